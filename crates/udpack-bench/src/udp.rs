//! Bare datagrams: what a request and its reply cost, and what a message to a room costs, where nothing is encrypted,
//! ordered, acknowledged or sent again.

use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::task::JoinSet;

use crate::args::{Load, Scenario};
use crate::fanout::{self, Fanout};
use crate::ours::{MESSAGE, all, ping_values};
use crate::peer::{Ready, Report};
use crate::raw::any_port;

/// Room for one of them, or for those that the kernel has put together.
const ROOM: usize = 4096;

/// A socket as quinn has them.
struct Socket {
    socket: Arc<dyn AsyncUdpSocket>,
    memory: Vec<u8>,
    heads: Vec<RecvMeta>,
}

impl Socket {
    fn bind(address: SocketAddr, batch: usize) -> io::Result<Self> {
        Ok(Self {
            socket: TokioRuntime.wrap_udp_socket(UdpSocket::bind(address)?)?,
            memory: vec![0; batch * ROOM],
            heads: vec![RecvMeta::default(); batch],
        })
    }

    /// Waits for datagrams: from whom, and the bytes.
    async fn receive(&mut self) -> io::Result<impl Iterator<Item = (SocketAddr, &[u8])>> {
        let (socket, memory, heads) = (&self.socket, &mut self.memory, &mut self.heads);
        let mut rooms: Vec<_> = memory.chunks_mut(ROOM).map(IoSliceMut::new).collect();
        let count = poll_fn(|context| socket.poll_recv(context, &mut rooms, heads)).await?;
        let received = self.memory.chunks(ROOM).zip(&self.heads).take(count);
        Ok(received.flat_map(|(room, head)| {
            let datagrams = room.get(..head.len).unwrap_or_default();
            let datagrams = datagrams.chunks(head.stride.max(1));
            datagrams.map(|datagram| (head.addr, datagram))
        }))
    }
}

async fn send(
    socket: &Arc<dyn AsyncUdpSocket>,
    destination: SocketAddr,
    contents: &[u8],
) -> io::Result<()> {
    let transmit = Transmit {
        destination,
        ecn: None,
        contents,
        segment_size: None,
        src_ip: None,
    };
    loop {
        match socket.try_send(&transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut poller = socket.clone().create_io_poller();
                poll_fn(|context| poller.as_mut().poll_writable(context)).await?;
            }
            sent => return sent,
        }
    }
}

/// The first byte of a datagram whose sender is sent it back, and all that is said from then on.
const JOIN: u8 = b'j';
/// The first byte of a datagram that goes to all who have joined.
const SAY: u8 = b'p';

/// Sends what is said to all who have joined, and everything else back, until the process ends.
pub(crate) fn serve(listen: SocketAddr) -> anyhow::Result<Ready> {
    let mut server = Socket::bind(listen, quinn::udp::BATCH_SIZE)?;
    let ready = Ready {
        address: server.socket.local_addr()?,
        key: String::new(),
    };
    tokio::spawn(async move {
        let socket = server.socket.clone();
        let mut members = Vec::new();
        // The clients notice: they get no answer.
        while let Ok(received) = server.receive().await {
            for (peer, datagram) in received {
                match datagram.first() {
                    Some(&SAY) => {
                        for member in &members {
                            let _ = send(&socket, *member, datagram).await;
                        }
                    }
                    first => {
                        if first == Some(&JOIN) {
                            members.push(peer);
                        }
                        let _ = send(&socket, peer, datagram).await;
                    }
                }
            }
        }
    });
    Ok(ready)
}

/// Runs a scenario's client.
pub(crate) async fn drive(
    scenario: Scenario,
    ready: &Ready,
    load: &Load,
) -> anyhow::Result<Report> {
    match scenario {
        Scenario::Ping => ping(ready.address, load).await,
        Scenario::Fanout => fanout(ready.address, load).await,
        _ => bail!("bare datagrams take no part in it"),
    }
}

/// One datagram is on its way on each socket: there is room for all of them, and none is lost.
async fn ping(server: SocketAddr, load: &Load) -> anyhow::Result<Report> {
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..load.sockets {
        let mut client = Socket::bind(any_port(server), 1)?;
        tasks.spawn(async move {
            let data = [0xa5; MESSAGE];
            let socket = client.socket.clone();
            let mut micros = Vec::with_capacity(each as usize);
            for _ in 0..each {
                let asked = Instant::now();
                send(&socket, server, &data).await?;
                let reply = client.receive().await?.next();
                micros.push(asked.elapsed().as_secs_f64() * 1e6);
                ensure!(
                    reply == Some((server, &data)),
                    "another reply than the request"
                );
            }
            Ok(micros)
        });
    }
    let micros = all(tasks).await?.concat();
    Ok(ping_values(&micros, begun.elapsed()))
}

/// Few datagrams are on their way to each socket: there is room for all of them, and none is lost.
async fn fanout(server: SocketAddr, load: &Load) -> anyhow::Result<Report> {
    let run = Fanout::new(load);
    let mut tasks = JoinSet::new();
    for _ in 0..load.sockets {
        let mut client = Socket::bind(any_port(server), 1)?;
        send(&client.socket, server, &[JOIN]).await?;
        ensure!(client.receive().await?.next().is_some(), "nobody answers");
        let (run, count) = (run.clone(), load.count as usize);
        tasks.spawn(async move {
            let mut millis = Vec::with_capacity(count);
            while millis.len() < count {
                for (_, datagram) in client.receive().await? {
                    let sent = datagram.get(1..9).and_then(|sent| sent.first_chunk());
                    let sent = sent.context("another datagram than was said")?;
                    millis.push(run.received(u64::from_be_bytes(*sent)));
                }
            }
            Ok(millis)
        });
    }
    let publisher = Socket::bind(any_port(server), 1)?;
    let begun = Instant::now();
    for _ in 0..load.count {
        let mut data = [0xa5; MESSAGE];
        let said = run.next().await?.to_be_bytes();
        for (byte, value) in data.iter_mut().zip([SAY].into_iter().chain(said)) {
            *byte = value;
        }
        send(&publisher.socket, server, &data).await?;
    }
    let millis = all(tasks).await?.concat();
    Ok(fanout::values(&millis, begun))
}
