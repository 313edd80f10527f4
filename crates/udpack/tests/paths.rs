//! What the kernel and the path do to packets, in network namespaces: both families, several addresses, zones, and
//! paths that lie.

#[path = "common/namespaces.rs"]
mod namespaces;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use namespaces::{Host, Hosts};
use serde_bytes::ByteBuf;
use tokio::net::UdpSocket;
use udpack::{
    Channel, Client, Context, Deny, Fault, Fingerprint, Hello, Identity, Peer, Server,
    ServerBuilder, Socket,
};

/// Everything here ends within this.
const PATIENCE: Duration = Duration::from_secs(60);

fn block_on<F: Future>(body: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().expect("a runtime");
    let bounded = async { tokio::time::timeout(PATIENCE, body).await };
    runtime.block_on(bounded).expect("in time")
}

/// A server on a host; stops when it is dropped.
struct Served {
    fingerprint: Fingerprint,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Serves `who` (from which address you come), `bytes` (as many as you ask for) and `count` (how many you send).
fn talking() -> ServerBuilder {
    let talk = |channel: Channel| async move {
        let peer = channel.socket().remote_address().to_string();
        channel
            .on("who", move |(): (), _: Context| {
                let peer = peer.clone();
                async move { Ok::<_, Fault>(peer) }
            })
            .on("bytes", |count: usize, _: Context| async move {
                Ok::<_, Fault>(ByteBuf::from(vec![7; count]))
            })
            .on("count", |bytes: ByteBuf, _: Context| async move {
                Ok::<_, Fault>(bytes.len())
            })
            .run()
            .await
    };
    Server::builder()
        .identity(Identity::generate().expect("random numbers"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel("talk", talk)
}

/// Serves on a host.
fn serve(host: &Host, listen: &'static str) -> Served {
    let (tell, told) = mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let thread = host.run(move || {
        block_on(async move {
            let server = talking().bind(listen).await.expect("the address is free");
            let _ = tell.send((server.fingerprint(), server.local_addr()));
            let _ = stopped.await;
        });
    });
    let (fingerprint, address) = told.recv_timeout(PATIENCE).expect("a server");
    Served {
        fingerprint,
        address,
        stop: Some(stop),
        thread: Some(thread),
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects from a host, and does something with the socket there.
fn with<T: Send + 'static, F: Future<Output = T>>(
    host: &Host,
    served: &Served,
    address: &str,
    body: impl FnOnce(Socket) -> F + Send + 'static,
) -> T {
    let (pin, address) = (served.fingerprint, address.to_owned());
    let thread = host.run(move || {
        block_on(async move {
            let client = Client::builder().pin(pin).build().expect("good settings");
            let socket = client.connect(&address).await;
            body(socket.unwrap_or_else(|error| panic!("{address}: {error}"))).await
        })
    });
    thread.join().expect("the client")
}

/// From which address the server sees the client that connects to this one.
fn seen(hosts: &Hosts, served: &Served, address: &str) -> String {
    with(&hosts.client, served, address, |socket| async move {
        let channel = socket.open("talk").await.expect("a channel");
        let from: String = channel.request("who", &()).await.expect("an answer");
        from.rsplit_once(':').expect("an address").0.to_owned()
    })
}

#[test]
fn one_port_serves_both_families_and_shows_addresses_as_people_know_them() {
    let Some(hosts) = Hosts::new() else { return };
    let served = serve(&hosts.server, "[::]:4433");
    assert_eq!(served.address.to_string(), "[::]:4433");
    assert_eq!(seen(&hosts, &served, "10.203.0.2:4433"), "10.203.0.1");
    assert_eq!(seen(&hosts, &served, "[fd00:203::2]:4433"), "[fd00:203::1]");
}

#[test]
fn a_link_local_address_goes_by_the_name_and_the_number_of_its_interface() {
    let Some(hosts) = Hosts::new() else { return };
    let link = hosts.client.ip("-o link show eth0").expect("a link");
    let number = link.split(':').next().expect("its number").to_owned();
    let served = serve(&hosts.server, "[::]:4433");
    for zone in ["eth0", &number] {
        let from = seen(&hosts, &served, &format!("[fe80::2%{zone}]:4433"));
        assert!(from.starts_with("[fe80::1%"), "{from}");
    }
}

/// Without being told, the kernel would answer from the first address of the interface.
#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let Some(hosts) = Hosts::new() else { return };
    for address in ["10.203.0.77/24", "fd00:203::77/64"] {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        let add = format!("address add {address} dev eth0{nodad}");
        hosts.server.ip(&add).expect("another address");
    }
    let served = serve(&hosts.server, "[::]:4433");
    for address in [
        "10.203.0.77",
        "[fd00:203::77]",
        "10.203.0.2",
        "[fd00:203::2]",
    ] {
        seen(&hosts, &served, &format!("{address}:4433"));
    }
    drop(served);
    let served = serve(&hosts.server, "0.0.0.0:4433");
    for address in ["10.203.0.77", "10.203.0.2"] {
        seen(&hosts, &served, &format!("{address}:4433"));
    }
}

/// A MiB each way, then what the connection measured.
async fn exchange(socket: Socket) -> udpack::Stats {
    let channel = socket.open("talk").await.expect("a channel");
    let bytes: ByteBuf = channel.request("bytes", &(1 << 20)).await.expect("bytes");
    assert_eq!(bytes.len(), 1 << 20);
    let count: usize = channel.request("count", &bytes).await.expect("a number");
    assert_eq!(count, 1 << 20);
    socket.metrics().stats
}

#[test]
fn packets_above_1280_bytes_that_vanish_hold_nothing_up() {
    let Some(hosts) = Hosts::new() else { return };
    hosts.lose("meta l4proto udp meta length gt 1280");
    let served = serve(&hosts.server, "[::]:4433");
    for address in ["10.203.0.2:4433", "[fd00:203::2]:4433"] {
        let stats = with(&hosts.client, &served, address, exchange);
        assert!(stats.mtu <= 1252, "{stats:?}");
        // Of about a thousand packets each way none but probes was larger, and a lost probe is no lost packet.
        assert!(stats.packets_lost < 50, "{stats:?}");
    }
}

/// The way changes below a connection, to a tunnel for instance.
#[test]
fn a_path_that_shrinks_below_a_connection_carries_on() {
    let Some(hosts) = Hosts::new() else { return };
    let hosts = Arc::new(hosts);
    let served = serve(&hosts.server, "[::]:4433");
    let path = hosts.clone();
    let stats = with(
        &hosts.client,
        &served,
        "10.203.0.2:4433",
        |socket| async move {
            let before = exchange(socket.clone()).await;
            assert_eq!(before.mtu, 1472, "{before:?}");
            path.lose("meta l4proto udp meta length gt 1280");
            exchange(socket).await
        },
    );
    assert!(stats.mtu <= 1252, "{stats:?}");
}

/// A forwarder on this machine: loopback takes 65,536 bytes, and what is behind it 1,280.
async fn forward(to: SocketAddr) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
    let address = front.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut clients = HashMap::new();
        let mut memory = vec![0; 65_536];
        while let Ok((length, client)) = front.recv_from(&mut memory).await {
            if length > 1252 {
                continue;
            }
            let back = match clients.entry(client) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(free) => {
                    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
                    back.connect(to).await.expect("the server");
                    tokio::spawn(answers(back.clone(), front.clone(), client));
                    free.insert(back)
                }
            };
            let _ = back.send(&memory[..length]).await;
        }
    });
    address
}

