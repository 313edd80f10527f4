//! quinn without anything above it: streams whose first byte says what they are for, and messages with a length of
//! four bytes before them. What a program would do with messages is done to those of `messages` alone: each is
//! encoded when it is sent, and decoded and checked when it comes. Elsewhere lengths are counted.

use std::any::Any;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, PeerIncompatible, SignatureScheme};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::args::{Load, Peer, Scenario};
use crate::fanout::{self, Fanout};
use crate::ours::{
    AT_ONCE, CHUNK, EVENT, MESSAGE, TEXT, all, handshake_values, idle, interference_values,
    millis_since, ping_values, ramp, tick, tick_count,
};
use crate::peer::{Marks, Ready, Report};
use crate::programs::walk;

/// Bytes of messages that are gathered for one write.
const BATCH: usize = 32 << 10;
/// Bytes of a message with its length.
const FRAME: usize = 4 + MESSAGE;

/// Counts bytes, and answers with their number at the end.
const SINK: u8 = b's';
/// Counts messages, and answers with their number at the end.
const COUNT: u8 = b'c';
/// Decodes messages, and answers with their number at the end.
const DECODE: u8 = b'd';
/// Sends everything back.
const ECHO: u8 = b'e';
/// Answers with a byte, and from then on gets what is said.
const JOIN: u8 = b'j';
/// Says it to all who joined before.
const SAY: u8 = b'p';

const DAY: Duration = Duration::from_secs(86_400);

/// The transport settings of both sides.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Settings {
    /// quinn's own.
    Defaults,
    /// Those of udpack.
    Tuned,
}

impl Settings {
    fn transport(
        self,
        peer: Option<SocketAddr>,
    ) -> anyhow::Result<Option<Arc<quinn::TransportConfig>>> {
        Ok(match self {
            Self::Defaults => None,
            Self::Tuned => Some(Arc::new(udpack::bench::transport(peer)?)),
        })
    }

    fn endpoint(
        self,
        address: SocketAddr,
        server: Option<quinn::ServerConfig>,
    ) -> anyhow::Result<Endpoint> {
        Ok(match (self, server) {
            (Self::Defaults, Some(server)) => Endpoint::server(server, address)?,
            (Self::Defaults, None) => Endpoint::client(address)?,
            (Self::Tuned, server) => udpack::bench::endpoint(address, server)?,
        })
    }
}

type Members = Arc<Mutex<Vec<SendStream>>>;

/// Serves on an endpoint; both end when the process does.
pub(crate) fn serve(
    listen: SocketAddr,
    settings: Settings,
) -> anyhow::Result<(Ready, Box<dyn Any>)> {
    let (tls, key) = server_tls(&[b"bench"])?;
    let crypto = QuicServerConfig::try_from(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // A server that only listens knows no route.
    if let Some(transport) = settings.transport(None)? {
        config.transport_config(transport);
    }
    let endpoint = settings.endpoint(listen, Some(config))?;
    let ready = Ready {
        address: endpoint.local_addr()?,
        key,
    };
    tokio::spawn(accept(endpoint.clone()));
    Ok((ready, Box::new(endpoint)))
}

async fn accept(endpoint: Endpoint) {
    let members = Members::default();
    while let Some(incoming) = endpoint.accept().await {
        let members = members.clone();
        tokio::spawn(async move {
            let Ok(conn) = incoming.await else { return };
            while let Ok((send, recv)) = conn.accept_bi().await {
                let members = members.clone();
                tokio::spawn(async move {
                    // The client notices: it gets no answer.
                    let _ = serve_stream(send, recv, members).await;
                });
            }
        });
    }
}

async fn serve_stream(
    mut send: SendStream,
    mut recv: RecvStream,
    members: Members,
) -> anyhow::Result<()> {
    let mut kind = [0];
    recv.read_exact(&mut kind).await?;
    let [kind] = kind;
    match kind {
        SINK => {
            let mut bytes = 0_u64;
            while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
                bytes += chunk.bytes.len() as u64;
            }
            send.write_all(&bytes.to_be_bytes()).await?;
            send.finish()?;
        }
        COUNT => {
            let mut frames = Frames::default();
            while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
                frames.take(&chunk.bytes);
            }
            send.write_all(&frames.messages.to_be_bytes()).await?;
            send.finish()?;
        }
        DECODE => {
            let mut messages = Messages::default();
            while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
                messages.take(&chunk.bytes)?;
            }
            send.write_all(&messages.right.to_be_bytes()).await?;
            send.finish()?;
        }
        ECHO => {
            while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
                send.write_chunk(chunk.bytes).await?;
            }
        }
        JOIN => {
            // Locked until it is one of them: who is told so may speak at once.
            let mut members = members.lock().await;
            send.write_all(&[JOIN]).await?;
            members.push(send);
        }
        SAY => {
            let mut members = std::mem::take(&mut *members.lock().await);
            let mut frame = [0; FRAME];
            while recv.read_exact(&mut frame).await.is_ok() {
                let frame = Bytes::copy_from_slice(&frame);
                for member in &mut members {
                    member.write_chunk(frame.clone()).await?;
                }
            }
            // Whoever is dropped here has its stream finished, not reset.
            drop(members);
        }
        _ => bail!("no such kind of stream"),
    }
    Ok(())
}

