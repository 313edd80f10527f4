//! Types as data: what serde can write arrives at the peer, in every place of a type, and what does not fit says why.

mod common;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use common::bounded;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use udpack::testing::{self, Net};
use udpack::{
    Answer, Channel, Context, Data, Encoded, Event, Fault, Limits, Message, Next, PresenceMap,
    RequestError, Router, Server, Socket,
};

/// A server with this router on `x`, and a channel to it.
async fn open(router: Router) -> (Net, Server, Socket, Channel) {
    open_within(router, Limits::default()).await
}

/// The same for a client with these limits.
async fn open_within(router: Router, limits: Limits) -> (Net, Server, Socket, Channel) {
    let net = Net::new(1);
    let server = testing::server().channel("x", router);
    let server = net.bind(server).await.expect("bound");
    let client = testing::client(&server).limits(limits);
    let socket = net.connect(client, &server).await.expect("let in");
    let channel = socket.open("x").await.expect("a channel");
    (net, server, socket, channel)
}

/// Sends the value as a request whose handler takes and returns its type.
async fn there_and_back<T>(value: T)
where
    T: Serialize + DeserializeOwned + Debug + PartialEq + Send + Sync + 'static,
{
    let router = Router::new().on("same", |Data(value): Data<T>| async move {
        Ok::<_, Fault>(value)
    });
    let (_net, _server, _socket, channel) = open(router).await;
    let back = channel.request::<_, T>("same", &value).await;
    assert_eq!(back.expect("it comes back"), value);
}

