//! The page of an example: served over plain HTTP on this machine, with the client that it imports, and where its server is.

use std::error::Error;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use udpack::{Drain, Server, ServerBuilder};

const CLIENT: &str = include_str!("../../crates/udpack-web/js/dist/udpack.js");
const STYLE: &str = include_str!("style.css");
/// The longest head of a request, and the time that it may take.
const HEAD: usize = 8 << 10;
const PATIENCE: Duration = Duration::from_secs(5);

/// The page itself and its program.
type Page = (&'static str, &'static str);

/// Serves on a free port of this machine, and the page on another, which it prints as a line of JSON; until Ctrl-C.
pub(crate) async fn run(
    server: ServerBuilder,
    html: &'static str,
    script: &'static str,
) -> Result<(), Box<dyn Error>> {
    let server = server.bind("127.0.0.1:0").await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!(
        r#"{{"page":"http://{}/","address":"{}","pin":"{}"}}"#,
        listener.local_addr()?,
        server.local_addr(),
        server.fingerprint()
    );
    tokio::spawn(serve(listener, (html, script), endpoint(&server)));
    server
        .run_until(tokio::signal::ctrl_c(), Drain::default())
        .await?;
    Ok(())
}

async fn serve(listener: TcpListener, page: Page, endpoint: String) {
    while let Ok((stream, _)) = listener.accept().await {
        let endpoint = endpoint.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(PATIENCE, answer(stream, page, &endpoint)).await;
        });
    }
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

async fn answer(mut stream: TcpStream, (html, script): Page, endpoint: &str) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        if head.len() > HEAD || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let (status, kind, body) = match head.split([' ', '?']).nth(1).unwrap_or_default() {
        "/" => ("200 OK", "text/html", html),
        "/page.js" => ("200 OK", "text/javascript", script),
        "/udpack.js" => ("200 OK", "text/javascript", CLIENT),
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
    stream.shutdown().await
}
