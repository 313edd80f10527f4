//! Reads new streams until their kind is known, within bounds of time and bytes.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream};

use super::wire::{self, Capsules, FIELD_SECTION, Fault, Request, code, fault, frame, uni};
use crate::transport::quic::varint;

/// A stream that is being read.
pub(super) type Reading = Pin<Box<dyn Future<Output = Event> + Send>>;

/// The result of reading.
pub(super) enum Event {
    /// SETTINGS; the control stream continues.
    Settings(Frames),
    /// A stream that lasts as long as the connection. It is read by a future of its own, which is smaller than the
    /// one that determined its kind.
    Then(Reading),
    /// A request for a session, or the status with which to answer another.
    Request(SendStream, Frames, Result<Request, u16>),
    /// A bidirectional stream of this session, after its header.
    Both(u64, (SendStream, RecvStream)),
    /// As well, from the client alone.
    Uni(u64, RecvStream),
    /// The client has closed the session.
    Closed(u32, String),
    /// The client has given the session up.
    Gone,
    /// A stream both ways that ended, or was turned away, before it had said what it is.
    Unsaid,
    /// As well, from the client alone.
    Nothing,
    /// A fault that ends the connection.
    Fault(Fault),
}

impl Event {
    /// Whether the event is of a new bidirectional stream.
    pub(super) fn is_of_both(&self) -> bool {
        matches!(
            self,
            Self::Request(..) | Self::Both(..) | Self::Unsaid | Self::Fault(_)
        )
    }
}

/// How many bytes a client may still send.
#[derive(Debug)]
pub(super) struct Budget(AtomicU64);

impl Budget {
    pub(super) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn take(&self, bytes: u64) -> Result<(), Fault> {
        let left = |left: u64| left.checked_sub(bytes);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
        let too_much = |_| fault(code::EXCESSIVE_LOAD, "more than HTTP/3 needs here");
        taken.map(drop).map_err(too_much)
    }
}

/// State that the streams of one connection share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) budget: Budget,
    within: Duration,
    control: AtomicBool,
    encoder: AtomicBool,
    decoder: AtomicBool,
}

impl Shared {
    pub(super) fn new(budget: u64, within: Duration) -> Self {
        Self {
            budget: Budget(AtomicU64::new(budget)),
            within,
            control: AtomicBool::new(false),
            encoder: AtomicBool::new(false),
            decoder: AtomicBool::new(false),
        }
    }

    /// Reads a bidirectional stream until its kind is known.
    pub(super) fn both(self: Arc<Self>, send: SendStream, recv: RecvStream) -> Reading {
        Box::pin(async move {
            let within = self.within;
            let mut streams = (send, Frames::new(recv, self));
            let head = tokio::time::timeout(within, head(&mut streams.1, frame::WEBTRANSPORT));
            let (mut send, mut frames) = match head.await {
                Ok(Ok(Head::Session(id))) => {
                    return Event::Both(id, (streams.0, streams.1.stream));
                }
                Ok(Ok(Head::Other(kind))) => {
                    let request = tokio::time::timeout(within, request(&mut streams.1, kind));
                    match request.await {
                        Ok(Ok(said)) => return Event::Request(streams.0, streams.1, said),
                        Ok(Err(Cut::Fault(fault))) => return Event::Fault(fault),
                        Ok(Err(Cut::Ended | Cut::Short | Cut::Over)) | Err(_) => streams,
                    }
                }
                Ok(Err(Cut::Fault(fault))) => return Event::Fault(fault),
                Ok(Err(Cut::Ended | Cut::Short | Cut::Over)) | Err(_) => streams,
            };
            let _ = send.reset(varint(code::REQUEST_INCOMPLETE));
            let _ = frames.stream.stop(varint(code::REQUEST_INCOMPLETE));
            Event::Unsaid
        })
    }

