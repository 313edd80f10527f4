//! Reports a transfer: results on standard output, everything else on standard error, and one exit code for all files.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot, watch};
use udpack::{Transport, TransportReason};
use udpack_transfer::{
    Code, Download, Event, FetchError, Fetched, Left, Link, LinkEvent, LinkEvents, LostXattrs,
    OtherTime, Outcome, PathProgress, Progress, TransferError, Upload, Wanted,
};

use super::failures::Failures;
use crate::args::LogArgs;
use crate::exit::{Explained, Failure, Kind};
use crate::json::{Ended, FileLine, Line, PathLine, ResultLine};
use crate::logging::Console;
use crate::output;
use crate::progress::{Meter, percent, size};
use crate::value::hex;
use crate::when::utc;

/// The origins of files by their index: of those that are listed and have no outcome yet.
#[derive(Debug, Clone, Default)]
pub(super) struct Origins(Arc<Mutex<HashMap<usize, Origin>>>);

/// The origin of one file.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    /// The local path of an upload, the remote one of a download.
    pub(super) shown: String,
    pub(super) what: Thing,
}

/// The kind of an entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Thing {
    #[default]
    File,
    Dir,
    Link,
}

impl Thing {
    /// The kind in JSON, if it is not a file.
    fn word(self) -> Option<&'static str> {
        match self {
            Self::File => None,
            Self::Dir => Some("dir"),
            Self::Link => Some("link"),
        }
    }
}

impl Origins {
    pub(super) fn insert(&self, index: usize, origin: Origin) {
        self.lock().insert(index, origin);
    }

    /// Records the origin of each item of a transfer as the transfer takes it.
    pub(super) fn of<T, I>(&self, items: I) -> impl Iterator<Item = T> + Send + use<T, I>
    where
        I: Iterator<Item = (T, Origin)> + Send,
    {
        let origins = self.clone();
        items.enumerate().map(move |(index, (item, origin))| {
            origins.insert(index, origin);
            item
        })
    }

    /// Records the origin of each file of a download. Taking the next one blocks.
    pub(super) fn of_downloads(
        &self,
        mut wanted: mpsc::Receiver<Wanted>,
    ) -> impl Iterator<Item = Wanted> + Send + use<> {
        let files = std::iter::from_fn(move || {
            let wanted = wanted.blocking_recv()?;
            let shown = wanted.remote.as_str().to_owned();
            let what = Thing::File;
            Some((wanted, Origin { shown, what }))
        });
        self.of(files)
    }

    fn shown(&self, index: usize) -> String {
        let known = self.lock();
        known
            .get(&index)
            .map_or_else(String::new, |origin| origin.shown.clone())
    }

    fn take(&self, index: usize) -> Origin {
        self.lock().remove(&index).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Origin>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The outcome that a dry run predicts for an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Send,
    /// An identical entry exists.
    Same,
    /// A different entry exists and is kept.
    Skip,
}

/// A transfer in either direction.
#[derive(Debug)]
pub(super) enum Transfer {
    Up(Upload),
    Down(Download),
}

impl Transfer {
    /// Cancel safe.
    async fn next(&mut self) -> Option<Event> {
        match self {
            Self::Up(upload) => upload.next().await,
            Self::Down(download) => download.next().await,
        }
    }

