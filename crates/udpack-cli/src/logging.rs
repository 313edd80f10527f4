//! Logs: on standard error together with a live progress line, and in files if requested.

use std::env;
use std::io::{self, IsTerminal as _, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields};
use tracing_subscriber::fmt::{self, FmtContext, MakeWriter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use udpack::text::printable_bytes;

use crate::args::LogArgs;
use crate::pages::terminal_columns;

/// Standard error, shared by a live line and lines that stay: one that stays takes the live line's place, and the live
/// line is written again below it.
#[derive(Debug, Clone)]
pub(crate) struct Console {
    bars: MultiProgress,
    live: Arc<Mutex<Option<ProgressBar>>>,
    quiet: bool,
}

impl Default for Console {
    fn default() -> Self {
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(LiveLine::default()), u8::MAX);
        Self {
            bars: MultiProgress::with_draw_target(target),
            live: Arc::default(),
            quiet: false,
        }
    }
}

impl Console {
    /// Sets whether it shows only errors. Defaults to no.
    pub(crate) fn quiet(self, quiet: bool) -> Self {
        Self { quiet, ..self }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Shows this as the live line; an empty one takes it away. It must be shorter than the terminal is wide.
    pub(crate) fn live(&self, line: String) {
        let mut live = lock(&self.live);
        if line.is_empty() {
            if let Some(bar) = live.take() {
                bar.finish_and_clear();
                self.bars.remove(&bar);
            }
            return;
        }
        let bar = live.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bars.add(ProgressBar::new(0).with_style(style))
        });
        if bar.message() != line {
            bar.set_message(line);
        }
    }

    /// Writes one line. A closed standard error is not a failure.
    pub(crate) fn line(&self, text: &str) {
        self.write(&one_line(text.as_bytes()));
    }

    /// Writes one line, unless only errors are shown.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            self.line(text);
        }
    }

    /// Writes a line that begins with a word for its kind: `error: …`, in a colour where colours are wanted.
    pub(crate) fn labelled(&self, label: &str, text: &str) {
        if !self.colours() {
            return self.line(&format!("{label}: {text}"));
        }
        let colour = match label {
            "error" => "1;31",
            "warning" => "1;33",
            _ => "1;36",
        };
        let mut line = format!("\u{1b}[{colour}m{label}:\u{1b}[0m ").into_bytes();
        line.extend(one_line(text.as_bytes()));
        self.write(&line);
    }

    /// Whether standard error is a terminal that shows colours to somebody who wants them.
    pub(crate) fn colours(&self) -> bool {
        !no_colour() && io::stderr().is_terminal()
    }

    /// Runs `write`, which prints whole lines, with the live line hidden. It must not use this console.
    pub(crate) fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        let live = lock(&self.live);
        match *live {
            None => write(),
            Some(_) => self.bars.suspend(write),
        }
    }

    fn write(&self, bytes: &[u8]) {
        self.above(|| {
            let _ = io::stderr().lock().write_all(bytes);
        });
    }
}

/// Where the live line is drawn: standard error, with the cursor left at the line's beginning.
///
/// A terminal that becomes narrower than the line may break it in two, and moves the cursor with what stands under it: all
/// remains are then behind the cursor, where the next drawing erases them. With the cursor at the line's end, where
/// indicatif's own terminal leaves it, they would be in front of it, in a number of rows that depends on the terminal.
///
/// A line made for the width that the terminal had a moment ago must not break either, so the terminal does not wrap
/// while it is written (DECAWM, mode 7).
#[derive(Debug, Default)]
struct LiveLine {
    drawn: Mutex<String>,
}

impl TermLike for LiveLine {
    fn width(&self) -> u16 {
        let columns = terminal_columns(&io::stderr()).unwrap_or(80);
        u16::try_from(columns).unwrap_or(u16::MAX)
    }

