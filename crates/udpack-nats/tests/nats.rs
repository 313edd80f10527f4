//! Three nodes and a real `nats-server`: whatever becomes of the broker, each member hears each sender in order, nothing twice,
//! and is told of what is missing.

mod common;

use std::collections::HashMap;
use std::time::Duration;

use common::{Broker, bounded, heard, reaches};
use rustix::process::Signal;
use udpack::{
    BindError, Channel, Client, ClusterState, Deny, Hello, Identity, Peer, Server, ServerBuilder,
    Socket,
};
use udpack_nats::{Nats, NatsError};

fn builder() -> ServerBuilder {
    Server::builder()
        .identity(Identity::generate().expect("a fresh key"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel("chat", |channel: Channel| async move {
            channel.join("hall").expect("a sound room");
            let _ = channel.send("joined", &()).await;
            while let Ok(Some(_)) = channel.recv().await {}
        })
}

async fn node(nats: Nats) -> Server {
    let server = builder().cluster(nats);
    server.bind("127.0.0.1:0").await.expect("a free port")
}

async fn nodes(broker: &Broker) -> Vec<Server> {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(node(Nats::connect(&broker.url()).await.expect("a broker")).await);
    }
    for server in &servers {
        while heard(server) < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    servers
}

/// A member, and what it knows of each sender.
struct Member {
    _socket: Socket,
    channel: Channel,
    /// The last number, and whether a gap came after it.
    senders: HashMap<usize, (u64, bool)>,
    lost: u64,
}

impl Member {
    async fn join(server: &Server) -> Self {
        let socket = Client::builder()
            .pin(server.fingerprint())
            .connect(&server.local_addr().to_string())
            .await
            .expect("let in");
        let channel = socket.open("chat").await.expect("a channel");
        let joined = channel.recv().await.expect("alive").expect("a message");
        assert_eq!(joined.event(), "joined");
        Self {
            _socket: socket,
            channel,
            senders: HashMap::new(),
            lost: 0,
        }
    }

    async fn take(&mut self) {
        let message = self.channel.recv().await.expect("alive").expect("one");
        if let Some(gap) = message.gap() {
            self.lost += gap.lost;
            self.senders.values_mut().for_each(|(_, gap)| *gap = true);
            return;
        }
        let (from, n): (usize, u64) = message.data().expect("a number");
        if let Some((last, gap)) = self.senders.insert(from, (n, false)) {
            assert!(n > last, "{n} of {from} after {last}: doubled or reordered");
            assert!(
                gap || n == last + 1,
                "{n} of {from} after {last}, and no gap"
            );
        }
    }

    /// Until each sender's last message is there, or a gap comes; says which.
    async fn hears(&mut self, last: &[u64]) -> bool {
        let before = self.lost;
        loop {
            let heard = |from: usize| self.senders.get(&from).map(|(n, _)| *n);
            if (0..last.len()).all(|from| heard(from) == Some(last[from])) {
                return true;
            }
            if self.lost > before {
                return false;
            }
            self.take().await;
        }
    }

    /// Until each sender's last message is there, or a gap where it would be.
    async fn account(&mut self, last: &[u64]) {
        let open = |member: &Self| {
            last.iter().enumerate().any(|(from, last)| {
                !matches!(member.senders.get(&from), Some((n, gap)) if n == last || *gap)
            })
        };
        while open(self) {
            self.take().await;
        }
    }
}

/// The numbers that each node's sender has sent.
#[derive(Default)]
struct Senders([u64; 3]);

impl Senders {
    fn send(&mut self, servers: &[Server], count: u64) {
        for _ in 0..count {
            for (from, server) in servers.iter().enumerate() {
                self.0[from] += 1;
                let to = server.rooms().to("hall");
                to.send("line", &(from, self.0[from])).expect("sound");
            }
        }
    }
}

/// Everybody hears everybody, until so many messages came through from all nodes to all members without a loss.
async fn whole(servers: &[Server], senders: &mut Senders, members: &mut [Member]) {
    for server in servers {
        reaches(server, ClusterState::Connected).await;
    }
    loop {
        senders.send(servers, 1);
        let mut all = true;
        for member in &mut *members {
            all &= member.hears(&senders.0).await;
        }
        if all {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_pauses_or_restarts_empty_costs_no_more_than_gaps_tell() {
    let Some(mut broker) = Broker::start("2MB") else {
        return;
    };
    bounded(async {
        let servers = nodes(&broker).await;
        let mut members = Vec::new();
        for server in &servers {
            members.push(Member::join(server).await);
            members.push(Member::join(server).await);
        }
        let mut senders = Senders::default();
        whole(&servers, &mut senders, &mut members).await;
        senders.send(&servers, 300);
        for member in &mut members {
            member.account(&senders.0).await;
            assert_eq!(member.lost, 0, "nothing was broken yet");
        }
        for restart in [false, true] {
            match restart {
                false => broker.signal(Signal::STOP),
                true => broker.kill(),
            }
            senders.send(&servers, 50);
            for server in &servers {
                reaches(server, ClusterState::Degraded).await;
            }
            senders.send(&servers, 50);
            // Those on the same node hear each other meanwhile.
            for (at, member) in members.iter_mut().enumerate() {
                let from = at / 2;
                while member.senders[&from].0 != senders.0[from] {
                    member.take().await;
                }
            }
            match restart {
                false => broker.signal(Signal::CONT),
                true => broker.restart(),
            }
            whole(&servers, &mut senders, &mut members).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_without_a_broker_only_when_told_to() {
    let Some(mut broker) = Broker::start("2MB") else {
        return;
    };
    bounded(async {
        let whole = Nats::connect(&broker.url()).await.expect("a broker");
        let whole = node(whole).await;
        broker.kill();
        let error = Nats::connect(&broker.url()).await.expect_err("no broker");
        assert_eq!(error.to_string(), "cannot connect to the NATS broker");
        assert!(matches!(error, NatsError::Connect(_)));
        let options = Nats::options().start_degraded();
        let alone = node(options.connect(&broker.url()).await.expect("no wait")).await;
        reaches(&alone, ClusterState::Degraded).await;
        let mut member = Member::join(&alone).await;
        alone
            .rooms()
            .to("hall")
            .send("line", &(0, 1))
            .expect("sound");
        member.account(&[1]).await;
        broker.restart();
        reaches(&alone, ClusterState::Connected).await;
        while heard(&alone) == 0 || heard(&whole) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Its subscription is the broker's business; what comes before it is nobody's loss.
        let sent = async {
            for n in 1_u64.. {
                whole
                    .rooms()
                    .to("hall")
                    .send("line", &(1, n))
                    .expect("sound");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let heard = async {
            while !member.senders.contains_key(&1) {
                member.take().await;
            }
        };
        tokio::select! {
            () = sent => {}
            () = heard => {}
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_takes_less_than_a_frame_is_refused_at_start() {
    let Some(broker) = Broker::start("1MB") else {
        return;
    };
    bounded(async {
        let nats = Nats::connect(&broker.url()).await.expect("a broker");
        let error = builder().cluster(nats).bind("127.0.0.1:0").await;
        let error = error.expect_err("frames are larger");
        assert!(
            matches!(error, BindError::ClusterMessages { most, .. } if most == 1 << 20),
            "{error}"
        );
        for namespace in ["", "a.b", "a b", ">"] {
            let nats = Nats::options().namespace(namespace);
            let error = nats.connect(&broker.url()).await.expect_err("no namespace");
            assert!(matches!(error, NatsError::Namespace));
        }
        let error = Nats::connect("http://x:y:z").await.expect_err("no address");
        assert!(matches!(error, NatsError::Address(_)), "{error:?}");
    })
    .await;
}