    fn progress(&self) -> Progress {
        match self {
            Self::Up(upload) => upload.progress(),
            Self::Down(download) => download.progress(),
        }
    }
}

/// Events beside those of the transfer's files.
#[derive(Debug)]
pub(super) enum Note {
    /// A directory or a link was created here.
    Made {
        path: String,
        source: String,
        what: Thing,
        same: bool,
    },
    /// The file system could not store a directory's time.
    OtherTime { path: String, time: OtherTime },
    /// An entry that is not one of the transfer's files has failed.
    Failed {
        path: String,
        source: String,
        error: anyhow::Error,
    },
    /// An entry was there when its directory was read, and is gone now.
    Vanished { path: String, source: String },
    /// It is written under another name than it has.
    Mapped { path: String, source: String },
    /// An entry is no part of a mirror.
    LeftOut {
        path: String,
        source: String,
        why: &'static str,
    },
}

/// Settings and counts for files that other programs change meanwhile.
#[derive(Debug, Default)]
pub(super) struct Living {
    /// Whether a file that is gone is skipped.
    pub(super) skip_vanished: bool,
    /// Whether the files come from the server, which reports that one is gone.
    remote: bool,
    /// Whether files that changed while they were read are sent again before they count as failures.
    pub(super) retry_changed: bool,
    /// The name and the source of each file to be sent again.
    again: Vec<(String, String)>,
    vanished: usize,
    /// Vanished files that count as failures.
    vanished_failed: usize,
    /// Files that changed each time they were read.
    changed: usize,
    /// Files that changed while they were read, and are stored as they were read.
    torn: usize,
}

/// Counts of a mirror.
#[derive(Debug, Default)]
pub(super) struct Mirrored {
    pub(super) unchanged: usize,
    pub(super) deleted: usize,
}

/// Work beside a transfer, in tasks of its own.
#[derive(Debug)]
pub(super) struct Beside {
    /// Its events, until it has ended.
    pub(super) notes: mpsc::Receiver<Note>,
    /// Signalled when the transfer has ended.
    pub(super) over: oneshot::Sender<()>,
}

/// Collects the outcomes of files.
#[derive(Debug)]
pub(super) struct Report {
    console: Console,
    json: bool,
    /// Whether every file gets a line, even if there are many and standard output is a terminal.
    each: bool,
    /// Whether standard output carries a file.
    mute: bool,
    /// Whether this is a dry run.
    dry: bool,
    began: Instant,
    /// When the last file had its outcome. Only the disconnect follows.
    ended: Option<Instant>,
    /// How many files were requested, if all were named.
    files: Option<usize>,
    stored: usize,
    /// How many directories and links were created.
    others: usize,
    same: usize,
    /// How many files were skipped although their content differs.
    skipped: usize,
    bytes: u64,
    sent: u64,
    /// The sent bytes of files that did not exist; the rate is computed from these.
    moved: u64,
    resumed: u64,
    /// The resumed bytes of files whose size only their end tells.
    resumed_unsized: u64,
    /// Bytes that the receiver copied from files it had.
    copied: u64,
    /// Bytes of holes.
    holes: u64,
    /// Bytes of files that were there already.
    there: u64,
    failures: Failures,
    living: Living,
    /// What is no part of a mirror.
    left_out: usize,
    /// Names that are written otherwise.
    mapped: usize,
    mirror: Option<Mirrored>,
    /// Files that failed before the transfer, which does not know them.
    never_begun: usize,
    /// That extended attributes were lost has been told.
    lost_xattrs: bool,
    last_progress: Option<Instant>,
    /// Progress that was not written because it came too soon after the last one.
    progress_waits: bool,
    /// Whether the hint that not every file gets a line was printed.
    told: bool,
    /// Lines of JSON that are not written yet. Empty while this waits for an event.
    unread: Vec<u8>,
    /// Whether more events may be ready.
    gathers: bool,
    /// Where parts of files are kept for a resume, and how much of them.
    left: Option<(PathBuf, Left)>,
    /// An error of standard output, unless its reader has closed it.
    unwritten: Option<io::Error>,
    /// How often the connection was lost and restored.
    reconnects: usize,
    /// What a transfer over several paths goes over, and which of them are lost.
    link: Option<Link>,
    lost: BTreeSet<String>,
}

impl Report {
    pub(super) fn new(console: &Console, json: bool, log: &LogArgs) -> Self {
        Self {
            console: console.clone(),
            json,
            each: log.verbose > 0 || !io::stdout().is_terminal(),
            mute: false,
            dry: false,
            began: Instant::now(),
            ended: None,
            files: None,
            stored: 0,
            others: 0,
            same: 0,
            skipped: 0,
            bytes: 0,
            sent: 0,
            moved: 0,
            resumed: 0,
            resumed_unsized: 0,
            copied: 0,
            holes: 0,
            there: 0,
            failures: Failures::new(console),
            living: Living::default(),
            left_out: 0,
            mapped: 0,
            mirror: None,
            never_begun: 0,
            lost_xattrs: false,
            last_progress: None,
            progress_waits: false,
            told: false,
            unread: Vec::new(),
            gathers: false,
            left: None,
            unwritten: None,
            reconnects: 0,
            link: None,
            lost: BTreeSet::new(),
        }
    }

    /// Reserves standard output for a file.
    pub(super) fn mute(&mut self) {
        self.mute = true;
    }

    /// Sets what happens to files that change or vanish. By default each is a failure.
    pub(super) fn living(&mut self, skip_vanished: bool, retry_changed: bool) {
        self.living.skip_vanished = skip_vanished;
        self.living.retry_changed = retry_changed;
    }

    /// The files come from the server.
    pub(super) fn fetches(&mut self) {
        self.living.remote = true;
    }

    /// The files that changed while they were read, to be sent again. From now on, a file that changes again is a
    /// failure unless `retry` is set.
    pub(super) fn take_changed(&mut self, retry: bool) -> Vec<(String, String)> {
        self.living.retry_changed = retry;
        std::mem::take(&mut self.living.again)
    }

    /// Makes the summary contain the counts of a mirror.
    pub(super) fn mirrored(&mut self) -> &mut Mirrored {
        self.mirror.get_or_insert_default()
    }

