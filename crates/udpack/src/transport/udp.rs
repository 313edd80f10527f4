//! The UDP socket: kernel buffers, batches larger than one send, and the size of datagrams that the route carries.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket as RawSocket, Type};
use tokio::io::Interest;

use crate::base::LogLimit;
use crate::base::lock;
use crate::transport::gather;
use crate::transport::lookup::unmapped;

/// Largest UDP payload that is tried, in bytes, even if the route carries larger ones.
///
/// What fits one IPv6 packet, and an IPv4 packet anyway; only loopback takes such. One stream there is 1.17 times as
/// fast as with 16,368 bytes, and loses nothing with our congestion control (2.8 and 2.4 GB/s).
pub(crate) const MOST_PAYLOAD: u16 = 65_535 - IPV6_HEADERS as u16;
/// Largest accepted UDP payload, in bytes, with a receive buffer below [`ROOMY`]. At Linux's usual 208 KiB, larger
/// datagrams were lost in rows, which quinn takes for a path that lost its MTU: 280 MB/s in packets of 1,200 bytes,
/// instead of 680 at this size.
pub(crate) const MODEST_PAYLOAD: u16 = 16_368;
/// Receive buffer in bytes from which on the size of datagrams does not matter: a dozen packets or none are lost in 1
/// GiB.
const ROOMY: usize = 4 << 20;
/// Bytes of one send with segmentation, at most.
pub(crate) const SEND: usize = MOST_PAYLOAD as usize;
/// Bytes of one receive: the most that Linux combines from datagrams (`GRO_LEGACY_MAX_SIZE`).
const RECEIVE: usize = 65_536;
/// The largest payload of a UDP datagram (RFC 9000, section 18.2), and of datagrams that Linux has combined.
const LARGEST: u16 = 65_527;
/// IP and UDP headers.
const IPV4_HEADERS: u32 = 20 + 8;
const IPV6_HEADERS: u32 = 40 + 8;

/// A UDP socket at this address; for IPv6 also of IPv4 peers. If the system has no IPv6, `[::]` binds all IPv4
/// addresses, and this is logged.
pub(crate) fn bound(address: SocketAddr) -> io::Result<UdpSocket> {
    bound_by(|address| open(address, None), address)
}

