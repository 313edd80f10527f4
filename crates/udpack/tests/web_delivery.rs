//! What resumable channels promise a page: numbered messages both ways through every end that a browser gives its session,
//! none lost, none doubled, none out of order. The page is somebody else's WebTransport, with the protocol by hand.

mod common;
#[path = "web/page.rs"]
#[expect(dead_code, reason = "each test binary uses its own part")]
mod page;

use std::collections::VecDeque;
use std::ops::Deref;
use std::time::Duration;

use common::{TOKEN, bind, server, timeouts};
use page::Page;
use quinn::VarInt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;
use udpack::{Channel, RecvError, SendError, Server, Web};
use web_transport_quinn::{SessionError, WebTransportError};

/// Messages each way, and frames with the end of a direction.
const MANY: u64 = 10_000;
const FRAMES: u64 = MANY + 1;
/// How Chromium resets and stops the streams of a session that it ends: HTTP/3's H3_CONNECT_ERROR.
const CONNECT_ERROR: u32 = 0x10f;

/// How a connection of the page ends.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// The browser closes it and says nothing of the session: the tab is gone.
    Closed,
    /// The page closes the session with `superseded`.
    Superseded,
    /// As Chromium does it: all streams are reset and stopped first, one of them in the middle of a message.
    Reset,
}

const CUTS: [Cut; 3] = [Cut::Closed, Cut::Superseded, Cut::Reset];

#[derive(Serialize)]
struct Hello {
    v: u64,
    token: &'static str,
    agent: &'static str,
    resume: Resume,
}

#[derive(Serialize, Clone, Default)]
struct Resume {
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<ByteBuf>,
}

#[derive(Deserialize)]
struct Welcome {
    session: String,
    #[serde(default)]
    resumed: bool,
    resume: Ticket,
}

#[derive(Deserialize)]
struct Ticket {
    token: ByteBuf,
}

#[derive(Serialize, Deserialize)]
struct Channels {
    open: Vec<u64>,
}

#[derive(Serialize)]
struct Open {
    id: u64,
    name: &'static str,
    resumable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    received: Option<u64>,
}

#[derive(Deserialize)]
struct Resumed {
    received: u64,
    done: bool,
}

#[derive(Serialize, Deserialize)]
struct Ack {
    channel: u64,
    own: bool,
    received: u64,
}

/// The frame of a message of the protocol, whose data is a map.
fn frame<T: Serialize>(event: &str, data: T) -> Vec<u8> {
    let body = rmp_serde::to_vec_named(&(event, data)).expect("a value");
    let length = u32::try_from(body.len()).expect("a small one");
    [&length.to_be_bytes()[..], &body].concat()
}

fn data<T: DeserializeOwned>(body: &[u8], event: &str) -> T {
    let (said, data): (String, T) = rmp_serde::from_slice(body).expect("such a message");
    assert_eq!(said, event);
    data
}

/// What a page keeps of a channel that it opened, whatever becomes of its connections.
struct Numbers {
    /// Frames that the server has not confirmed; the number of the first is `confirmed + 1`.
    kept: VecDeque<Vec<u8>>,
    next: u64,
    confirmed: u64,
    finished: bool,
    received: u64,
    heard: Vec<u64>,
    over: bool,
}

impl Numbers {
    fn told(&mut self, received: u64) {
        while self.confirmed < received.min(self.next) {
            self.kept.pop_front().expect("it was sent");
            self.confirmed += 1;
        }
        if received == FRAMES {
            self.confirmed = FRAMES;
        }
    }
}

/// A stream of a session on which HTTP/3's own codes can be said.
struct Raw {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

async fn raw(page: &Page) -> Raw {
    let (mut send, recv) = page.session.deref().open_bi().await.expect("a stream");
    // A stream of the session that stream 0 has asked for.
    send.write_all(&[0x40, 0x41, 0x00]).await.expect("sent");
    Raw { send, recv }
}

/// Reads frames and passes them on; an empty one is the end. Stops when nobody wants them.
async fn read(mut recv: quinn::RecvStream, to: mpsc::UnboundedSender<Vec<u8>>) {
    let mut length = [0; 4];
    loop {
        match recv.read_exact(&mut length).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => {
                let _ = to.send(Vec::new());
                // Kept until the test is done with it.
                return to.closed().await;
            }
            Err(_) => return,
        }
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        if recv.read_exact(&mut body).await.is_err() {
            return;
        }
        if to.send(body).is_err() {
            let _ = recv.stop(VarInt::from_u32(CONNECT_ERROR));
            return;
        }
    }
}

async fn counting(channel: Channel, tell: mpsc::UnboundedSender<Vec<u64>>) {
    let send = async {
        for number in 0..MANY {
            channel.send("n", &number).await?;
        }
        channel.finish().await
    };
    let listen = async {
        let mut heard: Vec<u64> = Vec::new();
        while let Some(message) = channel.recv().await? {
            heard.push(message.data().expect("a number"));
        }
        Ok(heard)
    };
    let (sent, heard): (Result<(), SendError>, Result<_, RecvError>) = tokio::join!(send, listen);
    sent.expect("everything was sent");
    let _ = tell.send(heard.expect("the page finishes"));
}

