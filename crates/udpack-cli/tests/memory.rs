//! The memory of the real server: what a burst took goes back to the system while nobody speaks.

mod common;

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "../../udpack/tests/hostile/bare.rs"]
mod bare;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bare::Bare;
use common::{Server, skipped, until, workdir};

/// What may be left of a burst: buffers that are used again, and what the allocator keeps for running threads.
const LEFT: u64 = 12 << 20;
/// How soon it is given back: two looks of two seconds, and patience with a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Memory of a process that no file holds, in bytes; `None` where the system does not say.
fn memory(server: &Server) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.running.id())).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// Waits until no more than this is held, with nobody speaking to the server.
fn falls_to(server: &Server, most: u64) {
    let deadline = Instant::now() + SOON;
    loop {
        let held = memory(server).expect("it was said before");
        if held <= most {
            return;
        }
        assert!(Instant::now() < deadline, "{held} bytes, not {most}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn frames_that_never_became_whole_leave_no_memory_behind() {
    let server = Server::start();
    server.still_works();
    let Some(before) = memory(&server) else {
        skipped("memory: no /proc/PID/status");
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let listening: SocketAddr = server.value("listening").parse().expect("an address");
    let url = server.url();
    let token = url
        .strip_prefix("udpack://")
        .and_then(|rest| rest.split('@').next());
    let token = token.expect("a token");

    let held = runtime.block_on(async {
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("an endpoint");
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
        let dialled = Bare::dial(&endpoint, listening, config).await;
        let peer = Arc::new(dialled.expect("a sound handshake"));
        let control = peer.enter(token).await;
        let size = 1_100_000_u32;
        let mut bytes = size.to_be_bytes().to_vec();
        bytes.resize(4 + size as usize - 1, 0x5a);
        let bytes = Arc::new(bytes);
        let mut streams = Vec::new();
        for id in 1..=40 {
            let mut stream = peer.channel(id, "events").await;
            let writing = tokio::time::timeout(Duration::from_secs(30), stream.write(&bytes));
            writing.await.expect("all but one byte is taken");
            streams.push(stream);
        }
        (endpoint, peer, control, streams)
    });
    until("the frames are held", || {
        memory(&server).is_some_and(|now| now > before + (30 << 20))
    });
    let (endpoint, peer, ..) = &held;
    runtime.block_on(async {
        peer.conn.close(0_u32.into(), b"");
        endpoint.wait_idle().await;
    });
    falls_to(&server, before + LEFT);
}

#[test]
fn a_large_upload_leaves_no_memory_behind() {
    let server = Server::start();
    server.still_works();
    let Some(before) = memory(&server) else {
        skipped("memory: no /proc/PID/status");
        return;
    };
    let dir = workdir();
    let file = fs::File::create(dir.path().join("large")).expect("a file");
    file.set_len(300 << 20).expect("a hole");
    let out = server.client(dir.path(), &["put", "-q", "large"]);
    assert_eq!(out.code, 0, "{out:?}");
    falls_to(&server, before + LEFT);
}
