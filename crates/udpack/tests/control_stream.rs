//! A control stream that its reader stops or its writer resets, and a server that goes away twice. On the paused clock,
//! against a peer that speaks QUIC and nothing else.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
#[path = "hostile/serving.rs"]
mod serving;

use std::time::Duration;

use bare::{Bare, Stream, Value, event, map};
use rustls::pki_types::PrivateKeyDer;
use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{
    Client, ClientBuilder, CloseCode, Identity, Reconnect, RefreshError, Server, Socket,
    SocketState,
};

/// Nothing here takes longer, on the paused clock.
const LONG: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("in time")
}

/// A client that was let in, and its control stream.
async fn guest(net: &Net, server: &Server) -> (Bare, Stream) {
    let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    let endpoint = net.bare().expect("an address");
    let bare = Bare::dial(&endpoint, server.local_addr(), config).await;
    let bare = bare.expect("a sound handshake");
    let control = bare.enter("anyone").await;
    (bare, control)
}

/// With which code the peer closed the connection.
async fn code(conn: &quinn::Connection) -> CloseCode {
    match within(conn.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            CloseCode::new(close.error_code.into_inner())
        }
        other => panic!("{other}"),
    }
}

fn refresh() -> Vec<u8> {
    event("$refresh", map([("token", "anyone".into())]))
}

fn close() -> Vec<u8> {
    event("$close", map([("code", 0.into()), ("text", "".into())]))
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_no_control_stream_is_let_go() {
    let net = Net::new(0).delay(Duration::from_millis(20));
    let server = net.bind(testing::server()).await.expect("an address");
    let (bare, mut control) = guest(&net, &server).await;
    control.recv.stop(0_u32.into()).expect("it was open");
    control.write(&refresh()).await;
    assert_eq!(code(&bare.conn).await, CloseCode::PROTOCOL_ORDER);
    within(async {
        while !server.sockets().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Who closes need not read on, whichever of its words comes first.
#[tokio::test(start_paused = true)]
async fn a_client_that_closes_may_stop_reading_first() {
    for (jitter, seed) in [(0, 0), (40, 1), (40, 2), (40, 3), (40, 4)] {
        let net = Net::new(seed)
            .delay(Duration::from_millis(20))
            .jitter(Duration::from_millis(jitter));
        let server = net.bind(testing::server()).await.expect("an address");
        let (bare, mut control) = guest(&net, &server).await;
        control.write(&refresh()).await;
        control.recv.stop(0_u32.into()).expect("it was open");
        tokio::time::sleep(Duration::from_millis(100)).await;
        control.write(&close()).await;
        let _ = control.send.finish();
        assert_eq!(code(&bare.conn).await, CloseCode::NORMAL, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_control_stream_that_is_reset_ends_its_connection() {
    let net = Net::new(0).delay(Duration::from_millis(20));
    let server = net.bind(testing::server()).await.expect("an address");
    let (bare, mut control) = guest(&net, &server).await;
    control.send.reset(7_u32.into()).expect("it was open");
    assert_eq!(code(&bare.conn).await, CloseCode::PROTOCOL_ORDER);
}

/// A server of bare QUIC, and a client that trusts it.
fn fake(net: &Net) -> (quinn::Endpoint, ClientBuilder) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec!["any.name".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate");
    let identity = Identity::from_pem(&certificate.pem(), &key.serialize_pem());
    let pin = identity.expect("they belong together").fingerprint();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = serving::serving(certificate.der().clone(), key);
    let endpoint = net.bare().expect("an address");
    endpoint.set_server_config(Some(config));
    (endpoint, net.attach(Client::builder().pin(pin).token("t")))
}

/// Takes a client's connection and lets it in.
async fn take(endpoint: &quinn::Endpoint) -> (quinn::Connection, Stream) {
    let incoming = endpoint.accept().await.expect("a client");
    let conn = incoming.await.expect("a sound handshake");
    let (send, recv) = conn.accept_bi().await.expect("a control stream");
    let mut control = Stream::new(send, recv);
    let hello = control.message().await.expect("a message");
    assert_eq!(hello.event(), "$hello");
    let limits = map([("frame", 65_536.into()), ("channels", 8.into())]);
    let welcome = map([
        ("v", 1.into()),
        ("session", "0".repeat(32).as_str().into()),
        ("agent", "fake".into()),
        ("limits", limits),
    ]);
    control.write(&event("$welcome", welcome)).await;
    (conn, control)
}

async fn pair(
    builder: ClientBuilder,
    endpoint: &quinn::Endpoint,
) -> (Socket, quinn::Connection, Stream) {
    let address = endpoint.local_addr().expect("bound").to_string();
    let (socket, (conn, control)) = tokio::join!(builder.connect(&address), take(endpoint));
    (socket.expect("let in"), conn, control)
}

#[tokio::test(start_paused = true)]
async fn a_server_that_reads_no_control_stream_is_left() {
    let net = Net::new(0).delay(Duration::from_millis(20));
    let (endpoint, client) = fake(&net);
    let (socket, conn, mut control) = pair(client.reconnect(Reconnect::default()), &endpoint).await;
    control.recv.stop(0_u32.into()).expect("it was open");
    // Until it has arrived.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let refreshed = within(socket.refresh("another")).await;
    assert!(
        matches!(refreshed, Err(RefreshError::Closed(_))),
        "{refreshed:?}"
    );
    assert_eq!(code(&conn).await, CloseCode::PROTOCOL_ORDER);
    assert_eq!(
        within(socket.closed()).await.code,
        CloseCode::PROTOCOL_ORDER
    );
}

fn goaway(text: &str, retry_after: u64) -> Vec<u8> {
    let fields = [
        ("code", Value::Uint(1)),
        ("text", text.into()),
        ("retry_after_ms", retry_after.into()),
        ("window_ms", 0.into()),
    ];
    event("$goaway", map(fields))
}

/// Of several the one that names the soonest time counts, whichever came first.
#[tokio::test(start_paused = true)]
async fn a_server_that_goes_away_twice_can_hurry_a_client_and_not_hold_it() {
    for (first, second, counts) in [
        (100_000, 5_000, ("second", 5)),
        (5_000, 100_000, ("first", 5)),
        (5_000, u64::MAX, ("first", 5)),
        (u64::MAX, 5_000, ("second", 5)),
    ] {
        let net = Net::new(0);
        let (endpoint, client) = fake(&net);
        let (socket, conn, mut control) =
            pair(client.reconnect(Reconnect::default()), &endpoint).await;
        let begun = Instant::now();
        let mut states = socket.states();
        states.next().await;
        control.write(&goaway("first", first)).await;
        let said = within(states.next()).await;
        assert!(
            matches!(&said, Some(SocketState::GoingAway(goaway)) if goaway.text == "first"),
            "{said:?}"
        );
        control.write(&goaway("second", second)).await;
        // It closes in order when its turn has come.
        loop {
            let message = within(control.message()).await.expect("a message");
            if message.event() == "$close" {
                break;
            }
        }
        let (text, seconds) = counts;
        let took = begun.elapsed();
        let due = Duration::from_secs(seconds);
        assert!(
            took >= due && took < due + Duration::from_secs(1),
            "{took:?}, {first}, {second}"
        );
        assert_eq!(
            socket.goaway().map(|goaway| goaway.text).as_deref(),
            Some(text)
        );
        conn.close(0_u32.into(), b"");
    }
}
