//! `demo`: the whole way in one process. A server on a loopback port, a client that uploads to it, and a
//! check of the stored file that trusts neither. Everything lies in a temporary directory.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use udpack::{Client, CloseCode, Deny, Hello, Identity, Peer, Server, generate_token};
use udpack_transfer::{
    Receiver, ReceiverConfig, RelPath, Source, Store, StoreConfig, TransferError, Uploader,
};

use super::report::{Origin, Origins, Report, Thing, Transfer};
use crate::args::DemoArgs;
use crate::exit::{Failure, Kind};
use crate::logging::Console;
use crate::progress::{Meter, size};
use crate::signals::Interrupts;

pub(super) async fn run(
    args: DemoArgs,
    console: &Console,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut report = Report::new(console, args.show.json, &args.log);
    report.expect(Some(1));
    let result = tokio::select! {
        result = demo(&args, console, &mut report) => result,
        () = interrupts.first() => Err(Failure::interrupted().into()),
    };
    report.finish(result)
}

async fn demo(args: &DemoArgs, console: &Console, report: &mut Report) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("udpack-demo-")
        .tempdir()
        .context("cannot make a temporary directory")?;
    let (file, name) = match &args.file {
        Some(file) => (file.clone(), file_name(file)),
        None => {
            let file = dir.path().join(MADE);
            let made = file.clone();
            blocking(move || make(&made))
                .await
                .with_context(|| format!("cannot write {}", file.display()))?;
            (file, MADE.parse()?)
        }
    };
    let metadata = std::fs::metadata(&file).map_err(|source| TransferError::Source {
        path: file.clone(),
        source,
    })?;

    let uploads = dir.path().join("uploads");
    let config = StoreConfig {
        max_file: None,
        min_free: Some(0),
        ..StoreConfig::default()
    };
    let receiver = Receiver::new(Store::open(&uploads, config)?, ReceiverConfig::default());
    let token = generate_token();
    let expected = token.clone();
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(move |hello: Hello| {
            let known = hello.token() == expected;
            async move {
                if known {
                    Ok(Peer::new("demo"))
                } else {
                    Err(Deny::auth_failed())
                }
            }
        })
        .congestion(args.cc.into());
    let server = receiver.attach(server).bind("127.0.0.1:0").await?;
    let address = server.local_addr().to_string();
    let socket = Client::builder()
        .pin(server.fingerprint())
        .token(token)
        .congestion(args.cc.into())
        .connect(&address)
        .await?;

    report.start(&address, Some(metadata.len()));
    let began = Instant::now();
    {
        let upload = Uploader::new(&socket).put([Source::file(&file, name.clone())]);
        let origins = Origins::default();
        origins.insert(
            0,
            Origin {
                shown: file.display().to_string(),
                what: Thing::File,
            },
        );
        let mut meter = Meter::new(args.show.progress, console);
        report
            .follow(Transfer::Up(upload), None, &origins, &mut meter)
            .await;
    }
    let secs = began.elapsed().as_secs_f64();
    socket.close(CloseCode::NORMAL, "done").await;
    server.close(CloseCode::NORMAL, "the demo is over").await;
    if !report.all_stored() {
        return Ok(());
    }

    let stored = uploads.join(name.as_str());
    let (ours, theirs) = blocking(move || Ok((hash(&file)?, hash(&stored)?)))
        .await
        .context("cannot read the stored file back")?;
    if ours != theirs {
        return Err(Failure::new(
            Kind::Integrity,
            "the stored file is not the file that was sent",
        )
        .into());
    }
    report.line(&format!(
        "verified  {ours}  read back from the server's disk"
    ));
    report.line(&format!(
        "speed  {}/s  {} in {secs:.2} s, written to disk and synced",
        size(metadata.len() as f64 / secs.max(1e-6)),
        size(metadata.len() as f64),
    ));
    Ok(())
}

/// The file's own name, where it can be one at a server.
fn file_name(file: &Path) -> RelPath {
    file.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.parse().ok())
        .unwrap_or_else(|| MADE.parse().expect("a plain name is a valid path"))
}

/// Fills a file with bytes that no link can compress.
fn make(path: &PathBuf) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut random = blake3::Hasher::new().update(b"udpack demo").finalize_xof();
    let mut block = vec![0; 1 << 20];
    for _ in 0..MADE_BLOCKS {
        random.fill(&mut block);
        file.write_all(&block)?;
    }
    Ok(())
}

fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

const MADE: &str = "demo.bin";
/// Of 1 MiB each.
const MADE_BLOCKS: usize = 64;
