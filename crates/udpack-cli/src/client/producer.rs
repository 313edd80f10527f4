//! Sources of `put` that can be read only once: standard input, the output of a command, a file that grows. Such a
//! source succeeds only if it is known to be complete; an error in place of its end prevents publishing.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpgrp, kill_process, kill_process_group, waitid,
};
use rustix::termios::tcgetpgrp;

use super::follow::Follow;
use crate::exit::{EmptyStdin, Unfinished};
use crate::output::counted;

/// A reader that checks that its source is complete.
pub(super) struct Producer {
    from: From,
    /// Whether an empty source is valid.
    pub(super) allow_empty: bool,
    /// The required size.
    pub(super) size: Option<u64>,
    /// The text at its end, before an optional end of line.
    pub(super) marker: Option<Vec<u8>>,
    count: u64,
    /// The last bytes: as many as the marker and an end of line need.
    tail: Vec<u8>,
}

enum From {
    Stdin,
    Command(Spawned),
    Growing(Follow),
}

/// The shells that run. None of these is waited for while it is here, so none is another process.
static SHELLS: Mutex<Vec<Shell>> = Mutex::new(Vec::new());

fn shells() -> MutexGuard<'static, Vec<Shell>> {
    SHELLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A shell that runs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shell {
    pid: Pid,
    /// Whether it leads a process group, to which all processes of its command belong.
    leads: bool,
}

impl Shell {
    /// Ends the command at once, with all processes of a pipeline.
    fn kill(self) {
        let _ = match self.leads {
            true => kill_process_group(self.pid, Signal::KILL),
            false => kill_process(self.pid, Signal::KILL),
        };
    }
}

/// Whether this process is in the foreground of its terminal. A command must then stay in the same process group: from one in
/// the background it could not ask for a password. Ctrl-C reaches all processes of the foreground group.
fn is_in_foreground() -> bool {
    let terminal = File::open("/dev/tty").ok();
    let foreground = terminal.and_then(|terminal| tcgetpgrp(terminal).ok());
    foreground == Some(getpgrp())
}

/// Ends all commands that run, for a program that is about to end: what one of them reads must not look to it as if it had come
/// to its end.
pub(crate) fn end_commands() {
    for shell in shells().drain(..) {
        shell.kill();
    }
}

/// A shell command. Dropping it ends the command.
pub(super) struct Spawned {
    line: String,
    child: Option<Child>,
}

impl Spawned {
    pub(super) fn new(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            child: None,
        }
    }

    /// The shell, which is started on first use.
    pub(super) fn child(&mut self, pipes: impl FnOnce(&mut Command)) -> io::Result<&mut Child> {
        if self.child.is_none() {
            let mut command = Command::new("sh");
            command.arg("-c").arg(&self.line);
            let leads = !is_in_foreground();
            if leads {
                command.process_group(0);
            }
            pipes(&mut command);
            let child = command.spawn().map_err(|error| {
                let text = format!("cannot start `{}`: {error}", self.line);
                io::Error::new(error.kind(), text)
            })?;
            shells().extend(pid(&child).map(|pid| Shell { pid, leads }));
            self.child = Some(child);
        }
        self.child
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The shell, with a pipe from this process as its standard input.
    pub(super) fn consumer(&mut self) -> io::Result<&mut Child> {
        self.child(|command| {
            command.stdin(Stdio::piped());
        })
    }

    /// Waits for its exit; a failure is an error. Blocks.
    pub(super) fn succeeded(&mut self) -> io::Result<()> {
        let status = match &mut self.child {
            Some(child) => {
                leave(child);
                child.wait()?
            }
            None => return Ok(()),
        };
        match status.success() {
            true => Ok(()),
            false => Err(Unfinished::command(&self.line, status.code(), &ended(status)).into()),
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            if let Some(shell) = running(child) {
                shell.kill();
            }
            leave(child);
            let _ = child.wait();
        }
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// The shell, unless it was waited for.
fn running(child: &Child) -> Option<Shell> {
    let pid = pid(child)?;
    shells().iter().find(|shell| shell.pid == pid).copied()
}

/// Waits until a shell has ended, and takes it from the list before its process id may become that of another process.
fn leave(child: &Child) {
    if let Some(shell) = running(child) {
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while waitid(WaitId::Pid(shell.pid), ended).is_err_and(|error| error == Errno::INTR) {}
        shells().retain(|other| *other != shell);
    }
}

/// Describes how a process ended.
fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "failed".to_owned(),
    }
}

