//! A client tries all addresses of a name at once, and one server alone hears of it.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{reconnect, timeouts};
use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{Client, ClientBuilder, CloseCode, ConnectError, Deny, Hello, Identity, Peer, Server};
use udpack::{Socket, SocketState};

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(3600), future)
        .await
        .expect("it ends")
}

fn dead(number: u8) -> IpAddr {
    match number % 2 {
        0 => format!("fd00:dead::{number}").parse().expect("an address"),
        _ => Ipv4Addr::new(10, 99, 0, number).into(),
    }
}

/// What a verifier was asked.
type Asked = Arc<AtomicUsize>;

/// A server with this key that counts who asks to be let in, and lets in whose token is not `wrong`.
async fn counting(net: &Net, identity: &Identity) -> (Server, Asked) {
    let asked = Asked::default();
    let counter = asked.clone();
    let verifier = move |hello: Hello| {
        counter.fetch_add(1, Ordering::Relaxed);
        async move {
            match hello.token() {
                "wrong" => Err(Deny::auth_failed()),
                _ => Ok(Peer::new("tester")),
            }
        }
    };
    let builder = Server::builder().identity(identity.clone()).auth(verifier);
    (net.bind(builder).await.expect("an address"), asked)
}

fn client(net: &Net, identity: &Identity) -> ClientBuilder {
    let builder = Client::builder().pin(identity.fingerprint());
    net.attach(builder.timeouts(timeouts()))
}

fn identity() -> Identity {
    Identity::generate().expect("random numbers")
}