/// Counts messages in the pieces of a stream.
#[derive(Debug, Default)]
struct Frames {
    /// The length as far as it has come.
    length: u32,
    length_bytes: u8,
    /// Bytes that the message still lacks.
    left: usize,
    messages: u64,
}

impl Frames {
    fn take(&mut self, mut data: &[u8]) {
        loop {
            if self.left > 0 {
                let step = self.left.min(data.len());
                data = data.get(step..).unwrap_or_default();
                self.left -= step;
                if self.left > 0 {
                    return;
                }
                self.messages += 1;
            }
            if self.length_bytes == 0
                && let Some((length, rest)) = data.split_first_chunk::<4>()
            {
                self.left = u32::from_be_bytes(*length) as usize;
                data = rest;
                continue;
            }
            let Some((byte, rest)) = data.split_first() else {
                return;
            };
            self.length = self.length << 8 | u32::from(*byte);
            self.length_bytes += 1;
            data = rest;
            if self.length_bytes == 4 {
                self.left = self.length as usize;
                (self.length, self.length_bytes) = (0, 0);
            }
        }
    }
}

/// Decodes the messages in the pieces of a stream.
#[derive(Debug, Default)]
struct Messages {
    /// A message as far as it has come, with its length.
    part: Vec<u8>,
    /// Those that say what they should.
    right: u64,
}

impl Messages {
    fn take(&mut self, mut data: &[u8]) -> anyhow::Result<()> {
        while !self.part.is_empty() && !data.is_empty() {
            let whole = match self.part.first_chunk() {
                Some(length) => 4 + length_of(length)?,
                None => 4,
            };
            let lacks = whole.saturating_sub(self.part.len()).min(data.len());
            let (head, rest) = data.split_at(lacks);
            self.part.extend_from_slice(head);
            data = rest;
            if let Some((length, message)) = self.part.split_first_chunk()
                && message.len() == length_of(length)?
            {
                self.right += u64::from(decode(message)?);
                self.part.clear();
            }
        }
        while let Some((length, rest)) = data.split_first_chunk()
            && let Some((message, rest)) = rest.split_at_checked(length_of(length)?)
        {
            self.right += u64::from(decode(message)?);
            data = rest;
        }
        self.part.extend_from_slice(data);
        Ok(())
    }
}

/// A length from its four bytes.
fn length_of(bytes: &[u8; 4]) -> anyhow::Result<usize> {
    let length = u32::from_be_bytes(*bytes) as usize;
    ensure!(length <= BATCH, "a message of {length} bytes");
    Ok(length)
}

