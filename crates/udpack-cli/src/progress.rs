//! Progress on standard error: a bar on a terminal, a line every 5 s elsewhere, or nothing.
//!
//! It counts what the server acknowledged, and says 100 % only when the last file is done. Speed and time left come
//! from what was transferred in the last seconds, and not from what was there already.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use udpack_transfer::{Link, PathProgress, Progress, format_size};

use crate::args::ProgressArg;
use crate::logging::{Console, is_dumb};
use crate::output::printable;
use crate::pages::terminal_columns;

/// Shows one run's progress. Dropping it removes the bar.
#[derive(Debug)]
pub(crate) struct Meter {
    show: Show,
    console: Console,
    rate: Rate,
    stall: Stall,
    /// The files under way, by their number, the first begun first.
    under_way: VecDeque<(usize, String)>,
    last: Instant,
    /// How far it was when it was last asked.
    progress: Progress,
    /// Shown in place of speed and time left.
    note: Option<&'static str>,
    /// What the connection runs over and why, unless it is QUIC.
    over: Option<String>,
    /// The link of a transfer over several paths, and what each of them has carried of late.
    link: Option<Link>,
    paths: BTreeMap<String, Rate>,
}

#[derive(Debug)]
enum Show {
    /// With the time of its last change.
    Bar(Option<Instant>),
    Plain,
    None,
}

impl Meter {
    pub(crate) fn new(style: ProgressArg, console: &Console) -> Self {
        let show = match style {
            ProgressArg::None => Show::None,
            ProgressArg::Auto if console.is_quiet() => Show::None,
            ProgressArg::Auto | ProgressArg::Bar if stderr().is_terminal() && !is_dumb() => {
                Show::Bar(None)
            }
            _ => Show::Plain,
        };
        Self {
            show,
            console: console.clone(),
            rate: Rate::default(),
            stall: Stall::new(Instant::now()),
            under_way: VecDeque::new(),
            last: Instant::now(),
            progress: Progress::default(),
            note: None,
            over: None,
            link: None,
            paths: BTreeMap::new(),
        }
    }

    /// A transfer over this link: shows each of its paths, if there are several.
    pub(crate) fn follow(&mut self, link: &Link) {
        self.link = Some(link.clone()).filter(|link| !link.paths().is_empty());
    }

    /// Each of several paths, with its bytes a second of late.
    pub(crate) fn paths(&self) -> Vec<(PathProgress, f64)> {
        let paths = self.link.as_ref().map(Link::paths).unwrap_or_default();
        let rate = |path: &PathProgress| self.paths.get(&path.path).map_or(0.0, Rate::now);
        paths
            .into_iter()
            .map(|path| (rate(&path), path))
            .map(|(rate, path)| (path, rate))
            .collect()
    }

    /// Each of several paths on one line.
    fn by_path(&mut self, now: Instant) -> Option<String> {
        let link = self.link.as_ref()?;
        let mut text = String::new();
        for path in link.paths() {
            let rate = self.paths.entry(path.path.clone()).or_default();
            let rate = rate.update(path.moved, now);
            let before = if text.is_empty() { "" } else { ", " };
            let _ = match path.connected {
                true => write!(text, "{before}{} {}/s", path.path, size(rate)),
                false => write!(text, "{before}{} lost", path.path),
            };
        }
        Some(text)
    }

    /// What the connection runs over and why, shown until it changes; nothing for QUIC.
    pub(crate) fn over(&mut self, over: Option<String>) {
        self.over = over;
    }

    /// A state shown in place of speed and time left, until it ends.
    pub(crate) fn note(&mut self, note: Option<&'static str>) {
        self.note = note;
        // The time without a connection says nothing of the next one.
        self.rate = Rate::default();
        self.stall = Stall::new(Instant::now());
        if let Show::Bar(drawn) = &mut self.show {
            *drawn = None;
            self.update(&{ self.progress });
        }
    }

    /// A file has begun.
    pub(crate) fn started(&mut self, index: usize, name: String) {
        self.under_way.push_back((index, printable(&name)));
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
        let rate = self.rate.update(progress.moved, now);
        let stalled = self.stall.update(progress, now).then_some("stalled");
        let note = self.note.or(stalled);
        let by_path = self.by_path(now);
        let over = self.over.as_deref().or(by_path.as_deref());
        self.progress = *progress;
        match self.show {
            Show::Bar(drawn) => {
                if drawn.is_none_or(|drawn| now.duration_since(drawn) >= BAR_EVERY) {
                    self.show = Show::Bar(Some(now));
                    let columns = terminal_columns(&stderr()).unwrap_or(80);
                    let line = layout(progress, rate, (note, over), self.name(), columns);
                    self.console.live(match self.console.colours() {
                        true => coloured(&line),
                        false => line,
                    });
                }
            }
            Show::Plain => {
                if now.duration_since(self.last) >= PLAIN_EVERY {
                    self.last = now;
                    self.console
                        .line(&plain(progress, rate, (note, over), self.name()));
                }
            }
            Show::None => {}
        }
    }