    /// Reports an entry that the source does not have: it was deleted, or would be in a dry run.
    pub(super) fn deleted(&mut self, path: &str, what: Thing) {
        self.failures.tell();
        self.mirrored().deleted += 1;
        let status = if self.dry { "planned" } else { "ok" };
        self.json(&Line::Deleted {
            status,
            path,
            kind: what.word(),
        });
        let mark = if what == Thing::Dir { "/" } else { "" };
        let path = output::printable(path);
        let did = if self.dry { "would delete" } else { "deleted" };
        let line = format!("{did} {path}{mark}");
        match self.dry {
            true => self.line(&line),
            false => self.file_line(&line),
        }
    }

    /// Makes this the report of a dry run.
    pub(super) fn dry(&mut self) {
        self.dry = true;
    }

    /// Sets the parts of files that are kept for a resume, for the summary.
    pub(super) fn left(&mut self, dir: &Path, left: Left) {
        self.left = Some((dir.to_owned(), left));
    }

    /// Sets how many files there will be, if that is known. It decides between the exit codes for one failure and for
    /// some of several.
    pub(super) fn expect(&mut self, files: Option<usize>) {
        self.files = files;
    }

    /// The transfer begins; `bytes` is the size of all files, if known.
    pub(super) fn start(&mut self, server: &str, bytes: Option<u64>) {
        let files = self.files;
        self.json(&Line::Start {
            server,
            files,
            bytes,
        });
        self.began = Instant::now();
        self.never_begun = self.failures.count();
    }

