//! Clients of a cluster behind one name: one that comes back to the wrong node is told where its session is and goes on there, and
//! what a node or a name says about places is never believed about keys.

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use common::{bounded, reconnect, timeouts};
use udpack::cluster::{Memory, MemoryLink, Topic};
use udpack::testing::{self, Net};
use udpack::{
    Channel, Client, CloseCode, Drain, Identity, RecvError, Server, Socket, SocketState,
    SocketStates,
};

/// Nodes with one key, behind one name.
struct Nodes {
    net: Net,
    servers: Vec<Server>,
    links: Vec<MemoryLink>,
}

const NAME: &str = "all.example";
const PORT: u16 = 45456;

/// Where the node of this number is.
fn address(at: usize) -> SocketAddr {
    SocketAddr::from(([10, 1, 0, at as u8 + 1], PORT))
}

/// A server that counts what its `echo` channels bring, one after the other.
fn server(identity: &Identity) -> udpack::ServerBuilder {
    testing::server()
        .identity(identity.clone())
        .timeouts(timeouts())
        .channel("echo", |channel: Channel| async move {
            let mut count = 0_u64;
            while let Some(message) = channel.recv().await? {
                let n: u64 = message.data().expect("a number");
                assert_eq!(n, count, "lost or doubled");
                count += 1;
                if channel.send("back", &n).await.is_err() {
                    break;
                }
            }
            Ok::<_, RecvError>(())
        })
}

async fn nodes(count: usize) -> Nodes {
    let (net, memory) = (Net::new(1), Memory::new());
    let identity = Identity::generate().expect("random numbers");
    let (mut servers, mut links) = (Vec::new(), Vec::new());
    for at in 0..count {
        let node = memory.node();
        links.push(node.link());
        let builder = server(&identity)
            .cluster(node)
            .advertise(format!("node-{at}"), address(at).to_string());
        servers.push(net.bind(builder).await.expect("an address"));
    }
    let nodes = Nodes {
        net,
        servers,
        links,
    };
    for at in 0..count {
        nodes.hears(at, count - 1).await;
    }
    nodes
}