    /// Bytes a second, of late.
    pub(crate) fn rate(&self) -> f64 {
        self.rate.now()
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.console.live(String::new());
    }
}

/// What fits on one line of a terminal of so many columns: what matters most is left out last, and never cut. A line
/// that is longer than the terminal is wide would leave parts of itself behind.
fn layout(
    progress: &Progress,
    rate: f64,
    (note, over): (Option<&str>, Option<&str>),
    name: &str,
    columns: usize,
) -> String {
    let known = is_final(progress);
    let share = percent(progress.acked, progress.total);
    let mut left = columns.saturating_sub(1);
    // With the place that each has on the line.
    let mut pieces: Vec<(u8, String)> = Vec::new();
    let mut add = |place, piece: String| {
        let long = columns_of(&piece) + usize::from(!pieces.is_empty());
        if !piece.is_empty() && long <= left {
            left -= long;
            pieces.push((place, piece));
        }
        left
    };
    if known {
        add(0, format!("{share:>3} %"));
    }
    match note {
        Some(note) => add(3, note.to_owned()),
        None => add(3, format!("{}/s", size(rate))),
    };
    let acked = size(progress.acked as f64);
    if !known {
        add(2, acked.clone());
    }
    if progress.files > 1 {
        let count = files_left(progress);
        let long = format!("{count} of {} files left", progress.files);
        let piece = if columns >= WIDE {
            long
        } else {
            format!("{count} left")
        };
        add(5, piece);
    }
    if note.is_none() && known {
        add(4, format!("eta {}", eta(progress, rate)));
    }
    if known {
        add(2, format!("{acked} of {}", size(progress.total as f64)));
        let done = usize::try_from(share).unwrap_or(BAR) * BAR / 100;
        let head = if done < BAR { ">" } else { "" };
        add(
            1,
            format!("[{:<BAR$}]", format!("{}{head}", "=".repeat(done))),
        );
    }
    if let Some(over) = over {
        // Why may not fit beside the bar; it was told in a line of its own.
        let before = add(6, String::new());
        if add(6, over.to_owned()) == before {
            let short = over.split(':').next().unwrap_or(over);
            add(6, short.to_owned());
        }
    }
    let room = add(7, String::new());
    if room > SHORTEST_NAME {
        add(7, cut(name, room.saturating_sub(1).min(NAME)));
    }
    pieces.sort_by_key(|(place, _)| *place);
    let pieces: Vec<_> = pieces.into_iter().map(|(_, piece)| piece).collect();
    pieces.join(" ")
}

/// The same with its bar in green.
fn coloured(line: &str) -> String {
    let bar = line
        .find('[')
        .and_then(|from| Some((from, from + line[from..].find(']')?)));
    match bar {
        Some((from, to)) => {
            format!(
                "{}\u{1b}[32m{}\u{1b}[0m{}",
                &line[..=from],
                &line[from + 1..to],
                &line[to..]
            )
        }
        None => line.to_owned(),
    }
}

fn plain(
    progress: &Progress,
    rate: f64,
    (note, over): (Option<&str>, Option<&str>),
    name: &str,
) -> String {
    let acked = size(progress.acked as f64);
    let mut line = match is_final(progress) {
        true => format!(
            "{} % {acked} of {} ",
            percent(progress.acked, progress.total),
            size(progress.total as f64)
        ),
        false => format!("{acked} so far "),
    };
    line.push_str(&pace(progress, rate, note));
    if progress.files > 1 {
        let _ = write!(
            line,
            " {} of {} files left",
            files_left(progress),
            progress.files
        );
    }
    if let Some(over) = over {
        let _ = write!(line, " over {over}");
    }
    if !name.is_empty() {
        let _ = write!(line, " {name}");
    }
    line
}

/// How many files have no outcome yet, with a `+` where more may be found.
fn files_left(progress: &Progress) -> String {
    let left = progress.files.saturating_sub(progress.files_done);
    let more = if progress.listed { "" } else { "+" };
    format!("{left}{more}")
}

/// Whether the total is that of everything, so that a part of it means something.
fn is_final(progress: &Progress) -> bool {
    progress.listed && progress.sized
}