/// Appends the message that udpack sends, with its length.
fn encode(buffer: &mut Vec<u8>) -> anyhow::Result<()> {
    let begin = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    rmp_serde::encode::write(buffer, &(EVENT, TEXT))?;
    let length = u32::try_from(buffer.len() - begin - 4)?;
    if let Some(place) = buffer.get_mut(begin..begin + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}

/// Whether it says what [`encode`] has written.
fn decode(message: &[u8]) -> anyhow::Result<bool> {
    let (event, text): (&str, &str) = rmp_serde::from_slice(message)?;
    Ok(event == EVENT && text == TEXT)
}

/// What a client of this server binds to.
pub(crate) fn any_port(server: SocketAddr) -> SocketAddr {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(any, 0)
}

/// Makes connections, each with an endpoint of its own.
pub(crate) struct Client {
    settings: Settings,
    config: quinn::ClientConfig,
    address: SocketAddr,
}

impl Client {
    pub(crate) fn new(ready: &Ready, settings: Settings) -> anyhow::Result<Self> {
        let crypto = QuicClientConfig::try_from(client_tls(&ready.key, &[b"bench"])?)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        if let Some(transport) = settings.transport(Some(ready.address))? {
            config.transport_config(transport);
        }
        Ok(Self {
            settings,
            config,
            address: ready.address,
        })
    }

    async fn one(&self) -> anyhow::Result<Connection> {
        let endpoint = self.settings.endpoint(any_port(self.address), None)?;
        let connecting = endpoint.connect_with(self.config.clone(), self.address, "localhost")?;
        Ok(connecting.await?)
    }

    async fn many(&self, count: usize) -> anyhow::Result<Vec<Connection>> {
        let dials = stream::iter(0..count).map(|_| self.one());
        dials.buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Runs a scenario's client; `each` message has a write of its own, or they go in batches.
    pub(crate) async fn drive(
        &self,
        peer: &Peer,
        load: &Load,
        each: bool,
        marks: Marks,
    ) -> anyhow::Result<Report> {
        match peer.scenario {
            Scenario::Stream | Scenario::Upload => self.stream(load).await,
            Scenario::Messages => self.messages(load, each).await,
            Scenario::Ping => self.ping(load).await,
            Scenario::Handshakes => self.handshakes(load).await,
            Scenario::Idle => idle(load, marks, |count| self.many(count)).await,
            Scenario::Fanout => self.fanout(load).await,
            Scenario::Interference => self.interference(load).await,
            Scenario::SmallFiles => {
                let dir = peer.dir.clone().context("there are no files to send")?;
                self.small_files(dir, load).await
            }
        }
    }

    async fn stream(&self, load: &Load) -> anyhow::Result<Report> {
        let conn = self.one().await?;
        let (mut send, mut recv) = open(&conn, SINK).await?;
        let chunk = Bytes::from(vec![0xa5; CHUNK]);
        let begun = Instant::now();
        let mut left = load.bytes;
        while left > 0 {
            let size = left.min(CHUNK as u64);
            send.write_chunk(chunk.slice(..size as usize)).await?;
            left -= size;
        }
        send.finish()?;
        let bytes = number(&mut recv).await?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(
            bytes == load.bytes,
            "{bytes} bytes of {} arrived",
            load.bytes
        );
        Ok(Report::default()
            .value("rate", bytes as f64 / took / 1e6)
            .lost(lost(&[conn])))
    }

    async fn messages(&self, load: &Load, each_alone: bool) -> anyhow::Result<Report> {
        let conns = self.many(load.sockets).await?;
        let mut streams = Vec::with_capacity(conns.len());
        for conn in &conns {
            streams.push(open(conn, DECODE).await?);
        }
        let each = load.count / load.sockets as u64;
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for (mut send, mut recv) in streams {
            tasks.spawn(async move {
                let mut batch = Vec::with_capacity(BATCH);
                for _ in 0..each {
                    encode(&mut batch)?;
                    if each_alone || batch.len() + FRAME > BATCH {
                        send.write_all(&batch).await?;
                        batch.clear();
                    }
                }
                send.write_all(&batch).await?;
                send.finish()?;
                let messages = number(&mut recv).await?;
                ensure!(messages == each, "{messages} messages of {each} arrived");
                Ok(())
            });
        }
        all(tasks).await?;
        let rate = load.count as f64 / begun.elapsed().as_secs_f64();
        Ok(Report::default().value("rate", rate).lost(lost(&conns)))
    }

    async fn ping(&self, load: &Load) -> anyhow::Result<Report> {
        let conns = self.many(load.sockets).await?;
        let each = load.count / load.sockets as u64;
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for conn in conns.clone() {
            tasks.spawn(async move {
                let (mut send, mut recv) = open(&conn, ECHO).await?;
                let mut micros = Vec::with_capacity(each as usize);
                let mut reply = [0; FRAME];
                for nth in 0..each {
                    let request = frame(nth);
                    let asked = Instant::now();
                    send.write_all(&request).await?;
                    recv.read_exact(&mut reply).await?;
                    micros.push(asked.elapsed().as_secs_f64() * 1e6);
                    ensure!(reply == request, "another reply than the request");
                }
                Ok(micros)
            });
        }
        let micros = all(tasks).await?.concat();
        Ok(ping_values(&micros, begun.elapsed()).lost(lost(&conns)))
    }

    async fn handshakes(&self, load: &Load) -> anyhow::Result<Report> {
        let shake = async || -> anyhow::Result<f64> {
            let begun = Instant::now();
            let conn = self.one().await?;
            let millis = begun.elapsed().as_secs_f64() * 1e3;
            conn.close(VarInt::from_u32(0), b"");
            Ok(millis)
        };
        let begun = Instant::now();
        let mut alone = Vec::new();
        for _ in 0..load.count {
            alone.push(shake().await?);
        }
        let alone_took = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let shakes = stream::iter(0..load.count).map(|_| shake());
        let beside: Vec<f64> = shakes.buffer_unordered(AT_ONCE).try_collect().await?;
        let beside_took = begun.elapsed().as_secs_f64();
        Ok(handshake_values(&alone, alone_took, &beside, beside_took))
    }

    async fn fanout(&self, load: &Load) -> anyhow::Result<Report> {
        let conns = self.many(load.sockets).await?;
        let run = Fanout::new(load);
        let mut tasks = JoinSet::new();
        for conn in &conns {
            let (send, mut recv) = open(conn, JOIN).await?;
            recv.read_exact(&mut [0]).await?;
            let (run, load) = (run.clone(), load.clone());
            tasks.spawn(async move {
                let _send = send;
                let mut millis = Vec::new();
                let mut frame = [0; FRAME];
                for _ in 0..load.count {
                    recv.read_exact(&mut frame).await?;
                    millis.push(run.received(tag(&frame)));
                }
                Ok(millis)
            });
        }
        let publisher = self.one().await?;
        let (mut send, _recv) = open(&publisher, SAY).await?;
        let begun = Instant::now();
        for _ in 0..load.count {
            send.write_all(&frame(run.next().await?)).await?;
        }
        let millis = all(tasks).await?.concat();
        Ok(fanout::values(&millis, begun))
    }

    async fn interference(&self, load: &Load) -> anyhow::Result<Report> {
        let conn = self.one().await?;
        let mut mirror = open(&conn, ECHO).await?;
        let alone = ticks(&mut mirror, load.seconds).await?;
        let (mut send, _recv) = open(&conn, SINK).await?;
        let written = Arc::new(AtomicU64::new(0));
        let progress = written.clone();
        let mut upload = JoinSet::<anyhow::Result<()>>::new();
        upload.spawn(async move {
            let chunk = Bytes::from(vec![0xa5; CHUNK]);
            loop {
                send.write_chunk(chunk.clone()).await?;
                progress.fetch_add(CHUNK as u64, Ordering::Relaxed);
            }
        });
        tokio::time::sleep(ramp(load)).await;
        let before = written.load(Ordering::Relaxed);
        let begun = Instant::now();
        let beside = ticks(&mut mirror, load.seconds).await?;
        let bytes = written.load(Ordering::Relaxed) - before;
        let took = begun.elapsed();
        ensure!(upload.try_join_next().is_none(), "the upload has ended");
        Ok(interference_values(&alone, &beside, bytes, took).lost(lost(&[conn])))
    }

    async fn small_files(&self, dir: PathBuf, load: &Load) -> anyhow::Result<Report> {
        let begun = Instant::now();
        let conn = self.one().await?;
        let (mut send, mut recv) = open(&conn, COUNT).await?;
        let (files, mut found) = mpsc::channel::<Vec<u8>>(64);
        let reader = tokio::task::spawn_blocking(move || {
            let mut failed = None;
            walk(&dir, &mut |path| match fs::read(path) {
                Ok(file) => files.blocking_send(file).is_ok(),
                Err(error) => {
                    failed = Some(error);
                    false
                }
            })
            .map_err(|error| failed.map_or(error, anyhow::Error::from))
        });
        while let Some(file) = found.recv().await {
            let length = u32::try_from(file.len())?;
            let length = Bytes::copy_from_slice(&length.to_be_bytes());
            send.write_all_chunks(&mut [length, Bytes::from(file)])
                .await?;
        }
        reader.await??;
        send.finish()?;
        let count = number(&mut recv).await?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(
            count == load.count,
            "{count} files of {} arrived",
            load.count
        );
        Ok(Report::default()
            .value("rate", count as f64 / took)
            .lost(lost(&[conn])))
    }
}

/// Milliseconds of round trips of messages that are sent at fixed times.
async fn ticks(
    (send, recv): &mut (SendStream, RecvStream),
    seconds: f64,
) -> anyhow::Result<Vec<f64>> {
    let count = tick_count(seconds);
    let epoch = Instant::now();
    let sending = async {
        for nth in 0..count {
            let now = tick(epoch, nth).await;
            send.write_all(&frame(now)).await?;
        }
        anyhow::Ok(())
    };
    let receiving = async {
        let mut millis = Vec::with_capacity(count as usize);
        let mut reply = [0; FRAME];
        for _ in 0..count {
            recv.read_exact(&mut reply).await?;
            millis.push(millis_since(epoch, tag(&reply)));
        }
        Ok(millis)
    };
    let ((), millis) = tokio::try_join!(sending, receiving)?;
    Ok(millis)
}

fn lost(conns: &[Connection]) -> u64 {
    let lost = |conn: &Connection| conn.stats().path.lost_packets;
    conns.iter().map(lost).sum()
}

async fn open(conn: &Connection, kind: u8) -> anyhow::Result<(SendStream, RecvStream)> {
    let (mut send, recv) = conn.open_bi().await?;
    send.write_all(&[kind]).await?;
    Ok((send, recv))
}

async fn number(recv: &mut RecvStream) -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    recv.read_exact(&mut bytes).await?;
    Ok(u64::from_be_bytes(bytes))
}

/// A message that begins with a number.
fn frame(tag: u64) -> [u8; FRAME] {
    let mut frame = [0xa5; FRAME];
    for (byte, value) in frame.iter_mut().zip(
        (MESSAGE as u32)
            .to_be_bytes()
            .into_iter()
            .chain(tag.to_be_bytes()),
    ) {
        *byte = value;
    }
    frame
}

/// The number it begins with.
fn tag(frame: &[u8; FRAME]) -> u64 {
    let tag = frame.get(4..12).and_then(|tag| tag.first_chunk());
    tag.map_or(0, |tag| u64::from_be_bytes(*tag))
}

/// TLS of a server with a fresh certificate, and the certificate in hexadecimal.
pub(crate) fn server_tls(alpn: &[&[u8]]) -> anyhow::Result<(rustls::ServerConfig, String)> {
    let pair = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()])?;
    // Browsers that are told its hash take one of at most 14 days.
    let now = SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + 7 * DAY).into();
    let certificate = params.self_signed(&pair)?.der().clone();
    let key =
        PrivateKeyDer::try_from(pair.serialize_der()).map_err(|reason| anyhow::anyhow!(reason))?;
    let hex = certificate
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.to_vec()).collect();
    Ok((config, hex))
}