/// Passes on what comes from the server.
async fn answers(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr) {
    let mut memory = vec![0; 65_536];
    while let Ok(length) = back.recv(&mut memory).await {
        if length <= 1252 {
            let _ = front.send_to(&memory[..length], client).await;
        }
    }
}

#[test]
fn a_forwarder_on_this_machine_is_no_loopback() {
    block_on(async {
        let server = talking().bind("127.0.0.1:0").await.expect("a free port");
        let address = forward(server.local_addr()).await;
        let client = Client::builder().pin(server.fingerprint());
        let socket = client.connect(&address.to_string()).await.expect("let in");
        let channel = socket.open("talk").await.expect("a channel");
        let bytes: ByteBuf = channel.request("bytes", &(64 << 10)).await.expect("bytes");
        let count: usize = channel.request("count", &bytes).await.expect("a number");
        assert_eq!(count, 64 << 10);
        // Not one packet was too large, but for probes, which do not count as lost.
        let (here, there) = (socket.metrics().stats, server.metrics().stats);
        assert_eq!((here.packets_lost, there.packets_lost), (0, 0));
        assert!(here.mtu <= 1252, "{here:?}");
    });
}

#[test]
fn loopback_itself_is_used_to_the_full() {
    block_on(async {
        let server = talking().bind("127.0.0.1:0").await.expect("a free port");
        let client = Client::builder().pin(server.fingerprint());
        let address = server.local_addr().to_string();
        let socket = client.connect(&address).await.expect("let in");
        let channel = socket.open("talk").await.expect("a channel");
        // At once, or a round trip later where the machine is too busy to show in time that loopback is whole.
        while socket.metrics().stats.mtu < 16_368 {
            let _: String = channel.request("who", &()).await.expect("an answer");
        }
    });
}

#[test]
fn a_path_that_takes_an_ethernets_packets_is_used_to_the_full() {
    let Some(hosts) = Hosts::new() else { return };
    let served = serve(&hosts.server, "[::]:4433");
    let stats = with(&hosts.client, &served, "10.203.0.2:4433", exchange);
    assert_eq!(stats.mtu, 1472, "{stats:?}");
}

#[test]
fn a_path_that_bleaches_ecn_carries_on() {
    let Some(hosts) = Hosts::new() else { return };
    for host in [&hosts.client, &hosts.server] {
        host.nft("ip ecn ect0", "ip ecn set not-ect");
        host.nft("ip6 ecn ect0", "ip6 ecn set not-ect");
    }
    let served = serve(&hosts.server, "[::]:4433");
    for address in ["10.203.0.2:4433", "[fd00:203::2]:4433"] {
        with(&hosts.client, &served, address, exchange);
    }
}