/// Speed and time left, or what matters more.
fn pace(progress: &Progress, rate: f64, note: Option<&str>) -> String {
    match note {
        Some(note) => note.to_owned(),
        None => format!("{}/s eta {}", size(rate), eta(progress, rate)),
    }
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
    if rate < 1.0 || !is_final(progress) || left / rate > LONGEST_ETA {
        return "-".to_owned();
    }
    duration(Duration::from_secs_f64(left / rate))
}

/// The end of a long name, which tells more than its beginning.
fn cut(name: &str, most: usize) -> String {
    if columns_of(name) <= most {
        return name.to_owned();
    }
    let mut left = most.saturating_sub(1);
    let fits = |c: &char| {
        let rest = left.checked_sub(columns(*c));
        left = rest.unwrap_or(0);
        rest.is_some()
    };
    let tail: Vec<char> = name.chars().rev().take_while(fits).collect();
    format!("…{}", tail.into_iter().rev().collect::<String>())
}

/// Columns that a text takes on a terminal, at most.
fn columns_of(text: &str) -> usize {
    text.chars().map(columns).sum()
}

/// From the Hangul on characters may be two columns wide; whether one of those is depends on the terminal, too.
fn columns(c: char) -> usize {
    if c < '\u{1100}' || c == '…' { 1 } else { 2 }
}

/// A number of bytes for people, or of bytes a second.
pub(crate) fn size(bytes: f64) -> String {
    format_size(bytes as u64)
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

/// Bytes a second over the last seconds.
#[derive(Debug, Default)]
struct Rate {
    /// How much there was and when, the oldest first; the first one is at most a window old, but for the last before it.
    seen: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn update(&mut self, bytes: u64, now: Instant) -> f64 {
        let soon = |at: &Instant| now.duration_since(*at) < SAMPLE_EVERY;
        // The first one stays: it is from where the others are counted.
        if self.seen.len() > 1
            && self
                .seen
                .iter()
                .rev()
                .nth(1)
                .is_some_and(|(at, _)| soon(at))
        {
            self.seen.pop_back();
        }
        self.seen.push_back((now, bytes));
        let old = |at: &Instant| now.duration_since(*at) >= WINDOW;
        while self.seen.get(1).is_some_and(|(at, _)| old(at)) {
            self.seen.pop_front();
        }
        self.now()
    }

    fn now(&self) -> f64 {
        let (Some((from, before)), Some((to, after))) = (self.seen.front(), self.seen.back())
        else {
            return 0.0;
        };
        let passed = to.duration_since(*from);
        if passed < SAMPLE_EVERY {
            return 0.0;
        }
        after.saturating_sub(*before) as f64 / passed.as_secs_f64()
    }
}

/// Detects a stalled transfer.
#[derive(Debug)]
struct Stall {
    since: Instant,
    last: Option<(u64, u64, usize)>,
}

impl Stall {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            last: None,
        }
    }

    /// Whether nothing has moved for a while.
    fn update(&mut self, progress: &Progress, now: Instant) -> bool {
        let state = (progress.acked, progress.moved, progress.files_done);
        if self.last != Some(state) {
            self.last = Some(state);
            self.since = now;
        }
        now.duration_since(self.since) >= STALLED
    }
}