    /// Follows a transfer and the work beside it to the end of both.
    pub(super) async fn follow(
        &mut self,
        mut transfer: Transfer,
        beside: Option<Beside>,
        origins: &Origins,
        meter: &mut Meter,
    ) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut notes, mut tell) = match beside {
            Some(beside) => (Some(beside.notes), Some(beside.over)),
            None => (None, None),
        };
        let mut over = false;
        while !over || notes.is_some() {
            let event = tokio::select! {
                biased;
                event = transfer.next(), if !over => event,
                note = next(&mut notes) => {
                    match note {
                        Some(note) => self.note(note),
                        None => notes = None,
                    }
                    continue;
                }
                // The display must also show that nothing moves.
                _ = tick.tick() => {
                    let progress = transfer.progress();
                    meter.update(&progress);
                    if self.progress_waits {
                        self.progress(&progress, meter);
                    }
                    continue;
                }
                // No event is ready: write the results, so that a reader sees each at once.
                () = std::future::ready(()), if !self.unread.is_empty() => {
                    self.write_out();
                    continue;
                }
            };
            match event {
                None => {
                    over = true;
                    if let Some(tell) = tell.take() {
                        let _ = tell.send(());
                    }
                }
                Some(event) => {
                    self.gathers = true;
                    self.event(event, origins, meter);
                    self.gathers = false;
                }
            }
        }
        self.write_out();
        self.ended = Some(Instant::now());
    }

    /// Follows a file that is written to a target other than a regular file.
    pub(super) async fn follow_fetch(
        &mut self,
        fetching: impl Future<Output = Result<Fetched, FetchError>>,
        progress: watch::Receiver<Progress>,
        links: LinkEvents,
        path: &str,
        source: &str,
        meter: &mut Meter,
    ) {
        let origins = Origins::default();
        let origin = Origin {
            shown: source.to_owned(),
            what: Thing::File,
        };
        origins.insert(0, origin);
        meter.started(0, path.to_owned());
        let mut fetching = std::pin::pin!(fetching);
        let mut links = Some(links);
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let fetched = loop {
            let event = tokio::select! {
                biased;
                fetched = &mut fetching => break fetched,
                event = next_link(&mut links) => match event {
                    Some(LinkEvent::Reconnecting { attempt, delay, reason }) => {
                        Event::Reconnecting { attempt, delay, reason }
                    }
                    Some(LinkEvent::Connected) => Event::Connected,
                    Some(LinkEvent::TransportChanged { to, why }) => {
                        Event::TransportChanged { to, why }
                    }
                    Some(_) => continue,
                    None => {
                        links = None;
                        continue;
                    }
                },
                _ = tick.tick() => Event::Progress(*progress.borrow()),
            };
            self.event(event, &origins, meter);
        };
        self.ended = Some(Instant::now());
        meter.ended(0);
        match fetched {
            Ok(fetched) => {
                let mut outcome = Outcome::from(fetched);
                path.clone_into(&mut outcome.path);
                self.done(&origins.take(0), &outcome);
            }
            // The reader has closed its end.
            Err(FetchError {
                cause: TransferError::Write(error),
                ..
            }) if output::is_gone(&error) => {}
            Err(error) if error.written == 0 => self.failed(path, source, &error.cause.into()),
            Err(error) => self.failed(path, source, &error.into()),
        }
    }

    fn event(&mut self, event: Event, origins: &Origins, meter: &mut Meter) {
        match event {
            Event::Started { index, path, .. } => meter.started(index, path),
            Event::Progress(progress) => {
                meter.update(&progress);
                self.progress(&progress, meter);
            }
            Event::Resumed {
                index,
                path,
                bytes,
                size,
            } => {
                self.resumed(&path, &origins.shown(index), bytes, size);
            }
            Event::Reconnecting {
                attempt,
                delay,
                reason,
            } => {
                let secs = delay.as_secs_f64();
                let reason = output::printable(&reason);
                self.json(&Line::Reconnecting {
                    attempt,
                    delay: secs,
                    reason: &reason,
                });
                meter.note(Some("reconnecting"));
                self.console.note(&format!(
                    "reconnecting (attempt {attempt}, in {secs:.1} s): {reason}"
                ));
            }
            Event::Connected => {
                meter.note(None);
                self.reconnects += 1;
                self.json(&Line::Connected {});
                self.console.note("connected again");
            }
            Event::PathLost {
                path,
                delay,
                reason,
            } => self.path_lost(path, delay, &reason),
            Event::PathConnected { path } => {
                self.json(&Line::PathConnected { path: &path });
                if self.lost.remove(&path) {
                    self.reconnects += 1;
                    self.console.note(&format!("connected again over {path}"));
                }
            }
            Event::TransportChanged { to, why } => self.transport(&to, why, meter),
            Event::Done(outcome) => {
                meter.ended(outcome.index);
                self.done(&origins.take(outcome.index), &outcome);
            }
            Event::Failed { index, path, error } => {
                meter.ended(index);
                let origin = origins.take(index);
                self.failed(&path, &origin.shown, &anyhow::Error::new(error));
            }
            _ => {}
        }
    }

    /// Reports that the connection uses this transport.
    fn transport(&mut self, transport: &Transport, why: TransportReason, meter: &mut Meter) {
        let (name, why) = (transport.name(), why.to_string());
        meter.over((*transport != Transport::Quic).then(|| format!("{name}: {why}")));
        self.json(&Line::Transport {
            transport: name,
            reason: &why,
        });
        self.console.note(&format!("connected over {name}: {why}"));
    }

    /// One of several paths is lost: told once, until it is back.
    fn path_lost(&mut self, path: String, delay: Duration, reason: &str) {
        let reason = output::printable(reason);
        self.json(&Line::PathLost {
            path: &path,
            delay: delay.as_secs_f64(),
            reason: &reason,
        });
        if !self.lost.contains(&path) {
            let text = format!("{path} is lost, the others go on: {reason}");
            self.console.note(&text);
            self.lost.insert(path);
        }
    }

    /// What each of several paths has carried.
    fn by_path(&self, secs: f64) -> Vec<PathLine> {
        let paths = self.link.as_ref().map(Link::paths).unwrap_or_default();
        let line = |path: PathProgress| PathLine {
            rate: path.moved as f64 / secs.max(1e-6),
            bytes: path.moved,
            connected: None,
            path: path.path,
        };
        paths.into_iter().map(line).collect()
    }

    /// Reports the transport of the first connection, unless it is QUIC.
    pub(super) fn connected(&mut self, link: &Link, meter: &mut Meter) {
        meter.follow(link);
        self.link = Some(link.clone()).filter(|link| !link.paths().is_empty());
        let Some(socket) = link.live() else { return };
        let transport = socket.transport();
        if let Some(why) = socket.transport_reason()
            && transport != Transport::Quic
        {
            self.transport(&transport, why, meter);
        }
    }

    pub(super) fn note(&mut self, note: Note) {
        match note {
            Note::Made {
                path,
                source,
                what,
                same,
            } => self.made(&path, &source, what, same),
            Note::OtherTime { path, time } => self.other_time(&path, Some(time)),
            Note::Failed {
                path,
                source,
                error,
            } => self.failed(&path, &source, &error),
            Note::Vanished { path, source } => {
                let gone = io::Error::from(io::ErrorKind::NotFound);
                let error = TransferError::Source {
                    path: source.clone().into(),
                    source: gone,
                };
                self.failed(&path, &source, &error.into());
            }
            Note::Mapped { path, source } => {
                self.mapped += 1;
                if !self.json && self.mapped <= FEW {
                    let (path, source) = (output::printable(&path), output::printable(&source));
                    self.console.note(&format!("{source} is written as {path}"));
                }
            }
            Note::LeftOut { path, source, why } => self.left_out(&path, &source, why),
        }
    }

    /// An entry is left out.
    fn left_out(&mut self, path: &str, source: &str, why: &str) {
        self.left_out += 1;
        self.json(&Line::File(FileLine {
            status: "left_out",
            path,
            source,
            ..FileLine::default()
        }));
        let source = output::printable(source);
        self.console.note(&format!("left out, {why}: {source}"));
    }

    /// Whether a file failed only because another program changed it, and is no failure or not yet. Counts it.
    fn excused(&mut self, path: &str, source: &str, error: &anyhow::Error) -> bool {
        let mirrors = self.mirror.is_some();
        if let Some(TransferError::Special { .. }) = error.downcast_ref() {
            self.left_out(path, source, "no file, directory or link");
            return true;
        }
        let living = &mut self.living;
        let is_gone = match error.downcast_ref::<TransferError>() {
            // What a link leads to may be missing although the link is there.
            Some(TransferError::Source { path, source }) => {
                let entry = std::fs::symlink_metadata(path);
                let is_link = entry.is_ok_and(|entry| entry.is_symlink());
                source.kind() == io::ErrorKind::NotFound && !is_link
            }
            Some(TransferError::Refused {
                code: Code::NotFound,
                ..
            }) => living.remote,
            _ => false,
        };
        let status = match error.downcast_ref::<TransferError>() {
            Some(_) if mirrors && is_gone => {
                living.vanished += 1;
                if !living.skip_vanished {
                    living.vanished_failed += 1;
                    return false;
                }
                "vanished"
            }
            Some(
                TransferError::SourceChanged { .. }
                | TransferError::Mismatch
                | TransferError::Refused {
                    code: Code::SourceChanged,
                    ..
                },
            ) => {
                if !living.retry_changed {
                    living.changed += 1;
                    return false;
                }
                living.again.push((path.to_owned(), source.to_owned()));
                "changed"
            }
            _ => return false,
        };
        self.json(&Line::File(FileLine {
            status,
            path,
            source,
            ..FileLine::default()
        }));
        let did = match status {
            "vanished" => "is gone by now",
            _ => "changed while it was read, and is tried again",
        };
        let source = output::printable(source);
        self.console.note(&format!("{source} {did}"));
        true
    }

    /// Whether there was nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.stored + self.others + self.failures.count() == 0
    }

    /// Reports the predicted outcome of an entry in a dry run, or the error. The size of standard input is unknown.
    pub(super) fn planned(
        &mut self,
        path: &str,
        source: &str,
        what: Thing,
        size: Option<u64>,
        fate: anyhow::Result<Fate>,
    ) {
        self.dry = true;
        let fate = match fate {
            Ok(fate) => fate,
            Err(error) => return self.failed(path, source, &error),
        };
        self.failures.tell();
        let bytes = size.unwrap_or(0);
        if what == Thing::File {
            self.stored += 1;
            self.bytes += bytes;
            self.same += usize::from(fate == Fate::Same);
            self.skipped += usize::from(fate == Fate::Skip);
            self.moved += if fate == Fate::Send { bytes } else { 0 };
        } else {
            self.others += 1;
        }
        self.json(&Line::File(FileLine {
            status: "planned",
            path,
            source,
            kind: what.word(),
            bytes: size,
            same: Some(fate == Fate::Same),
            skipped: (fate == Fate::Skip).then_some(true),
            ..FileLine::default()
        }));
        if fate != Fate::Send {
            return;
        }
        let mark = if what == Thing::Dir { "/" } else { "" };
        let size = size.map_or_else(|| "-".to_owned(), |size| size.to_string());
        self.line(&format!("{}{mark}  {size}  -", output::printable(path)));
    }

    /// Whether every file is stored.
    pub(super) fn all_stored(&self) -> bool {
        self.failures.count() == 0
    }

    /// Prints a line of a result that is for people only.
    pub(super) fn line(&mut self, text: &str) {
        if !self.json && !self.mute {
            let written = self.console.above(|| output::line(text));
            self.wrote(written);
        }
    }

    /// Prints the line of one file: none with `-q`, and on a terminal only for the first files.
    fn file_line(&mut self, text: &str) {
        let many = !self.each && self.stored + self.others > FEW;
        if self.json || self.console.is_quiet() {
            return;
        }
        if !many {
            self.line(text);
        } else if !std::mem::replace(&mut self.told, true) {
            self.console
                .note("further files are not listed here; -v lists each");
        }
    }

    /// Reports that a file has failed.
    pub(super) fn failed(&mut self, path: &str, source: &str, error: &anyhow::Error) {
        if self.excused(path, source, error) {
            return;
        }
        let explained = Explained::of(error);
        tracing::info!(path, error = explained.text, "not stored");
        self.json(&Line::File(FileLine {
            status: "error",
            path,
            source,
            error_kind: Some(explained.kind.name()),
            error: Some(&explained.text),
            command_exit: explained.command_exit,
            ..FileLine::default()
        }));
        let others = self.stored + self.others + self.failures.count();
        let alone = others == 0 && self.files.is_none_or(|files| files == 1);
        self.failures.add(source, explained, alone);
    }

    fn resumed(&mut self, path: &str, source: &str, bytes: u64, size: u64) {
        // Of some files only the end tells the size.
        let sized = size > 0;
        if sized && bytes >= size {
            // It existed already, and its `same` says so.
            return;
        }
        self.resumed += bytes;
        self.resumed_unsized += if sized { 0 } else { bytes };
        tracing::info!(path, bytes, size, "resumed");
        self.json(&Line::Resumed {
            path,
            source,
            bytes,
            size: sized.then_some(size),
        });
        let path = output::printable(path);
        let from = match sized {
            true => format!("{} %", percent(bytes, size)),
            false => crate::progress::size(bytes as f64),
        };
        self.console.note(&format!("{path}: resumed from {from}"));
    }

    fn made(&mut self, path: &str, source: &str, what: Thing, same: bool) {
        self.failures.tell();
        self.others += 1;
        self.json(&Line::File(FileLine {
            status: "ok",
            path,
            source,
            kind: what.word(),
            same: Some(same),
            ..FileLine::default()
        }));
        let mark = if what == Thing::Dir { "/" } else { "" };
        self.file_line(&format!("{}{mark}  -  -", output::printable(path)));
    }

    fn done(&mut self, origin: &Origin, outcome: &Outcome) {
        if origin.what != Thing::File {
            self.made(&outcome.path, &origin.shown, origin.what, outcome.same);
            self.lost_xattrs(&outcome.path, outcome.lost_xattrs);
            return self.other_time(&outcome.path, outcome.other_time);
        }
        self.failures.tell();
        self.stored += 1;
        self.same += usize::from(outcome.same);
        self.skipped += usize::from(outcome.skipped);
        self.bytes += outcome.size;
        self.sent += outcome.sent;
        self.copied += outcome.copied;
        if outcome.same {
            // It was no part of a file but all of it.
            self.resumed -= std::mem::take(&mut self.resumed_unsized);
        }
        self.holes += outcome.holes;
        self.there += if outcome.same { outcome.size } else { 0 };
        if !outcome.same && !outcome.skipped {
            self.moved += outcome.sent;
        }
        let hash = hex(&outcome.hash);
        tracing::info!(
            path = outcome.path,
            bytes = outcome.size,
            sent = outcome.sent,
            same = outcome.same,
            skipped = outcome.skipped,
            secs = outcome.elapsed.as_secs_f64(),
            "stored"
        );
        if self.json {
            self.json(&Line::File(FileLine {
                status: "ok",
                path: &outcome.path,
                source: &origin.shown,
                bytes: Some(outcome.size),
                hash: Some(&hash),
                sent: Some(outcome.sent),
                resumed: Some(outcome.resumed),
                copied: (outcome.copied > 0).then_some(outcome.copied),
                holes: (outcome.holes > 0).then_some(outcome.holes),
                torn: outcome.torn.then_some(true),
                same: Some(outcome.same),
                skipped: outcome.skipped.then_some(true),
                sync: outcome.sync.map(|sync| sync.to_string()),
                secs: Some(outcome.elapsed.as_secs_f64()),
                ..FileLine::default()
            }));
        } else {
            let left = if outcome.skipped {
                "  skipped, other content is there"
            } else {
                ""
            };
            self.file_line(&format!(
                "{}  {}  {hash}{left}",
                output::printable(&outcome.path),
                outcome.size
            ));
        }
        self.other_time(&outcome.path, outcome.other_time);
        self.lost_xattrs(&outcome.path, outcome.lost_xattrs);
        if outcome.torn {
            self.torn(&origin.shown);
        }
    }

    /// Says that a file changed while it was read, and is stored all the same.
    fn torn(&mut self, source: &str) {
        self.living.torn += 1;
        if self.json {
            tracing::warn!(source, "changed while it was read");
        } else {
            let source = output::printable(source);
            let text =
                format!("warning: {source} changed while it was read: what is stored may be torn");
            self.console.note(&text);
        }
    }

    /// Warns that the file system could not store the time of a file or directory.
    fn other_time(&mut self, path: &str, time: Option<OtherTime>) {
        let Some(OtherTime { asked, got }) = time else {
            return;
        };
        let (asked, got) = (utc(asked.secs), utc(got.secs));
        tracing::debug!(path, asked, got, "the file system cannot hold the time");
        self.json(&Line::OtherTime {
            path,
            asked: &asked,
            got: &got,
        });
        if !self.json {
            let path = output::printable(path);
            self.console.note(&format!(
                "warning: {path}: modified {asked}, stored with {got}: the file system there cannot hold the time"
            ));
        }
    }

    /// Warns, once in a run, that extended attributes are missing; as JSON of each file.
    fn lost_xattrs(&mut self, path: &str, lost: LostXattrs) {
        let (lost, text) = match lost {
            LostXattrs::Some(lost) => {
                let of = match lost {
                    1 => "1 extended attribute is".to_owned(),
                    lost => format!("{lost} extended attributes are"),
                };
                let why =
                    "the receiver takes none of this kind, or its file system does not hold them";
                (Some(lost), format!("{of} not stored: {why}"))
            }
            LostXattrs::Withheld => {
                let text =
                    "the server gives no extended attributes of this kind (udpack-server --xattrs)";
                (None, text.to_owned())
            }
            _ => return,
        };
        tracing::debug!(path, ?lost, "extended attributes are missing");
        self.json(&Line::Xattrs { path, lost });
        if std::mem::replace(&mut self.lost_xattrs, true) || self.json {
            return;
        }
        let path = output::printable(path);
        let text = format!("warning: {path}: {text}; others are not told");
        self.console.note(&text);
    }

    fn progress(&mut self, progress: &Progress, meter: &Meter) {
        let last = progress.listed && progress.files_done == progress.files;
        let now = Instant::now();
        let soon = self
            .last_progress
            .is_some_and(|last| now.duration_since(last) < PROGRESS_EVERY);
        self.progress_waits = self.json && soon && !last;
        if !self.json || self.progress_waits {
            return;
        }
        self.last_progress = Some(now);
        let line = |(path, rate): (PathProgress, f64)| PathLine {
            path: path.path,
            bytes: path.moved,
            rate,
            connected: Some(path.connected),
        };
        let paths: Vec<_> = meter.paths().into_iter().map(line).collect();
        self.json(&Line::Progress {
            bytes: progress.acked,
            total: progress.total,
            files_done: progress.files_done + self.never_begun,
            files: progress.files + self.never_begun,
            rate: meter.rate(),
            paths: &paths,
        });
    }

    /// Prints the summary or the `result` line. Returns the verdict over all files.
    pub(super) fn finish(mut self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let elapsed = self.ended.unwrap_or_else(Instant::now) - self.began;
        let result = match result {
            Err(error) if Explained::of(&error).kind == Kind::Interrupted => {
                Err(Failure::interrupted().hint(AGAIN).into())
            }
            Err(error) => {
                self.failures.tell();
                Err(error)
            }
            Ok(()) => {
                let total = self.stored + self.others + self.failures.count();
                let verdict = self.failures.verdict(total, "stored", Some(AGAIN));
                verdict
                    .map_err(|error| self.moving(error))
                    .and_then(|()| self.whole())
            }
        };
        let secs = elapsed.as_secs_f64();
        let sent = if self.dry { 0 } else { self.moved };
        let rate = sent as f64 / secs.max(1e-6);
        self.tell_left();
        if self.json {
            let explained = result.as_ref().err().map(Explained::of);
            self.json(&Line::Result(ResultLine {
                ended: Ended::with(explained.as_ref()),
                files: self.stored,
                failed: self.failures.count(),
                changed: Some(self.living.changed),
                torn: (self.living.torn > 0).then_some(self.living.torn),
                mapped: (self.mapped > 0).then_some(self.mapped),
                vanished: Some(self.living.vanished),
                left_out: (self.mirror.is_some() || self.left_out > 0).then_some(self.left_out),
                unchanged: self.mirror.as_ref().map(|mirror| mirror.unchanged),
                deleted: self.mirror.as_ref().map(|mirror| mirror.deleted),
                bytes: self.bytes,
                sent: self.sent,
                resumed: self.resumed,
                copied: self.copied,
                holes: self.holes,
                same: self.there,
                reconnects: Some(self.reconnects),
                secs,
                rate,
                paths: &self.by_path(secs),
            }));
        }
        // A mirror that did not begin has nothing to sum up.
        let mirrored = self
            .mirror
            .as_ref()
            .is_some_and(|mirror| result.is_ok() || mirror.unchanged + mirror.deleted > 0);
        if self.stored > 0 || mirrored {
            self.console.note(&match self.dry {
                true => self.outlook(),
                false => self.summary(secs, rate),
            });
        }
        result?;
        match self.unwritten {
            Some(error) => Err(error).context("cannot write to standard output"),
            None => Ok(()),
        }
    }

    /// An exit code of its own, where everything was stored and some of it may be torn.
    fn whole(&self) -> anyhow::Result<()> {
        if self.living.torn == 0 {
            return Ok(());
        }
        let torn = files(self.living.torn);
        let text = format!("{torn} changed while being read, and may be torn as they are stored");
        Err(Failure::new(Kind::Moving, text)
            .hint("run it again when nothing writes there")
            .into())
    }

    /// Has an exit code of its own if only files failed that other programs changed.
    fn moving(&self, error: anyhow::Error) -> anyhow::Error {
        let moving = self.living.changed + self.living.vanished_failed;
        if moving < self.failures.count() || self.mirror.is_none() {
            return error;
        }
        let moving = files(moving);
        let text = format!("{moving} changed or vanished while being read; all others were stored");
        Failure::new(Kind::Moving, text)
            .hint("run it again when nothing writes there, or pass over vanished ones with --vanished skip")
            .into()
    }

    fn tell_left(&mut self) {
        let Some((dir, left)) = self.left.take() else {
            return;
        };
        let dir = dir.display().to_string();
        self.json(&Line::Kept {
            dir: &dir,
            files: left.uploads,
            bytes: left.bytes,
        });
        let files = match left.uploads {
            1 => "a file",
            _ => "files",
        };
        let (bytes, dir) = (size(left.bytes as f64), output::printable(&dir));
        self.console.note(&format!(
            "{bytes} of {files} kept in {dir} to be resumed; to give that up: rm -r {dir}"
        ));
    }

    /// The summary of a dry run.
    fn outlook(&self) -> String {
        let files = files(self.stored - self.same - self.skipped);
        let bytes = size(self.moved as f64);
        let deleted = self.mirror.as_ref().map_or(0, |mirror| mirror.deleted);
        let rest = [
            count(deleted, "would be deleted"),
            count(self.same, ALREADY),
            count(self.skipped, SKIPPED),
        ];
        let first = format!("{files}, {bytes} would be sent");
        listed(std::iter::once(first).chain(rest.into_iter().flatten()))
    }

    fn summary(&self, secs: f64, rate: f64) -> String {
        let (files, bytes) = (files(self.stored), size(self.bytes as f64));
        let paths = self.by_path(secs).into_iter().map(|path| {
            let (bytes, rate) = (size(path.bytes as f64), size(path.rate));
            format!("{bytes} over {} at {rate}/s", path.path)
        });
        let sent = size(self.sent as f64);
        let reconnects = match self.reconnects {
            0 => None,
            1 => Some("connected again once".to_owned()),
            often => Some(format!("connected again {often} times")),
        };
        let mirror = self.mirror.as_ref();
        let rest = [
            (self.sent < self.bytes).then(|| format!("{sent} transferred")),
            amount(self.resumed, "resumed"),
            amount(self.copied, "copied from old versions"),
            amount(self.holes, "of holes"),
            reconnects,
            count(mirror.map_or(0, |mirror| mirror.deleted), "deleted"),
            mirror.map(|mirror| format!("{} unchanged", mirror.unchanged)),
            count(self.left_out, "left out"),
            count(self.living.vanished, "vanished"),
            count(self.living.changed, "changed meanwhile"),
            count(self.living.torn, "may be torn"),
            count(self.mapped, "under other names"),
            count(self.same, ALREADY),
            count(self.skipped, SKIPPED),
        ];
        let first = format!("{files}, {bytes} in {secs:.2} s");
        let rate = (self.moved > 0).then(|| format!("{}/s", size(rate)));
        let parts = std::iter::once(first).chain(rate).chain(paths);
        listed(parts.chain(rest.into_iter().flatten()))
    }

    fn json(&mut self, line: &Line<'_>) {
        if self.json {
            match output::add_json(&mut self.unread, line) {
                Ok(()) if self.gathers && self.unread.len() < UNREAD => {}
                Ok(()) => self.write_out(),
                Err(error) => self.wrote(Err(error)),
            }
        }
    }

    /// Writes the collected lines of JSON.
    fn write_out(&mut self) {
        if !self.unread.is_empty() {
            let written = self.console.above(|| output::all(&self.unread));
            self.unread.clear();
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

fn files(count: usize) -> String {
    output::counted(count as u64, "file", "files")
}

/// So many of something for the summary, unless there are none.
fn count(count: usize, what: &str) -> Option<String> {
    (count > 0).then(|| format!("{count} {what}"))
}

/// So many bytes of something for the summary, unless there are none.
fn amount(bytes: u64, what: &str) -> Option<String> {
    (bytes > 0).then(|| format!("{} {what}", size(bytes as f64)))
}

fn listed(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}

/// The next event of the link; never ready once there are no more.
async fn next_link(links: &mut Option<LinkEvents>) -> Option<LinkEvent> {
    match links {
        Some(links) => links.next().await,
        None => std::future::pending().await,
    }
}

/// The next note; never ready once there are no more.
async fn next(notes: &mut Option<mpsc::Receiver<Note>>) -> Option<Note> {
    match notes {
        Some(notes) => notes.recv().await,
        None => std::future::pending().await,
    }
}

/// How many files get a line on a terminal. Beyond that the summary suffices.
const FEW: usize = 20;
/// Bytes of results that are written at once.
const UNREAD: usize = 64 << 10;
/// The part of the summary about files that existed already.
const ALREADY: &str = "already there";
const SKIPPED: &str = "skipped: other content is there";

const PROGRESS_EVERY: Duration = Duration::from_millis(200);
const AGAIN: &str =
    "run the same command again: it resumes, and transfers nothing twice that is there";
