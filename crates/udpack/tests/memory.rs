//! What an idle socket costs in bytes, beside bare QUIC, and that streams are permitted as they are used.
//!
//! On a network in memory with a paused clock: what is waited for costs no time.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
mod common;
#[path = "common/heap.rs"]
mod heap;
#[path = "hostile/serving.rs"]
mod serving;

use std::sync::Arc;
use std::time::Duration;

use bare::{Bare, Stream};
use futures_util::FutureExt;
use futures_util::future::try_join_all;
use heap::{Mark, alone};
use rustls::pki_types::PrivateKeyDer;
use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{Channel, Limits, Server};

/// Sockets of which the cost is the mean.
const SOCKETS: usize = 48;
/// Those made before, for what is made once.
const WARM: usize = 8;
/// What an idle admitted socket may cost a server more than a connection of bare QUIC that permits as many streams.
const MORE: usize = 2 << 10;
/// And one more that its client may come back to.
const KEPT: usize = 1 << 10;

/// Bytes for each connection that `dial` makes, both ends together.
async fn cost<T>(mut dial: impl AsyncFnMut() -> T) -> usize {
    let mut held = Vec::with_capacity(WARM + SOCKETS);
    for _ in 0..WARM {
        held.push(dial().await);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mark = Mark::set();
    for _ in 0..SOCKETS {
        held.push(dial().await);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    mark.held() / SOCKETS
}

/// Both ends of a connection of bare QUIC on which a stream was used, for a server with these settings.
async fn bare_cost(net: &Net, transport: quinn::TransportConfig) -> usize {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec!["any.name".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate");
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let mut config = serving::serving(certificate.der().clone(), key);
    config.transport_config(Arc::new(transport));
    let server = net.bare().expect("an address");
    server.set_server_config(Some(config));
    let address = server.local_addr().expect("bound");
    let client = net.bare().expect("an address");
    cost(async || {
        let accepted = async {
            let incoming = server.accept().await.expect("a client");
            let conn = incoming.await.expect("a sound handshake");
            let (mut send, mut recv) = conn.accept_bi().await.expect("a stream");
            recv.read_chunk(1024, true).await.expect("a few bytes");
            send.write_all(&[0; 200]).await.expect("room for them");
            (conn, send, recv)
        };
        let dialled = async {
            let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
            let bare = Bare::dial(&client, address, config).await;
            let bare = bare.expect("a sound handshake");
            let mut stream = bare.stream().await;
            stream.write(&bare::hello("")).await;
            stream.recv.read_chunk(1024, true).await.expect("answered");
            (bare, stream)
        };
        tokio::join!(accepted, dialled)
    })
    .await
}

async fn entered(client: &quinn::Endpoint, server: &Server, resume: bool) -> (Bare, Stream) {
    let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    let bare = Bare::dial(client, server.local_addr(), config).await;
    let bare = bare.expect("a sound handshake");
    if !resume {
        let control = bare.enter("").await;
        return (bare, control);
    }
    let mut control = bare.stream().await;
    let hello = bare::map([
        ("v", 1.into()),
        ("token", "".into()),
        ("agent", "bare".into()),
        ("resume", bare::map([])),
    ]);
    control.write(&bare::event("$hello", hello)).await;
    let welcome = control.message().await.expect("admitted");
    assert_eq!(welcome.event(), "$welcome");
    (bare, control)
}

#[tokio::test(start_paused = true)]
async fn an_idle_socket_costs_hardly_more_than_its_connection() {
    alone(async {
        let net = Net::new(0);
        let alive = || {
            let mut transport = quinn::TransportConfig::default();
            transport.keep_alive_interval(Some(Duration::from_millis(50)));
            transport
        };
        // With equal settings both ends cost the same.
        let client = bare_cost(&net, alive()).await / 2;
        let mut same = alive();
        let limits = Limits::default();
        same.max_concurrent_bidi_streams((limits.channels + 1).into())
            .max_concurrent_uni_streams(1_u32.into());
        let raw = bare_cost(&net, same).await - client;
        let server = testing::server().channel("echo", common::echo);
        let limits = Limits {
            sockets_per_address: 1000,
            ..limits
        };
        let server = net.bind(server.limits(limits)).await;
        let server = server.expect("a free address");
        let endpoint = net.bare().expect("an address");
        let idle = cost(async || entered(&endpoint, &server, false).await).await - client;
        assert!(idle < raw + MORE, "{idle} bytes, bare QUIC {raw}");
        let kept = cost(async || entered(&endpoint, &server, true).await).await - client;
        assert!(kept < idle + KEPT, "{kept} bytes, others {idle}");
    })
    .await;
}

/// A channel that was opened and has answered once.
async fn asked(socket: &udpack::Socket, n: u64) -> Result<Channel, udpack::RequestError> {
    let channel = socket.channel("echo").open().await;
    let channel = channel.expect("one more channel");
    let answer: u64 = channel.request("echo", &n).await?;
    assert_eq!(answer, n);
    Ok(channel)
}

#[tokio::test(start_paused = true)]
async fn all_channels_may_be_opened_at_once_by_either_side() {
    alone(async {
        let trip = Duration::from_millis(100);
        let net = Net::new(0).delay(trip / 2);
        let limits = Limits::default();
        let most = u64::from(limits.channels);
        let server = testing::server()
            .channel("echo", common::echo)
            .connection(async |socket| {
                socket.closed().await;
            });
        let server = net.bind(server).await.expect("a free address");
        let client = testing::client(&server).channel("echo", common::echo);
        let client = net.connect(client, &server).await.expect("let in");
        let there = server.sockets().pop().expect("the client");
        for socket in [&client, &there] {
            let begun = Instant::now();
            let opened = (0..most).map(|n| asked(socket, n));
            let opened = try_join_all(opened).await.expect("answers");
            // One for those that were permitted at first, one for the others.
            assert!(begun.elapsed() < 3 * trip, "{:?}", begun.elapsed());
            let more = tokio::time::timeout(10 * trip, socket.channel("echo").open()).await;
            assert!(more.is_err(), "one channel more than the limit");
            drop(opened);
            tokio::time::sleep(10 * trip).await;
            asked(socket, 0).await.expect("room again");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_permitted_few_streams_until_it_uses_them() {
    alone(async {
        let net = Net::new(0);
        let server = testing::server().channel("echo", common::echo);
        let server = net.bind(server).await.expect("a free address");
        let (bare, _control) = entered(&net.bare().expect("an address"), &server, false).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        // quinn tells nobody of a stream before something is written to it.
        let mut streams: Vec<_> = std::iter::from_fn(|| bare.conn.open_bi().now_or_never())
            .map(|stream| stream.expect("a connection"))
            .collect();
        assert_eq!(streams.len(), 5, "beside the control stream");
        for (id, (send, _)) in (1..=2).zip(&mut streams) {
            let open = bare::open(id, "echo");
            send.write_all(&open).await.expect("a stream");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let more = std::iter::from_fn(|| bare.conn.open_bi().now_or_never()).count();
        assert_eq!(streams.len() + more, 64);
    })
    .await;
}