    /// Reads a unidirectional stream until its kind is known.
    pub(super) fn uni(self: Arc<Self>, stream: RecvStream) -> Reading {
        Box::pin(async move {
            let within = self.within;
            let shared = self.clone();
            let mut frames = Frames::new(stream, self);
            let head =
                match tokio::time::timeout(within, head(&mut frames, uni::WEBTRANSPORT)).await {
                    Ok(Ok(head)) => head,
                    Ok(Err(Cut::Fault(fault))) => return Event::Fault(fault),
                    Ok(Err(Cut::Ended | Cut::Short | Cut::Over)) => return Event::Nothing,
                    Err(_) => {
                        frames.stop(code::STREAM_CREATION);
                        return Event::Nothing;
                    }
                };
            let second = |what| Event::Fault(fault(code::STREAM_CREATION, what));
            match head {
                Head::Session(id) => Event::Uni(id, frames.stream),
                Head::Other(uni::CONTROL) if shared.control.swap(true, Ordering::Relaxed) => {
                    second("a second control stream")
                }
                Head::Other(uni::CONTROL) => {
                    match tokio::time::timeout(within, settings(&mut frames)).await {
                        Ok(Ok(())) => Event::Settings(frames),
                        Ok(Err(cut)) => Event::Fault(cut.critical()),
                        Err(_) => {
                            Event::Fault(fault(code::MISSING_SETTINGS, "no SETTINGS in time"))
                        }
                    }
                }
                Head::Other(uni::PUSH) => second("a push from a client"),
                Head::Other(uni::QPACK_ENCODER) if shared.encoder.swap(true, Ordering::Relaxed) => {
                    second("a second encoder stream")
                }
                Head::Other(uni::QPACK_DECODER) if shared.decoder.swap(true, Ordering::Relaxed) => {
                    second("a second decoder stream")
                }
                Head::Other(uni::QPACK_ENCODER) => {
                    Event::Then(Box::pin(frames.qpack(code::QPACK_ENCODER_STREAM)))
                }
                Head::Other(uni::QPACK_DECODER) => {
                    Event::Then(Box::pin(frames.qpack(code::QPACK_DECODER_STREAM)))
                }
                Head::Other(_) => {
                    // GREASE, or something of the future (RFC 9114, section 6.2).
                    frames.stop(code::STREAM_CREATION);
                    Event::Nothing
                }
            }
        })
    }
}

/// Why reading a stream ended.
enum Cut {
    /// It ended.
    Ended,
    /// It ended in the middle of an element.
    Short,
    /// The client has reset it.
    Over,
    /// The bytes break the protocol.
    Fault(Fault),
}

impl Cut {
    /// The same of a stream of which more was to come.
    fn within(self) -> Self {
        match self {
            Self::Ended => Self::Short,
            other => other,
        }
    }

    /// The same of a stream that must not end.
    fn critical(self) -> Fault {
        match self {
            Self::Fault(fault) => fault,
            Self::Ended | Self::Short | Self::Over => {
                fault(code::CLOSED_CRITICAL_STREAM, "a stream ended that must not")
            }
        }
    }
}

impl From<Fault> for Cut {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// The kind of a stream, from its first bytes.
enum Head {
    /// It belongs to this session.
    Session(u64),
    /// The type of a stream or of its first frame.
    Other(u64),
}

/// Reads exactly these bytes, because the rest belongs to the session.
async fn head(frames: &mut Frames, session: u64) -> Result<Head, Cut> {
    let kind = frames.number().await?;
    if kind != session {
        return Ok(Head::Other(kind));
    }
    let id = frames.number().await?;
    if !id.is_multiple_of(4) {
        return Err(fault(code::ID_ERROR, "a session that is no request").into());
    }
    Ok(Head::Session(id))
}

/// Reads the first frame of the control stream.
async fn settings(frames: &mut Frames) -> Result<(), Cut> {
    let (kind, length) = frames.frame().await?;
    if kind != frame::SETTINGS {
        let text = "the control stream does not begin with SETTINGS";
        return Err(fault(code::MISSING_SETTINGS, text).into());
    }
    let payload = frames.payload(length).await?;
    Ok(wire::check_settings(&payload)?)
}

/// Reads a request whose first frame is of this type.
async fn request(frames: &mut Frames, mut kind: u64) -> Result<Result<Request, u16>, Cut> {
    loop {
        frames.shared.budget.take(2)?;
        let length = frames.number().await?;
        match kind {
            frame::HEADERS if length > FIELD_SECTION => {
                return Err(fault(code::EXCESSIVE_LOAD, "the field section is too large").into());
            }
            frame::HEADERS => {
                let section = frames.payload(length).await?;
                return Ok(wire::request(&section)?);
            }
            kind if frame::is_known(kind) => {
                let text = "a request does not begin with HEADERS";
                return Err(fault(code::FRAME_UNEXPECTED, text).into());
            }
            _ => frames.skip(length).await?,
        }
        kind = frames.number().await?;
    }
}

/// A stream of HTTP/3 from the client.
pub(super) struct Frames {
    stream: RecvStream,
    shared: Arc<Shared>,
}

impl Frames {
    fn new(stream: RecvStream, shared: Arc<Shared>) -> Self {
        Self { stream, shared }
    }

    /// Stops the stream with this code.
    pub(super) fn stop(mut self, code: u64) {
        let _ = self.stream.stop(varint(code));
    }

    /// The next bytes: at least one, at most `most`.
    async fn some(&mut self, most: usize) -> Result<Bytes, Cut> {
        match self.stream.read_chunk(most, true).await {
            Ok(Some(chunk)) => Ok(chunk.bytes),
            Ok(None) => Err(Cut::Ended),
            // The code that accepts the connection's streams gets the error.
            Err(ReadError::ConnectionLost(_)) => std::future::pending().await,
            Err(_) => Err(Cut::Over),
        }
    }

