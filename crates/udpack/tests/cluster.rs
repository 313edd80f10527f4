//! Rooms of several servers: what one sends all hear, each member hears it once and in order, and what is missing is told.

mod common;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use common::bounded;
use udpack::cluster::{Memory, MemoryLink, Topic};
use udpack::testing::{self, Net};
use udpack::{
    Channel, CloseCode, ClusterState, Drain, Encoded, Message, PresenceMap, Server, Socket, Whom,
};

/// Servers of one cluster whose `chat` channels join `hall`.
struct Nodes {
    net: Net,
    servers: Vec<Server>,
    links: Vec<MemoryLink>,
}

async fn node(net: &Net, memory: &Memory, name: &str) -> (Server, MemoryLink) {
    let node = memory.node();
    let link = node.link();
    let builder = testing::server()
        .channel("chat", |channel: Channel| async move {
            channel.join("hall").expect("a sound room");
            let _ = channel.send("joined", &()).await;
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .channel("present", |channel: Channel| async move {
            channel.track("hall", "here").expect("a sound meta");
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .cluster(node)
        .advertise(name, format!("{name}.example:45456"));
    (net.bind(builder).await.expect("an address"), link)
}

async fn nodes(count: usize) -> Nodes {
    let (net, memory) = (Net::new(1), Memory::new());
    let (mut servers, mut links) = (Vec::new(), Vec::new());
    for n in 0..count {
        let (server, link) = node(&net, &memory, &format!("node-{n}")).await;
        servers.push(server);
        links.push(link);
    }
    let nodes = Nodes {
        net,
        servers,
        links,
    };
    for server in &nodes.servers {
        meets(server, count - 1).await;
    }
    nodes
}

/// Waits until a server hears so many others.
async fn meets(server: &Server, others: usize) {
    let cluster = server.cluster().expect("a node");
    while cluster.nodes().iter().filter(|node| !node.lost).count() != others {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until what the nodes have sent each other is known, also that nothing was sent.
async fn settled() {
    tokio::time::sleep(Duration::from_secs(6)).await;
}

impl Nodes {
    async fn member(&self, at: usize) -> (Socket, Channel) {
        let server = &self.servers[at];
        let client = testing::client(server);
        let socket = self.net.connect(client, server).await.expect("let in");
        let channel = socket.open("chat").await.expect("a channel");
        assert_eq!(next(&channel).await.event(), "joined");
        (socket, channel)
    }

    fn send(&self, from: usize, numbers: std::ops::Range<u64>) {
        for n in numbers {
            let rooms = self.servers[from].rooms();
            rooms.to("hall").send("line", &(from, n)).expect("sound");
        }
    }
}

impl Nodes {
    /// A peer of this id who is present.
    async fn comes(&self, at: usize, id: &str) -> (Socket, Channel) {
        let server = &self.servers[at];
        let client = testing::client(server).token(id);
        let socket = self.net.connect(client, server).await.expect("let in");
        let channel = socket.open("present").await.expect("a channel");
        (socket, channel)
    }
}

/// Follows the presence until exactly these peers are there; each change on the way shows at least `always`.
async fn sees(channel: &Channel, map: &mut PresenceMap, peers: &[&str], always: &[&str]) {
    while map.peers().collect::<Vec<_>>() != peers {
        map.apply(&next(channel).await);
        for peer in always {
            assert!(map.peers().any(|id| id == *peer), "{peer} was gone");
        }
    }
}

async fn next(channel: &Channel) -> Message {
    channel.recv().await.expect("alive").expect("a message")
}

/// Takes messages until those named have come from each sender, in order; gives what gaps told of.
async fn hear(channel: &Channel, until: &[(usize, u64)]) -> u64 {
    let (mut last, mut lost) = (HashMap::<usize, u64>::new(), 0);
    while until.iter().any(|(from, n)| last.get(from) != Some(n)) {
        let message = next(channel).await;
        if let Some(gap) = message.gap() {
            assert_eq!(gap.room, "hall");
            lost += gap.lost;
            continue;
        }
        let (from, n): (usize, u64) = message.data().expect("a number");
        let before = last.insert(from, n);
        assert!(
            before.is_none_or(|before| before < n),
            "doubled or reordered"
        );
    }
    lost
}

#[tokio::test(start_paused = true)]
async fn members_on_all_nodes_hear_what_is_sent_on_any() {
    bounded(async {
        let nodes = nodes(3).await;
        let mut members = Vec::new();
        for at in 0..3 {
            members.push(nodes.member(at).await);
        }
        for from in 0..3 {
            nodes.send(from, 0..50);
        }
        for (_socket, channel) in &members {
            assert_eq!(hear(channel, &[(0, 49), (1, 49), (2, 49)]).await, 0);
        }
        let id = members[1].0.id();
        let to = nodes.servers[0].rooms().to("hall").except(&id);
        to.send("line", &(0, 50)).expect("sound");
        nodes.send(0, 51..52);
        for (at, (_socket, channel)) in members.iter().enumerate() {
            let (_, n): (usize, u64) = next(channel).await.data().expect("a number");
            assert_eq!(n, if at == 1 { 51 } else { 50 });
        }
    })
    .await;
}

/// Also where nobody on the sending node is in the room.
#[tokio::test(start_paused = true)]
async fn a_node_without_members_reaches_those_of_others() {
    bounded(async {
        let nodes = nodes(2).await;
        let (_socket, channel) = nodes.member(1).await;
        nodes.send(0, 0..3);
        assert_eq!(hear(&channel, &[(0, 2)]).await, 0);
        let metrics = nodes.servers[1].metrics();
        assert_eq!((metrics.cluster_received, metrics.cluster_nodes), (3, 1));
        assert_eq!(nodes.servers[0].metrics().cluster_published, 3);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_the_broker_loses_is_told_by_what_follows() {
    bounded(async {
        let nodes = nodes(2).await;
        let (_socket, channel) = nodes.member(1).await;
        nodes.send(0, 0..1);
        nodes.links[1].lose(5);
        nodes.send(0, 1..7);
        let (first, gap, after) = (
            next(&channel).await,
            next(&channel).await,
            next(&channel).await,
        );
        assert_eq!(first.data::<(usize, u64)>().expect("a number").1, 0);
        assert_eq!(gap.gap().expect("a gap").lost, 5);
        assert_eq!(after.data::<(usize, u64)>().expect("a number").1, 6);
        assert_eq!(nodes.servers[1].metrics().cluster_lost, 5);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_tail_and_a_lost_first_message_are_told_by_marks() {
    bounded(async {
        let nodes = nodes(2).await;
        let (_socket, channel) = nodes.member(1).await;
        settled().await;
        // Nothing of this sender was ever heard here.
        nodes.links[1].lose(4);
        nodes.send(0, 0..4);
        assert_eq!(next(&channel).await.gap().expect("a gap").lost, 4);
        nodes.send(0, 4..5);
        assert_eq!(hear(&channel, &[(0, 4)]).await, 0);
    })
    .await;
}

/// Those on either side of a cut hear their own node at once, and of the rest what they missed.
#[tokio::test(start_paused = true)]
async fn a_node_that_is_cut_off_goes_on_and_tells_what_it_missed() {
    bounded(async {
        let nodes = nodes(2).await;
        let (a, b) = (nodes.member(0).await, nodes.member(1).await);
        nodes.send(0, 0..1);
        nodes.send(1, 0..1);
        for channel in [&a.1, &b.1] {
            assert_eq!(hear(channel, &[(0, 0), (1, 0)]).await, 0);
        }
        let mut view = nodes.servers[1].cluster().expect("a node");
        nodes.links[1].cut();
        assert_eq!(view.changed().await, ClusterState::Degraded);
        assert_eq!(nodes.servers[1].metrics().cluster_degraded, 1);
        nodes.send(0, 1..11);
        nodes.send(1, 1..21);
        assert_eq!(hear(&a.1, &[(0, 10)]).await, 0, "local");
        assert_eq!(hear(&b.1, &[(1, 20)]).await, 0, "local");
        nodes.links[1].mend();
        assert_eq!(view.changed().await, ClusterState::Connected);
        assert_eq!(next(&a.1).await.gap().expect("a gap").lost, 20);
        assert_eq!(next(&b.1).await.gap().expect("a gap").lost, 10);
        nodes.send(0, 11..12);
        nodes.send(1, 21..22);
        assert_eq!(hear(&a.1, &[(0, 11), (1, 21)]).await, 0);
        assert_eq!(hear(&b.1, &[(0, 11), (1, 21)]).await, 0);
        assert_eq!(nodes.servers[1].metrics().cluster_degraded, 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_dies_is_lost_with_a_gap_and_one_that_leaves_without() {
    bounded(async {
        let nodes = nodes(3).await;
        let (_socket, channel) = nodes.member(0).await;
        nodes.send(1, 0..1);
        nodes.send(2, 0..1);
        assert_eq!(hear(&channel, &[(1, 0), (2, 0)]).await, 0);
        // It says where its stream ends.
        let code = CloseCode::SHUTTING_DOWN;
        nodes.servers[1].close(code, "done").await;
        meets(&nodes.servers[0], 1).await;
        assert_eq!(nodes.servers[0].metrics().cluster_lost, 0);
        // It says nothing any more.
        nodes.links[2].cut_silently();
        nodes.send(2, 1..2);
        assert_eq!(next(&channel).await.gap().expect("one or more").lost, 1);
        let view = nodes.servers[0].cluster().expect("a node");
        let others = view.nodes();
        assert_eq!(others.len(), 1, "{others:?}");
        assert!(others[0].lost && others[0].name == "node-2");
        assert_eq!(others[0].address, "node-2.example:45456");
        // It was silent, not dead: the one that was told is not told again.
        nodes.links[2].mend();
        nodes.send(2, 2..3);
        assert_eq!(hear(&channel, &[(2, 2)]).await, 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_another_node_makes_up_reaches_no_member() {
    bounded(async {
        let nodes = nodes(2).await;
        let (_socket, channel) = nodes.member(0).await;
        let mut message = b"\x01\x01AAAAAAAA\0\0\0\0\0\0\0\0\0\0\0\x01\0".to_vec();
        let hall = Topic::room("hall");
        let sound = b"\0\0\0\x08\x92\xa4line\xa1x";
        for frame in [
            &b""[..],
            b"\0\0\0\x09\x92\xa4line\xa1x",
            b"\0\0\0\x07\x92\xa4$gap\x80",
            b"\0\0\0\x02\x92\xc1",
        ] {
            let message = [&message[..], frame].concat();
            nodes.links[0].inject(hall, message.into());
        }
        nodes.links[0].inject(hall, Bytes::from_static(b"garbage"));
        nodes.links[0].inject(hall, Bytes::new());
        nodes.links[0].inject(hall, vec![0xff; 1 << 20].into());
        let once: Bytes = [&message[..], sound].concat().into();
        nodes.links[0].inject(hall, once.clone());
        // Doubled, of a stream that has ended, beyond any stream, another version.
        nodes.links[0].inject(hall, once);
        message[13] = 1;
        nodes.links[0].inject(hall, [&message[..], sound].concat().into());
        message[13] = 0;
        message[21] = 9;
        nodes.links[0].inject(hall, [&message[..], sound].concat().into());
        message[13] = 1;
        message[14..22].fill(0xff);
        nodes.links[0].inject(hall, [&message[..], sound].concat().into());
        message[0] = 2;
        nodes.links[0].inject(hall, [&message[..], sound].concat().into());
        nodes.send(1, 0..1);
        let mut lines = 0;
        loop {
            let message = next(&channel).await;
            match message.data::<(usize, u64)>() {
                Ok(_) => break,
                Err(_) => lines += 1,
            }
        }
        assert_eq!(lines, 2, "the first of each stream");
        assert_eq!(nodes.servers[0].metrics().cluster_ignored, 9);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn who_is_present_on_one_node_is_present_on_all() {
    bounded(async {
        let nodes = nodes(3).await;
        let (_socket, channel) = nodes.member(0).await;
        let mut map = PresenceMap::new("hall");
        let (_ann, ann) = nodes.comes(0, "ann").await;
        let (_bob, _chan) = nodes.comes(1, "bob").await;
        let (_cid, cid) = nodes.comes(2, "cid").await;
        sees(&channel, &mut map, &["ann", "bob", "cid"], &[]).await;
        // Who comes later is told of all.
        let server = &nodes.servers[2];
        let connected = nodes.net.connect(testing::client(server), server).await;
        let socket = connected.expect("let in");
        let late = socket.open("chat").await.expect("a channel");
        let mut later = PresenceMap::new("hall");
        sees(&late, &mut later, &["ann", "bob", "cid"], &[]).await;
        // A change that is lost is asked for again.
        nodes.links[0].lose(1);
        cid.finish().await.expect("alive");
        drop(cid);
        sees(&channel, &mut map, &["ann", "bob"], &["ann", "bob"]).await;
        sees(&late, &mut later, &["ann", "bob"], &["ann", "bob"]).await;
        ann.finish().await.expect("alive");
        sees(&channel, &mut map, &["bob"], &["bob"]).await;
        sees(&late, &mut later, &["bob"], &["bob"]).await;
        assert_eq!(nodes.servers[0].metrics().cluster_lost, 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn those_on_a_node_that_dies_leave_and_come_back_with_it() {
    bounded(async {
        let nodes = nodes(2).await;
        let (_socket, channel) = nodes.member(0).await;
        let mut map = PresenceMap::new("hall");
        let (_ann, _chan) = nodes.comes(0, "ann").await;
        let (_bob, _chan1) = nodes.comes(1, "bob").await;
        sees(&channel, &mut map, &["ann", "bob"], &[]).await;
        nodes.links[1].cut_silently();
        let diff = map.apply(&next(&channel).await).expect("a change");
        assert_eq!(diff.why.as_deref(), Some("node_lost"));
        assert_eq!(map.peers().collect::<Vec<_>>(), ["ann"]);
        nodes.links[1].mend();
        sees(&channel, &mut map, &["ann", "bob"], &["ann"]).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_moves_to_another_node_is_never_gone() {
    bounded(async {
        let nodes = nodes(3).await;
        let (_socket, channel) = nodes.member(0).await;
        let mut map = PresenceMap::new("hall");
        let (bob, bobs) = nodes.comes(1, "bob").await;
        let (_dan, dans) = nodes.comes(1, "dan").await;
        sees(&channel, &mut map, &["bob", "dan"], &[]).await;
        let drain = Drain::within(Duration::from_secs(1));
        nodes.servers[1]
            .run_until(std::future::ready(()), drain)
            .await
            .expect("served");
        drop((bob, bobs, dans));
        let (_bob, _bobs) = nodes.comes(2, "bob").await;
        // Nobody waits for dan for ever.
        sees(&channel, &mut map, &["bob"], &["bob"]).await;
    })
    .await;
}

/// Of a node's own history nobody goes on over a hole in it.
#[tokio::test(start_paused = true)]
async fn what_a_room_with_a_history_misses_is_told_too() {
    bounded(async {
        let nodes = nodes(2).await;
        let rooms = nodes.servers[1].rooms();
        let history = Some(udpack::History::default());
        rooms.history("hall", history).expect("a sound room");
        let (_socket, channel) = nodes.member(1).await;
        nodes.send(0, 0..2);
        assert_eq!(hear(&channel, &[(0, 1)]).await, 0);
        nodes.links[1].lose(5);
        nodes.send(0, 2..7);
        // Nothing follows.
        assert_eq!(next(&channel).await.gap().expect("a gap").lost, 5);
        nodes.send(0, 7..9);
        assert_eq!(hear(&channel, &[(0, 8)]).await, 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn all_nodes_answer_and_who_does_not_is_named() {
    const WITHIN: Duration = Duration::from_secs(2);
    bounded(async {
        let nodes = nodes(3).await;
        let (ann, anns) = nodes.comes(0, "ann").await;
        let (bob, _bobs) = nodes.comes(1, "bob").await;
        let (_bob2, bobs2) = nodes.comes(2, "bob").await;
        let mut map = PresenceMap::new("hall");
        sees(&anns, &mut map, &["ann", "bob"], &[]).await;
        let view = nodes.servers[0].cluster().expect("a node");
        let peers = async |view: &udpack::ClusterView| loop {
            let answer = view.members("hall", WITHIN).await;
            let mut peers: Vec<_> = answer.value.iter().map(|m| m.peer.clone()).collect();
            peers.sort();
            if peers.len() == 3 || !answer.missing.is_empty() {
                return (peers, answer.missing);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let everybody = ["ann", "bob", "bob"].map(str::to_owned).to_vec();
        assert_eq!(peers(&view).await, (everybody, Vec::new()));
        assert!(view.members("nobody", WITHIN).await.value.is_empty());

        let hello = Encoded::new("hello", "you").expect("sound");
        let sent = view
            .send(Whom::Peer("bob"), "present", &hello, WITHIN)
            .await;
        assert_eq!((sent.value, sent.missing), (2, Vec::new()));
        while next(&bobs2).await.event() != "hello" {}
        let sent = view
            .send(Whom::Session(&ann.id()), "present", &hello, WITHIN)
            .await;
        assert_eq!(sent.value, 1);
        while next(&anns).await.event() != "hello" {}

        let of = |at: usize| nodes.servers[at].cluster().expect("a node").id();
        nodes.links[2].cut_silently();
        let closed = view
            .close(Whom::Peer("bob"), CloseCode::AUTH_REVOKED, "out", WITHIN)
            .await;
        assert_eq!((closed.value, closed.missing), (1, vec![of(2)]));
        assert_eq!(bob.closed().await.code, CloseCode::AUTH_REVOKED);
        let (left, missing) = peers(&view).await;
        assert!(left.len() < 3 && left.contains(&"ann".to_owned()));
        assert_eq!(missing, [of(2)]);
        // A question that cannot be read is none.
        let mut bytes = b"\x01\x09AAAAAAAA\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x01".to_vec();
        bytes.push(0xc1);
        let before = nodes.servers[0].metrics().cluster_ignored;
        nodes.links[0].inject(Topic::Nodes, bytes.into());
        nodes.send(1, 0..1);
        while next(&anns).await.event() != "line" {}
        assert_eq!(nodes.servers[0].metrics().cluster_ignored, before + 1);
    })
    .await;
}
