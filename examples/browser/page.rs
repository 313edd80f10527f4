//! The page of an example: served over plain HTTP on this machine, with the client that it imports, where its server is, and
//! WebSockets for browsers that cannot reach it over UDP.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use udpack::{Drain, Server, ServerBuilder, Web};
use udpack_web::{HttpListener, Site};

const CLIENT: &str = include_str!("../../crates/udpack-web/js/dist/udpack.js");
const MUX: &str = include_str!("../../crates/udpack-web/js/dist/mux.js");
const STYLE: &str = include_str!("style.css");
/// The longest head of a request, and the time that it may take.
const HEAD: usize = 8 << 10;
const PATIENCE: Duration = Duration::from_secs(5);

/// The page itself and its program.
type Page = (&'static str, &'static str);

/// Serves on a free port of this machine, and the page on another, which it prints as a line of JSON; until Ctrl-C. The first
/// argument is the address where others reach this machine: browsers have WebTransport at pages of 127.0.0.1 only, for plain HTTP.
pub(crate) async fn run(
    server: ServerBuilder,
    html: &'static str,
    script: &'static str,
) -> Result<(), Box<dyn Error>> {
    let host = std::env::args().nth(1);
    let host: IpAddr = host.as_deref().unwrap_or("127.0.0.1").parse()?;
    let server = server.bind((host, 0)).await?;
    let listener = TcpListener::bind((host, 0)).await?;
    println!(
        r#"{{"page":"http://{}/","address":"{}","pin":"{}"}}"#,
        listener.local_addr()?,
        server.local_addr(),
        server.fingerprint()
    );
    let sockets = HttpListener::bind("127.0.0.1:0").await?;
    let at = sockets.local_addr();
    tokio::spawn(sockets.serve(Site::of(server.clone(), Web::new())));
    tokio::spawn(serve(listener, (html, script), endpoint(&server), at));
    server
        .run_until(tokio::signal::ctrl_c(), Drain::default())
        .await?;
    Ok(())
}

async fn serve(listener: TcpListener, page: Page, endpoint: String, sockets: SocketAddr) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let endpoint = endpoint.clone();
        tokio::spawn(async move {
            let answered = answer(&mut stream, page, &endpoint);
            if let Ok(Ok(Some(head))) = tokio::time::timeout(PATIENCE, answered).await {
                let _ = carry(stream, &head, sockets).await;
            }
        });
    }
}

/// Hands what a page sends into a WebSocket on to where WebSockets are taken.
async fn carry(mut stream: TcpStream, head: &[u8], sockets: SocketAddr) -> io::Result<()> {
    let mut inner = TcpStream::connect(sockets).await?;
    inner.write_all(head).await?;
    tokio::io::copy_bidirectional(&mut stream, &mut inner).await?;
    Ok(())
}

/// What `connect` of the page asks for first: the port of the server, and the hashes of its certificates.
fn endpoint(server: &Server) -> String {
    let mut hashes = Vec::new();
    for hash in server.certificate_hashes() {
        let digits = hash.map(|byte| format!("{byte:02x}")).concat();
        hashes.push(format!("\"{digits}\""));
    }
    let (port, hashes) = (server.local_addr().port(), hashes.join(","));
    format!(
        r#"{{"protocol":"udpack/1","host":null,"port":{port},"path":"/udpack","hashes":[{hashes}]}}"#
    )
}

/// Answers a request. Gives back what it has read if that is for a WebSocket.
async fn answer(
    stream: &mut TcpStream,
    (html, script): Page,
    endpoint: &str,
) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        if head.len() > HEAD || stream.read_buf(&mut head).await? == 0 {
            return Ok(None);
        }
    }
    let request = String::from_utf8_lossy(&head);
    let (status, kind, body) = match request.split([' ', '?']).nth(1).unwrap_or_default() {
        "/udpack" => return Ok(Some(head)),
        "/" => ("200 OK", "text/html", html),
        "/page.js" => ("200 OK", "text/javascript", script),
        "/udpack.js" => ("200 OK", "text/javascript", CLIENT),
        "/mux.js" => ("200 OK", "text/javascript", MUX),
        "/style.css" => ("200 OK", "text/css", STYLE),
        "/.well-known/udpack.json" => ("200 OK", "application/json", endpoint),
        _ => ("404 Not Found", "text/plain", "there is nothing here"),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}; charset=utf-8\r\ncontent-length: {length}\r\n\
         cache-control: no-store\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await?;
    Ok(None)
}
