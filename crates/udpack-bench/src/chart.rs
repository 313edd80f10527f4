//! Charts as SVG text: bars with their spread, and lines over time. Colours follow the reader's light or dark mode.

use std::fmt::Write;

/// Pixels from the left edge to the axis of a bar chart: room for its labels.
const LABELS: f64 = 130.0;
/// Pixels of one bar, with the gap below it.
const BAR: f64 = 18.0;
const WIDTH: f64 = 720.0;
/// Pixels right of the longest bar: room for its figure.
const FIGURES: f64 = 90.0;
const HEADER: f64 = 34.0;
const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-weight:600;font-size:14px}\
.soft{fill:#57606a}.axis{stroke:#8c959f;fill:none}.grid{stroke:#d0d7de;fill:none}.ours{fill:#0969da}.other{fill:#afb8c1}\
.spread{stroke:#24292f;fill:none}.line{fill:none;stroke-width:1.8}.l0{stroke:#0969da}.l1{stroke:#bc4c00;stroke-dasharray:6 3}\
.l2{stroke:#1a7f37;stroke-dasharray:2 3}.t0{fill:#0969da}.t1{fill:#bc4c00}.t2{fill:#1a7f37}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.axis{stroke:#6e7681}.grid{stroke:#30363d}\
.ours{fill:#4493f8}.other{fill:#565f69}.spread{stroke:#e6edf3}.l0{stroke:#4493f8}.l1{stroke:#f0883e}.l2{stroke:#3fb950}\
.t0{fill:#4493f8}.t1{fill:#f0883e}.t2{fill:#3fb950}}";

/// One bar: the median, and the least and the greatest value as a line through its end.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
    /// Whether it is what the others are compared with.
    pub(crate) ours: bool,
}

/// Bars under a heading; it may be empty.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) heading: String,
    pub(crate) bars: Vec<Bar>,
}

/// Horizontal bars, all from zero and to one scale.
pub(crate) fn bars(title: &str, unit: &str, groups: &[Group]) -> String {
    let all = || groups.iter().flat_map(|group| &group.bars);
    let scale = Scale::to(all().map(|bar| bar.max).fold(0.0, f64::max));
    let room = WIDTH - LABELS - FIGURES;
    let x = |value: f64| LABELS + value / scale.end * room;

    let mut body = String::new();
    let mut y = HEADER;
    for group in groups {
        if !group.heading.is_empty() {
            y += 6.0;
            text(&mut body, 4.0, y + 12.0, "soft", "start", &group.heading);
            y += BAR;
        }
        for bar in &group.bars {
            let middle = y + BAR / 2.0 - 2.0;
            text(&mut body, LABELS - 6.0, middle + 4.0, "", "end", &bar.label);
            let class = if bar.ours { "ours" } else { "other" };
            let _ = writeln!(
                body,
                r#"<rect class="{class}" x="{LABELS:.1}" y="{y:.1}" width="{:.1}" height="{:.1}"/>"#,
                x(bar.median) - LABELS,
                BAR - 4.0,
            );
            path(
                &mut body,
                "spread",
                &[(x(bar.min), middle), (x(bar.max), middle)],
            );
            let figure = figure(bar.median);
            text(
                &mut body,
                x(bar.max) + 6.0,
                middle + 4.0,
                "",
                "start",
                &figure,
            );
            y += BAR;
        }
    }
    let mut back = String::new();
    for tick in scale.ticks() {
        let class = if tick == 0.0 { "axis" } else { "grid" };
        path(
            &mut back,
            class,
            &[(x(tick), HEADER - 4.0), (x(tick), y + 2.0)],
        );
        text(&mut back, x(tick), y + 16.0, "soft", "middle", &label(tick));
    }
    text(
        &mut back,
        x(scale.end / 2.0),
        y + 32.0,
        "soft",
        "middle",
        unit,
    );
    document(title, y + 40.0, &(back + &body))
}

/// One line: a value for each step of the horizontal axis.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    pub(crate) label: String,
    pub(crate) values: Vec<f64>,
}

/// Lines over time, a value a second.
pub(crate) fn lines(title: &str, unit: &str, series: &[Series]) -> String {
    let height = 220.0;
    let left = 48.0;
    let all = || series.iter().flat_map(|line| &line.values);
    let up = Scale::to(all().copied().fold(0.0, f64::max));
    let seconds = series.iter().map(|line| line.values.len()).max();
    let across = Scale::to(seconds.unwrap_or(1) as f64);
    let x = |value: f64| left + value / across.end * (WIDTH - left - 20.0);
    let y = |value: f64| HEADER + 16.0 + (1.0 - value / up.end) * height;

    let mut body = String::new();
    for tick in up.ticks() {
        let class = if tick == 0.0 { "axis" } else { "grid" };
        path(
            &mut body,
            class,
            &[(x(0.0), y(tick)), (x(across.end), y(tick))],
        );
        text(
            &mut body,
            left - 6.0,
            y(tick) + 4.0,
            "soft",
            "end",
            &label(tick),
        );
    }
    for tick in across.ticks() {
        text(
            &mut body,
            x(tick),
            y(0.0) + 16.0,
            "soft",
            "middle",
            &label(tick),
        );
    }
    text(&mut body, 4.0, HEADER + 2.0, "soft", "start", unit);
    let bottom = y(0.0) + 32.0;
    text(
        &mut body,
        x(across.end / 2.0),
        bottom,
        "soft",
        "middle",
        "seconds",
    );
    for (nth, line) in series.iter().enumerate() {
        let points: Vec<(f64, f64)> = line
            .values
            .iter()
            .enumerate()
            .map(|(second, value)| (x(second as f64 + 0.5), y(*value)))
            .collect();
        path(&mut body, &format!("line l{}", nth % 3), &points);
        text(
            &mut body,
            WIDTH - 20.0 - 120.0 * (series.len() - 1 - nth) as f64,
            HEADER + 2.0,
            &format!("t{}", nth % 3),
            "end",
            &line.label,
        );
    }
    document(title, bottom + 8.0, &body)
}

/// An axis from zero to a round number.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scale {
    end: f64,
    step: f64,
}

impl Scale {
    fn to(greatest: f64) -> Self {
        let greatest = if greatest.is_finite() && greatest > 0.0 {
            greatest
        } else {
            1.0
        };
        // Between three and seven steps of 1, 2 or 5 times a power of ten.
        let rough = greatest / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
        let step = step
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        Self {
            end: (greatest / step).ceil() * step,
            step,
        }
    }

    fn ticks(self) -> impl Iterator<Item = f64> {
        let count = (self.end / self.step).round() as u32;
        (0..=count).map(move |nth| f64::from(nth) * self.step)
    }
}

/// A number with as many digits as it is worth, thousands set apart.
pub(crate) fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 0.1 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = match text.split_once('.') {
        Some((whole, rest)) => (whole, format!(".{rest}")),
        None => (text.as_str(), String::new()),
    };
    let mut grouped = String::new();
    for (nth, character) in whole.chars().enumerate() {
        let left = whole.len() - nth;
        if nth > 0
            && left.is_multiple_of(3)
            && character.is_ascii_digit()
            && !grouped.ends_with('-')
        {
            grouped.push(',');
        }
        grouped.push(character);
    }
    grouped + &rest
}