impl Nodes {
    /// Waits until a node hears so many others, and knows where they are.
    async fn hears(&self, at: usize, others: usize) {
        let cluster = self.servers[at].cluster().expect("a node");
        let known = || {
            let nodes = cluster.nodes();
            let known = |node: &&udpack::ClusterNode| !node.lost && !node.address.is_empty();
            nodes.iter().filter(known).count()
        };
        while known() != others {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// From now on the name leads to this node.
    fn lead_to(&self, at: usize) {
        self.net.name(NAME, [address(at).ip()]);
    }

    async fn client(&self) -> Socket {
        let client = Client::builder()
            .pin(self.servers[0].fingerprint())
            .timeouts(timeouts())
            .reconnect(reconnect());
        let client = self.net.attach(client);
        let place = format!("{NAME}:{PORT}");
        client.connect(&place).await.expect("let in")
    }

    fn sockets(&self, at: usize) -> usize {
        self.servers[at].sockets().len()
    }
}

/// Sends and hears the next numbers.
async fn goes_on(channel: &Channel, numbers: std::ops::Range<u64>) {
    for n in numbers.clone() {
        channel.send("there", &n).await.expect("alive");
    }
    for n in numbers {
        let message = channel.recv().await.expect("alive").expect("a message");
        assert_eq!(message.data::<u64>().expect("a number"), n);
    }
}

/// The next connection: whether the session was resumed, or why not.
async fn connected(states: &mut SocketStates) -> (bool, Option<String>) {
    loop {
        match states.next().await.expect("it does not end") {
            SocketState::Connected { resumed, reason } => return (resumed, reason),
            SocketState::Closed(reason) => panic!("{reason}"),
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_comes_back_to_another_node_goes_on_where_its_session_is() {
    bounded(async {
        let nodes = nodes(3).await;
        nodes.lead_to(0);
        let socket = nodes.client().await;
        let (id, mut states) = (socket.id(), socket.states());
        assert_eq!(connected(&mut states).await, (false, None));
        let channel = socket.channel("echo").resumable().open().await;
        let channel = channel.expect("a channel");
        goes_on(&channel, 0..3).await;
        let mut next = 3;
        // Each time the name leads elsewhere. The second time the client knows the place, and asks nobody.
        for (at, asked) in [(1, 1), (2, 1)] {
            nodes.lead_to(at);
            nodes.net.cut_client_for(&socket, Duration::from_secs(8));
            let sends = goes_on(&channel, next..next + 3);
            let (_, back) = tokio::join!(sends, connected(&mut states));
            assert_eq!(back, (true, None));
            next += 3;
            assert_eq!(socket.id(), id);
            assert_eq!((nodes.sockets(0), nodes.sockets(at)), (1, 0));
            let refused: u64 = nodes.servers.iter().map(Server::refused).sum();
            assert_eq!(refused, asked);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_session_of_a_dead_node_is_unknown_elsewhere() {
    bounded(async {
        let nodes = nodes(2).await;
        nodes.lead_to(0);
        let socket = nodes.client().await;
        let mut states = socket.states();
        connected(&mut states).await;
        let channel = socket.channel("echo").resumable().open().await;
        let channel = channel.expect("a channel");
        goes_on(&channel, 0..1).await;
        nodes.lead_to(1);
        nodes.net.take_down(&nodes.servers[0]);
        nodes.links[0].cut_silently();
        let back = connected(&mut states).await;
        assert_eq!(back, (false, Some("unknown".to_owned())));
        let end = channel.closed().await;
        assert_eq!(end.code, CloseCode::NOT_RESUMED);
        assert_eq!(nodes.sockets(1), 1);
    })
    .await;
}

/// A beat of the first node, as another would make it up: its id, and this address.
fn beat(of: &Server, address: &str) -> Vec<u8> {
    let mut beat = vec![1, 4];
    let id = of.cluster().expect("a node").id().to_string();
    beat.extend((0..8).map(|at| u8::from_str_radix(&id[2 * at..2 * at + 2], 16).expect("hex")));
    beat.extend([0; 12]);
    beat.extend(b"\x83\xa4name\xa1x\xa7address");
    beat.extend([0xd9, address.len() as u8]);
    beat.extend(address.as_bytes());
    beat.extend(b"\xa7sockets\x00");
    beat
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_not_the_sessions_ends_no_socket_and_gets_no_token() {
    bounded(async {
        let nodes = nodes(2).await;
        // A stranger, with a key of its own; a node that has the session not; and what is no place at all.
        let stranger = nodes.net.bind(testing::server()).await.expect("an address");
        let stranger_at = stranger.local_addr().to_string();
        let here = address(1).to_string();
        for (told, asked) in [
            (stranger_at.as_str(), 1),
            (here.as_str(), 2),
            ("no place", 0),
        ] {
            nodes.lead_to(0);
            let socket = nodes.client().await;
            let mut states = socket.states();
            connected(&mut states).await;
            nodes.lead_to(1);
            nodes.net.cut_client_for(&socket, Duration::from_secs(8));
            // The node itself would say better soon.
            nodes.links[0].cut_silently();
            nodes.links[1].inject(Topic::Nodes, beat(&nodes.servers[0], told).into());
            let before = nodes.servers[1].refused();
            let back = connected(&mut states).await;
            assert_eq!(back, (false, Some("unknown".to_owned())), "{told}");
            assert_eq!(nodes.servers[1].refused() - before, asked, "{told}");
            assert_eq!((stranger.sockets().len(), stranger.refused()), (0, 0));
            assert!(socket.open("echo").await.is_ok());
            socket.close(CloseCode::NORMAL, "").await;
            nodes.links[0].mend();
            nodes.hears(1, 1).await;
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_clients_of_a_node_that_goes_are_spread_over_the_others() {
    const CLIENTS: usize = 200;
    bounded(async {
        let nodes = nodes(3).await;
        // One of the others has 40 clients already, and the third hears of it.
        let mut clients = Vec::new();
        for at in [1, 0] {
            nodes.lead_to(at);
            for _ in 0..if at == 1 { 40 } else { CLIENTS } {
                clients.push(nodes.client().await);
            }
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        let leaving = &clients[40..];
        let mut channels = Vec::new();
        for socket in leaving {
            let channel = socket.channel("echo").resumable().open().await;
            let channel = channel.expect("a channel");
            // A program reads its channel to the end.
            channels.push(tokio::spawn(async move {
                while let Ok(Some(_)) = channel.recv().await {}
                channel.closed().await
            }));
        }
        let drain = Drain::within(Duration::from_secs(5));
        let stopping = nodes.servers[0].run_until(std::future::ready(()), drain);
        stopping.await.expect("served");
        let mut told = BTreeMap::new();
        for (socket, channel) in leaving.iter().zip(channels) {
            let end = channel.await.expect("no panic");
            assert_eq!(end.code, CloseCode::MOVED, "{end}");
            let mut states = socket.states();
            connected(&mut states).await;
            *told.entry(socket.remote_address()).or_insert(0) += 1;
        }
        assert_eq!(told.values().sum::<usize>(), CLIENTS);
        // By load: 120 each in the end, and the same whatever the name leads to.
        assert_eq!(told.get(&address(1)), Some(&80), "{told:?}");
        assert_eq!((nodes.sockets(1), nodes.sockets(2)), (120, 120));
        // And they go on there.
        let channel = leaving[0].open("echo").await.expect("a channel");
        goes_on(&channel, 0..2).await;
    })
    .await;
}