#[tokio::test(start_paused = true)]
async fn four_dead_addresses_of_five_take_four_times_250_ms() {
    bounded(async {
        let net = Net::new(1);
        let key = identity();
        let (server, _) = counting(&net, &key).await;
        let names = [dead(2), dead(1), dead(4), dead(3), server.local_addr().ip()];
        net.name("host.example", names);
        let begun = Instant::now();
        let socket = client(&net, &key).connect("host.example").await;
        let socket = socket.expect("the fifth answers");
        assert_eq!(socket.remote_address(), server.local_addr());
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(1000), "{took:?}");
        assert!(took < Duration::from_millis(1050), "{took:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn ipv6_without_a_way_costs_250_ms_at_most() {
    bounded(async {
        let net = Net::new(2);
        let key = identity();
        let (server, _) = counting(&net, &key).await;
        let names = [dead(2), dead(4), dead(6), dead(8), server.local_addr().ip()];
        net.name("host.example", names);
        let begun = Instant::now();
        let socket = client(&net, &key).connect("host.example").await;
        socket.expect("IPv4 has the second turn");
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(300), "{took:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_server_is_reached_at_ipv6() {
    bounded(async {
        let net = Net::new(3);
        let key = identity();
        let address: SocketAddr = "[fd00:1::1]:45456".parse().expect("an address");
        let server = net
            .bind_at(testing::server().identity(key.clone()), address)
            .await
            .expect("an address");
        net.name("host.example", [dead(1), address.ip()]);
        let socket = client(&net, &key).connect("host.example").await;
        let socket = socket.expect("IPv6 has the second turn");
        assert_eq!(socket.remote_address(), address);
        let there = server.accept().await.expect("a socket");
        assert!(there.remote_address().is_ipv6());
        let moved = net.move_client(&socket).expect("of this network");
        let channel = socket.channel("echo").open().await.expect("a channel");
        channel.send("hello", &()).await.expect("room");
        let arrived = there.accept_channel().await.expect("the channel");
        arrived.recv().await.expect("a message");
        let now = there.remote_address();
        assert!(
            now.is_ipv6() && now.to_string() != moved.to_string(),
            "{now}"
        );
    })
    .await;
}

/// Both handshakes are under way at once, and each server would let us in.
#[tokio::test(start_paused = true)]
async fn only_the_winner_is_told_who_we_are() {
    bounded(async {
        let net = Net::new(4).delay(Duration::from_millis(300));
        let key = identity();
        let (first, asked) = counting(&net, &key).await;
        let (second, not_asked) = counting(&net, &key).await;
        net.name(
            "host.example",
            [first.local_addr().ip(), second.local_addr().ip()],
        );
        let socket = client(&net, &key).connect("host.example").await;
        let socket = socket.expect("both would let us in");
        assert_eq!(socket.remote_address(), first.local_addr());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(not_asked.load(Ordering::Relaxed), 0);
        assert!(second.sockets().is_empty());
        assert_eq!(second.metrics().refused.values().sum::<u64>(), 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_key_at_one_address_does_not_stop_the_others() {
    bounded(async {
        let net = Net::new(5);
        let key = identity();
        let (other, not_asked) = counting(&net, &identity()).await;
        let (server, _) = counting(&net, &key).await;
        net.name(
            "host.example",
            [other.local_addr().ip(), server.local_addr().ip()],
        );
        let begun = Instant::now();
        let socket = client(&net, &key).connect("host.example").await;
        let socket = socket.expect("the second has the key");
        assert_eq!(socket.remote_address(), server.local_addr());
        assert_eq!(not_asked.load(Ordering::Relaxed), 0);
        // What failed starts the next one at once.
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(200), "{took:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_final() {
    bounded(async {
        let net = Net::new(6);
        let key = identity();
        let (first, asked) = counting(&net, &key).await;
        let (second, not_asked) = counting(&net, &key).await;
        net.name(
            "host.example",
            [first.local_addr().ip(), second.local_addr().ip()],
        );
        let client = client(&net, &key).token("wrong");
        let error = client.connect("host.example").await.expect_err("refused");
        assert!(
            matches!(&error, ConnectError::Denied(reason) if reason.code == CloseCode::AUTH_FAILED),
            "{error}"
        );
        assert!(error.is_auth() && !error.retry());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(not_asked.load(Ordering::Relaxed), 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_error_names_each_address_and_its_reason() {
    bounded(async {
        let net = Net::new(7);
        let (key, another) = (identity(), identity());
        let (other, _) = counting(&net, &another).await;
        let there = other.local_addr();
        net.name("host.example", [dead(2), there.ip(), dead(1)]);
        let error = client(&net, &key).connect("host.example").await;
        let error = error.expect_err("none is the right one");
        let text = format!(
            "no address of host.example works: no answer from [fd00:dead::2]:45456; \
             {there}: the server's key is not the pinned one: expected {}, got {}; \
             no answer from 10.99.0.1:45456",
            key.fingerprint(),
            another.fingerprint()
        );
        assert_eq!(error.to_string(), text);
        assert!(error.is_auth(), "somebody else was there");
        assert!(error.retry(), "the right one may come back");
    })
    .await;
}

/// Both attempts are under way at once, and the later answer does not hide what the earlier one said.
#[tokio::test(start_paused = true)]
async fn two_wrong_keys_are_both_named() {
    bounded(async {
        let net = Net::new(9).delay(Duration::from_millis(300));
        let (key, others) = (identity(), [identity(), identity()]);
        let mut servers = Vec::new();
        for other in &others {
            servers.push(counting(&net, other).await.0);
        }
        let addresses = servers.iter().map(|server| server.local_addr().ip());
        net.name("host.example", addresses);
        let error = client(&net, &key).connect("host.example").await;
        let ConnectError::EachAddress { errors, .. } = error.expect_err("none is right") else {
            panic!("two addresses");
        };
        for ((address, error), (server, other)) in errors.iter().zip(servers.iter().zip(&others)) {
            assert_eq!(*address, server.local_addr());
            match error {
                ConnectError::PinMismatch { presented, .. } => {
                    assert_eq!(*presented, other.fingerprint());
                }
                error => panic!("{error}"),
            }
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_program_that_connects_again_may_begin_where_it_was_connected() {
    bounded(async {
        let net = Net::new(10);
        let key = identity();
        let (server, _) = counting(&net, &key).await;
        let there = server.local_addr();
        net.name("host.example", [dead(2), dead(1), there.ip()]);
        let client = client(&net, &key).build().expect("good settings");
        let begun = Instant::now();
        let again = client.beginning_with(there);
        again.connect("host.example").await.expect("let in");
        assert!(begun.elapsed() < Duration::from_millis(200));
        assert_eq!(net.traffic().astray, 0);
        // An address that the name has lost is not tried.
        let elsewhere = client.beginning_with(SocketAddr::new(dead(3), there.port()));
        let socket = elsewhere.connect("host.example").await.expect("let in");
        assert_eq!(socket.remote_address(), there);
    })
    .await;
}

async fn connected_again(socket: &Socket) {
    let mut states = socket.states();
    let mut lost = false;
    loop {
        match states.next().await.expect("another state") {
            SocketState::Connected { .. } if lost => return,
            SocketState::Connected { .. } => {}
            SocketState::Reconnecting { .. } => lost = true,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_reconnects_begins_where_it_was_connected_last() {
    bounded(async {
        let net = Net::new(8);
        let key = identity();
        let (server, _) = counting(&net, &key).await;
        net.name(
            "host.example",
            [dead(2), dead(1), dead(3), server.local_addr().ip()],
        );
        let client = client(&net, &key).reconnect(reconnect());
        let socket = client.connect("host.example").await.expect("let in");
        assert!(net.traffic().astray > 0, "the dead ones were tried first");
        let there = server.accept().await.expect("a socket");
        let before = net.traffic().astray;
        let again = connected_again(&socket);
        let closing = there.close(CloseCode::SHUTTING_DOWN, "come back");
        let _ = tokio::join!(again, closing);
        assert_eq!(net.traffic().astray, before, "only the last one was tried");
        assert_eq!(socket.remote_address(), server.local_addr());
    })
    .await;
}
