//! A server that speaks S3 (moto, from PyPI), and a proxy in front of it that fails as a store does.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Least bytes of a part that moto takes here; S3 itself takes 5 MiB.
pub(crate) const PART: u64 = 64 << 10;

/// moto shows objects of one request to nobody, and does not look at a signature.
const SOMEBODY: &str = "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";

/// moto in a process of its own, with an empty bucket.
pub(crate) struct Moto {
    child: Child,
    pub(crate) port: u16,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where moto is, if it is.
fn program() -> Option<PathBuf> {
    let target = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../target/python/bin/moto_server"
    );
    let ours = [PathBuf::from(target), PathBuf::from("moto_server")];
    ours.into_iter().find(|program| {
        let version = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        version.is_ok()
    })
}

impl Moto {
    /// `None`, said aloud, where there is none.
    pub(crate) async fn start() -> Option<Self> {
        let Some(program) = program() else {
            eprintln!(
                "SKIPPED: there is no moto_server here (scripts/install-test-tools --python)"
            );
            return None;
        };
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("its number").port();
        drop(free);
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .env("S3_UPLOAD_PART_MIN_SIZE", "1024")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto runs");
        let mut moto = Self { child, port };
        let made = tokio::time::timeout(Duration::from_secs(60), async {
            while !moto
                .ask("PUT", "/bucket")
                .await
                .is_some_and(|it| it.starts_with("HTTP/1.1 200"))
            {
                assert!(
                    moto.child.try_wait().expect("it is ours").is_none(),
                    "moto has ended"
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        made.await.expect("moto answers");
        Some(moto)
    }

    /// What it answers to a request without a body.
    async fn answer(&self, method: &str, path: &str) -> Option<Vec<u8>> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{SOMEBODY}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        Some(answer)
    }

    async fn ask(&self, method: &str, path: &str) -> Option<String> {
        let answer = self.answer(method, path).await?;
        Some(String::from_utf8_lossy(&answer).into_owned())
    }

    /// The bytes of an object.
    pub(crate) async fn get(&self, path: &str) -> Vec<u8> {
        let answer = self.answer("GET", path).await.expect("an answer");
        let head = answer.windows(4).position(|it| it == b"\r\n\r\n");
        answer[head.expect("a head") + 4..].to_vec()
    }

    /// Uploads that are under way in the bucket.
    pub(crate) async fn uploads(&self) -> usize {
        let answer = self.ask("GET", "/bucket?uploads").await.expect("an answer");
        answer.matches("<UploadId>").count()
    }

    /// Keys in the bucket but for those of udpack itself.
    pub(crate) async fn keys(&self) -> Vec<String> {
        let answer = self
            .ask("GET", "/bucket?list-type=2")
            .await
            .expect("an answer");
        let keys = answer.split("<Key>").skip(1);
        let keys = keys.filter_map(|rest| rest.split("</Key>").next());
        let ours = keys.filter(|key| !key.contains(".udpack/"));
        ours.map(str::to_owned).collect()
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// This status and code of S3, without asking moto.
    Status(u16, &'static str),
    /// 200, and an error in the body.
    ErrorInside(&'static str),
    /// Asks moto, and loses its answer.
    Lost,
    /// Cuts the connection after half of the request.
    Cut,
}

/// What a fault is decided by: the method and the path with its query, and how many requests came before.
type Decide = Box<dyn Fn(&str, u64) -> Option<Fault> + Send + Sync>;

/// A proxy in front of moto.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    /// Bytes of parts of files that went through; a sink's probe of the store at its start is none.
    pub(crate) part_bytes: watch::Receiver<u64>,
    sent: Arc<watch::Sender<u64>>,
    pub(crate) faults: Arc<AtomicU64>,
    decide: Arc<Mutex<Decide>>,
}

impl Proxy {
    pub(crate) async fn start(moto: &Moto) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (sent, part_bytes) = watch::channel(0);
        let proxy = Self {
            port: listener.local_addr().expect("its number").port(),
            part_bytes,
            sent: Arc::new(sent),
            faults: Arc::default(),
            decide: Arc::new(Mutex::new(Box::new(|_, _| None))),
        };
        let (shared, to, count) = (proxy.clone(), moto.port, Arc::new(AtomicU64::new(0)));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, count) = (shared.clone(), count.clone());
                tokio::spawn(async move {
                    let _ = shared.serve(stream, to, &count).await;
                });
            }
        });
        proxy
    }

    pub(crate) fn fail(&self, decide: impl Fn(&str, u64) -> Option<Fault> + Send + Sync + 'static) {
        *self.decide.lock().expect("sound") = Box::new(decide);
    }

    /// One request a connection.
    async fn serve(
        &self,
        mut stream: TcpStream,
        to: u16,
        count: &AtomicU64,
    ) -> std::io::Result<()> {
        let mut request = Vec::new();
        let head = loop {
            if let Some(at) = request.windows(4).position(|it| it == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        };
        let text = String::from_utf8_lossy(&request[..head]).into_owned();
        let line = text.lines().next().unwrap_or_default().to_owned();
        let length = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().ok())?
        });
        let whole = head + length.unwrap_or(0_usize);
        let number = count.fetch_add(1, Ordering::Relaxed);
        let fault = self.decide.lock().expect("sound")(&line, number);
        self.faults
            .fetch_add(u64::from(fault.is_some()), Ordering::Relaxed);
        while request.len() < whole {
            if fault == Some(Fault::Cut) && request.len() >= whole / 2 {
                return Ok(());
            }
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        let xml = |code: &str| {
            format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>"
            )
        };
        let answer = |status: u16, body: String| {
            format!(
                "HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
        };
        match fault {
            Some(Fault::Status(status, code)) => {
                stream
                    .write_all(answer(status, xml(code)).as_bytes())
                    .await?;
                return stream.shutdown().await;
            }
            Some(Fault::ErrorInside(code)) => {
                stream.write_all(answer(200, xml(code)).as_bytes()).await?;
                return stream.shutdown().await;
            }
            _ => {}
        }
        let is_part = line.starts_with("PUT") && line.contains("partNumber");
        if is_part && !line.contains("/probe?") {
            self.sent.send_modify(|sent| *sent += (whole - head) as u64);
        }
        // The host is in the signature, which moto does not look at; the connection ends with the answer.
        let head_end = head - 2;
        let mut moto = TcpStream::connect(("127.0.0.1", to)).await?;
        moto.write_all(&request[..head_end]).await?;
        moto.write_all(b"Connection: close\r\n\r\n").await?;
        moto.write_all(&request[head..]).await?;
        let mut reply = Vec::new();
        moto.read_to_end(&mut reply).await?;
        if fault == Some(Fault::Lost) {
            return Ok(());
        }
        stream.write_all(&reply).await?;
        stream.shutdown().await
    }
}

/// What the crate `object_store` must know of it.
pub(crate) fn settings(port: u16) -> Vec<(String, String)> {
    let endpoint = format!("http://127.0.0.1:{port}");
    let settings = [
        ("aws_endpoint", &*endpoint),
        ("aws_allow_http", "true"),
        ("aws_access_key_id", "test"),
        ("aws_secret_access_key", "test"),
        ("aws_region", "us-east-1"),
    ];
    settings
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
}
