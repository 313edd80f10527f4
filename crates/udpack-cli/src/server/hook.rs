//! The operator's program, which is run before a file is accepted and after it is stored.
//!
//! It is run directly, by no shell, with one argument and what it needs to know in its environment: a name from
//! a peer is never part of a command line. It gets none of the server's standard streams.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use udpack::{Peer, Pool, Shares, Tenant};
use udpack_transfer::{Accepted, Hook, HookOffer, HookStored, names};

use crate::output::printable;
use crate::value::hex;

/// A program and how it is run. A handle.
#[derive(Debug, Clone)]
pub(super) struct Program {
    path: Arc<Path>,
    limit: Duration,
    /// Runs of `done`, divided by token; those of `accept` are counted by the receiver.
    places: Pool,
}

/// One run's environment.
type Variables = Vec<(&'static str, OsString)>;

impl Hook for Program {
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        let size = offer.size.map_or(String::new(), |size| size.to_string());
        let variables = vec![
            ("UDPACK_PATH", names::os(&offer.path).into_owned()),
            ("UDPACK_SIZE", size.into()),
            ("UDPACK_PEER", offer.peer.clone().into()),
        ];
        Box::pin(async move { self.ask(&variables).await })
    }

    fn done(&self, stored: HookStored) {
        // Independent of the working directory.
        let file = std::path::absolute(&stored.file).unwrap_or(stored.file);
        let tenant = Tenant::peer(&Peer::new(stored.peer.clone()));
        let variables = vec![
            ("UDPACK_PATH", names::os(&stored.path).into_owned()),
            ("UDPACK_SIZE", stored.size.to_string().into()),
            ("UDPACK_PEER", stored.peer.into()),
            ("UDPACK_FILE", file.into()),
            ("UDPACK_HASH", hex(&stored.hash).into()),
        ];
        self.tell(tenant, variables);
    }
}

impl Program {
    /// The program at this path, see [`find`], which has so long to answer `accept`.
    pub(super) fn new(path: &Path, limit: Duration) -> Self {
        Self {
            path: path.into(),
            limit,
            places: Pool::new(
                "runs of the hook",
                Shares::of(SIDE_BY_SIDE).with_queue(WAITING),
            ),
        }
    }

    /// Asks whether a file may be taken. `Ok` holds another name for it, if it is to have one; `Err` the
    /// sentence for the client.
    ///
    /// # Cancel safety
    /// Dropping it ends the program.
    async fn ask(&self, variables: &Variables) -> Accepted {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            tracing::error!(hook = %self.path.display(), %error, "{what}");
            "the server's hook failed".to_owned()
        };
        let run = async {
            let child = self.spawn("accept", variables)?;
            Ran::of(child).await
        };
        let ran = match tokio::time::timeout(self.limit, run).await {
            Ok(ran) => ran,
            // The program ends with the future that held it.
            Err(late) => return Err(failed("hook took too long: refused", &late)),
        };
        let ran = ran.map_err(|error| failed("hook cannot be run: refused", &error))?;
        if !ran.status.success() {
            return Err(match ran.stderr.as_str() {
                "" => "the server's hook refused it".to_owned(),
                reason => printable(reason),
            });
        }
        Ok(Some(ran.stdout).filter(|name| !name.is_empty()))
    }

    /// Runs the program for a stored file. Returns at once; a failure is logged and changes nothing.
    fn tell(&self, tenant: Tenant, variables: Variables) {
        let program = self.clone();
        tokio::spawn(async move {
            let _place = match program.places.take(&tenant).await {
                Ok(place) => place,
                Err(full) => {
                    let hook = program.path.display();
                    tracing::warn!(%hook, %full, "hook is too slow: it is not run for a stored file");
                    return;
                }
            };
            let run = async {
                let child = program.spawn("done", &variables)?;
                Ran::of(child).await
            };
            let hook = program.path.display();
            match tokio::time::timeout(DONE_LIMIT, run).await {
                Ok(Ok(ran)) if ran.status.success() => {}
                Ok(Ok(ran)) => {
                    let (status, reason) = (ran.status, printable(&ran.stderr));
                    tracing::warn!(%hook, %status, reason, "hook failed");
                }
                Ok(Err(error)) => tracing::warn!(%hook, %error, "hook cannot be run"),
                Err(_) => tracing::warn!(%hook, "hook took too long and was ended"),
            }
        });
    }

    fn spawn(&self, argument: &str, variables: &Variables) -> io::Result<Run> {
        let variables = variables.iter();
        let child = Command::new(&*self.path)
            .arg(argument)
            .envs(variables.map(|(name, value)| (*name, OsStr::new(value))))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .process_group(0)
            .spawn();
        child.map(Run)
    }
}

/// A run, in a process group of its own. Dropping it before the program has ended ends all processes of the group.
struct Run(Child);

