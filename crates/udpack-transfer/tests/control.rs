//! A server as its operators see it: the channel `stats`, what `jobs` says of phases, ends and reasons, and who may do what.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::future::{Future, IntoFuture as _};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use common::{Fixture, noise, token, token_file};
use raw::{RawLane, V, chunk, file, finish, get, map};
use tokio::sync::Notify;
use udpack::cluster::Memory;
use udpack::{Channel, CloseCode, Drain, RequestError, ServerBuilder, Socket};
use udpack_transfer::{
    Accepted, Answer, Code, Control, Hook, HookOffer, HookStored, HookWhole, JOBS_CHANNEL, Job,
    JobState, Jobs, JobsEvent, Phase, Receiver, ReceiverConfig, Remote, STATS_CHANNEL, ServerStats,
    StatsWatch, Store, StoreConfig, TransferError,
};

const CLIENTS: &[(&str, &str)] = &[
    ("boss", "scope=admin"),
    ("guard", "scope=watch"),
    ("reader", "scope=read"),
    ("writer", "scope=write"),
    ("tenant", "scope=read,write prefix=teams/a quota=1M"),
];

/// What a test waits for comes within this, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn bounded<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// A server that is looked at.
struct World {
    fixture: Fixture,
    control: Control,
    receiver: Receiver,
    looking: tokio::task::JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

impl World {
    async fn new() -> Self {
        Self::with(ReceiverConfig::default(), |receiver| receiver).await
    }

    async fn with(config: ReceiverConfig, change: impl FnOnce(Receiver) -> Receiver) -> Self {
        Self::serving(config, change, |server| server).await
    }

    async fn node(memory: &Memory, name: &str) -> Self {
        let node = memory.node();
        let more = |server: ServerBuilder| server.cluster(node).advertise(name, "");
        Self::serving(ReceiverConfig::default(), |receiver| receiver, more).await
    }

    async fn serving(
        config: ReceiverConfig,
        change: impl FnOnce(Receiver) -> Receiver,
        more: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let receiver = change(Receiver::new(store, config));
        let tokens = dir.path().join("tokens");
        let tokens = token_file(&tokens, CLIENTS);
        let control = Control::new(&receiver);
        let more = |server| more(control.attach(server));
        let fixture = Fixture::serve_more(dir, receiver.clone(), tokens, more).await;
        let (looker, server) = (control.clone(), fixture.server.clone());
        let looking = tokio::spawn(async move { looker.run(&server).await });
        Self {
            fixture,
            control,
            receiver,
            looking,
        }
    }

    async fn socket(&self, name: &str) -> Socket {
        self.fixture.connect_as(&token(name)).await
    }