impl Producer {
    pub(super) fn stdin() -> Self {
        Self::new(From::Stdin)
    }

    pub(super) fn command(line: &str) -> Self {
        Self::new(From::Command(Spawned::new(line)))
    }

    pub(super) fn growing(file: Follow) -> Self {
        Self::new(From::Growing(file))
    }

    fn new(from: From) -> Self {
        Self {
            from,
            allow_empty: false,
            size: None,
            marker: None,
            count: 0,
            tail: Vec::new(),
        }
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.from {
            From::Stdin => io::stdin().read(buffer),
            From::Growing(file) => file.read(buffer),
            From::Command(command) => {
                let child = command.child(|command| {
                    command.stdin(Stdio::null()).stdout(Stdio::piped());
                })?;
                match &mut child.stdout {
                    Some(stdout) => stdout.read(buffer),
                    None => Ok(0),
                }
            }
        }
    }

    /// Records bytes that were read.
    fn note(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.count += bytes.len() as u64;
        if let Some(size) = self.size.filter(|size| self.count > *size) {
            return Err(Unfinished::new(format!("it is longer than --size says, {size}")).into());
        }
        if let Some(marker) = &self.marker {
            let most = marker.len() + LINE_END;
            let last = bytes.len().saturating_sub(most);
            self.tail
                .extend_from_slice(bytes.get(last..).unwrap_or_default());
            let old = self.tail.len().saturating_sub(most);
            self.tail.drain(..old);
        }
        Ok(())
    }

    /// Checks that the source is complete at its end.
    fn end(&mut self) -> io::Result<()> {
        if let From::Command(command) = &mut self.from {
            command.succeeded()?;
        }
        if self.count == 0 && !self.allow_empty {
            return Err(match &self.from {
                From::Stdin => io::Error::other(EmptyStdin),
                From::Command(_) => Unfinished::new("the command wrote nothing").into(),
                From::Growing(_) => Unfinished::new("it ended without a byte").into(),
            });
        }
        if let Some(size) = self.size.filter(|size| self.count != *size) {
            let text = format!(
                "it ended after {}, and --size says {size}",
                counted(self.count, "byte", "bytes")
            );
            return Err(Unfinished::new(text).into());
        }
        if let Some(marker) = &self.marker {
            let tail = &self.tail[..];
            let tail = tail.strip_suffix(b"\n").unwrap_or(tail);
            let tail = tail.strip_suffix(b"\r").unwrap_or(tail);
            if !tail.ends_with(marker) && !self.tail.ends_with(marker) {
                return Err(
                    Unfinished::new("it ended without the text of --require-eof-marker").into(),
                );
            }
        }
        Ok(())
    }
}

impl Read for Producer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.read_some(buffer)?;
        if count == 0 && !buffer.is_empty() {
            return self.end().map(|()| 0);
        }
        self.note(buffer.get(..count).unwrap_or_default())?;
        Ok(count)
    }
}

/// The most bytes of an end of line.
const LINE_END: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut producer: Producer) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        match producer.read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_command_counts_only_with_its_success() {
        assert_eq!(read(Producer::command("printf abc")), Ok(b"abc".to_vec()));
        let error = read(Producer::command("printf abc; exit 7")).unwrap_err();
        assert_eq!(error, "the command `printf abc; exit 7` exited with 7");
        let error = read(Producer::command("printf abc; kill -9 $$")).unwrap_err();
        assert!(error.ends_with("was ended by signal 9"), "{error}");
        let error = read(Producer::command("true")).unwrap_err();
        assert_eq!(error, "the command wrote nothing");
    }

    #[test]
    fn size_and_marker_are_those_of_the_whole() {
        let sized = |line: &str, size| {
            let mut producer = Producer::command(line);
            producer.size = Some(size);
            read(producer).is_ok()
        };
        assert!(sized("printf abc", 3) && !sized("printf abc", 2) && !sized("printf abc", 4));
        let marked = |line: &str| {
            let mut producer = Producer::command(line);
            producer.marker = Some(b"-- end".to_vec());
            read(producer).is_ok()
        };
        for whole in [
            "printf 'x-- end'",
            "printf 'x-- end\\n'",
            "printf 'x-- end\\r\\n'",
            "printf -- '-- end'",
        ] {
            assert!(marked(whole), "{whole}");
        }
        for cut in [
            "printf 'x-- en'",
            "printf -- '-- end.'",
            "printf -- '-- end\\n\\n'",
            "printf x",
        ] {
            assert!(!marked(cut), "{cut}");
        }
    }
}
