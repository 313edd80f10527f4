//! Bare datagrams: what a request and its reply cost where nothing is encrypted, ordered or sent again.

use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{bail, ensure};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::task::JoinSet;

use crate::args::{Load, Scenario};
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

/// Sends everything back, until the process ends.
pub(crate) fn serve(listen: SocketAddr) -> anyhow::Result<Ready> {
    let mut server = Socket::bind(listen, quinn::udp::BATCH_SIZE)?;
    let ready = Ready {
        address: server.socket.local_addr()?,
        key: String::new(),
    };
    tokio::spawn(async move {
        let socket = server.socket.clone();
        // The clients notice: they get no answer.
        while let Ok(received) = server.receive().await {
            for (peer, datagram) in received {
                let _ = send(&socket, peer, datagram).await;
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