    async fn lane(&self, name: &str) -> (Socket, RawLane) {
        let socket = self.socket(name).await;
        let lane = RawLane::open(&socket).await;
        (socket, lane)
    }
}

/// The state when it is this.
async fn when(
    watch: &mut StatsWatch,
    what: &str,
    is: impl Fn(&ServerStats) -> bool,
) -> ServerStats {
    bounded(what, async {
        loop {
            let stats = watch.next().await.expect("more").expect("a sound state");
            if is(&stats) {
                return stats;
            }
        }
    })
    .await
}

/// The job when it is this, of those that are told as running or changed.
async fn job_when(jobs: &mut Jobs, what: &str, is: impl Fn(&Job) -> bool) -> Job {
    bounded(what, async {
        loop {
            let found = match jobs.next().await.expect("more").expect("a sound job") {
                JobsEvent::List(all) => all,
                JobsEvent::Changed(job) => vec![job],
                _ => Vec::new(),
            };
            if let Some(job) = found.into_iter().find(|job| is(job)) {
                return job;
            }
        }
    })
    .await
}

fn refused<T: std::fmt::Debug>(answer: Result<T, TransferError>) -> Code {
    match answer {
        Err(TransferError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

/// The code of the answer to a request, or that there was none.
async fn ask(channel: &Channel, event: &str, data: &V) -> String {
    let request = channel.request::<_, ()>(event, data);
    let answer = bounded("an answer", request.into_future()).await;
    match answer {
        Ok(()) => "reply".to_owned(),
        Err(RequestError::Fault(fault)) => fault.code,
        Err(RequestError::NoHandler) => "no_handler".to_owned(),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn who_may_watch_sees_all_and_ends_nothing() {
    let world = World::new().await;
    let (_writer, mut lane) = world.lane("writer").await;
    lane.say(&file(1, "theirs", 8)).await;
    lane.say(&chunk(1, 0, b"abcd")).await;
    lane.acked(1, 4).await;
    let guard = world.socket("guard").await;
    let mut jobs = Remote::new(&guard).jobs();
    let job = job_when(&mut jobs, "the job", |job| job.path == "theirs").await;
    assert_eq!(
        (job.peer.as_str(), job.bytes, job.size),
        ("writer", 4, Some(8))
    );
    assert_eq!(
        refused(jobs.cancel(job.id, Some("no")).await),
        Code::Forbidden
    );
    let mut watch = Remote::new(&guard).stats();
    let stats = when(&mut watch, "the state", |_| true).await;
    assert_eq!((stats.jobs.puts, stats.jobs.gets), (1, 0));
    let victim = stats.sockets.iter().find(|socket| socket.peer == "writer");
    let victim = victim.expect("a socket").id.clone();
    assert_eq!(refused(watch.kick(&victim, None).await), Code::Forbidden);
    assert_eq!(refused(watch.drain().await), Code::Forbidden);
    // Nor does it read, list or write.
    let asking = RawLane::open(&guard).await;
    let listed: Result<(), _> = asking.request(&("list", map([]))).await;
    assert_eq!(listed.expect_err("no right to read").0, "forbidden");
    let mut asking = asking;
    asking.say(&file(1, "mine", 0)).await;
    assert_eq!(asking.hear().await.line, "error 1 forbidden");
    // All is as it was.
    lane.say(&chunk(1, 4, b"efgh")).await;
    lane.say(&finish(1, b"abcdefgh")).await;
    assert_eq!(lane.hear().await.line, "done 1 theirs 8");
}

#[tokio::test]
async fn who_may_not_watch_sees_nothing_of_others() {
    let world = World::new().await;
    let (_writer, mut lane) = world.lane("writer").await;
    lane.say(&file(1, "theirs", 8)).await;
    lane.say(&chunk(1, 0, b"abcd")).await;
    lane.acked(1, 4).await;
    for name in ["reader", "writer", "tenant"] {
        let socket = world.socket(name).await;
        let mut watch = Remote::new(&socket).stats();
        match bounded(name, watch.next()).await.expect("an answer") {
            Err(TransferError::Closed(reason)) => {
                assert_eq!(reason.code, CloseCode::REFUSED, "{name}: {reason}");
            }
            other => panic!("{name}: {other:?}"),
        }
        let mut jobs = Remote::new(&socket).jobs();
        let first = bounded(name, jobs.next())
            .await
            .expect("a list")
            .expect("a list");
        let seen = usize::from(name == "writer");
        match first {
            JobsEvent::List(all) => assert_eq!(all.len(), seen, "{name}: {all:?}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_reason_reaches_the_client_and_those_who_watch_later() {
    let world = World::new().await;
    let (_writer, mut lane) = world.lane("writer").await;
    let boss = world.socket("boss").await;
    let mut jobs = Remote::new(&boss).jobs();
    lane.say(&file(1, "first", 8)).await;
    let job = job_when(&mut jobs, "the first", |job| job.path == "first").await;
    let raw = boss.open(JOBS_CHANNEL).await.expect("a channel");
    let long = "x".repeat(257);
    for bad in [long.as_str(), "two\nlines", "\u{1b}[2J", "\u{202e}gpj.exe"] {
        let asked = map([("job", job.id.into()), ("reason", bad.into())]);
        assert_eq!(ask(&raw, "cancel", &asked).await, "bad_payload", "{bad:?}");
    }
    let asked = map([("job", job.id.into()), ("reason", 7.into())]);
    assert_eq!(ask(&raw, "cancel", &asked).await, "bad_payload");
    jobs.cancel(job.id, Some("too large for today"))
        .await
        .expect("granted");
    let heard = lane.hear().await;
    assert_eq!(heard.line, "error 1 cancelled");
    assert_eq!(heard.text, "cancelled at the server: too large for today");
    let over = |job: &Job| job.state != JobState::Running;
    let ended = job_when(&mut jobs, "its end", over).await;
    assert_eq!(ended.state, JobState::Cancelled);
    assert_eq!(ended.text.as_deref(), Some("too large for today"));
    // Without a reason, and with an empty one.
    for (id, reason) in [(2, None), (3, Some(""))] {
        lane.say(&file(id, "again", 8)).await;
        let runs = |job: &Job| job.path == "again" && job.state == JobState::Running;
        let job = job_when(&mut jobs, "another", runs).await;
        jobs.cancel(job.id, reason).await.expect("granted");
        assert_eq!(lane.hear().await.text, "cancelled at the server");
        let ended = job_when(&mut jobs, "its end", over).await;
        assert_eq!((ended.id, ended.text), (job.id, None));
    }
    // One that fails, and one that is stored.
    lane.say(&file(4, "wrong", 4)).await;
    lane.say(&chunk(4, 0, b"abcd")).await;
    lane.say(&finish(4, b"efgh")).await;
    assert_eq!(lane.hear().await.line, "error 4 hash_mismatch retry");
    lane.say(&file(5, "right", 0)).await;
    lane.say(&finish(5, b"")).await;
    assert_eq!(lane.hear().await.line, "done 5 right 0");
    let is_right = |job: &Job| job.path == "right" && job.state == JobState::Done;
    job_when(&mut jobs, "the last", is_right).await;
    let mut later = Remote::new(&boss).jobs();
    let list = bounded("a list", later.next())
        .await
        .expect("a list")
        .expect("a list");
    assert_eq!(list, JobsEvent::List(Vec::new()));
    let JobsEvent::Ended(ended) = bounded("the rest", later.next())
        .await
        .expect("it")
        .expect("it")
    else {
        panic!("those that ended come after the list");
    };
    let told: Vec<_> = ended
        .iter()
        .map(|job| (job.path.as_str(), job.state, job.code.as_deref()))
        .collect();
    assert_eq!(
        told,
        [
            ("right", JobState::Done, None),
            ("wrong", JobState::Failed, Some("hash_mismatch")),
            ("again", JobState::Cancelled, None),
            ("again", JobState::Cancelled, None),
            ("first", JobState::Cancelled, None),
        ]
    );
    let text = ended[1].text.as_deref().expect("a sentence");
    assert!(text.starts_with("hash mismatch"), "{text}");
    assert!(ended.iter().all(|job| job.ago.is_some()), "{ended:?}");
    // Another client sees none of it.
    let mut others = Remote::new(&world.socket("reader").await).jobs();
    let list = bounded("a list", others.next())
        .await
        .expect("a list")
        .expect("a list");
    assert_eq!(list, JobsEvent::List(Vec::new()));
    let next = tokio::time::timeout(Duration::from_millis(1), others.next()).await;
    assert!(next.is_err(), "{next:?}");
}

/// Agrees when it is told to.
#[derive(Default)]
struct Gate(Arc<Notify>);

impl Hook for Gate {
    fn accept<'a>(
        &'a self,
        _: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(async { Ok(None) })
    }

    fn verify<'a>(&'a self, _: &'a HookWhole) -> Answer<'a> {
        Box::pin(async {
            self.0.notified().await;
            Ok(())
        })
    }

    fn done(&self, _: HookStored) {}
}

#[tokio::test]
async fn jobs_say_what_they_are_doing() {
    let gate = Gate::default();
    let open = gate.0.clone();
    let config = ReceiverConfig {
        downloads: 1,
        ..ReceiverConfig::default()
    };
    let world = World::with(config, |receiver| receiver.hook(gate)).await;
    let boss = world.socket("boss").await;
    let mut jobs = Remote::new(&boss).jobs();
    let (_writer, mut lane) = world.lane("writer").await;
    let bytes = noise(1, 3 << 20);
    lane.say(&file(1, "a", bytes.len() as u64)).await;
    lane.say(&chunk(1, 0, &bytes[..100_000])).await;
    let receives = |job: &Job| job.phase == Some(Phase::Receiving) && job.bytes == 100_000;
    job_when(&mut jobs, "receiving", receives).await;
    for at in (100_000..bytes.len()).step_by(100_000) {
        let end = bytes.len().min(at + 100_000);
        lane.say(&chunk(1, at as u64, &bytes[at..end])).await;
    }
    lane.say(&finish(1, &bytes)).await;
    let checks = |job: &Job| job.phase == Some(Phase::Checking);
    let job = job_when(&mut jobs, "checking", checks).await;
    assert_eq!(job.bytes, bytes.len() as u64);
    assert!(!job.stalled, "{job:?}");
    open.notify_one();
    assert_eq!(lane.hear().await.line, format!("done 1 a {}", bytes.len()));
    let job = job_when(&mut jobs, "the end", |job| job.state == JobState::Done).await;
    assert_eq!((job.phase, job.rate), (None, 0));
    // A download whose client takes nothing, and one that waits behind it.
    let large = fs::File::create(world.fixture.root().join("large")).expect("a file");
    large.set_len(512 << 20).expect("a hole");
    let (first, down) = world.lane("reader").await;
    down.say(&get(1, "large")).await;
    let sends = |job: &Job| job.phase == Some(Phase::Sending) && job.bytes > 0;
    let job = job_when(&mut jobs, "sending", sends).await;
    assert_eq!(job.size, Some(512 << 20));
    let (_second, waiting) = world.lane("tenant").await;
    fs::create_dir_all(world.fixture.root().join("teams/a")).expect("a directory");
    fs::write(world.fixture.root().join("teams/a/b"), b"b").expect("a file");
    waiting.say(&get(1, "b")).await;
    let waits = |job: &Job| job.path == "teams/a/b" && job.phase == Some(Phase::Waiting);
    job_when(&mut jobs, "waiting", waits).await;
    first.abort(CloseCode::NORMAL, "");
}

#[tokio::test]
async fn figures_agree_with_what_was_sent_and_leave_out_the_telling() {
    const CLIENTS: u64 = 20;
    const SIZE: usize = 300_000;
    let world = World::new().await;
    let guard = world.socket("guard").await;
    let mut watch = Remote::new(&guard).stats();
    let first = when(&mut watch, "the first", |_| true).await;
    assert_eq!((first.sockets_in_all, first.rooms_in_all), (1, 0));
    let own = &first.sockets[0];
    assert_eq!(
        (own.peer.as_str(), own.transport.as_str()),
        ("guard", "quic")
    );
    assert_eq!(own.id, guard.id().as_str());
    assert!(own.connected && own.channels == 1, "{own:?}");
    assert!(
        first.memory.is_none_or(|memory| memory > 1 << 20),
        "{first:?}"
    );
    assert!(first.disk_free <= first.disk_total && first.disk_free.is_some());
    let mut sockets = Vec::new();
    for client in 0..CLIENTS {
        let (socket, lane) = world.lane("writer").await;
        let bytes = noise(client, SIZE);
        lane.say(&file(1, &format!("file {client}"), SIZE as u64))
            .await;
        for at in (0..SIZE).step_by(100_000) {
            lane.say(&chunk(1, at as u64, &bytes[at..at + 100_000]))
                .await;
        }
        lane.say(&finish(1, &bytes)).await;
        sockets.push((socket, lane));
    }
    for (client, (_, lane)) in sockets.iter_mut().enumerate() {
        assert_eq!(
            lane.hear().await.line,
            format!("done 1 file {client} {SIZE}")
        );
    }
    let total = CLIENTS * SIZE as u64;
    let all = when(&mut watch, "all", |stats| stats.jobs.done == CLIENTS).await;
    assert_eq!((all.files, all.stored), (CLIENTS, total));
    assert_eq!(
        (all.jobs.puts, all.jobs.failed, all.sockets_in_all),
        (0, 0, CLIENTS + 1)
    );
    let received = all.received - first.received;
    assert!(
        (total..total + total / 20).contains(&received),
        "{received} of {total}"
    );
    for socket in all.sockets.iter().filter(|socket| socket.peer == "writer") {
        let expected = SIZE as u64..SIZE as u64 + 20_000;
        assert!(expected.contains(&socket.received), "{socket:?}");
    }
    let sum: u64 = all.sockets.iter().map(|socket| socket.received).sum();
    assert_eq!(sum, all.received, "no socket has gone");
    // One more watcher has all of them told again: the telling itself is no traffic.
    let other = world.socket("boss").await;
    let mut more = Remote::new(&other).stats();
    let seen = when(&mut more, "the same", |_| true).await;
    let told = |stats: &ServerStats| {
        let own = stats
            .sockets
            .iter()
            .find(|socket| socket.id == guard.id().as_str());
        own.expect("it is there").sent
    };
    assert_eq!(told(&seen), told(&first));
    drop(sockets);
    when(&mut watch, "all gone", |stats| stats.sockets_in_all == 2).await;
}

/// What was received in each of the last seconds, together.
async fn history(socket: &Socket) -> u64 {
    #[derive(serde::Deserialize)]
    struct History {
        every: f64,
        received: Vec<u64>,
        sent: Vec<u64>,
    }
    let channel = socket.open(STATS_CHANNEL).await.expect("a channel");
    let message = bounded("the first message", channel.recv()).await;
    let message = message.expect("open").expect("a message");
    assert_eq!(message.event(), "history");
    let history: History = message.data().expect("sound");
    assert_eq!(
        (history.every, history.sent.len()),
        (1.0, history.received.len())
    );
    assert!(history.received.len() <= 300);
    channel.close(CloseCode::NORMAL, "");
    history.received.iter().sum()
}

#[tokio::test]
async fn who_begins_to_watch_learns_what_moved_before() {
    const SIZE: u64 = 3_000_000;
    let world = World::new().await;
    let guard = world.socket("guard").await;
    let (_writer, mut lane) = world.lane("writer").await;
    let bytes = noise(1, 100_000);
    lane.say(&file(1, "x", SIZE)).await;
    for at in (0..SIZE).step_by(bytes.len()) {
        lane.say(&chunk(1, at, &bytes)).await;
    }
    lane.acked(1, SIZE).await;
    bounded("the second in which it came is over", async {
        while history(&guard).await < SIZE {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn quotas_are_told_of_clients_that_are_there() {
    let world = World::new().await;
    let (tenant, mut lane) = world.lane("tenant").await;
    lane.say(&file(1, "x", 1000)).await;
    lane.say(&chunk(1, 0, &[7; 1000])).await;
    lane.say(&finish(1, &[7; 1000])).await;
    assert_eq!(lane.hear().await.line, "done 1 x 1000");
    let mut watch = Remote::new(&world.socket("guard").await).stats();
    let stats = when(&mut watch, "the state", |_| true).await;
    assert_eq!(stats.quotas.len(), 1, "{stats:?}");
    let quota = &stats.quotas[0];
    assert_eq!(quota.peer.as_deref(), Some("tenant"));
    assert_eq!(quota.prefix.as_deref(), Some("teams/a"));
    assert_eq!((quota.used, quota.quota), (Some(1000), 1 << 20));
    drop((tenant, lane));
    when(&mut watch, "none", |stats| stats.quotas.is_empty()).await;
}

#[tokio::test]
async fn a_socket_is_closed_by_an_admin_with_a_code_and_a_reason() {
    let world = World::new().await;
    let (victim, _lane) = world.lane("writer").await;
    let (other, mut theirs) = world.lane("writer").await;
    let boss = world.socket("boss").await;
    let mut watch = Remote::new(&boss).stats();
    let id = victim.id().as_str().to_owned();
    let there = |stats: &ServerStats| stats.sockets.iter().any(|socket| socket.id == id);
    when(&mut watch, "it is there", there).await;
    assert_eq!(refused(watch.kick("nobody", None).await), Code::NotFound);
    let raw = boss.open(STATS_CHANNEL).await.expect("a channel");
    let long = "x".repeat(257);
    let id_of = |id: &str| ("socket", V::from(id));
    for (bad, data) in [
        ("no socket", map([])),
        ("a number", map([("socket", 7.into())])),
        ("long", map([id_of(&id), ("reason", long.as_str().into())])),
        ("two lines", map([id_of(&id), ("reason", "a\nb".into())])),
        ("nothing", V::Nil),
    ] {
        assert_eq!(ask(&raw, "kick", &data).await, "bad_payload", "{bad}");
    }
    assert_eq!(ask(&raw, "pause", &V::Nil).await, "no_handler");
    watch.kick(&id, Some("go home")).await.expect("granted");
    let reason = bounded("its end", victim.closed()).await;
    assert_eq!(reason.code, CloseCode::FORBIDDEN);
    assert_eq!(reason.text, "closed by an operator: go home");
    when(&mut watch, "it is gone", |stats| !there(stats)).await;
    theirs.say(&file(1, "x", 0)).await;
    theirs.say(&finish(1, b"")).await;
    assert_eq!(theirs.hear().await.line, "done 1 x 0");
    drop(other);
}

#[tokio::test]
async fn an_admin_has_the_server_go_down_in_order() {
    let world = World::new().await;
    let (_writer, mut lane) = world.lane("writer").await;
    lane.say(&file(1, "last", 4)).await;
    lane.say(&chunk(1, 0, b"ab")).await;
    lane.acked(1, 2).await;
    let (server, control) = (world.fixture.server.clone(), world.control.clone());
    let receiver = world.receiver.clone();
    let serving = tokio::spawn(async move {
        let stop = async {
            control.drain_asked().await;
            control.shutting_down();
            receiver.shutting_down();
        };
        server.run_until(stop, Drain::within(PATIENCE)).await
    });
    let mut watch = Remote::new(&world.socket("boss").await).stats();
    when(&mut watch, "the state", |stats| !stats.draining).await;
    watch.drain().await.expect("granted");
    when(&mut watch, "draining", |stats| stats.draining).await;
    // What runs may finish.
    lane.say(&chunk(1, 2, b"cd")).await;
    lane.say(&finish(1, b"abcd")).await;
    assert_eq!(lane.hear().await.line, "done 1 last 4");
    bounded("the end of the watch", async {
        loop {
            match watch.next().await.expect("an end") {
                Ok(stats) => assert!(stats.draining, "{stats:?}"),
                Err(TransferError::Closed(reason)) => {
                    return assert_eq!(reason.code, CloseCode::SHUTTING_DOWN);
                }
                Err(other) => panic!("{other}"),
            }
        }
    })
    .await;
    lane.channel.finish().await.expect("in order");
    let ended = bounded("the end of the server", serving).await;
    ended.expect("no panic").expect("in order");
}

#[tokio::test]
async fn the_state_fits_the_frames_of_who_watches() {
    let world = World::new().await;
    let mut sockets = Vec::new();
    for _ in 0..40 {
        sockets.push(world.socket("writer").await);
    }
    let narrow = udpack::Limits {
        frame: 4096,
        ..udpack::Limits::default()
    };
    let guard = world.fixture.connect_within(&token("guard"), narrow).await;
    let mut watch = Remote::new(&guard).stats();
    let stats = when(&mut watch, "the state", |stats| stats.sockets_in_all == 41).await;
    assert!((1..41).contains(&stats.sockets.len()), "{stats:?}");
}

#[tokio::test]
async fn an_operator_at_one_node_sees_all_and_disconnects_who_is_at_another() {
    let memory = Memory::new();
    let (here, there) = (
        World::node(&memory, "here").await,
        World::node(&memory, "there").await,
    );
    let guest = there.socket("reader").await;
    let boss = here.socket("boss").await;
    let mut watch = Remote::new(&boss).stats();
    let both = |stats: &ServerStats| {
        let cluster = stats.cluster.as_ref().expect("a node");
        cluster.nodes.iter().any(|node| node.sockets == 1)
    };
    let stats = when(&mut watch, "both nodes", both).await;
    let cluster = stats.cluster.expect("a node");
    let [other] = &cluster.nodes[..] else {
        panic!("{:?}", cluster.nodes);
    };
    assert_eq!((other.name.as_str(), other.lost), ("there", false));
    assert_eq!(
        (cluster.own.name.as_str(), cluster.own.sockets),
        ("here", 1)
    );
    assert_eq!(cluster.own.id, cluster.id);
    let id = guest.id().to_string();
    watch.kick(&id, Some("go home")).await.expect("granted");
    let end = bounded("the guest hears it", guest.closed()).await;
    assert_eq!(end.code, CloseCode::FORBIDDEN);
    assert_eq!(end.text, "closed by an operator: go home");
    assert_eq!(refused(watch.kick("nobody", None).await), Code::NotFound);
    assert_eq!(
        there.control.kick_anywhere("nobody", None).await,
        Err(Vec::new())
    );
}
