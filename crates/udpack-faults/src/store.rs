//! SIGKILL of a server whose files go to an object store (moto), at random instants: once where they go there at once
//! (`--store`), once where they go there behind the disk (`--push`). Each file that a client was told is stored must be in the
//! bucket in the end, what is in the bucket must be whole at any time, and no upload may be left there.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{self, Rig, Server};
use crate::rng::Rng;

#[derive(Clone, Debug, Args)]
pub(crate) struct StoreArgs {
    /// How often the server is killed, each way by half.
    #[arg(long, default_value_t = 20)]
    kills: u64,

    /// Longest time that the store answers nothing, in milliseconds.
    #[arg(long, default_value_t = 1500)]
    pause: u64,
}

/// How files come to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Pushed,
}

impl Way {
    fn prefix(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Pushed => "pushed",
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Self::Direct => "--store",
            Self::Pushed => "--push",
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    acked: u64,
    kills: u64,
    pauses: u64,
    wrong: u64,
}

impl Tally {
    fn wrong(&mut self, what: &str) {
        self.wrong += 1;
        println!("WRONG: {what}");
    }
}

/// Runs both ways; true when nothing was wrong.
pub(crate) fn run(args: &StoreArgs, rig: &Rig, mut rng: Rng) -> anyhow::Result<bool> {
    if !rig.server_knows("--push")? {
        println!("SKIPPED: udpack-server has no object stores (cargo build --features store)");
        return Ok(true);
    }
    let Some(moto) = Moto::start(rig)? else {
        println!("SKIPPED: no moto_server: scripts/install-test-tools --python");
        return Ok(true);
    };
    let began = Instant::now();
    let rig = rig.clone().with_env(&[
        ("AWS_ENDPOINT", &format!("http://127.0.0.1:{}", moto.port)),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ]);
    let mut tally = Tally::default();
    for way in [Way::Direct, Way::Pushed] {
        break_it(args, way, &rig, &mut rng, &moto, &mut tally)?;
    }
    for line in rig::panics(&rig.log()) {
        tally.wrong(&line);
    }
    println!(
        "store: {} kills, {} pauses of the store, {} files acknowledged: {} wrong; {:.1} s",
        tally.kills,
        tally.pauses,
        tally.acked,
        tally.wrong,
        began.elapsed().as_secs_f64()
    );
    if tally.wrong == 0 {
        fs::remove_dir_all(rig.work())?;
    }
    Ok(tally.wrong == 0)
}

fn break_it(
    args: &StoreArgs,
    way: Way,
    rig: &Rig,
    rng: &mut Rng,
    moto: &Moto,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let dir = rig.work().join(way.prefix());
    let sources = rig.work().join(format!("{}-sources", way.prefix()));
    fs::create_dir_all(&sources)?;
    let address = format!("s3://bucket/{}", way.prefix());
    let port = rig::free_port(rng)?;
    let serve = || rig.server_with(port, &dir, &[way.flag(), &address]);
    let mut server = serve()?;
    let mut files = BTreeMap::new();
    let mut number = 0;
    let mut kills = 0;
    while kills < args.kills.div_ceil(2) {
        let paths = sources_of(rng, &sources, &mut number, &mut files)?;
        let put = rig.put(port, &paths, None)?;
        for _ in 0..rng.range(1, 3) {
            thread::sleep(Duration::from_millis(rng.range(20, 900)));
            if rng.chance(30) {
                moto.pause(Duration::from_millis(rng.range(1, args.pause.max(2))))?;
                tally.pauses += 1;
            }
            server = killed(server, serve)?;
            kills += 1;
        }
        let told = put.finish(PATIENCE)?;
        // Whoever came while nobody was there does not try again.
        if !told.success && !told.unmet {
            tally.wrong(&format!(
                "{way:?}: a client did not finish: {:?}",
                told.errors
            ));
        }
        tally.acked += told.acked.len() as u64;
        for (name, hash) in &told.acked {
            if files.get(name) != Some(hash) {
                tally.wrong(&format!("{way:?}: {name} is acknowledged as {hash}"));
            }
        }
        if way == Way::Direct {
            check(
                way,
                moto,
                &files,
                told.acked.iter().map(|(name, _)| name),
                tally,
            )?;
        }
    }
    tally.kills += kills;
    if way == Way::Pushed {
        let notes = dir.join(".udpack/changes");
        let deadline = Instant::now() + PATIENCE;
        while fs::read_dir(&notes)?.next().is_some() {
            ensure!(Instant::now() < deadline, "the push does not end");
            thread::sleep(Duration::from_millis(20));
        }
        let there = fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name()));
        let there: Vec<_> = there.collect::<Result<_, std::io::Error>>()?;
        let there = there.iter().filter_map(|name| name.to_str());
        let there: Vec<String> = there
            .filter(|name| files.contains_key(*name))
            .map(str::to_owned)
            .collect();
        check(way, moto, &files, there.iter(), tally)?;
    }
    if let Err(error) = server.terminate() {
        tally.wrong(&format!("{error:#}"));
    }
    // What a crash left is ended when the store is opened again, and by then nothing is interrupted.
    let last = serve()?;
    let left = moto.text("/bucket?uploads")?.matches("<UploadId>").count();
    if left > 0 {
        tally.wrong(&format!("{way:?}: {left} uploads are left in the store"));
    }
    last.terminate()
}

