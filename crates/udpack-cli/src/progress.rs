//! Progress on standard error: a bar on a terminal, a line every 5 s elsewhere, or nothing.
//!
//! It counts what the server acknowledged, and says 100 % only when the last file is done.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use udpack_transfer::Progress;

use crate::args::ProgressArg;
use crate::logging::Console;

/// Shows one run's progress. Dropping it removes the bar.
#[derive(Debug)]
pub(crate) struct Meter {
    show: Show,
    console: Console,
    rate: Rate,
    /// The files under way, by their number, the first begun first.
    under_way: VecDeque<(usize, String)>,
    last: Instant,
    /// Shown in place of speed and time left.
    note: Option<&'static str>,
}

#[derive(Debug)]
enum Show {
    Bar(ProgressBar),
    Plain,
    None,
}

impl Meter {
    pub(crate) fn new(style: ProgressArg, quiet: bool, console: &Console) -> Self {
        let show = match style {
            ProgressArg::Bar => Show::Bar(bar(console)),
            ProgressArg::Plain => Show::Plain,
            ProgressArg::None => Show::None,
            ProgressArg::Auto if quiet => Show::None,
            ProgressArg::Auto if stderr().is_terminal() => Show::Bar(bar(console)),
            ProgressArg::Auto => Show::Plain,
        };
        Self {
            show,
            console: console.clone(),
            rate: Rate::new(Instant::now()),
            under_way: VecDeque::new(),
            last: Instant::now(),
            note: None,
        }
    }

    /// Something that matters more than speed and time left, until it is over.
    pub(crate) fn note(&mut self, note: Option<&'static str>) {
        self.note = note;
        if let (Show::Bar(bar), Some(note)) = (&self.show, note) {
            bar.set_message(note);
        }
    }

    /// A file has begun.
    pub(crate) fn started(&mut self, index: usize, name: String) {
        self.under_way.push_back((index, name));
    }

    /// A file is done or has failed.
    pub(crate) fn ended(&mut self, index: usize) {
        // Most end in about the order in which they began.
        if let Some(at) = self.under_way.iter().position(|(known, _)| *known == index) {
            self.under_way.remove(at);
        }
    }

    fn name(&self) -> &str {
        self.under_way.front().map_or("", |(_, name)| name)
    }

    /// The server has acknowledged more.
    pub(crate) fn update(&mut self, progress: &Progress) {
        let now = Instant::now();
        let rate = self.rate.update(progress.acked, now);
        match &self.show {
            Show::Bar(bar) => {
                bar.set_length(progress.total);
                bar.set_message(match self.note {
                    Some(note) => note.to_owned(),
                    None => format!("{}/s eta {}", size(rate), eta(progress, rate)),
                });
                bar.set_prefix(if progress.files > 1 {
                    format!(
                        "{}/{} {}",
                        progress.files_done,
                        progress.files,
                        cut(self.name())
                    )
                } else {
                    cut(self.name())
                });
                bar.set_position(progress.acked);
            }
            Show::Plain => {
                if now.duration_since(self.last) >= PLAIN_EVERY {
                    self.last = now;
                    self.console
                        .line(&plain(progress, rate, self.note, self.name()));
                }
            }
            Show::None => {}
        }
    }

    /// Bytes a second, of late.
    pub(crate) fn rate(&self) -> f64 {
        self.rate.now
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
            self.console.bars.remove(bar);
        }
    }
}

