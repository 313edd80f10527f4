//! Links as pictures on a terminal, for the camera of a telephone.

use std::io::{self, IsTerminal as _};

use fast_qr::{ECL, QRBuilder};

use crate::output;

/// Shows the picture on standard output, if that is a terminal with room for it.
pub(crate) fn show(link: &str) -> io::Result<()> {
    let out = io::stdout();
    if !out.is_terminal() {
        return Ok(());
    }
    let size = rustix::termios::tcgetwinsize(&out)?;
    match picture(link, size.ws_col.into()) {
        Some(picture) => output::all(picture.as_bytes()),
        None => Ok(()),
    }
}

/// The picture in half blocks, two rows of it a line, if it is not wider than so many columns.
fn picture(link: &str, columns: usize) -> Option<String> {
    let code = QRBuilder::new(link).ecl(ECL::L).build().ok()?;
    let width = code.size + 2 * MARGIN;
    if width > columns {
        return None;
    }
    let dark = |row: usize, column: usize| {
        let inside = |at: usize| at.checked_sub(MARGIN).filter(|at| *at < code.size);
        let found = inside(row).zip(inside(column));
        found.is_some_and(|(row, column)| code[row][column].value())
    };
    let mut text = String::new();
    for row in (0..width).step_by(2) {
        // Black on white in any colours of the terminal: cameras of some telephones do not read it the other way round.
        text.push_str("\x1b[30;107m");
        for column in 0..width {
            text.push(match (dark(row, column), dark(row + 1, column)) {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
        }
        text.push_str("\x1b[0m\n");
    }
    Some(text)
}

/// The empty edge that readers need.
const MARGIN: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_shown_where_it_has_room() {
        let link = "https://192.0.2.7:45456/#t=0123456789abcdefghijklmnopqrstuvwxyzABCDEFG";
        let shown = picture(link, 80).expect("room");
        let lines: Vec<&str> = shown.lines().collect();
        let width = lines[0].trim_start_matches("\x1b[30;107m");
        let width = width.trim_end_matches("\x1b[0m").chars().count();
        assert_eq!(lines.len(), width.div_ceil(2));
        assert!(picture(link, width).is_some() && picture(link, width - 1).is_none());
        // A link that no such picture can hold.
        assert!(picture(&link.repeat(100), 10_000).is_none());
    }
}