    /// Some of the next `left` bytes.
    async fn part(&mut self, left: u64) -> Result<Bytes, Cut> {
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        self.some(most).await.map_err(Cut::within)
    }

    /// A number of QUIC's variable length.
    async fn number(&mut self) -> Result<u64, Cut> {
        let first = self.some(1).await?;
        let first = first.first().copied().unwrap_or_default();
        let mut value = u64::from(first & 0x3f);
        let mut rest = (1_usize << (first >> 6)) - 1;
        while rest > 0 {
            let bytes = self.some(rest).await.map_err(Cut::within)?;
            rest -= bytes.len();
            value = bytes
                .iter()
                .fold(value, |value, byte| value << 8 | u64::from(*byte));
        }
        Ok(value)
    }

    /// Type and length of the next frame.
    async fn frame(&mut self) -> Result<(u64, u64), Cut> {
        let kind = self.number().await?;
        self.shared.budget.take(2)?;
        let length = self.number().await.map_err(Cut::within)?;
        Ok((kind, length))
    }

    /// Reads the payload of a frame. The bytes are taken from the budget before memory is allocated.
    async fn payload(&mut self, length: u64) -> Result<Vec<u8>, Cut> {
        self.shared.budget.take(length)?;
        let mut left = usize::try_from(length).unwrap_or_default();
        let mut payload = Vec::new();
        while left > 0 {
            let bytes = self.some(left).await.map_err(Cut::within)?;
            left -= bytes.len();
            payload.extend_from_slice(&bytes);
        }
        Ok(payload)
    }

    /// Skips the payload of a frame.
    async fn skip(&mut self, length: u64) -> Result<(), Cut> {
        self.shared.budget.take(length)?;
        let mut left = length;
        while left > 0 {
            left -= self.part(left).await?.len() as u64;
        }
        Ok(())
    }

    /// Reads the control stream after SETTINGS. A server needs none of its frames, and the stream must not end.
    pub(super) async fn control(mut self) -> Event {
        let cut = loop {
            let (kind, length) = match self.frame().await {
                Ok(head) => head,
                Err(cut) => break cut,
            };
            if frame::is_known(kind) && !frame::is_control(kind) {
                let text = "a frame that does not belong on the control stream";
                break fault(code::FRAME_UNEXPECTED, text).into();
            }
            if let Err(cut) = self.skip(length).await {
                break cut;
            }
        };
        Event::Fault(cut.critical())
    }

    /// Reads a QPACK stream, on which almost nothing may be sent to a side without a dynamic table.
    async fn qpack(mut self, code: u64) -> Event {
        const MOST: usize = 1024;
        let mut left = MOST;
        while left > 0 {
            match self.some(left).await {
                Ok(bytes) => left -= bytes.len(),
                Err(cut) => return Event::Fault(cut.critical()),
            }
        }
        Event::Fault(fault(code, "more than QPACK needs without a table"))
    }

    /// Reads the request's stream after the request, up to the capsule that closes the session.
    pub(super) async fn capsules(mut self) -> Event {
        let mut capsules = Capsules::default();
        loop {
            let (kind, length) = match self.frame().await {
                Ok(head) => head,
                Err(Cut::Ended) if !capsules.is_within() => return Event::Closed(0, String::new()),
                Err(cut) => return within_capsule(cut),
            };
            let taken = match kind {
                frame::DATA => self.data(length, &mut capsules).await,
                kind if frame::is_known(kind) => {
                    let text = "a frame that does not belong on the request's stream";
                    Err(fault(code::FRAME_UNEXPECTED, text).into())
                }
                _ => self.skip(length).await.map(|()| None),
            };
            match taken {
                Ok(None) => {}
                Ok(Some((code, text))) => return Event::Closed(code, text),
                Err(cut) => return within_capsule(cut),
            }
        }
    }

    async fn data(
        &mut self,
        length: u64,
        capsules: &mut Capsules,
    ) -> Result<Option<(u32, String)>, Cut> {
        let mut left = length;
        while left > 0 {
            let bytes = self.part(left).await?;
            self.shared.budget.take(bytes.len() as u64)?;
            left -= bytes.len() as u64;
            if let Some(closed) = capsules.push(&bytes)? {
                return Ok(Some(closed));
            }
        }
        Ok(None)
    }
}

fn within_capsule(cut: Cut) -> Event {
    match cut {
        Cut::Fault(fault) => Event::Fault(fault),
        Cut::Ended | Cut::Short => {
            Event::Fault(fault(code::MESSAGE, "the request's stream ended too early"))
        }
        Cut::Over => Event::Gone,
    }
}