impl Drop for Run {
    fn drop(&mut self) {
        // It has an id until it was waited for, and so long no other process has that id.
        let id = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(group) = id.and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// How a run ended.
#[derive(Debug)]
struct Ran {
    status: ExitStatus,
    /// The first lines of what it wrote.
    stdout: String,
    stderr: String,
}

impl Ran {
    /// Waits for the program's end. What it leaves running in the background may keep its streams open: nobody
    /// waits for that.
    async fn of(mut run: Run) -> io::Result<Self> {
        let child = &mut run.0;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let status = {
            let reading = async {
                let (out, err) = tokio::join!(keep(stdout, &mut out), keep(stderr, &mut err));
                out.and(err)
            };
            let mut reading = std::pin::pin!(reading);
            tokio::select! {
                biased;
                read = &mut reading => {
                    read?;
                    child.wait().await?
                }
                status = child.wait() => {
                    // Output written before the end is in the pipes by now.
                    let _ = tokio::time::timeout(GRACE, reading).await;
                    status?
                }
            }
        };
        Ok(Self {
            status,
            stdout: names::from_bytes(first_line(&out)).into_owned(),
            stderr: String::from_utf8_lossy(first_line(&err)).into_owned(),
        })
    }
}

/// Reads to the end, so that the program never waits for a reader, and keeps the beginning.
async fn keep(stream: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) -> io::Result<()> {
    let Some(mut stream) = stream else {
        return Ok(());
    };
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await?;
        let read = buffer.get(..count).unwrap_or_default();
        if read.is_empty() {
            return Ok(());
        }
        let room = LINE.saturating_sub(kept.len());
        kept.extend(read.iter().take(room));
    }
}

fn first_line(bytes: &[u8]) -> &[u8] {
    let line = bytes.split(|byte| *byte == b'\n').next();
    line.unwrap_or_default().trim_ascii()
}

/// Finds the program before the server starts: a hook that is missing would refuse everything.
pub(super) fn find(path: &Path) -> io::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let runs = |path: &Path| {
        std::fs::metadata(path)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let bare =
        path.components().count() == 1 && !path.as_os_str().as_encoded_bytes().contains(&b'/');
    if !bare {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        if !runs(path) {
            return Err(io::Error::other("it is not executable"));
        }
        return path.canonicalize();
    }
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs)
        .map(|dir| dir.join(path))
        .find(|found| runs(found))
        .ok_or_else(|| io::Error::other("it is in no directory of PATH"))
}

/// How long `done` may take.
const DONE_LIMIT: Duration = Duration::from_secs(600);
/// Runs of `done` at once.
const SIDE_BY_SIDE: usize = 4;
/// Runs of `done` that may wait, a quarter of them of one token; beyond, files are not told of.
const WAITING: usize = 40_000;
/// How long to read on after a program's end.
const GRACE: Duration = Duration::from_millis(200);
/// Bytes of a program's first line that are kept.
const LINE: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Read as _};
    use std::os::unix::fs::PermissionsExt as _;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("hook");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).expect("chmod");
        path
    }

    async fn ask(text: &str, limit: Duration) -> Accepted {
        let dir = tempfile::tempdir().expect("a directory");
        let program = Program::new(&script(dir.path(), text), limit);
        program.ask(&vec![("UDPACK_PATH", "a $(b)".into())]).await
    }

    #[tokio::test]
    async fn exit_code_and_first_lines_decide() {
        let long = Duration::from_secs(30);
        assert_eq!(ask("exit 0", long).await, Ok(None));
        assert_eq!(
            ask("echo \"$1:$UDPACK_PATH\"; echo more", long).await,
            Ok(Some("accept:a $(b)".to_owned()))
        );
        assert_eq!(
            ask("echo no: $UDPACK_PATH >&2; echo more >&2; exit 3", long).await,
            Err("no: a $(b)".to_owned())
        );
        assert_eq!(
            ask("exit 1", long).await,
            Err("the server's hook refused it".to_owned())
        );
        assert_eq!(
            ask("echo name; sleep 40 &", long).await,
            Ok(Some("name".to_owned())),
            "nobody waits for what goes on in the background"
        );
        let much = "head -c 1000000 /dev/zero | tr '\\0' x; echo no >&2";
        assert_eq!(
            ask(much, long)
                .await
                .map(|name| name.map(|name| name.len())),
            Ok(Some(LINE))
        );
    }

    #[tokio::test]
    async fn one_that_hangs_or_is_missing_refuses() {
        let failed = Err("the server's hook failed".to_owned());
        assert_eq!(
            ask("exec sleep 1000", Duration::from_millis(50)).await,
            failed
        );
        let program = Program::new(Path::new("/nonexistent/hook"), Duration::from_secs(30));
        assert_eq!(program.ask(&Vec::new()).await, failed);
    }

    #[tokio::test]
    async fn one_that_nobody_waits_for_any_longer_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().expect("a directory");
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.is_ok_and(|made| made.success()));
        let text = format!(
            "exec >{}; echo begun; sleep 1000 | sleep 1000",
            fifo.display()
        );
        let (begun, began) = tokio::sync::oneshot::channel();
        let told = tokio::task::spawn_blocking(move || {
            let mut told = BufReader::new(std::fs::File::open(fifo).expect("it writes"));
            let mut line = String::new();
            told.read_line(&mut line).expect("text");
            begun.send(line).expect("somebody waits");
            // Ends when nobody has it open for writing.
            told.read_to_end(&mut Vec::new()).expect("an end")
        });
        tokio::select! {
            ran = ask(&text, Duration::from_secs(600)) => panic!("{ran:?}"),
            line = began => assert_eq!(line.as_deref(), Ok("begun\n")),
        }
        assert_eq!(told.await.expect("no panic"), 0);
    }

    #[test]
    fn only_what_can_be_run_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = script(dir.path(), "");
        assert!(find(&path).is_ok());
        assert!(find(dir.path()).is_err());
        assert!(find(Path::new("sh")).is_ok());
        assert!(find(Path::new("no-such-program-anywhere")).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(find(&path).is_err());
    }
}