#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(tag = "kind")]
enum Tagged {
    Up { at: IpAddr },
    Down { why: String },
    Sent { bytes: Vec<u8>, rest: ByteBuf },
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
#[serde(untagged)]
enum Untagged {
    Up { at: SocketAddr },
    Number(u64),
    Bytes { bytes: Vec<u8> },
}

#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
struct Inner {
    at: IpAddr,
    n: u64,
    bytes: Vec<u8>,
}

#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Event)]
struct Flat {
    id: u32,
    #[serde(flatten)]
    inner: Inner,
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
enum External {
    Unit,
    New(Vec<u8>),
    Tuple(u8, u8),
    Struct { at: IpAddr },
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
#[serde(tag = "t", content = "c")]
enum Adjacent {
    Bytes(Vec<u8>),
    At { ip: IpAddr },
}

/// A type that has two forms, as those of dates and identifiers do.
#[derive(Debug, Clone, Copy, PartialEq)]
struct TwoForms(u32);

impl Serialize for TwoForms {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(&format_args!("n{}", self.0)),
            false => serializer.serialize_u32(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for TwoForms {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        if !deserializer.is_human_readable() {
            return u32::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix('n').and_then(|n| n.parse().ok());
        digits
            .map(Self)
            .ok_or_else(|| D::Error::custom("no number"))
    }
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
#[serde(tag = "kind")]
enum Dated {
    At { when: TwoForms, all: Vec<TwoForms> },
}

fn ip() -> IpAddr {
    IpAddr::from([192, 0, 2, 1])
}

fn inner() -> Inner {
    Inner {
        at: ip(),
        n: u64::MAX,
        bytes: vec![1, 200, 3],
    }
}

#[tokio::test(start_paused = true)]
async fn what_serde_keeps_before_it_knows_its_place_arrives() {
    bounded(async {
        there_and_back(Tagged::Up { at: ip() }).await;
        there_and_back(Tagged::Down { why: "x".into() }).await;
        let (bytes, rest) = (vec![0, 127, 128, 255], ByteBuf::from(vec![9; 300]));
        there_and_back(Tagged::Sent { bytes, rest }).await;
        let at = SocketAddr::new(ip(), 45_456);
        there_and_back(Untagged::Up { at }).await;
        there_and_back(Untagged::Number(7)).await;
        there_and_back(Untagged::Bytes { bytes: vec![200] }).await;
        there_and_back(Flat {
            id: 1,
            inner: inner(),
        })
        .await;
        there_and_back(Adjacent::Bytes(vec![1, 2, 255])).await;
        there_and_back(Adjacent::At { ip: ip() }).await;
        let (when, all) = (TwoForms(3), vec![TwoForms(1), TwoForms(2)]);
        there_and_back(Dated::At { when, all }).await;
        there_and_back(Some(vec![Tagged::Up { at: ip() }])).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_serde_reads_at_once_arrives() {
    bounded(async {
        for value in [
            External::Unit,
            External::New(vec![7, 255]),
            External::Tuple(1, 200),
            External::Struct { at: ip() },
        ] {
            there_and_back(value).await;
        }
        there_and_back(HashMap::from([
            (1_u64, "a".to_owned()),
            (u64::MAX, "b".to_owned()),
        ]))
        .await;
        there_and_back(BTreeMap::from([(ip(), 1)])).await;
        there_and_back(HashSet::from([1_u8, 200])).await;
        there_and_back((f64::INFINITY, 1.0_f64, i64::MIN, i64::MAX)).await;
        there_and_back((u128::MAX, 7_u128, i128::MIN)).await;
        there_and_back((None::<u8>, Some("x".to_owned()), 'é')).await;
        there_and_back([200_u8; 32]).await;
        there_and_back(vec![vec![1_u8], vec![], vec![200, 201]]).await;
        there_and_back(vec![Some(1_u8), None]).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_list_of_bytes_travels_as_binary() {
    bounded(async {
        for len in [100_000, 900_000] {
            there_and_back(vec![200_u8; len]).await;
        }
        let bytes = |data: &dyn Fn() -> Encoded| data().bytes().slice(4..);
        assert_eq!(
            bytes(&|| Encoded::new("e", &vec![1_u8, 200]).expect("encodes")),
            b"\x92\xa1e\xc4\x02\x01\xc8"[..]
        );
        assert_eq!(
            bytes(&|| Encoded::new("e", &[1_u8, 200][..]).expect("encodes")),
            b"\x92\xa1e\xc4\x02\x01\xc8"[..],
            "a slice"
        );
        assert_eq!(
            bytes(&|| Encoded::new("e", &[1_u8, 200]).expect("encodes")),
            b"\x92\xa1e\x92\x01\xcc\xc8"[..],
            "an array of fixed length is one of numbers"
        );
        assert_eq!(
            bytes(&|| Encoded::new("e", &ip()).expect("encodes")),
            b"\x92\xa1e\xa9192.0.2.1"[..],
            "an address is text"
        );
    })
    .await;
}

#[test]
fn binary_and_arrays_of_numbers_are_both_lists_of_bytes() {
    let message =
        |body: &'static [u8]| Message::decode(Bytes::from_static(body)).expect("a message");
    let binary = message(b"\x92\xa1e\xc4\x02\x01\xc8");
    let array = message(b"\x92\xa1e\x92\x01\xcc\xc8");
    for message in [&binary, &array] {
        assert_eq!(message.data::<Vec<u8>>().expect("bytes"), [1, 200]);
        assert_eq!(message.data::<[u8; 2]>().expect("bytes"), [1, 200]);
        assert_eq!(message.data::<ByteBuf>().expect("bytes"), [1, 200]);
        let any = message.data::<serde_json::Value>().expect("any value");
        assert_eq!(any, serde_json::json!([1, 200]));
    }
    let kept = message(b"\x92\xa1e\x82\xa4kind\xa4Sent\xa5bytes\x92\x01\xcc\xc8");
    assert!(kept.data::<Tagged>().is_err(), "`rest` is missing");
}

/// A list that begins with a byte and goes on otherwise.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
#[serde(untagged)]
enum Odd {
    Byte(u8),
    Text(String),
}

#[tokio::test(start_paused = true)]
async fn a_list_that_only_begins_with_a_byte_arrives() {
    bounded(async {
        let text = || Odd::Text("x".to_owned());
        there_and_back(vec![Odd::Byte(1), text()]).await;
        there_and_back(vec![text(), Odd::Byte(1)]).await;
        there_and_back(vec![Odd::Byte(1), Odd::Byte(255)]).await;
    })
    .await;
}

#[test]
fn binary_is_not_blown_up_into_numbers_without_a_bound() {
    let bytes = vec![7_u8; 100_000];
    let sent = Encoded::new("e", &serde_json::json!({})).expect("encodes");
    assert!(sent.len() < 16);
    let tagged = Tagged::Sent {
        bytes,
        rest: ByteBuf::new(),
    };
    let frame = Encoded::new("e", &tagged).expect("encodes");
    let message = Message::decode(frame.bytes().slice(4..)).expect("a message");
    message
        .data::<Tagged>()
        .expect_err("numbers above the limit for elements");
}

#[tokio::test(start_paused = true)]
async fn every_way_of_sending_carries_the_same_types() {
    bounded(async {
        let node = Tagged::Up { at: ip() };
        let tracked = node.clone();
        let router = Router::new()
            .event(|flat: Flat| async move { assert_eq!(flat.inner, inner()) })
            .on("track", move |channel: Channel| {
                let tracked = tracked.clone();
                async move { channel.track("r", &tracked).map_err(Fault::from) }
            });
        let (_net, server, socket, channel) = open(router).await;
        let flat = Flat {
            id: 1,
            inner: inner(),
        };
        channel.call(&flat).await.expect("handled");
        channel.send_acked("track", &()).await.expect("tracked");
        let mut map = PresenceMap::new("r");
        while map.is_empty() {
            let message = channel.recv().await.expect("alive").expect("a message");
            map.apply(&message);
        }
        let metas: Result<Vec<Tagged>, _> = map.metas("tester").into_iter().collect();
        assert_eq!(metas.expect("nodes"), std::slice::from_ref(&node));
        socket.send_volatile("v", &node).expect("sent");
        let peer = server.sockets().pop().expect("a socket");
        let volatile = peer.recv_volatile().await.expect("a message");
        assert_eq!(volatile.data::<Tagged>().expect("a node"), node);
    })
    .await;
}

#[derive(Serialize, Deserialize, Debug)]
struct Order {
    a: u32,
    b: String,
}

#[tokio::test(start_paused = true)]
async fn data_that_does_not_fit_says_what_serde_says() {
    bounded(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let router = Router::new()
            .on("typed", |_: Order| async {})
            .on("by hand", |message: Message| async move {
                let order: Order = message.data()?;
                Ok::<_, Fault>(order.a)
            })
            .wrap(move |message: Message, cx: Context, next: Next| {
                let tell = tell.clone();
                async move {
                    let answer = next.run(message, cx).await;
                    let _ = tell.send(answer.fault().and_then(Fault::reason));
                    answer
                }
            });
        let (_net, _server, _socket, channel) = open(router).await;
        for event in ["typed", "by hand"] {
            let data = serde_json::json!({"a": 1, "c": "\u{202e}"});
            let asked = channel.request::<_, u32>(event, &data).await;
            let Err(RequestError::Fault(fault)) = asked else {
                panic!("{event}: {asked:?}");
            };
            assert_eq!(fault.code, Fault::BAD_PAYLOAD, "{event}");
            assert_eq!(fault.message, "data does not have the expected type");
            let reason = Some("missing field `b`".to_owned());
            assert_eq!(fault.reason(), reason, "{event}: to the asker");
            assert_eq!(told.recv().await, Some(reason), "{event}: to the author");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_reply_above_the_askers_frame_says_so_with_both_sizes() {
    bounded(async {
        let large = || ByteBuf::from(vec![7; 10_000]);
        let router = Router::new()
            .on("value", move || async move { Ok::<_, Fault>(large()) })
            .on("answer", move || async move { Answer::value(&large()) })
            .on("items", move || async move {
                udpack::Streaming::new(futures_util::stream::iter([large()]))
            });
        let limits = Limits {
            frame: 4_096,
            ..Limits::default()
        };
        let (_net, _server, _socket, channel) = open_within(router, limits).await;
        for event in ["value", "answer", "items"] {
            let asked = channel.send_acked(event, &()).await;
            let Err(RequestError::Fault(fault)) = asked else {
                panic!("{event}: {asked:?}");
            };
            assert_eq!(fault.code, Fault::REPLY_TOO_LARGE, "{event}");
            let sizes = fault.data::<HashMap<String, u64>>().expect("sizes");
            let sizes = sizes.expect("there");
            assert_eq!(sizes["limit"], 4_096, "{event}");
            assert!((10_000..10_040).contains(&sizes["size"]), "{sizes:?}");
            let size = sizes["size"].to_string();
            assert!(fault.message.contains(&size), "{}", fault.message);
        }
    })
    .await;
}