fn killed(server: Server, serve: impl Fn() -> anyhow::Result<Server>) -> anyhow::Result<Server> {
    server.kill();
    serve()
}

/// A few new files: small ones, and ones of several parts.
fn sources_of(
    rng: &mut Rng,
    dir: &Path,
    number: &mut u64,
    files: &mut BTreeMap<String, String>,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for _ in 0..rng.range(2, 5) {
        *number += 1;
        let len = match rng.chance(50) {
            true => rng.range(0, 200_000),
            false => rng.range(8 << 20, 40 << 20),
        };
        let mut bytes = vec![0; usize::try_from(len)?];
        let seed = rng.range(0, u64::MAX - 1).to_le_bytes();
        blake3::Hasher::new()
            .update(&seed)
            .finalize_xof()
            .fill(&mut bytes);
        let name = format!("file-{number}");
        let path = dir.join(&name);
        fs::write(&path, &bytes)?;
        files.insert(name, blake3::hash(&bytes).to_string());
        paths.push(path);
    }
    Ok(paths)
}

/// All that is in the bucket is whole, and these are in it.
fn check<'a>(
    way: Way,
    moto: &Moto,
    files: &BTreeMap<String, String>,
    must: impl Iterator<Item = &'a String>,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let prefix = way.prefix();
    let keys = moto.text(&format!("/bucket?list-type=2&prefix={prefix}/"))?;
    let keys = keys
        .split("<Key>")
        .skip(1)
        .filter_map(|rest| rest.split("</Key>").next());
    let names: Vec<&str> = keys
        .filter_map(|key| key.strip_prefix(prefix)?.strip_prefix('/'))
        .filter(|name| !name.starts_with(".udpack/"))
        .collect();
    for name in must {
        if !names.contains(&name.as_str()) {
            tally.wrong(&format!("{way:?}: {name} is lost"));
        }
    }
    for name in names {
        let hash = blake3::hash(&moto.get(&format!("/bucket/{prefix}/{name}"))?).to_string();
        if files.get(name) != Some(&hash) {
            tally.wrong(&format!("{way:?}: {name} is not what was sent"));
        }
    }
    Ok(())
}

/// A server that speaks S3, with an empty bucket.
struct Moto {
    child: Child,
    port: u16,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    /// `None` where it is not installed.
    fn start(rig: &Rig) -> anyhow::Result<Option<Self>> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let start = |name: PathBuf| {
            let mut command = Command::new(name);
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        // Where scripts/install-test-tools puts it.
        let names = [
            rig.bins().join("../python/bin/moto_server"),
            "moto_server".into(),
        ];
        let Some(child) = names.into_iter().map(start).find_map(Result::ok) else {
            return Ok(None);
        };
        let moto = Self { child, port };
        let deadline = Instant::now() + PATIENCE;
        while !moto
            .ask("PUT", "/bucket")
            .is_ok_and(|it| it.starts_with(b"HTTP/1.1 200"))
        {
            ensure!(Instant::now() < deadline, "moto_server does not answer");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(moto))
    }

    fn ask(&self, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{SOMEBODY}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }

    fn get(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let answer = self.ask("GET", path)?;
        let head = answer.windows(4).position(|it| it == b"\r\n\r\n");
        let head = head.context("no head in the answer of moto")?;
        if !answer.starts_with(b"HTTP/1.1 200") {
            bail!("moto answers {}", String::from_utf8_lossy(&answer[..head]));
        }
        Ok(answer[head + 4..].to_vec())
    }

    fn text(&self, path: &str) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&self.get(path)?).into_owned())
    }

    /// It answers nothing for so long.
    fn pause(&self, pause: Duration) -> anyhow::Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP)?;
        thread::sleep(pause);
        Ok(kill_process(pid, Signal::CONT)?)
    }
}

/// moto shows objects of one request to nobody, and does not look at a signature.
const SOMEBODY: &str = "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(240);
