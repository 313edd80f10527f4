//! What an upload tells while it runs and when it ends: results on standard output, the rest on standard
//! error, and one verdict over all files.

use std::io;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use udpack_transfer::{Event, Outcome, Progress, Upload};

use crate::exit::{Explained, Failure, Kind};
use crate::json::Line;
use crate::logging::Console;
use crate::output;
use crate::progress::{Meter, size};
use crate::value::hex;

/// Collects what became of the files.
#[derive(Debug)]
pub(super) struct Report {
    console: Console,
    json: bool,
    quiet: bool,
    began: Instant,
    /// When the last file had its outcome; what follows is parting.
    ended: Option<Instant>,
    /// Files asked for.
    files: usize,
    stored: usize,
    same: usize,
    bytes: u64,
    sent: u64,
    failures: Vec<Explained>,
    /// Files that failed before anything was sent, which the upload knows nothing of.
    never_sent: usize,
    last_progress: Option<Instant>,
    /// Standard output failed, other than by being closed.
    unwritten: Option<io::Error>,
}

impl Report {
    pub(super) fn new(console: &Console, json: bool, quiet: bool) -> Self {
        Self {
            console: console.clone(),
            json,
            quiet,
            began: Instant::now(),
            ended: None,
            files: 0,
            stored: 0,
            same: 0,
            bytes: 0,
            sent: 0,
            failures: Vec::new(),
            never_sent: 0,
            last_progress: None,
            unwritten: None,
        }
    }

    /// How many files there are to be; tells one failure from many.
    pub(super) fn expect(&mut self, files: usize) {
        self.files = files;
    }

    /// The upload begins.
    pub(super) fn start(&mut self, server: &str, bytes: u64) {
        let files = self.files;
        self.json(&Line::Start {
            server,
            files,
            bytes,
        });
        self.began = Instant::now();
    }

