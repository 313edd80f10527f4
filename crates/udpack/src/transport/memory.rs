//! A network in memory below QUIC: packets that are lost, delayed, doubled and reordered as a seed says.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use crate::base::lock;
use crate::transport::carriers::Carriers;
use crate::transport::endpoint::{At, Via};
use crate::transport::mux::Ends;
use crate::trust::origin::Transport;
use crate::trust::url::DEFAULT_PORT;

/// Largest UDP payload that passes, in bytes: Ethernet's 1,500 less the headers.
const MTU: usize = 1472;
/// Packets that may wait for one receiver; more are dropped, as a kernel's buffer would.
const INBOX: usize = 16_384;
/// The first ports that clients send from.
const FIRST_PORT: u16 = 49_152;

/// The treatment of packets between a client and the servers, in each direction.
///
/// Start from `Path::default()` (a clean link with 1 ms of delay) and change what you must:
/// `Path { loss: 0.1, ..Path::default() }`.
#[derive(Debug, Clone, PartialEq)]
pub struct Path {
    /// Share of packets that are lost, 0.0 to 1.0. Default 0.
    pub loss: f64,
    /// The delay of each packet. Default 1 ms.
    pub delay: Duration,
    /// The largest additional random delay of a packet; packets may overtake each other. Default 0.
    pub jitter: Duration,
    /// Share of packets that arrive twice. Default 0.
    pub duplicate: f64,
    /// Share of packets that are held back for another `delay` and 5 ms, while later ones pass. Default 0.
    pub reorder: f64,
    /// Bytes per second that pass. Further packets wait up to 100 ms; beyond that they are lost. Default: no limit.
    pub rate: Option<u64>,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            loss: 0.0,
            delay: Duration::from_millis(1),
            jitter: Duration::ZERO,
            duplicate: 0.0,
            reorder: 0.0,
            rate: None,
        }
    }
}

/// What became of the packets so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Packets sent.
    pub sent: u64,
    /// Packets delivered to their receiver, copies included.
    pub delivered: u64,
    /// Packets lost by [`Path::loss`].
    pub lost: u64,
    /// Packets that were duplicated.
    pub duplicated: u64,
    /// Packets that were held back.
    pub reordered: u64,
    /// Packets lost in a cut, including those in transit when it began.
    pub cut: u64,
    /// Packets lost because the rate did not carry them, the receiver's buffer was full or they were too large.
    pub dropped: u64,
    /// Packets to an address without a socket.
    pub astray: u64,
}

/// A network in memory. A handle: clones share one network. See the [module](crate::testing).
#[derive(Debug, Clone)]
pub struct Net {
    state: Arc<Mutex<State>>,
}