    /// There is one row, and the cursor is at its beginning.
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        self.write_str(line)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        lock(&self.drawn).push_str(text);
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        lock(&self.drawn).clear();
        Ok(())
    }

    /// Writes over the line that stands there. A closed standard error is not a failure.
    fn flush(&self) -> io::Result<()> {
        let drawn = std::mem::take(&mut *lock(&self.drawn));
        let drawn = format!("\u{1b}[?7l\r{}\u{1b}[J\r\u{1b}[?7h", drawn.trim_end());
        let _ = io::stderr().lock().write_all(drawn.as_bytes());
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Turns one write into one line without anything that controls a terminal.
fn one_line(text: &[u8]) -> Vec<u8> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let mut line = printable_bytes(text).into_owned().into_bytes();
    line.push(b'\n');
    line
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Console {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A log writer that escapes each line: text from a peer can neither begin another line nor control the terminal of
/// a reader. The subscriber passes each line in one write.
struct Lines<W>(W);

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Lines<W> {
    type Writer = Lines<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Lines(self.0.make_writer())
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_all(&one_line(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A client's warnings and errors for whoever watches: in the form of its other messages, without time, module and spans.
struct Messages;

impl<S, N> FormatEvent<S, N> for Messages
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: format::Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        context.format_fields(line.by_ref(), event)
    }
}

/// Writes each line behind the word for its level.
struct Labelled(Console);

impl<'a> MakeWriter<'a> for Labelled {
    type Writer = LabelledLine;

    fn make_writer(&'a self) -> LabelledLine {
        LabelledLine(self.0.clone(), "warning")
    }

    fn make_writer_for(&'a self, about: &Metadata<'_>) -> LabelledLine {
        let label = match *about.level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "note",
        };
        LabelledLine(self.0.clone(), label)
    }
}

struct LabelledLine(Console, &'static str);

impl Write for LabelledLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.labelled(self.1, &String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether colours are turned off by the user or the terminal.
pub(crate) fn no_colour() -> bool {
    let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    unwanted || is_dumb()
}

/// Whether the terminal, if there is one, supports only plain text.
pub(crate) fn is_dumb() -> bool {
    env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty())
}

/// The logging program, which decides the default level and the name of the files.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    Server,
    Client,
}

/// Installs the subscriber. Dropping the guard flushes the log file.
pub(crate) fn start(
    role: Role,
    args: &LogArgs,
    console: &Console,
) -> anyhow::Result<Option<WorkerGuard>> {
    let usual = match role {
        Role::Server => LevelFilter::INFO,
        Role::Client => LevelFilter::WARN,
    };
    let level = match (args.quiet, args.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => usual,
        (false, 1) => usual.max(LevelFilter::DEBUG),
        (false, _) => LevelFilter::TRACE,
    };
    let asked = env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let asked = asked.and_then(|text| text.parse().ok());
    // Whoever asks for a log gets one, with times.
    let is_log = asked.is_some() || args.verbose > 0;
    let on_stderr: Targets = asked.unwrap_or_else(|| ours(role, level));
    let stderr = fmt::layer().with_ansi(false).log_internal_errors(false);
    let stderr = match role {
        Role::Client if !is_log => stderr
            .event_format(Messages)
            .with_writer(Labelled(console.clone()))
            .with_filter(on_stderr)
            .boxed(),
        Role::Client | Role::Server => stderr
            .with_target(args.verbose > 0)
            .with_writer(Lines(console.clone()))
            .with_filter(on_stderr)
            .boxed(),
    };
    let (file, guard) = match &args.log_dir {
        Some(dir) => {
            let (writer, guard) = tracing_appender::non_blocking(rolling(role, dir)?);
            let layer = fmt::layer()
                .with_writer(Lines(writer))
                .with_ansi(false)
                .log_internal_errors(false)
                .with_filter(ours(role, level.max(LevelFilter::DEBUG)));
            (Some(layer), Some(guard))
        }
        None => (None, None),
    };
    // Fails only if a subscriber is already installed, which then stays in use.
    let _ = tracing_subscriber::registry()
        .with(stderr)
        .with(file)
        .try_init();
    Ok(guard)
}

/// Writes an error that ends the program into the log file; standard error gets it in another form.
pub(crate) fn keep<T>(result: &anyhow::Result<T>) {
    if let Err(error) = result {
        tracing::debug!(error = format!("{error:#}"), "failed");
    }
}

/// A module of the libraries whose warnings the client does not show, where its source is, and what it shows.
const SILENCED: [(&str, &str, LevelFilter); 2] = [
    // Small UDP buffers concern the server; in front of every command the warning would be noise.
    (
        "udpack::transport::udp",
        "udpack/src/transport/udp.rs",
        LevelFilter::ERROR,
    ),
    // What a directory of this machine refuses becomes the error of the file and is printed there.
    (
        "udpack_transfer::store",
        "udpack-transfer/src/store.rs",
        LevelFilter::OFF,
    ),
];

/// This level for this project's crates; only warnings and errors of others.
fn ours(role: Role, level: LevelFilter) -> Targets {
    let others = match level {
        LevelFilter::TRACE => LevelFilter::DEBUG,
        level => level.min(LevelFilter::WARN),
    };
    let mut filter = Targets::new().with_default(others);
    if level < LevelFilter::DEBUG {
        // Logs as an error what becomes the error of the connection and is printed there.
        filter = filter.with_target("rustls_platform_verifier", LevelFilter::OFF);
    }
    for target in ["udpack", "udpack_transfer", "udpack_cli"] {
        filter = filter.with_target(target, level);
    }
    if matches!(role, Role::Client) && level < LevelFilter::DEBUG {
        filter = filter.with_targets(SILENCED.map(|(target, _, level)| (target, level)));
    }
    filter
}

fn rolling(role: Role, dir: &Path) -> anyhow::Result<RollingFileAppender> {
    let name = match role {
        Role::Server => "server",
        Role::Client => "client",
    };
    std::fs::create_dir_all(dir)
        // The link beside the files holds the path as it is given here.
        .and_then(|()| dir.canonicalize())
        .and_then(|dir| {
            RollingFileAppender::builder()
                .rotation(Rotation::DAILY)
                .filename_prefix(name)
                .filename_suffix("log")
                .latest_symlink(format!("{name}.log"))
                .max_log_files(FILES)
                .build(dir)
                .map_err(io::Error::other)
        })
        .with_context(|| format!("cannot write logs in {}", dir.display()))
}

/// How many days log files are kept.
const FILES: usize = 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_silences_is_where_the_libraries_have_it() {
        for (target, source, _) in SILENCED {
            let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            assert!(crates.join(source).is_file(), "{target}");
        }
        let filter = ours(Role::Client, LevelFilter::WARN);
        let warns = |target| filter.would_enable(target, &Level::WARN);
        assert!(warns("udpack::session") && warns("quinn"));
        assert!(!warns("udpack::transport::udp") && !warns("udpack_transfer::store::disk"));
    }

    #[test]
    fn a_line_stays_one_line() {
        for (written, line) in [
            (&b"a b\n"[..], &b"a b\n"[..]),
            (b"a\nb\x1b[1m\n", b"a\\nb\\u{1b}[1m\n"),
            ("\u{9b}2J\u{202e}".as_bytes(), b"\\u{9b}2J\\u{202e}\n"),
            (b"\xff", b"\\xff\n"),
        ] {
            assert_eq!(one_line(written), line);
        }
    }
}
