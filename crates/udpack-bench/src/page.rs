//! Where pages of a browser send bytes to nowhere, for `bench/browser`: a stream of WebTransport with the QUIC settings of
//! udpack, a WebSocket, and the body of a PUT, the latter two over TLS and TCP. Each answers with the number of bytes.

use std::io::{Read, stdin};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures_util::{SinkExt, StreamExt};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, Incoming};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_tungstenite::tungstenite::Message;
use web_transport_quinn::{RecvStream, Request, SendStream};

use crate::raw::server_tls;

/// Streams that the peer opens: three of HTTP/3 and one of its own; CONNECT and the page's own.
const UNI: u32 = 4;
const BIDI: u32 = 66;
/// Bytes that are read at once from a connection of TCP.
const PART: usize = 256 << 10;
/// Bytes of the head of a request.
const HEAD: u64 = 16 << 10;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Address that it listens on
    #[arg(long, default_value = "127.0.0.1")]
    listen: IpAddr,
}

/// Where pages find it.
#[derive(Serialize)]
struct Addresses {
    web_transport: String,
    web_socket: String,
    put: String,
    /// The certificate of the first, in hexadecimal.
    certificate: String,
}

/// Serves until standard input ends.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let (addresses, _endpoint) = runtime.block_on(serve(options.listen))?;
    println!("{}", serde_json::to_string(&addresses)?);
    stdin().read_to_end(&mut Vec::new())?;
    runtime.shutdown_background();
    Ok(())
}

async fn serve(listen: IpAddr) -> anyhow::Result<(Addresses, Endpoint)> {
    let (tls, certificate) = server_tls(&[b"h3"])?;
    let crypto = QuicServerConfig::try_from(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let mut transport = udpack::bench::transport(None)?;
    transport
        .max_concurrent_uni_streams(UNI.into())
        .max_concurrent_bidi_streams(BIDI.into());
    config.transport_config(Arc::new(transport));
    let endpoint = udpack::bench::endpoint(SocketAddr::new(listen, 0), Some(config))?;
    let addresses = Addresses {
        web_transport: format!("https://{}/", endpoint.local_addr()?),
        web_socket: format!("wss://{}/", over_tls(listen, web_socket).await?),
        put: format!("https://{}/", over_tls(listen, put).await?),
        certificate,
    };
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            // The page notices: it gets no answer.
            tokio::spawn(async move { web_transport(incoming).await.ok() });
        }
    });
    Ok((addresses, endpoint))
}

async fn web_transport(incoming: Incoming) -> anyhow::Result<()> {
    let session = Request::accept(incoming.await?).await?.ok().await?;
    while let Ok((send, recv)) = session.accept_bi().await {
        tokio::spawn(async move { stream(send, recv).await.ok() });
    }
    Ok(())
}

async fn stream(mut send: SendStream, mut recv: RecvStream) -> anyhow::Result<()> {
    let mut bytes = 0_u64;
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        bytes += chunk.bytes.len() as u64;
    }
    send.write_all(bytes.to_string().as_bytes()).await?;
    send.finish()?;
    Ok(())
}

/// Serves each connection of TLS on a port of its own.
async fn over_tls<F>(
    listen: IpAddr,
    serve: fn(TlsStream<TcpStream>) -> F,
) -> anyhow::Result<SocketAddr>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let (tls, _) = server_tls(&[])?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind((listen, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                tcp.set_nodelay(true)?;
                serve(acceptor.accept(tcp).await?).await
            });
        }
    });
    Ok(address)
}

async fn web_socket(tls: TlsStream<TcpStream>) -> anyhow::Result<()> {
    let mut socket = tokio_tungstenite::accept_async(tls).await?;
    let mut bytes = 0_u64;
    while let Some(message) = socket.next().await {
        match message? {
            Message::Binary(data) => bytes += data.len() as u64,
            Message::Text(_) => socket.send(Message::text(bytes.to_string())).await?,
            Message::Close(_) => break,
            _ => {}
        }
    }
    Ok(())
}

/// Answers requests of HTTP/1.1, from pages of any origin.
async fn put(tls: TlsStream<TcpStream>) -> anyhow::Result<()> {
    let mut stream = BufStream::with_capacity(PART, PART, tls);
    let mut part = vec![0; PART];
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let most = HEAD.saturating_sub(head.len() as u64);
            let read = (&mut stream)
                .take(most)
                .read_until(b'\n', &mut head)
                .await?;
            if head.is_empty() {
                return Ok(());
            }
            ensure!(read > 0, "the head of a request is too long, or ends");
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"))
            .map_or(Ok(0), |length| length.trim().parse::<u64>())?;
        let (method, _) = head.split_once(' ').context("no request")?;
        let answer = match method {
            "put" => {
                let mut left = length;
                while left > 0 {
                    let most = usize::try_from(left).unwrap_or(PART).min(PART);
                    let read = stream.read(part.get_mut(..most).context("a part")?).await?;
                    ensure!(read > 0, "the body ends early");
                    left -= read as u64;
                }
                length.to_string()
            }
            "options" => String::new(),
            _ => bail!("only PUT is answered"),
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Methods: PUT\r\n\
             Access-Control-Allow-Headers: *\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        stream.flush().await?;
    }
}