/// TLS of a client that believes this certificate.
pub(crate) fn client_tls(key: &str, alpn: &[&[u8]]) -> anyhow::Result<rustls::ClientConfig> {
    let pairs = key.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair)?;
        u8::from_str_radix(pair, 16).context("the key is not hexadecimal")
    });
    let verifier = ThisCertificate {
        certificate: pairs.collect::<anyhow::Result<Vec<u8>>>()?,
        provider: provider(),
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.to_vec()).collect();
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Believes one certificate and nothing else.
#[derive(Debug)]
struct ThisCertificate {
    certificate: Vec<u8>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ThisCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if end_entity.as_ref() == self.certificate {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_messages_however_they_are_cut() {
        let mut stream = Vec::new();
        for size in [64_usize, 1, 0, 300, 64] {
            stream.extend_from_slice(&(size as u32).to_be_bytes());
            stream.resize(stream.len() + size, 7);
        }
        for step in 1..=stream.len() {
            let mut frames = Frames::default();
            for piece in stream.chunks(step) {
                frames.take(piece);
            }
            // One without bytes is none: nobody sends it.
            assert_eq!(frames.messages, 4, "pieces of {step}");
        }
    }

    #[test]
    fn decodes_messages_however_they_are_cut() {
        let mut stream = Vec::new();
        for _ in 0..5 {
            encode(&mut stream).unwrap();
        }
        assert_eq!(stream.len(), 5 * FRAME);
        let other = stream.len() - 1;
        stream[other] ^= 1;
        for step in 1..=stream.len() {
            let mut messages = Messages::default();
            for piece in stream.chunks(step) {
                messages.take(piece).unwrap();
            }
            assert_eq!(messages.right, 4, "pieces of {step}");
        }
        assert!(Messages::default().take(&[0xff; 4]).is_err());
    }

    #[test]
    fn a_frame_carries_its_number() {
        assert_eq!(tag(&frame(0x0102_0304_0506_0708)), 0x0102_0304_0506_0708);
        assert_eq!(frame(0)[..4], [0, 0, 0, 64]);
    }
}
