//! A bad network between clients and a server, in this process: datagrams are lost, late, swapped and
//! repeated, the way is blocked, or the clients' address changes as behind a NAT.
//!
//! Every verdict comes from generators with fixed seeds, one for each direction, in the order of the
//! datagrams. What remains of chance is when the two programs send.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

/// What happens to the datagrams of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Way {
    /// How many of 1 are lost.
    pub(crate) loss: f64,
    /// How late each is.
    pub(crate) delay: Duration,
    /// By how much that varies, both ways. Datagrams keep their order all the same.
    pub(crate) jitter: Duration,
    /// Bytes a second that it carries; 0 for as many as come. What would wait longer than a second is lost.
    pub(crate) rate: u64,
    /// How many of 1 come twice.
    pub(crate) duplicate: f64,
    /// How many of 1 are held back for another `delay`, so that later ones overtake them.
    pub(crate) reorder: f64,
}

/// What happens to all datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// The same seed, the same verdicts.
    pub(crate) seed: u64,
    /// From the clients to the server.
    pub(crate) up: Way,
    /// From the server to the clients.
    pub(crate) down: Way,
}

impl Faults {
    /// The same in both directions.
    pub(crate) fn both(seed: u64, way: Way) -> Self {
        Self {
            seed,
            up: way,
            down: way,
        }
    }
}

/// UDP payload of an Ethernet frame.
const ETHERNET: usize = 1472;

/// What happened so far, both directions together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Delivered, repeated ones counted again.
    pub(crate) passed: u64,
    /// Lost by chance.
    pub(crate) lost: u64,
    /// Lost because the way was full.
    pub(crate) crowded: u64,
    /// Lost because they were too large.
    pub(crate) large: u64,
    /// Lost in a blackhole.
    pub(crate) swallowed: u64,
    /// Delivered twice.
    pub(crate) repeated: u64,
    /// Held back.
    pub(crate) held: u64,
}

/// A relay on a loopback port. Dropping it cuts the way.
pub(crate) struct Relay {
    link: Arc<Link>,
    address: SocketAddr,
    up: JoinHandle<()>,
}

impl Relay {
    /// Relays between a port of its own and `server`.
    pub(crate) async fn start(server: SocketAddr, faults: Faults) -> Self {
        let front = Arc::new(socket().expect("a free port"));
        let address = front.local_addr().expect("a bound socket");
        let link = Arc::new(Link {
            front,
            server: Mutex::new(server),
            faults,
            closed: AtomicBool::new(false),
            clients: Mutex::default(),
            passed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            crowded: AtomicU64::new(0),
            widest: AtomicUsize::new(ETHERNET),
            large: AtomicU64::new(0),
            swallowed: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            held: AtomicU64::new(0),
        });
        let port = Port::Clients(link.front.clone());
        let way = InFlight::new(faults.up, !faults.seed);
        let up = tokio::spawn(link.clone().carry(port, way));
        Self { link, address, up }
    }

    /// Where clients shall connect to.
    pub(crate) fn addr(&self) -> String {
        self.address.to_string()
    }

    /// Swallows everything from now on, or no longer. What is on its way still arrives.
    pub(crate) fn blackhole(&self, on: bool) {
        self.link.closed.store(on, Ordering::Relaxed);
    }

    /// Carries datagrams of at most so many bytes from now on; at first of 1,472, as an Ethernet does.
    pub(crate) fn narrow(&self, widest: usize) {
        self.link.widest.store(widest, Ordering::Relaxed);
    }

    /// Takes datagrams of any size, and waits until both ends have found that out: nothing has come for `time`.
    pub(crate) async fn widen(&self, time: Duration) {
        self.narrow(usize::MAX);
        let mut before = None;
        while before != Some(self.tally()) {
            before = Some(self.tally());
            tokio::time::sleep(time).await;
        }
    }

    /// Swallows everything for `time`.
    pub(crate) async fn blackhole_for(&self, time: Duration) {
        self.blackhole(true);
        tokio::time::sleep(time).await;
        self.blackhole(false);
    }

    /// Gives each client a new address, as seen by the server. The old ones lead nowhere.
    pub(crate) fn rebind(&self) {
        for (client, flow) in self.link.clients.lock().expect("no panic").iter_mut() {
            *flow = self.link.flow(*client, flow.turn + 1);
        }
    }

    /// Sends what comes from now on to another server.
    pub(crate) fn lead_to(&self, server: SocketAddr) {
        *self.link.server.lock().expect("no panic") = server;
    }

    /// How many clients it has seen.
    pub(crate) fn clients(&self) -> usize {
        self.link.clients.lock().expect("no panic").len()
    }

    /// What happened so far.
    pub(crate) fn tally(&self) -> Tally {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            passed: read(&self.link.passed),
            lost: read(&self.link.lost),
            crowded: read(&self.link.crowded),
            large: read(&self.link.large),
            swallowed: read(&self.link.swallowed),
            repeated: read(&self.link.repeated),
            held: read(&self.link.held),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.up.abort();
        self.link.clients.lock().expect("no panic").clear();
    }
}

struct Link {
    front: Arc<UdpSocket>,
    server: Mutex<SocketAddr>,
    faults: Faults,
    closed: AtomicBool,
    clients: Mutex<HashMap<SocketAddr, Flow>>,
    passed: AtomicU64,
    lost: AtomicU64,
    crowded: AtomicU64,
    /// Larger datagrams are lost, without a word to their sender.
    widest: AtomicUsize,
    large: AtomicU64,
    swallowed: AtomicU64,
    repeated: AtomicU64,
    held: AtomicU64,
}

/// One client: its address at the server, and the task for what comes back.
struct Flow {
    socket: Arc<UdpSocket>,
    turn: u64,
    down: AbortHandle,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.down.abort();
    }
}