/// How far back a rate looks.
const WINDOW: Duration = Duration::from_secs(5);
/// Readings that are closer than this are one.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// Without anything that moves for so long, that is what is shown.
const STALLED: Duration = Duration::from_secs(5);
/// Seconds: what would take longer is not worth a number.
const LONGEST_ETA: f64 = 100.0 * 3600.0;
/// The bar changes no sooner than after so long.
const BAR_EVERY: Duration = Duration::from_millis(50);
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// Characters of a file name shown beside the bar, at most.
const NAME: usize = 24;
/// A name is not shown in less room than this.
const SHORTEST_NAME: usize = 8;
/// Columns from which on there is room for words.
const WIDE: usize = 100;
/// Columns within a bar's brackets.
const BAR: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_fits_every_terminal_and_keeps_what_matters_most() {
        let mut progress = Progress::default();
        (progress.acked, progress.total, progress.moved) = (12 << 20, 30 << 20, 12 << 20);
        (progress.files_done, progress.files) = (99, 10_000);
        (progress.listed, progress.sized) = (true, true);
        let name = "a/long/way/down/to/a/file-with-a-name.bin";
        let line = |columns| {
            layout(
                &progress,
                2.5 * 1024.0 * 1024.0,
                (None, None),
                name,
                columns,
            )
        };
        for columns in 0..200 {
            let lost = layout(&progress, 0.0, (Some("reconnecting"), None), name, columns);
            for line in [line(columns), lost] {
                assert!(line.chars().count() < columns.max(1), "{columns}: {line}");
            }
        }
        let wide = "東京/写真/二〇二六年十一月二十九日の夜.jpeg";
        let line_of = |name, columns| layout(&progress, 0.0, (None, None), name, columns);
        for columns in 0..200 {
            let line = line_of(wide, columns);
            assert!(columns_of(&line) < columns.max(1), "{columns}: {line}");
        }
        assert!(
            line_of(wide, 120).ends_with(" …十一月二十九日の夜.jpeg"),
            "{}",
            line_of(wide, 120)
        );
        assert_eq!(line(20), " 40 % 2.5 MiB/s");
        assert_eq!(line(40), " 40 % 2.5 MiB/s eta 0:07 9901 left");
        assert_eq!(
            line(120),
            " 40 % [======>         ] 12.0 MiB of 30.0 MiB 2.5 MiB/s eta 0:07 9901 of 10000 files left …/a/file-with-a-name.bin"
        );
        let lost = |columns| layout(&progress, 0.0, (Some("reconnecting"), None), name, columns);
        assert_eq!(lost(20), " 40 % reconnecting");
        progress.listed = false;
        assert_eq!(
            layout(&progress, 0.0, (None, None), "", 40),
            "12.0 MiB 0 B/s 9901+ left"
        );
    }

    #[test]
    fn a_hundred_percent_is_all_of_it() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(999_999, 1_000_000), 99);
        assert_eq!(percent(1_000_000, 1_000_000), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(size(1536.0), "1.5 KiB");
        assert_eq!(duration(Duration::from_secs(3)), "0:03");
        assert_eq!(duration(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(cut("short", NAME), "short");
        assert_eq!(cut(&"a".repeat(40), NAME).chars().count(), NAME);
    }

    fn progress(acked: u64, total: u64, moved: u64) -> Progress {
        let mut progress = Progress::default();
        (progress.acked, progress.total, progress.moved) = (acked, total, moved);
        (progress.files, progress.listed, progress.sized) = (1, true, true);
        progress
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let mut rate = Rate::default();
        assert_eq!(rate.update(0, at(0)), 0.0);
        assert_eq!(rate.update(100, at(1)), 0.0, "too soon to tell");
        for n in 1..=100 {
            let now = rate.update(n * 100, at(n * 100));
            assert!((now - 1000.0).abs() < 1.0, "{now}");
        }
        // It ends with the window, and not a tenth of a byte later.
        let now = rate.update(10_000, at(12_500));
        assert!((400.0..600.0).contains(&now), "{now}");
        assert_eq!(rate.update(10_000, at(15_000)), 0.0);
        // However often it is asked, little is kept.
        for n in 0..100_000 {
            rate.update(10_000 + n, at(20_000) + Duration::from_micros(n * 100));
        }
        assert!(rate.seen.len() <= 102, "{}", rate.seen.len());
    }

    #[test]
    fn no_time_is_told_that_nobody_knows() {
        let eta = |progress: &Progress, rate| eta(progress, rate);
        assert_eq!(eta(&progress(0, 1000, 0), 10.0), "1:40");
        assert_eq!(eta(&progress(0, 98_000_000, 0), 2.0), "-", "13649 hours");
        assert_eq!(eta(&progress(0, 1000, 0), 0.0), "-");
        let mut open = progress(27 << 20, 30 << 20, 27 << 20);
        open.sized = false;
        assert_eq!(eta(&open, 1e6), "-");
        assert_eq!(
            plain(&open, 1024.0, (None, None), "piped"),
            "27.0 MiB so far 1.0 KiB/s eta - piped"
        );
        open.sized = true;
        assert_eq!(
            plain(&open, f64::from(1 << 20), (None, None), "x"),
            "90 % 27.0 MiB of 30.0 MiB 1.0 MiB/s eta 0:03 x"
        );
        open.listed = false;
        assert!(plain(&open, 1.0, (None, None), "").starts_with("27.0 MiB so far "));
        assert!(plain(&open, 1.0, (Some("stalled"), None), "").contains(" stalled"));
    }

    #[test]
    fn what_does_not_move_for_a_while_is_stalled() {
        let start = Instant::now();
        let mut stall = Stall::new(start);
        let mut after = |secs: u64, acked, moved| {
            stall.update(
                &progress(acked, 1000, moved),
                start + Duration::from_secs(secs),
            )
        };
        assert!(!after(0, 0, 0));
        assert!(!after(4, 0, 0));
        assert!(after(5, 0, 0));
        assert!(!after(6, 1, 0), "what is compared moves, too");
        assert!(!after(10, 1, 0));
        assert!(after(11, 1, 0));
        assert!(!after(12, 1, 1));
    }
}