fn bound_by(
    open: impl Fn(SocketAddr) -> io::Result<UdpSocket>,
    address: SocketAddr,
) -> io::Result<UdpSocket> {
    let all = address.is_ipv6() && address.ip().is_unspecified();
    match open(address) {
        Err(error) if all && is_without_ipv6(&error) => {
            let address = SocketAddr::from(([0, 0, 0, 0], address.port()));
            tracing::warn!(%error, listening = %address, "this system has no IPv6; only IPv4 is served");
            open(address)
        }
        opened => opened,
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error();
    [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL]
        .iter()
        .any(|errno| code == Some(errno.raw_os_error()))
}

fn open(address: SocketAddr, interface: Option<&str>) -> io::Result<UdpSocket> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if let Some(interface) = interface {
        keep_to(&socket, interface)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Gives a bound UDP socket large kernel buffers, for an endpoint that accepts UDP payloads of `payload` bytes, or
/// smaller ones if the buffer is small; the size is returned with it. If the kernel grants less, the log says what to
/// do.
pub(crate) fn serve(socket: UdpSocket, buffer: usize, payload: u16) -> io::Result<Bound> {
    let socket = RawSocket::from(socket);
    let granted = grow_buffers(&socket, buffer);
    let socket = UdpSocket::from(socket);
    let payload = taken(payload, granted);
    let datagrams = Arc::new(Datagrams::of(socket)?);
    Ok(Bound {
        socket: Arc::new(Batching::over(datagrams.clone(), payload)),
        payload,
        port: Port(Some(datagrams)),
    })
}

/// Makes a socket send and receive over this interface of the system alone, whatever its routes say.
pub(crate) fn keep_to<'a>(
    socket: impl Into<socket2::SockRef<'a>>,
    interface: &str,
) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    return socket.into().bind_device(Some(interface.as_bytes()));
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = (socket.into(), interface);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Binds a UDP socket, to this interface alone if one is given, and [`serve`]s it.
pub(crate) fn bind(
    address: SocketAddr,
    interface: Option<&str>,
    buffer: usize,
    payload: u16,
) -> io::Result<Bound> {
    let socket = match interface {
        None => bound(address)?,
        some => open(address, some)?,
    };
    serve(socket, buffer, payload)
}

/// A UDP socket for a QUIC endpoint.
pub(crate) struct Bound {
    pub(crate) socket: Arc<dyn AsyncUdpSocket>,
    /// Largest UDP payload, in bytes, that the endpoint accepts.
    pub(crate) payload: u16,
    pub(crate) port: Port,
}

/// The port of an endpoint; empty on the in-memory network.
#[derive(Debug, Default)]
pub(crate) struct Port(Option<Arc<Datagrams>>);

impl Port {
    /// Closes the UDP socket even while connections use it: nothing more is sent or received, and the port can
    /// be bound at once.
    pub(crate) fn close(&self) {
        if let Some(socket) = &self.0 {
            *socket.io.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// Ends when the system reports that datagrams to this peer do not arrive, and returns the reason; otherwise never
/// ends. Asks the system after `pause`.
///
/// QUIC's own socket is not connected, because client and server may change their addresses, so it receives no ICMP
/// errors. This sends an empty datagram, which QUIC ignores, from a second socket that is connected.
pub(crate) async fn unreachable(
    (local, interface): (SocketAddr, Option<&str>),
    peer: SocketAddr,
    pause: Duration,
) -> &'static str {
    let hear = async {
        tokio::time::sleep(pause).await;
        let socket = tokio::net::UdpSocket::bind(SocketAddr::new(local.ip(), 0)).await?;
        if let Some(interface) = interface {
            keep_to(&socket, interface)?;
        }
        socket.connect(peer).await?;
        socket.send(&[]).await?;
        loop {
            socket.recv(&mut [0; 16]).await?;
        }
    };
    let heard: io::Result<Infallible> = hear.await;
    match heard.map_err(|error| error.kind()) {
        Err(io::ErrorKind::ConnectionRefused) => "connection refused",
        Err(io::ErrorKind::HostUnreachable) => "host unreachable",
        Err(io::ErrorKind::NetworkUnreachable) => "network unreachable",
        Err(io::ErrorKind::NetworkDown) => "network down",
        // The error says nothing about the path to the peer.
        Err(_) => std::future::pending().await,
        Ok(never) => match never {},
    }
}

/// Largest UDP payload, in bytes, that an endpoint accepts if it wants `payload` and has a receive buffer of
/// `granted` bytes. A payload above half of [`RECEIVE`] needs as much buffer memory as the largest one.
fn taken(payload: u16, granted: usize) -> u16 {
    let payload = if granted < ROOMY {
        payload.min(MODEST_PAYLOAD)
    } else {
        payload
    };
    if usize::from(payload) > RECEIVE / 2 {
        LARGEST
    } else {
        payload
    }
}

/// Enlarges the kernel's buffers; returns the size of the receive buffer, in bytes.
fn grow_buffers(socket: &RawSocket, wanted: usize) -> usize {
    // A privileged process may exceed the system's limit; otherwise the limit applies.
    if sockopt::set_socket_recv_buffer_size_force(socket, wanted).is_err() {
        let _ = socket.set_recv_buffer_size(wanted);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, wanted).is_err() {
        let _ = socket.set_send_buffer_size(wanted);
    }
    // Linux reports twice what it grants.
    let granted = |size: io::Result<usize>| size.map_or(0, |size| size / 2);
    let receive = granted(socket.recv_buffer_size());
    let send = granted(socket.send_buffer_size());
    if receive < wanted || send < wanted {
        tracing::warn!(
            wanted,
            receive,
            send,
            "the kernel gives smaller UDP buffers than asked for, which costs speed; \
             to allow them: sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"
        );
    }
    receive
}

/// Largest UDP payload, in bytes, that the kernel sends to this peer without fragments, at most [`MOST_PAYLOAD`];
/// `None` if unknown. The kernel knows only the first link; probes find out about the rest of the path.
pub(crate) fn route_payload(peer: SocketAddr) -> Option<u16> {
    let peer = unmapped(peer);
    let socket =
        RawSocket::new(Domain::for_address(peer), Type::DGRAM, Some(Protocol::UDP)).ok()?;
    // `connect` sends nothing; it looks up the route.
    socket.connect(&peer.into()).ok()?;
    let payload = match peer {
        SocketAddr::V4(_) => sockopt::ip_mtu(&socket).ok()?.checked_sub(IPV4_HEADERS)?,
        SocketAddr::V6(_) => sockopt::ipv6_mtu(&socket).ok()?.checked_sub(IPV6_HEADERS)?,
    };
    Some(u16::try_from(payload).map_or(MOST_PAYLOAD, |payload| payload.min(MOST_PAYLOAD)))
}

/// The kernel's socket. Quinn's own (`TokioRuntime`'s) receives until nothing is left: if datagrams come one by one,
/// every second receive finds nothing (requests over 100 sockets: 2.2 receives for each, 1.2 this way).
#[derive(Debug)]
struct Datagrams {
    /// `None` after the socket was closed.
    io: RwLock<Option<Arc<tokio::net::UdpSocket>>>,
    state: UdpSocketState,
    log_limit: LogLimit,
    /// Whether the kernel had no room for the last send.
    full: AtomicBool,
    /// How many messages the last receive returned.
    last: AtomicUsize,
    /// Whether the kernel has refused segmentation offload.
    divides: AtomicBool,
}

impl Datagrams {
    /// Wraps a bound socket. Must be called within tokio's runtime.
    fn of(socket: UdpSocket) -> io::Result<Self> {
        Ok(Self {
            state: UdpSocketState::new((&socket).into())?,
            io: RwLock::new(Some(Arc::new(tokio::net::UdpSocket::from_std(socket)?))),
            log_limit: LogLimit::default(),
            full: AtomicBool::new(false),
            last: AtomicUsize::new(0),
            divides: AtomicBool::new(false),
        })
    }

    fn io(&self) -> RwLockReadGuard<'_, Option<Arc<tokio::net::UdpSocket>>> {
        self.io.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Datagrams {
    /// Logs once that the kernel or the driver accepts only one datagram in one send. quinn then passes no more than
    /// one.
    #[cold]
    fn log_refusal(&self, error: &io::Error) {
        if !self.divides.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                %error,
                "the network interface refuses to cut sends into datagrams (GSO): each datagram is sent by itself, which costs speed"
            );
        }
    }

    /// Logs why a datagram was not sent, unless it was an MTU probe.
    #[cold]
    fn not_sent(&self, transmit: &Transmit<'_>, error: &io::Error) {
        let too_large = rustix::io::Errno::MSGSIZE.raw_os_error();
        if error.raw_os_error() == Some(too_large) {
            return;
        }
        if let Some(left_out) = self.log_limit.line() {
            let to = transmit.destination;
            tracing::warn!(%to, %error, left_out, "a datagram could not be sent");
        }
    }
}

/// Sends several datagrams together, or, where that is refused, which `refused` is told, one by one: a driver or a tunnel may refuse what the
/// kernel offers, and shows that only with the first such send, of which nothing leaves.
fn divided(
    mut send: impl FnMut(&Transmit<'_>) -> io::Result<()>,
    transmit: &Transmit<'_>,
    refused: impl FnOnce(&io::Error),
) -> io::Result<()> {
    let error = match (send(transmit), transmit.segment_size) {
        (Err(error), Some(segment)) if segment > 0 && is_refusal(&error) => error,
        (sent, _) => return sent,
    };
    refused(&error);
    let segment = transmit.segment_size.unwrap_or(SEND).max(1);
    for (at, contents) in transmit.contents.chunks(segment).enumerate() {
        let sent = send(&Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn,
            contents,
            segment_size: None,
            src_ip: transmit.src_ip,
        });
        match sent {
            // Sent datagrams must not be sent again; the rest is lost, once in the lifetime of a socket.
            Err(error) if at > 0 && error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            sent => sent?,
        }
    }
    Ok(())
}

/// Whether this is Linux' error for a driver or a tunnel without segmentation offload.
fn is_refusal(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error();
    code == Some(Errno::IO.raw_os_error()) || code == Some(Errno::INVAL.raw_os_error())
}

impl AsyncUdpSocket for Datagrams {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room {
            socket: self,
            waiting: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let io = self.io();
        let Some(io) = &*io else {
            return Ok(());
        };
        let sent = io.try_io(Interest::WRITABLE, || {
            let send = |part: &Transmit<'_>| self.state.try_send((&**io).into(), part);
            divided(send, transmit, |error| self.log_refusal(error))
        });
        let full = matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        if full != self.full.load(Ordering::Relaxed) {
            self.full.store(full, Ordering::Relaxed);
        }
        match sent {
            Err(error) if !full => {
                self.not_sent(transmit, &error);
                // For QUIC the datagram is lost.
                Ok(())
            }
            sent => sent,
        }
    }

    /// A receive that brings less than it had room for has emptied the socket. Then tokio need not be shown by another
    /// one that there is nothing left: epoll tells anew of whatever came after it, and forgetting what it told before
    /// undoes nothing that it tells meanwhile (tokio does the same with streams, in its `poll_evented.rs`).
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // Every place costs something, and mostly there is little.
        let last = self.last.load(Ordering::Relaxed);
        let room = last.saturating_mul(4).max(8);
        let room = room.min(bufs.len()).min(quinn::udp::BATCH_SIZE);
        let (bufs, _) = bufs.split_at_mut(room);
        let io = self.io();
        let Some(io) = &*io else {
            return Poll::Pending;
        };
        loop {
            ready!(io.poll_recv_ready(cx))?;
            let mut emptied = None;
            let received = io.try_io(Interest::READABLE, || {
                let count = self.state.recv((&**io).into(), bufs, meta)?;
                if count != last {
                    self.last.store(count, Ordering::Relaxed);
                }
                if cfg!(target_os = "linux") && count < room {
                    emptied = Some(count);
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(count)
            });
            match (emptied, received) {
                (Some(count), _) => return Poll::Ready(Ok(count)),
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                (None, received) => return Poll::Ready(received),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let io = self.io();
        io.as_ref().ok_or(io::ErrorKind::NotConnected)?.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room in the kernel; asks for it only when there was none.
struct Room {
    socket: Arc<Datagrams>,
    waiting: Option<Waiting>,
}

type Waiting = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whoever is told so by mistake finds out when it sends, and comes back.
        if self.waiting.is_none() && !self.socket.full.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let Some(io) = self.socket.io().clone() else {
            return Poll::Ready(Ok(()));
        };
        let waiting =
            (self.waiting).get_or_insert_with(|| Box::pin(async move { io.writable().await }));
        let room = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(room)
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").finish_non_exhaustive()
    }
}

/// A socket that takes batches of any size, and whose receive buffers hold what the kernel can deliver at once.
///
/// quinn hands over up to ten datagrams in one call. More than [`SEND`] bytes the kernel refuses as a whole, and
/// quinn takes that for a path that lost its MTU: so what is larger goes out in several sends.
#[derive(Debug)]
struct Batching {
    socket: Arc<dyn AsyncUdpSocket>,
    /// Datagrams of the largest size that come in one receive. quinn makes its buffers so many times as large.
    received: usize,
    /// The batch of which the kernel has taken a part.
    begun: Mutex<Option<Begun>>,
}

/// A batch that quinn will hand over again from where it lies, with the bytes of it that went out.
#[derive(Debug, Clone, Copy)]
struct Begun {
    place: (usize, usize),
    sent: usize,
}

impl Batching {
    fn over(socket: Arc<dyn AsyncUdpSocket>, payload: u16) -> Self {
        let most = match payload {
            LARGEST => 1,
            _ => RECEIVE.div_ceil(usize::from(payload.max(1))),
        };
        Self {
            received: socket.max_receive_segments().min(most),
            socket,
            begun: Mutex::default(),
        }
    }

    /// Forgets how much of this batch was sent, and tells.
    fn resume(&self, place: (usize, usize)) -> usize {
        let mut begun = lock(&self.begun);
        let known = begun.take_if(|begun| begun.place == place);
        known.map_or(0, |begun| begun.sent)
    }
}

impl AsyncUdpSocket for Batching {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let contents = transmit.contents;
        let segment = match transmit.segment_size {
            Some(segment) if contents.len() > SEND && segment > 0 => segment,
            _ => return gather::send(&self.socket, transmit),
        };
        let place = (contents.as_ptr() as usize, contents.len());
        let most = (SEND / segment).max(1) * segment;
        let mut sent = self.resume(place);
        while let Some(rest) = contents.get(sent..).filter(|rest| !rest.is_empty()) {
            let part = rest.get(..most).unwrap_or(rest);
            let part = Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents: part,
                segment_size: (part.len() > segment).then_some(segment),
                src_ip: transmit.src_ip,
            };
            let result = gather::send(&self.socket, &part);
            if let Err(error) = result {
                if sent > 0 && error.kind() == io::ErrorKind::WouldBlock {
                    *lock(&self.begun) = Some(Begun { place, sent });
                }
                return Err(error);
            }
            sent += part.contents.len();
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.received
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    /// Takes as many sends as it has room for, and keeps their sizes.
    #[derive(Debug)]
    pub(crate) struct Kernel {
        room: Mutex<usize>,
        segments: usize,
        sends: Mutex<Vec<Send>>,
    }

    /// The bytes, and the size of their datagrams where they are more than one.
    type Send = (Vec<u8>, Option<usize>);

    impl Kernel {
        pub(crate) fn with_room(room: usize) -> Arc<Self> {
            Self::with_segments(room, 64)
        }

        /// Takes and delivers no more than so many datagrams at once.
        pub(crate) fn with_segments(room: usize, segments: usize) -> Arc<Self> {
            Arc::new(Self {
                room: Mutex::new(room),
                segments,
                sends: Mutex::default(),
            })
        }

        pub(crate) fn make_room(&self, room: usize) {
            *lock(&self.room) = room;
        }

        pub(crate) fn sends(&self) -> Vec<Send> {
            lock(&self.sends).clone()
        }
    }

    /// Waits for room.
    #[derive(Debug)]
    struct Room(Arc<Kernel>);

    impl UdpPoller for Room {
        fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            match *lock(&self.0.room) {
                0 => Poll::Pending,
                _ => Poll::Ready(Ok(())),
            }
        }
    }

    impl AsyncUdpSocket for Kernel {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(Room(self))
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let mut room = lock(&self.room);
            *room = room.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
            lock(&self.sends).push((transmit.contents.to_vec(), transmit.segment_size));
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn max_transmit_segments(&self) -> usize {
            self.segments
        }

        fn max_receive_segments(&self) -> usize {
            self.segments
        }
    }

    pub(crate) fn batch(contents: &[u8], segment: usize) -> Transmit<'_> {
        Transmit {
            destination: SocketAddr::from(([127, 0, 0, 1], 1)),
            ecn: None,
            contents,
            segment_size: (contents.len() > segment).then_some(segment),
            src_ip: None,
        }
    }

    #[tokio::test]
    async fn a_closed_port_is_free_for_another_socket() {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let bound = bind(address, None, 1 << 20, 1472).unwrap();
        let address = bound.socket.local_addr().unwrap();
        assert!(UdpSocket::bind(address).is_err());
        bound.port.close();
        UdpSocket::bind(address).expect("the port is free");
        // Remaining users send nothing and receive nothing.
        let sent = bound.socket.try_send(&batch(b"late", 1472));
        sent.expect("as if it were lost");
        let mut memory = [0; 16];
        let mut bufs = [IoSliceMut::new(&mut memory)];
        let mut meta = [RecvMeta::default()];
        let receive = poll_fn(|cx| Poll::Ready(bound.socket.poll_recv(cx, &mut bufs, &mut meta)));
        assert!(receive.await.is_pending());
    }

    #[tokio::test]
    async fn all_is_received_that_comes_in_bursts_of_any_size() {
        let bound = bind(SocketAddr::from(([127, 0, 0, 1], 0)), None, 1 << 20, 1472);
        let socket = bound.unwrap().socket;
        let to = socket.local_addr().unwrap();
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut memory = vec![0; quinn::udp::BATCH_SIZE * 65_536];
        let mut sent = 0_u32;
        for burst in [1, 1, 2, 7, 8, 9, 31, 32, 33, 64, 1, 100, 1] {
            let expected: Vec<u32> = (sent..sent + burst).collect();
            for number in &expected {
                from.send_to(&number.to_be_bytes(), to).unwrap();
            }
            sent += burst;
            let mut received = Vec::new();
            while received.len() < expected.len() {
                let mut bufs: Vec<_> = memory.chunks_mut(65_536).map(IoSliceMut::new).collect();
                let mut meta = vec![RecvMeta::default(); bufs.len()];
                let receive = poll_fn(|cx| socket.poll_recv(cx, &mut bufs, &mut meta));
                let receive = tokio::time::timeout(Duration::from_secs(20), receive);
                let count = receive.await.expect("more comes").unwrap();
                for (buf, meta) in bufs.iter().zip(&meta).take(count) {
                    let datagrams = buf[..meta.len].chunks(meta.stride);
                    received.extend(
                        datagrams
                            .map(|four| u32::from_be_bytes(four.try_into().expect("a number"))),
                    );
                }
            }
            assert_eq!(received, expected);
        }
    }

    #[test]
    fn a_batch_goes_out_in_sends_that_the_kernel_takes() {
        for (length, segment) in [
            (10 * 1472, 1472),
            (10 * 8972, 8972),
            (10 * 16_368 - 7, 16_368),
            (2 * 65_487, 65_487),
            (60_000, 60_000),
        ] {
            let kernel = Kernel::with_room(100);
            let socket = Batching::over(kernel.clone(), 16_368);
            let contents: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            socket.try_send(&batch(&contents, segment)).expect("room");
            let sends = kernel.sends();
            let whole: Vec<u8> = sends.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            assert_eq!(whole, contents);
            for (at, (bytes, segmented)) in sends.iter().enumerate() {
                assert!(bytes.len() <= SEND, "{} bytes at once", bytes.len());
                assert_eq!(*segmented, (bytes.len() > segment).then_some(segment));
                let last = at + 1 == sends.len();
                assert!(last || bytes.len() % segment == 0, "cut inside a datagram");
            }
        }
    }

    #[test]
    fn a_batch_that_found_no_room_goes_on_where_it_stopped() {
        let kernel = Kernel::with_room(0);
        let socket = Batching::over(kernel.clone(), 16_368);
        let (first, other) = (vec![1; 10 * 16_368], vec![2; 10 * 16_368]);
        let blocked = |bytes: &[u8]| {
            let error = socket.try_send(&batch(bytes, 16_368)).expect_err("no room");
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        };
        kernel.make_room(1);
        blocked(&first);
        // Another connection finds no room at all.
        blocked(&other);
        kernel.make_room(1);
        blocked(&first);
        kernel.make_room(100);
        socket.try_send(&batch(&first, 16_368)).expect("room");
        let sent: usize = kernel.sends().iter().map(|(send, _)| send.len()).sum();
        assert_eq!(sent, first.len(), "nothing twice");
        socket.try_send(&batch(&first, 16_368)).expect("room");
        let sent: usize = kernel.sends().iter().map(|(send, _)| send.len()).sum();
        assert_eq!(sent, 2 * first.len(), "the next one is another");
    }

    #[test]
    fn tells_what_the_route_takes() {
        for peer in ["127.0.0.1:9", "[::ffff:127.0.0.1]:9"] {
            let peer = peer.parse().expect("an address");
            let payload = route_payload(peer).expect("loopback has a route");
            assert!((1200..=MOST_PAYLOAD).contains(&payload), "{payload}");
        }
    }

    #[test]
    fn binds_with_the_buffers_it_can_get() {
        let loopback = "127.0.0.1:0".parse().expect("an address");
        let socket = RawSocket::from(bound(loopback).expect("loopback"));
        let granted = grow_buffers(&socket, 1 << 20);
        let size = socket.recv_buffer_size().expect("a size");
        assert!(size >= 128 << 10, "{size}");
        assert_eq!(granted, size / 2);
    }

    #[test]
    fn what_may_not_leave_together_leaves_one_by_one() {
        use rustix::io::Errno;
        let contents: Vec<u8> = (0..2500).map(|n| (n % 251) as u8).collect();
        for refusal in [Errno::IO, Errno::INVAL] {
            let (mut sent, mut told) = (Vec::new(), 0);
            let kernel = |part: &Transmit<'_>| match part.segment_size {
                Some(_) => Err(refusal.into()),
                None => {
                    sent.push(part.contents.to_vec());
                    Ok(())
                }
            };
            divided(kernel, &batch(&contents, 1200), |_| told += 1).expect("it is sent");
            assert_eq!(sent, contents.chunks(1200).collect::<Vec<_>>());
            assert_eq!(told, 1);
        }
        // Another error is not about segments, nor is one of a single datagram.
        let mut tries = 0;
        let unreachable = |_: &Transmit<'_>| {
            tries += 1;
            Err(Errno::NETUNREACH.into())
        };
        let sent = divided(unreachable, &batch(&contents, 1200), |_| panic!("told"));
        sent.expect_err("no way");
        let refused = |_: &Transmit<'_>| Err(Errno::INVAL.into());
        let sent = divided(refused, &batch(&contents[..1200], 1200), |_| panic!("told"));
        sent.expect_err("it was alone");
        assert_eq!(tries, 1);
    }

    #[test]
    fn one_that_finds_no_room_begins_again_only_if_nothing_has_left() {
        use rustix::io::Errno;
        let contents = vec![1; 3600];
        for (room, ends) in [(0, false), (1, true), (3, true)] {
            let mut sent = 0;
            let kernel = |part: &Transmit<'_>| match part.segment_size {
                Some(_) => Err(Errno::IO.into()),
                None if sent == room => Err(io::ErrorKind::WouldBlock.into()),
                None => {
                    sent += 1;
                    Ok(())
                }
            };
            let outcome = divided(kernel, &batch(&contents, 1200), |_| {});
            assert_eq!((outcome.is_ok(), sent), (ends, room));
        }
    }

    #[test]
    fn without_ipv6_all_addresses_are_those_of_ipv4() {
        let none = |address: SocketAddr| match address.is_ipv6() {
            true => Err(rustix::io::Errno::AFNOSUPPORT.into()),
            false => open(address, None),
        };
        let all = SocketAddr::from(([0_u16; 8], 0));
        let socket = bound_by(none, all).expect("IPv4");
        assert!(socket.local_addr().unwrap().is_ipv4());
        let one = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 0));
        bound_by(none, one).expect_err("another address was not asked for");
        let taken = |_| Err(io::ErrorKind::AddrInUse.into());
        bound_by(taken, all).expect_err("the port is not free");
    }

    #[test]
    fn takes_huge_datagrams_only_with_room_for_many() {
        assert_eq!(taken(MOST_PAYLOAD, 0), MODEST_PAYLOAD);
        assert_eq!(taken(MOST_PAYLOAD, 212_992), MODEST_PAYLOAD);
        assert_eq!(taken(MOST_PAYLOAD, ROOMY), LARGEST);
        assert_eq!(taken(1472, 0), 1472);
        assert_eq!(taken(8972, ROOMY), 8972);
    }

    #[test]
    fn receives_as_much_as_comes_at_once_and_not_twice_that() {
        for payload in [
            1200,
            1472,
            8972,
            MODEST_PAYLOAD,
            (RECEIVE / 2) as u16,
            LARGEST,
        ] {
            let socket = Kernel::with_room(0);
            let room =
                Batching::over(socket, payload).max_receive_segments() * usize::from(payload);
            assert!(room >= usize::from(LARGEST), "{payload}: {room}");
            assert!(room < 2 * RECEIVE, "{payload}: {room}");
        }
    }
}