/// One connection of the page: resumes, goes on, and ends by `cut` once it has heard so many more, or when all is done and
/// the server says that it has heard all.
async fn connection(
    server: &Server,
    resume: &mut Resume,
    numbers: &mut Numbers,
    at_server: &mut mpsc::UnboundedReceiver<Vec<u64>>,
    cut: Option<(Cut, u64)>,
) {
    let page = Page::connect(server).await;
    let mut control = raw(&page).await;
    let hello = Hello {
        v: 1,
        token: TOKEN,
        agent: "page",
        resume: resume.clone(),
    };
    let again = resume.token.is_some();
    control
        .send
        .write_all(&frame("$hello", hello))
        .await
        .expect("sent");
    let (tell, mut said) = mpsc::unbounded_channel();
    tokio::spawn(read(control.recv, tell));
    let welcome: Welcome = data(&said.recv().await.expect("$welcome"), "$welcome");
    assert_eq!(welcome.resumed, again, "the session goes on");
    *resume = Resume {
        session: Some(welcome.session),
        token: Some(welcome.resume.token),
    };
    if again {
        let channels = frame("$channels", Channels { open: vec![1] });
        control.send.write_all(&channels).await.expect("sent");
        let _: Channels = data(&said.recv().await.expect("$channels"), "$channels");
    }
    let mut stream = raw(&page).await;
    let open = Open {
        id: 1,
        name: "numbers",
        resumable: true,
        received: again.then_some(numbers.received),
    };
    stream
        .send
        .write_all(&frame("$open", open))
        .await
        .expect("sent");
    let (tell, mut came) = mpsc::unbounded_channel();
    tokio::spawn(read(stream.recv, tell));
    if again {
        let resumed: Resumed = data(&came.recv().await.expect("$resume"), "$resume");
        assert!(!resumed.done, "the channel goes on");
        numbers.told(resumed.received);
        for frame in &numbers.kept {
            stream.send.write_all(frame).await.expect("sent");
        }
        if numbers.finished {
            stream.send.finish().expect("open");
        }
    }
    let until = cut.map_or(u64::MAX, |(_, more)| numbers.received + more);
    while numbers.received < until && !(numbers.over && numbers.confirmed == FRAMES) {
        tokio::select! {
            Some(body) = came.recv() => {
                numbers.received += 1;
                if body.is_empty() {
                    numbers.over = true;
                } else {
                    numbers.heard.push(data(&body, "n"));
                }
                if numbers.received.is_multiple_of(50) || numbers.over {
                    let received = numbers.received;
                    let ack = Ack { channel: 1, own: true, received };
                    control.send.write_all(&frame("$ack", ack)).await.expect("sent");
                }
            }
            Some(body) = said.recv() => {
                let ack: Ack = data(&body, "$ack");
                assert_eq!((ack.channel, ack.own), (1, false));
                numbers.told(ack.received);
            }
            () = std::future::ready(()), if numbers.next < MANY && numbers.kept.len() < 1000 => {
                let frame = frame("n", numbers.next);
                numbers.next += 1;
                stream.send.write_all(&frame).await.expect("sent");
                numbers.kept.push_back(frame);
            }
            () = std::future::ready(()), if numbers.next == MANY && !numbers.finished => {
                numbers.finished = true;
                stream.send.finish().expect("open");
            }
        }
    }
    let quic = page.session.deref();
    match cut {
        None => {
            // A close at once would overtake the last `$ack`, for which the server waits.
            let heard = at_server.recv().await.expect("the channel's end");
            assert!(heard.iter().copied().eq(0..MANY), "at the server");
        }
        Some((Cut::Closed, _)) => quic.close(VarInt::from_u32(0x100), b""),
        Some((Cut::Superseded, _)) => {
            page.session.close(0x36, b"");
            let over = page.session.closed().await;
            let said = matches!(
                over,
                SessionError::WebTransportError(WebTransportError::Closed(0x36, _))
                    | SessionError::ConnectionError(_)
            );
            assert!(said, "{over}");
        }
        Some((Cut::Reset, _)) => {
            if !numbers.finished {
                // Half a frame; the whole is kept, and comes again.
                let whole = frame("n", numbers.next);
                numbers.next += 1;
                let half = whole.len() / 2;
                stream.send.write_all(&whole[..half]).await.expect("sent");
                numbers.kept.push_back(whole);
            }
            let _ = stream.send.reset(VarInt::from_u32(CONNECT_ERROR));
            drop((came, said));
            // The resets are on their way before the close, as a browser's are.
            tokio::time::sleep(Duration::from_millis(20)).await;
            quic.close(VarInt::from_u32(0x100), b"");
        }
    }
}

#[tokio::test]
async fn ten_thousand_messages_each_way_through_every_end_of_a_session() {
    let test = async {
        let (tell, mut at_server) = mpsc::unbounded_channel();
        let handler = move |channel: Channel| counting(channel, tell.clone());
        let builder = server().web(Web::new()).timeouts(timeouts());
        let server = bind(builder.channel("numbers", handler)).await;
        let (mut resume, mut numbers) = (
            Resume::default(),
            Numbers {
                kept: VecDeque::new(),
                next: 0,
                confirmed: 0,
                finished: false,
                received: 0,
                heard: Vec::new(),
                over: false,
            },
        );
        for (at, cut) in CUTS.iter().cycle().take(24).enumerate() {
            let more = 7 + 30 * at as u64;
            let cut = Some((*cut, more));
            connection(&server, &mut resume, &mut numbers, &mut at_server, cut).await;
        }
        connection(&server, &mut resume, &mut numbers, &mut at_server, None).await;
        assert!(numbers.heard.iter().copied().eq(0..MANY), "at the page");
    };
    tokio::time::timeout(Duration::from_secs(60), test)
        .await
        .expect("it ends");
}