fn bar(console: &Console) -> ProgressBar {
    let percent = |state: &ProgressState, w: &mut dyn std::fmt::Write| {
        let _ = write!(w, "{:>3} %", percent(state.pos(), state.len().unwrap_or(0)));
    };
    let acked = |state: &ProgressState, w: &mut dyn std::fmt::Write| {
        let total = state.len().unwrap_or(0);
        let _ = write!(w, "{} of {}", size(state.pos() as f64), size(total as f64));
    };
    let style = ProgressStyle::with_template("{percent_done} [{bar:20}] {acked} {msg}  {prefix}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("percent_done", percent)
        .with_key("acked", acked)
        .progress_chars("=> ");
    console.bars.add(ProgressBar::new(0).with_style(style))
}

fn plain(progress: &Progress, rate: f64, note: Option<&str>, name: &str) -> String {
    let mut line = format!(
        "{} % {} of {} ",
        percent(progress.acked, progress.total),
        size(progress.acked as f64),
        size(progress.total as f64),
    );
    let _ = match note {
        Some(note) => line.write_str(note),
        None => write!(line, "{}/s eta {}", size(rate), eta(progress, rate)),
    };
    if progress.files > 1 {
        let _ = write!(line, " {} of {} files", progress.files_done, progress.files);
    }
    if !name.is_empty() {
        let _ = write!(line, " {name}");
    }
    line
}

/// Rounded down, so that 100 means all of it.
pub(crate) fn percent(done: u64, total: u64) -> u64 {
    match total {
        0 => 0,
        total => u64::try_from(u128::from(done) * 100 / u128::from(total)).unwrap_or(100),
    }
}

fn eta(progress: &Progress, rate: f64) -> String {
    let left = progress.total.saturating_sub(progress.acked) as f64;
    if rate < 1.0 || !progress.listed {
        return "-".to_owned();
    }
    duration(Duration::from_secs_f64((left / rate).min(1e8)))
}

/// The end of a long name, which tells more than its beginning.
fn cut(name: &str) -> String {
    let count = name.chars().count();
    if count <= NAME {
        return name.to_owned();
    }
    let tail: String = name.chars().skip(count + 1 - NAME).collect();
    format!("…{tail}")
}

/// A number of bytes for people, in powers of 1024.
pub(crate) fn size(bytes: f64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024.0 {
        return format!("{bytes:.0} B");
    }
    let mut value = bytes;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A time for people: `1:02:03`, `2:03`, or `0:03`.
pub(crate) fn duration(time: Duration) -> String {
    let secs = time.as_secs();
    let (hours, minutes, secs) = (secs / 3600, secs / 60 % 60, secs % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{secs:02}")
    } else {
        format!("{minutes}:{secs:02}")
    }
}

/// Bytes a second over the last second or so.
#[derive(Debug)]
struct Rate {
    now: f64,
    bytes: u64,
    at: Instant,
    first: bool,
}

impl Rate {
    fn new(at: Instant) -> Self {
        Self {
            now: 0.0,
            bytes: 0,
            at,
            first: true,
        }
    }

    fn update(&mut self, bytes: u64, now: Instant) -> f64 {
        let passed = now.duration_since(self.at).as_secs_f64();
        if passed < 0.1 {
            return self.now;
        }
        let fresh = bytes.saturating_sub(self.bytes) as f64 / passed;
        // Old readings fade within a second, whatever the interval between updates.
        let keep = if self.first { 0.0 } else { (-passed).exp() };
        self.now = self.now * keep + fresh * (1.0 - keep);
        self.first = false;
        self.bytes = bytes;
        self.at = now;
        self.now
    }
}

const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// Characters of a file name shown beside the bar.
const NAME: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_percent_is_all_of_it() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(999_999, 1_000_000), 99);
        assert_eq!(percent(1_000_000, 1_000_000), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(size(0.0), "0 B");
        assert_eq!(size(1023.0), "1023 B");
        assert_eq!(size(1536.0), "1.5 KiB");
        assert_eq!(size(5.0 * 1024.0 * 1024.0), "5.0 MiB");
        assert_eq!(duration(Duration::from_secs(3)), "0:03");
        assert_eq!(duration(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"a".repeat(40)).chars().count(), NAME);
    }

    #[test]
    fn the_rate_follows_what_was_acknowledged() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        assert_eq!(rate.update(1000, start + Duration::from_secs(1)), 1000.0);
        let later = rate.update(1000, start + Duration::from_secs(11));
        assert!(later < 1.0, "{later}");
    }
}