/// A socket with room for what two fast programs send at once: losses shall come from the faults alone.
fn socket() -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let room = 8 << 20;
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, room).is_err() {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, room);
    }
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// Where the datagrams of one direction come from.
enum Port {
    /// From all clients.
    Clients(Arc<UdpSocket>),
    /// From the server, for this client.
    Server(Arc<UdpSocket>, SocketAddr),
}

impl Port {
    /// Length and client of the next datagram.
    async fn recv(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        match self {
            Self::Clients(socket) => loop {
                let (len, client) = socket.recv_from(buffer).await?;
                // An empty one only asks whether somebody listens, from another port beside the client's.
                if len > 0 {
                    return Ok((len, client));
                }
            },
            Self::Server(socket, client) => {
                let (len, _) = socket.recv_from(buffer).await?;
                Ok((len, *client))
            }
        }
    }
}

/// Datagrams of one direction on their way, and the generator for the verdicts about the next ones.
struct InFlight {
    way: Way,
    dice: Dice,
    /// When it is due, in which order it came, what it is.
    packets: BinaryHeap<Reverse<(Instant, u64, Packet)>>,
    next: u64,
    /// When the last one that keeps its order is due.
    last: Instant,
    /// When the way has carried what has come so far.
    free: Instant,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    bytes: Vec<u8>,
    client: SocketAddr,
}

impl InFlight {
    fn new(way: Way, seed: u64) -> Self {
        Self {
            way,
            dice: Dice(seed),
            packets: BinaryHeap::new(),
            next: 0,
            last: Instant::now(),
            free: Instant::now(),
        }
    }

    fn push(&mut self, due: Instant, bytes: &[u8], client: SocketAddr) {
        let bytes = bytes.to_vec();
        let packet = Packet { bytes, client };
        self.packets.push(Reverse((due, self.next, packet)));
        self.next += 1;
    }

    /// When the next one is due.
    fn due(&self) -> Option<Instant> {
        self.packets.peek().map(|Reverse((due, ..))| *due)
    }

    /// The next one that is due by `now`.
    fn take(&mut self, now: Instant) -> Option<Packet> {
        if self.due()? > now {
            return None;
        }
        let Reverse((_, _, packet)) = self.packets.pop()?;
        Some(packet)
    }
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = (z ^ (z >> 31)) >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }
}

impl Link {
    /// A client's address at the server and what carries the answers, both new.
    fn flow(self: &Arc<Self>, client: SocketAddr, turn: u64) -> Flow {
        let socket = Arc::new(socket().expect("a free port"));
        let port = Port::Server(socket.clone(), client);
        let seed = self.faults.seed ^ (turn + 1).rotate_left(32);
        let way = InFlight::new(self.faults.down, seed);
        let down = tokio::spawn(self.clone().carry(port, way)).abort_handle();
        Flow { socket, turn, down }
    }

    /// Where a client's datagrams leave from.
    fn upstream(self: &Arc<Self>, client: SocketAddr) -> Arc<UdpSocket> {
        let mut clients = self.clients.lock().expect("no panic");
        let turn = clients.len() as u64;
        let flow = clients
            .entry(client)
            .or_insert_with(|| self.flow(client, turn));
        flow.socket.clone()
    }

    /// Carries one direction until its task is aborted.
    async fn carry(self: Arc<Self>, from: Port, mut way: InFlight) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let due = way.due();
            tokio::select! {
                biased;
                () = until(due), if due.is_some() => {
                    while let Some(packet) = way.take(Instant::now()) {
                        self.deliver(&from, packet).await;
                    }
                }
                received = from.recv(&mut buffer) => {
                    let Ok((len, client)) = received else {
                        return;
                    };
                    self.judge(&mut way, &buffer[..len], client);
                }
            }
        }
    }

    /// Decides what becomes of a datagram. Each takes the same number of draws, so that the verdict over one
    /// depends on its number alone.
    fn judge(&self, flight: &mut InFlight, bytes: &[u8], client: SocketAddr) {
        let way = flight.way;
        let [lost, late, repeated, held] = std::array::from_fn(|_| flight.dice.roll());
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        if self.closed.load(Ordering::Relaxed) {
            count(&self.swallowed);
            return;
        }
        if bytes.len() > self.widest.load(Ordering::Relaxed) {
            count(&self.large);
            return;
        }
        if lost < way.loss {
            count(&self.lost);
            return;
        }
        let mut now = Instant::now();
        if way.rate > 0 {
            let free = flight.free.max(now);
            if free > now + Duration::from_secs(1) {
                count(&self.crowded);
                return;
            }
            flight.free = free + Duration::from_secs_f64(bytes.len() as f64 / way.rate as f64);
            now = flight.free;
        }
        let late = (way.delay + way.jitter.mul_f64(2.0 * late)).saturating_sub(way.jitter);
        let due = if held < way.reorder {
            count(&self.held);
            now + late + way.delay.max(Duration::from_millis(1))
        } else {
            flight.last = flight.last.max(now + late);
            flight.last
        };
        flight.push(due, bytes, client);
        if repeated < way.duplicate {
            count(&self.repeated);
            flight.push(due, bytes, client);
        }
    }

    async fn deliver(self: &Arc<Self>, from: &Port, packet: Packet) {
        self.passed.fetch_add(1, Ordering::Relaxed);
        // What cannot be sent is lost, as on any network.
        let _ = match from {
            Port::Clients(_) => {
                let server = *self.server.lock().expect("no panic");
                let socket = self.upstream(packet.client);
                socket.send_to(&packet.bytes, server).await
            }
            Port::Server(..) => self.front.send_to(&packet.bytes, packet.client).await,
        };
    }
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}