    /// Follows an upload to its end. `locals` are the local names of its sources.
    pub(super) async fn follow(
        &mut self,
        mut upload: Upload,
        locals: &[String],
        meter: &mut Meter,
    ) {
        self.never_sent = self.files.saturating_sub(locals.len());
        let local = |index: usize| locals.get(index).map_or("", String::as_str);
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            let event = tokio::select! {
                event = upload.next() => event,
                // Nothing moves: that must show, too.
                _ = tick.tick() => {
                    meter.update(&upload.progress());
                    continue;
                }
            };
            match event {
                None => break,
                Some(Event::Started { index, path, .. }) => meter.started(index, path),
                Some(Event::Progress(progress)) => {
                    meter.update(&progress);
                    self.progress(&progress, meter.rate());
                }
                Some(Event::Done(outcome)) => {
                    meter.ended(outcome.index);
                    self.stored(local(outcome.index), &outcome);
                }
                Some(Event::Failed { index, path, error }) => {
                    meter.ended(index);
                    self.failed(&path, local(index), &anyhow::Error::new(error));
                }
                Some(_) => {}
            }
        }
        self.ended = Some(Instant::now());
    }

    /// Whether every file is at the server.
    pub(super) fn all_stored(&self) -> bool {
        self.stored == self.files
    }

    /// A line of a result that is for people only.
    pub(super) fn line(&mut self, text: &str) {
        if !self.json {
            let written = self.console.around_bars(|| output::line(text));
            self.wrote(written);
        }
    }

    /// A file failed.
    pub(super) fn failed(&mut self, path: &str, source: &str, error: &anyhow::Error) {
        let explained = Explained::of(error);
        tracing::info!(path, error = explained.text, "not stored");
        self.json(&Line::File {
            status: "error",
            path,
            source,
            bytes: None,
            hash: None,
            sent: None,
            same: None,
            secs: None,
            error_kind: Some(explained.kind.name()),
            error: Some(&explained.text),
        });
        // A single failure is told at the end, with its hint; a lost connection once for all files.
        let told = explained.kind == Kind::Network
            && self
                .failures
                .iter()
                .any(|failure| failure.kind == Kind::Network);
        if self.files > 1 && !told {
            // Most sentences name the file.
            let text = &explained.text;
            self.console.line(&if text.contains(source) {
                format!("error: {text}")
            } else {
                format!("error: {}: {text}", output::printable(source))
            });
        }
        self.failures.push(explained);
    }

    fn stored(&mut self, source: &str, outcome: &Outcome) {
        self.stored += 1;
        self.same += usize::from(outcome.same);
        self.bytes += outcome.size;
        self.sent += outcome.sent;
        let hash = hex(&outcome.hash);
        tracing::info!(
            path = outcome.path,
            bytes = outcome.size,
            sent = outcome.sent,
            same = outcome.same,
            secs = outcome.elapsed.as_secs_f64(),
            "stored"
        );
        if self.json {
            self.json(&Line::File {
                status: "ok",
                path: &outcome.path,
                source,
                bytes: Some(outcome.size),
                hash: Some(&hash),
                sent: Some(outcome.sent),
                same: Some(outcome.same),
                secs: Some(outcome.elapsed.as_secs_f64()),
                error_kind: None,
                error: None,
            });
        } else {
            self.line(&format!(
                "{}  {}  {hash}",
                output::printable(&outcome.path),
                outcome.size
            ));
        }
    }

    fn progress(&mut self, progress: &Progress, rate: f64) {
        let last = progress.files_done == progress.files;
        let now = Instant::now();
        let soon = self
            .last_progress
            .is_some_and(|last| now.duration_since(last) < PROGRESS_EVERY);
        if !self.json || (soon && !last) {
            return;
        }
        self.last_progress = Some(now);
        self.json(&Line::Progress {
            bytes: progress.acked,
            total: progress.total,
            files_done: progress.files_done + self.never_sent,
            files: progress.files + self.never_sent,
            rate,
        });
    }

    /// The end: the summary or the `result` line. Gives the verdict over everything.
    pub(super) fn finish(mut self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let elapsed = self.ended.unwrap_or_else(Instant::now) - self.began;
        let result = match result {
            Err(error) if Explained::of(&error).kind == Kind::Interrupted => {
                Err(Failure::interrupted().hint(AGAIN).into())
            }
            result => result.and_then(|()| self.verdict()),
        };
        let secs = elapsed.as_secs_f64();
        let rate = self.sent as f64 / secs.max(1e-6);
        let explained = result.as_ref().err().map(Explained::of);
        if self.json {
            let kind = explained.as_ref().map(|explained| explained.kind);
            self.json(&Line::Result {
                status: match kind {
                    None => "ok",
                    Some(Kind::Partial) => "partial",
                    Some(Kind::Interrupted) => "interrupted",
                    Some(_) => "error",
                },
                exit: kind.map_or(0, Kind::code),
                files: self.stored,
                failed: self.failures.len(),
                bytes: self.bytes,
                sent: self.sent,
                secs,
                rate,
                error_kind: kind.map(Kind::name),
                error: explained.as_ref().map(|explained| explained.text.as_str()),
                hint: explained
                    .as_ref()
                    .and_then(|explained| explained.hint.as_deref()),
            });
        }
        if self.stored > 0 && !self.quiet {
            let files = if self.stored == 1 { "file" } else { "files" };
            let mut summary = format!(
                "{} {files}, {} in {secs:.2} s",
                self.stored,
                size(self.bytes as f64)
            );
            if self.sent > 0 {
                summary.push_str(&format!(", {}/s", size(rate)));
            }
            if self.same > 0 {
                summary.push_str(&format!(", {} already there", self.same));
            }
            self.console.line(&summary);
        }
        result?;
        match self.unwritten {
            Some(error) => Err(error).context("cannot write to standard output"),
            None => Ok(()),
        }
    }

    /// One failure of one file speaks for itself, and so do equal ones of all files.
    fn verdict(&self) -> anyhow::Result<()> {
        let Some(first) = self.failures.first() else {
            return Ok(());
        };
        let count = self.failures.len();
        let alike = self
            .failures
            .iter()
            .all(|failure| failure.kind == first.kind);
        let failure = if self.files == 1 {
            Failure::new(first.kind, first.text.clone())
        } else if count == self.files && alike {
            Failure::new(first.kind, format!("none of the {count} files was stored"))
        } else {
            Failure::new(
                Kind::Partial,
                format!("{count} of {} files were not stored", self.files),
            )
        };
        let hint = if alike { first.hint.clone() } else { None };
        let hint = hint.unwrap_or_else(|| AGAIN.to_owned());
        Err(failure.hint(hint).into())
    }

    fn json(&mut self, line: &Line<'_>) {
        if self.json {
            let written = self.console.around_bars(|| output::json(line));
            self.wrote(written);
        }
    }

    fn wrote(&mut self, written: io::Result<()>) {
        if let Err(error) = written
            && !output::is_gone(&error)
        {
            self.unwritten.get_or_insert(error);
        }
    }
}

const PROGRESS_EVERY: Duration = Duration::from_millis(200);
const AGAIN: &str = "run the same command again: what is stored already is not sent a second time";