impl Net {
    /// A clean network: no loss, 1 ms of delay.
    pub fn new(seed: u64) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                seed,
                path: Path::default(),
                cut: Cut::default(),
                no_udp: false,
                names: HashMap::new(),
                hosts: Vec::new(),
                servers: 0,
                addresses: 0,
                ports: HashMap::new(),
                at: HashMap::new(),
                streams: HashMap::new(),
                next_port: 0,
                next_packet: 0,
                traffic: Traffic::default(),
            })),
        }
    }

    /// Drops this share of the packets; see [`Path::loss`].
    #[must_use = "gives the network back"]
    pub fn loss(self, share: f64) -> Self {
        self.with(|path| path.loss = share)
    }

    /// Delays every packet, each direction; see [`Path::delay`].
    #[must_use = "gives the network back"]
    pub fn delay(self, delay: Duration) -> Self {
        self.with(|path| path.delay = delay)
    }

    /// Delays every packet by an additional random time up to `jitter`; see [`Path::jitter`].
    #[must_use = "gives the network back"]
    pub fn jitter(self, jitter: Duration) -> Self {
        self.with(|path| path.jitter = jitter)
    }

    /// Duplicates this share of the packets; see [`Path::duplicate`].
    #[must_use = "gives the network back"]
    pub fn duplicate(self, share: f64) -> Self {
        self.with(|path| path.duplicate = share)
    }

    /// Holds this share of the packets back; see [`Path::reorder`].
    #[must_use = "gives the network back"]
    pub fn reorder(self, share: f64) -> Self {
        self.with(|path| path.reorder = share)
    }

    /// Lets this many bytes per second pass, for each client and direction; see [`Path::rate`].
    #[must_use = "gives the network back"]
    pub fn rate(self, bytes_per_second: u64) -> Self {
        self.with(|path| path.rate = Some(bytes_per_second))
    }

    fn with(self, change: impl FnOnce(&mut Path)) -> Self {
        change(&mut lock(&self.state).path);
        self
    }

    /// The current treatment of packets.
    pub fn path(&self) -> Path {
        lock(&self.state).path.clone()
    }

    /// Changes the treatment of packets from now on, for every client; packets in transit are not affected.
    pub fn set_path(&self, path: Path) {
        lock(&self.state).path = path;
    }

    /// What became of the packets so far.
    pub fn traffic(&self) -> Traffic {
        lock(&self.state).traffic
    }

    /// Drops all packets, including those in transit, until [`mend`](Self::mend).
    pub fn cut(&self) {
        self.set_cut(None, Cut::Open);
    }

    /// As [`cut`](Self::cut), for this time.
    pub fn cut_for(&self, time: Duration) {
        self.set_cut(None, Cut::Until(Instant::now() + time));
    }

    /// Ends a [`cut`](Self::cut) of the whole network. Cuts of single clients remain.
    pub fn mend(&self) {
        lock(&self.state).cut = Cut::default();
    }

    /// Blocks all UDP packets, like a firewall, or lets them pass again; TCP always passes.
    pub fn block_udp(&self, block: bool) {
        let mut state = lock(&self.state);
        state.no_udp = block;
        if block {
            state.drop_in_flight(None);
        }
    }

    pub(crate) fn set_cut(&self, host: Option<usize>, cut: Cut) {
        let mut state = lock(&self.state);
        match host {
            Some(index) => match state.hosts.get_mut(index) {
                Some(host) => host.cut = cut,
                None => return,
            },
            None => state.cut = cut,
        }
        state.drop_in_flight(host);
    }

    /// Ends the cut of one client.
    pub(crate) fn mend_host(&self, host: usize) {
        if let Some(host) = lock(&self.state).hosts.get_mut(host) {
            host.cut = Cut::default();
        }
    }

    /// Gives one client another IP address.
    pub(crate) fn move_host(&self, index: usize) -> Option<IpAddr> {
        let mut state = lock(&self.state);
        let to = state.client_address();
        let from = {
            let host = state.hosts.get_mut(index)?;
            std::mem::replace(&mut host.ip, to)
        };
        let State { ports, at, .. } = &mut *state;
        for (id, port) in ports.iter_mut() {
            if port.host == Some(index) && of_client(port.address.ip()) == from {
                at.remove(&port.address);
                let to = in_family(to, port.address.is_ipv6());
                port.address.set_ip(to);
                at.insert(port.address, *id);
            }
        }
        Some(to)
    }

    /// Gives these addresses a name, for clients to connect to. Packets to addresses without a socket are lost.
    ///
    /// ```
    /// # let net = udpack::testing::Net::new(1);
    /// net.name("twice.example", ["fd00::1".parse().unwrap(), "10.1.0.1".parse().unwrap()]);
    /// ```
    pub fn name(&self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses = addresses.into_iter().collect();
        lock(&self.state)
            .names
            .insert(name.to_ascii_lowercase(), addresses);
    }

    /// The client with this IP address.
    pub(crate) fn host_at(&self, ip: IpAddr) -> Option<usize> {
        let ip = of_client(ip);
        let state = lock(&self.state);
        state.hosts.iter().position(|host| host.ip == ip)
    }

    /// The next free address of a server.
    pub(crate) fn server_address(&self) -> SocketAddr {
        let mut state = lock(&self.state);
        state.servers += 1;
        let [_, b, c, d] = state.servers.to_be_bytes();
        SocketAddr::from(([10, 1 + b, c, d], DEFAULT_PORT))
    }

    /// The source of a server's sockets.
    pub(crate) fn server_host(&self) -> Host {
        Host {
            net: self.clone(),
            client: None,
        }
    }

    /// The source of the sockets of one more client.
    pub(crate) fn client_host(&self) -> Host {
        let mut state = lock(&self.state);
        let ip = state.client_address();
        let number = state.hosts.len();
        let seed = state.seed;
        state.hosts.push(HostState {
            ip,
            cut: Cut::default(),
            up: Lane::new(seed, number, 0),
            down: Lane::new(seed, number, 1),
            next_port: FIRST_PORT,
        });
        Host {
            net: self.clone(),
            client: Some(number),
        }
    }

    /// A QUIC endpoint at an address of its own, for peers that speak QUIC and nothing else.
    #[doc(hidden)]
    pub fn bare(&self) -> io::Result<quinn::Endpoint> {
        let via = Via::Net(self.client_host());
        let anywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let (endpoint, _) = via.open(
            At::Address(anywhere),
            0,
            None,
            quinn::EndpointConfig::default(),
            None,
            None,
        )?;
        Ok(endpoint)
    }

    /// Removes the sockets at this address from the network.
    pub(crate) fn unplug(&self, address: SocketAddr) {
        lock(&self.state).unplug(address);
    }
}