/// A tick's number, without digits that say nothing.
fn label(value: f64) -> String {
    if value >= 1000.0 {
        return figure(value);
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn document(title: &str, height: f64, body: &str) -> String {
    let title = escape(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" width=\"{WIDTH:.0}\" \
         role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>\n<text class=\"title\" x=\"4\" \
         y=\"16\">{title}</text>\n{body}</svg>\n"
    )
}

fn text(out: &mut String, x: f64, y: f64, class: &str, anchor: &str, words: &str) {
    let _ = writeln!(
        out,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escape(words)
    );
}

fn path(out: &mut String, class: &str, points: &[(f64, f64)]) {
    let mut data = String::new();
    for (nth, (x, y)) in points.iter().enumerate() {
        let _ = write!(data, "{}{x:.1} {y:.1}", if nth == 0 { 'M' } else { 'L' });
    }
    let _ = writeln!(out, r#"<path class="{class}" d="{data}"/>"#);
}

fn escape(words: &str) -> String {
    words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_a_round_number() {
        let ticks = |greatest| Scale::to(greatest).ticks().collect::<Vec<_>>();
        assert_eq!(ticks(11.7), [0.0, 5.0, 10.0, 15.0]);
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.0).len(), 6);
        assert_eq!(ticks(f64::NAN).len(), 6);
    }

    #[test]
    fn figures_have_the_digits_that_they_are_worth() {
        let figures = [1_234_567.0, 999.6, 12.34, 1.234, 0.0042, 0.0, -1234.0].map(figure);
        assert_eq!(
            figures,
            [
                "1,234,567",
                "1,000",
                "12.3",
                "1.23",
                "0.0042",
                "0",
                "-1,234"
            ]
        );
    }

    #[test]
    fn bars_are_drawn_to_one_scale() {
        let bar = |label: &str, median, ours| Bar {
            label: label.to_owned(),
            min: median,
            median,
            max: median,
            ours,
        };
        let group = Group {
            heading: "one & all".to_owned(),
            bars: vec![bar("udpack", 100.0, true), bar("scp", 50.0, false)],
        };
        let chart = bars("a < b", "MB/s", &[group]);
        assert!(chart.contains("a &lt; b") && chart.contains("one &amp; all"));
        assert!(
            chart.contains(r#"class="ours" x="130.0" y="58.0" width="500.0""#),
            "{chart}"
        );
        assert!(
            chart.contains(r#"class="other" x="130.0" y="76.0" width="250.0""#),
            "{chart}"
        );
    }

    #[test]
    fn a_line_has_a_point_for_each_value() {
        let series = Series {
            label: "udpack".to_owned(),
            values: vec![0.0, 5.0, 10.0],
        };
        let chart = lines("rates", "MB/s", &[series]);
        let line = chart.lines().find(|line| line.contains("line l0"));
        let line = line.expect("the line is drawn");
        assert_eq!(line.matches(['M', 'L']).count(), 3, "{line}");
    }
}
