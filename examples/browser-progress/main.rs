//! A list of jobs with live progress: a job runs at the server, and how far it is goes to the browser that asked, at most ten
//! times a second. Whoever leaves the list, or stops one, stops its jobs.
//!
//! Run it with `cargo run --example browser-progress`, and open the page that it names.

#[path = "../browser/page.rs"]
mod page;

use std::error::Error;
use std::time::Duration;

use futures_util::stream;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use udpack::{Data, Hello, Identity, Peer, Router, Server, Streaming, Web};

const EACH: Duration = Duration::from_millis(100);

#[derive(Clone, Serialize)]
struct Progress {
    done: u32,
    total: u32,
}

/// The job: a hundred steps a second.
async fn work(total: u32, tell: watch::Sender<Progress>) {
    for done in 1..=total {
        sleep(Duration::from_millis(10)).await;
        tell.send_replace(Progress { done, total });
    }
}

async fn start(Data(total): Data<u32>) -> Streaming {
    let (tell, seen) = watch::channel(Progress { done: 0, total });
    // The job ends with the set, and that with the stream of items.
    let mut job = JoinSet::new();
    job.spawn(work(total, tell));
    let next = async |(mut seen, job): (watch::Receiver<Progress>, JoinSet<()>)| {
        sleep(EACH).await;
        // The latest counts; the last is always told.
        seen.changed().await.ok()?;
        let progress = seen.borrow_and_update().clone();
        Some((progress, (seen, job)))
    };
    Streaming::new(stream::unfold((seen, job), next))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .web(Web::new())
        .channel("jobs", Router::new().on("start", start));
    page::run(server, include_str!("index.html"), include_str!("page.js")).await
}