/// The source of a builder's sockets: this network, at a client's address or a server's own.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    net: Net,
    client: Option<usize>,
}

/// A client's address in one of the families: it has `fd00::10.129.0.1` beside 10.129.0.1.
fn in_family(ip: IpAddr, v6: bool) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if v6 => {
            let [a, b, c, d] = ip.octets().map(u16::from);
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, a << 8 | b, c << 8 | d).into()
        }
        ip => ip,
    }
}

/// The IPv4 address of the client that has this address.
fn of_client(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(ip) if ip.segments().starts_with(&[0xfd00, 0, 0, 0, 0, 0]) => {
            let [.., a, b, c, d] = ip.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        ip => ip,
    }
}

impl Host {
    /// The addresses of a name that was given, or of an address.
    pub(crate) fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let named = lock(&self.net.state).names.get(host).cloned();
        let found = match named {
            Some(found) => found,
            None => vec![host.parse().map_err(|_| io::ErrorKind::NotFound)?],
        };
        let found = found.into_iter().map(|ip| SocketAddr::new(ip, port));
        Ok(found.collect())
    }

    /// A socket: for a client at its present IP address and a new port, for a server at `address`.
    pub(crate) fn open(&self, address: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let mut state = lock(&self.net.state);
        let address = match self.client {
            Some(index) => {
                let host = state.hosts.get_mut(index).ok_or(io::ErrorKind::NotFound)?;
                let port = host.next_port;
                host.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
                SocketAddr::new(in_family(host.ip, address.is_ipv6()), port)
            }
            None => address,
        };
        if state.at.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let id = state.next_port;
        state.next_port += 1;
        state.at.insert(address, id);
        state.ports.insert(
            id,
            PortState {
                host: self.client,
                address,
                inbox: BTreeMap::new(),
                waker: None,
            },
        );
        Ok(Arc::new(Port {
            net: self.net.clone(),
            id,
            timer: Mutex::default(),
        }))
    }
}

impl Host {
    /// Byte streams to this address of a server go to these.
    pub(crate) fn take_streams(&self, address: SocketAddr, to: &Arc<Carriers>) {
        let mut state = lock(&self.net.state);
        state.streams.insert(address, Arc::downgrade(to));
    }

    /// Opens a byte stream to a server, like TCP: no bytes are lost, and a cut delays them.
    pub(crate) async fn connect(&self, to: SocketAddr) -> io::Result<(DuplexStream, SocketAddr)> {
        let host = self.client.ok_or(io::ErrorKind::Unsupported)?;
        let (server, from) = {
            let mut state = lock(&self.net.state);
            let server = state.streams.get(&to).and_then(Weak::upgrade);
            let from = state.hosts.get_mut(host).ok_or(io::ErrorKind::NotFound)?;
            let port = from.next_port;
            from.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            (server, SocketAddr::new(from.ip, port))
        };
        let server = server.ok_or(io::ErrorKind::ConnectionRefused)?;
        let way = Server {
            address: to,
            carriers: Arc::downgrade(&server),
        };
        let ((here, near), (far, there)) = (duplex(PIPE), duplex(PIPE));
        let ((near_in, near_out), (far_in, far_out)) = (split(near), split(far));
        tokio::spawn(relay(
            self.net.clone(),
            (host, way.clone()),
            near_in,
            far_out,
        ));
        tokio::spawn(relay(self.net.clone(), (host, way), far_in, near_out));
        let ends = Ends {
            local: None,
            remote: from,
            transport: Transport::WebSocket { origin: None },
        };
        server.take_in(there, ends).await;
        Ok((here, from))
    }
}

