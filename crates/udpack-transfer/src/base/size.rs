//! Sizes in text for people.

/// Reads a number of bytes, with K, M, G or T (also KB, KiB, …) for powers of 1024: `512K`, `1.5G`.
///
/// # Errors
/// A sentence that says what is expected, or that the number is too large.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    const FORM: &str = "expected a number of bytes, with K, M, G or T for powers of 1024";
    const LARGE: &str = "more bytes than can be counted";
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_uppercase();
    let shift = match unit
        .strip_suffix("IB")
        .or_else(|| unit.strip_suffix('B'))
        .unwrap_or(&unit)
    {
        "" if unit != "IB" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(FORM),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let dotted = number.contains('.');
    if whole.is_empty() || fraction.contains('.') || (dotted && (fraction.is_empty() || shift == 0))
    {
        return Err(FORM);
    }
    if fraction.len() > 9 {
        return Err(FORM);
    }
    let whole = whole.parse::<u64>().map_err(|_| LARGE)?;
    let whole = whole.checked_mul(1 << shift).ok_or(LARGE)?;
    let part = match fraction {
        "" => 0,
        digits => {
            let value = digits.parse::<u64>().map_err(|_| FORM)?;
            let scale = 10_u128.pow(u32::try_from(digits.len()).map_err(|_| FORM)?);
            u64::try_from((u128::from(value) << shift) / scale).map_err(|_| LARGE)?
        }
    };
    whole.checked_add(part).ok_or(LARGE)
}

/// Formats a number of bytes for people, in the units that [`parse_size`] reads: `700 B`, `1.5 GiB`. Rounds down, so
/// that a reported amount of free space is really free.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = bytes.checked_ilog2().unwrap_or(0) / 10;
    let Some(name) = (unit as usize).checked_sub(1).and_then(|at| UNITS.get(at)) else {
        return format!("{bytes} B");
    };
    let shift = unit * 10;
    let whole = bytes >> shift;
    let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
    format!("{whole}.{tenths} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_as_they_are_read() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (2047, "1.9 KiB"),
            (5 << 20, "5.0 MiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (3_199_999_999, "2.9 GiB"),
            (7 << 40, "7.0 TiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
        for text in ["1.5 KiB", "5.0 MiB", "2.9 GiB"] {
            let bytes = parse_size(&text.replace(' ', "")).unwrap();
            assert_eq!(format_size(bytes + 1), text, "{bytes}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("123", 123),
            ("512K", 512 << 10),
            ("10m", 10 << 20),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("1KiB", 1024),
            ("1kb", 1024),
            ("7B", 7),
            ("0.001M", 1048),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "K",
            "1.",
            ".5K",
            "1.5",
            "1X",
            "-1",
            "1 K",
            "1iB",
            "1..2K",
            "99999999999999T",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