/// Bytes that a pipe holds.
const PIPE: usize = 64 << 10;
/// The most pieces in transit through a relay.
const RELAYED: usize = 64;

/// Carries one direction of a byte stream between a client and a server, until either end is dropped.
async fn relay(
    net: Net,
    (host, server): (usize, Server),
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
) {
    let (pieces, mut arriving) = mpsc::channel::<(Instant, Bytes)>(RELAYED);
    let net = &net;
    let reading = async move {
        let mut buffer = vec![0; MTU];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let due = Instant::now() + lock(&net.state).path.delay;
            let piece = Bytes::copy_from_slice(&buffer[..count]);
            if pieces.send((due, piece)).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((due, piece)) = arriving.recv().await {
            tokio::time::sleep_until(due).await;
            loop {
                let passes = lock(&net.state).passes(host, &server);
                match passes {
                    Ok(true) => break,
                    Ok(false) => tokio::time::sleep(Duration::from_millis(10)).await,
                    Err(Broken) => return,
                }
            }
            lock(&net.state).traffic.delivered += 1;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

#[derive(Debug)]
struct State {
    seed: u64,
    path: Path,
    cut: Cut,
    /// No packet passes, but byte streams do.
    no_udp: bool,
    names: HashMap<String, Vec<IpAddr>>,
    /// The clients, in the order in which they were attached.
    hosts: Vec<HostState>,
    servers: u32,
    addresses: u32,
    ports: HashMap<u64, PortState>,
    at: HashMap<SocketAddr, u64>,
    /// The acceptors of byte streams, by address.
    streams: HashMap<SocketAddr, Weak<Carriers>>,
    next_port: u64,
    next_packet: u64,
    traffic: Traffic,
}

#[derive(Debug)]
struct HostState {
    ip: IpAddr,
    cut: Cut,
    up: Lane,
    down: Lane,
    next_port: u16,
}

#[derive(Debug)]
struct PortState {
    /// The client that the socket belongs to; `None` for a server.
    host: Option<usize>,
    address: SocketAddr,
    /// Packets by the time they arrive, then in the order in which they were sent.
    inbox: BTreeMap<(Instant, u64), Packet>,
    waker: Option<Waker>,
}

#[derive(Debug, Clone)]
struct Packet {
    /// The client on whose path the packet travels.
    host: usize,
    from: SocketAddr,
    ecn: Option<EcnCodepoint>,
    bytes: Bytes,
}

/// Whether packets pass.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum Cut {
    #[default]
    Whole,
    Open,
    Until(Instant),
}

impl Cut {
    fn holds(self, now: Instant) -> bool {
        match self {
            Self::Whole => false,
            Self::Open => true,
            Self::Until(end) => now < end,
        }
    }
}

/// One direction of a client's path: its random state, and when it is free for the next packet.
#[derive(Debug)]
struct Lane {
    luck: u64,
    free: Option<Instant>,
}

/// The random numbers of one packet. All are drawn for every packet, so that a change of the path does not change the
/// numbers of later packets.
struct Fate {
    loss: f64,
    duplicate: f64,
    reorder: f64,
    jitter: [f64; 2],
}

impl Lane {
    fn new(seed: u64, host: usize, direction: u64) -> Self {
        let mut luck = seed;
        let mixed = splitmix(&mut luck);
        luck = mixed ^ ((host as u64) << 1 | direction);
        splitmix(&mut luck);
        Self { luck, free: None }
    }

    fn draw(&mut self) -> f64 {
        // 53 bits are what an f64 holds: 0.0 <= x < 1.0.
        (splitmix(&mut self.luck) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn fate(&mut self) -> Fate {
        Fate {
            loss: self.draw(),
            duplicate: self.draw(),
            reorder: self.draw(),
            jitter: [self.draw(), self.draw()],
        }
    }
}

/// The next number of the pseudo-random sequence of a seed.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl State {
    fn client_address(&mut self) -> IpAddr {
        self.addresses += 1;
        let [_, b, c, d] = self.addresses.to_be_bytes();
        Ipv4Addr::new(10, 129 + b, c, d).into()
    }

    /// Queues a packet; returns the waker to call.
    fn send(
        &mut self,
        from: u64,
        to: SocketAddr,
        ecn: Option<EcnCodepoint>,
        bytes: &[u8],
    ) -> Option<Waker> {
        let now = Instant::now();
        let (source, sender) = {
            let port = self.ports.get(&from)?;
            (port.address, port.host)
        };
        self.traffic.sent += 1;
        let receiver = self.at.get(&to).copied();
        let receiving = receiver.and_then(|id| self.ports.get(&id)?.host);
        // There is no path between two servers, or to a client that was removed.
        let (Some(receiver), Some(index)) = (receiver, sender.or(receiving)) else {
            self.traffic.astray += 1;
            return None;
        };
        let host = self.hosts.get_mut(index)?;
        let lane = if sender.is_some() {
            &mut host.up
        } else {
            &mut host.down
        };
        let fate = lane.fate();
        if self.no_udp || self.cut.holds(now) || host.cut.holds(now) {
            self.traffic.cut += 1;
            return None;
        }
        if fate.loss < self.path.loss {
            self.traffic.lost += 1;
            return None;
        }
        let mut start = now;
        if let Some(rate) = self.path.rate {
            start = lane.free.map_or(now, |free| free.max(now));
            if start - now > QUEUE {
                self.traffic.dropped += 1;
                return None;
            }
            let takes = Duration::from_secs_f64(bytes.len() as f64 / rate.max(1) as f64);
            start += takes;
            lane.free = Some(start);
        }
        let mut due = start + self.path.delay;
        if fate.reorder < self.path.reorder {
            due += self.path.delay + Duration::from_millis(5);
            self.traffic.reordered += 1;
        }
        let [first, second] = fate.jitter.map(|luck| due + self.path.jitter.mul_f64(luck));
        let twice = fate.duplicate < self.path.duplicate;
        self.traffic.duplicated += u64::from(twice);
        let packet = Packet {
            host: index,
            from: source,
            ecn,
            bytes: Bytes::copy_from_slice(bytes),
        };
        let port = self.ports.get_mut(&receiver)?;
        if bytes.len() > MTU || port.inbox.len() >= INBOX {
            self.traffic.dropped += 1;
            return None;
        }
        if twice {
            port.inbox
                .insert((second, self.next_packet), packet.clone());
            self.next_packet += 1;
        }
        port.inbox.insert((first, self.next_packet), packet);
        self.next_packet += 1;
        port.waker.take()
    }

    /// Returns the packets that have arrived; otherwise the time at which the next packet arrives.
    fn receive(
        &mut self,
        id: u64,
        now: Instant,
        waker: &Waker,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Result<usize, Option<Instant>> {
        let port = self.ports.get_mut(&id).ok_or(None)?;
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some(entry) = port.inbox.first_entry() else {
                break;
            };
            if entry.key().0 > now {
                break;
            }
            let packet = entry.remove();
            let len = packet.bytes.len().min(buf.len());
            buf[..len].copy_from_slice(&packet.bytes[..len]);
            *meta = RecvMeta {
                addr: packet.from,
                len,
                stride: len,
                ecn: packet.ecn,
                dst_ip: Some(port.address.ip()),
            };
            count += 1;
        }
        if count > 0 {
            self.traffic.delivered += count as u64;
            return Ok(count);
        }
        port.waker = Some(waker.clone());
        Err(port.inbox.first_key_value().map(|((due, _), _)| *due))
    }

    /// Drops the packets in transit: of one client, or all.
    fn drop_in_flight(&mut self, host: Option<usize>) {
        for port in self.ports.values_mut() {
            let before = port.inbox.len();
            port.inbox
                .retain(|_, packet| host.is_some_and(|host| packet.host != host));
            self.traffic.cut += (before - port.inbox.len()) as u64;
        }
    }

    fn unplug(&mut self, address: SocketAddr) {
        if let Some(id) = self.at.remove(&address) {
            self.ports.remove(&id);
            self.streams.remove(&address);
        }
    }

    /// Whether a byte stream between a client and a server passes: not while it is cut, or while no server is at the
    /// address.
    ///
    /// # Errors
    /// When another server is at the address, which does not know the stream.
    fn passes(&self, host: usize, server: &Server) -> Result<bool, Broken> {
        let now = Instant::now();
        let there = self.streams.get(&server.address);
        match there {
            Some(there) if !there.ptr_eq(&server.carriers) => return Err(Broken),
            _ => {}
        }
        let cut =
            self.cut.holds(now) || self.hosts.get(host).is_none_or(|host| host.cut.holds(now));
        Ok(there.is_some() && !cut)
    }
}

/// A server that takes byte streams.
#[derive(Clone)]
struct Server {
    address: SocketAddr,
    carriers: Weak<Carriers>,
}

struct Broken;

/// Longest wait for the rate.
const QUEUE: Duration = Duration::from_millis(100);

/// One UDP socket of the network.
#[derive(Debug)]
struct Port {
    net: Net,
    id: u64,
    /// Wakes the receiver when the next packet arrives.
    timer: Mutex<Option<Pin<Box<Sleep>>>>,
}

impl AsyncUdpSocket for Port {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit
            .segment_size
            .unwrap_or(transmit.contents.len())
            .max(1);
        for bytes in transmit.contents.chunks(segment) {
            let waker =
                lock(&self.net.state).send(self.id, transmit.destination, transmit.ecn, bytes);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut timer = lock(&self.timer);
        let mut now = Instant::now();
        loop {
            let received = lock(&self.net.state).receive(self.id, now, cx.waker(), bufs, meta);
            let due = match received {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Some(due)) => due,
                Err(None) => return Poll::Pending,
            };
            let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            std::task::ready!(timer.as_mut().poll(cx));
            now = due;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        lock(&self.net.state)
            .ports
            .get(&self.id)
            .map(|port| port.address)
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut state = lock(&self.net.state);
        if let Some(port) = state.ports.remove(&self.id) {
            state.at.remove(&port.address);
            state.streams.remove(&port.address);
        }
    }
}

/// The network accepts every packet at once, even if it drops it later.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fates of `count` packets from each of two clients, who take turns of this length.
    fn fates(seed: u64, count: usize, turn: usize) -> [Vec<bool>; 2] {
        let net = Net::new(seed).loss(0.2);
        let hosts = [(); 2].map(|()| net.client_host());
        let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let senders = hosts.map(|host| host.open(anywhere).unwrap());
        let server = net.server_host();
        let to = SocketAddr::from(([10, 1, 0, 1], 1));
        let _receiver = server.open(to).unwrap();
        let mut fates = [Vec::new(), Vec::new()];
        while fates.iter().any(|fates| fates.len() < count) {
            for (sender, fates) in senders.iter().zip(&mut fates) {
                for _ in 0..turn.min(count - fates.len()) {
                    let before = net.traffic().lost;
                    sender
                        .try_send(&Transmit {
                            destination: to,
                            ecn: None,
                            contents: b"packet",
                            segment_size: None,
                            src_ip: None,
                        })
                        .unwrap();
                    fates.push(net.traffic().lost > before);
                }
            }
        }
        fates
    }

    #[test]
    fn a_seed_fixes_the_fate_of_each_packet_whatever_others_send() {
        let [first, second] = fates(1, 4000, 1);
        assert_eq!(fates(1, 4000, 1), [first.clone(), second.clone()]);
        assert_eq!(fates(1, 4000, 7), [first.clone(), second.clone()]);
        assert_ne!(first, second);
        assert_ne!(fates(2, 4000, 1)[0], first);
        for fates in [first, second] {
            let lost = fates.iter().filter(|lost| **lost).count();
            assert!((700..900).contains(&lost), "{lost} of 4000");
        }
    }

    #[test]
    fn a_receiver_that_takes_nothing_holds_so_many_packets_at_most() {
        let net = Net::new(3);
        let server = net.server_host();
        let to = SocketAddr::from(([10, 1, 0, 1], 1));
        let _receiver = server.open(to).unwrap();
        let sender = net.client_host().open(to).unwrap();
        let mut transmit = Transmit {
            destination: to,
            ecn: None,
            contents: &[0; 1000],
            segment_size: Some(100),
            src_ip: None,
        };
        for _ in 0..INBOX / 10 + 10 {
            sender.try_send(&transmit).unwrap();
        }
        let traffic = net.traffic();
        assert_eq!(traffic.sent - traffic.dropped, INBOX as u64);
        transmit.destination.set_port(2);
        sender.try_send(&transmit).unwrap();
        assert_eq!(net.traffic().astray, 10);
    }
}
