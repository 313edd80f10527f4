//! An in-memory network for tests: no sockets, no files, and no waiting with tokio's paused clock.
//!
//! Servers and clients run whole, QUIC and TLS included; only the UDP socket beneath them is replaced. The
//! [`Net`] loses, delays, doubles and reorders their packets as a seed and a [`Path`] say, can be
//! [cut](Net::cut), and can [move a client](Net::move_client) to another address.
//!
//! ```
//! # async fn ready() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use udpack::{Fault, testing::{self, Net}};
//!
//! let net = Net::new(7).delay(Duration::from_millis(20)).loss(0.02);
//! let server = net
//!     .bind(testing::server().channel("math", |channel: udpack::Channel| async move {
//!         channel.on("double", |n: u64, _: udpack::Context| async move { Ok::<_, Fault>(n * 2) }).run().await
//!     }))
//!     .await?;
//! let socket = net.connect(testing::client(&server), &server).await?;
//! let math = socket.open("math").await?;
//! let doubled: u64 = math.request("double", &21).await?;
//! assert_eq!(doubled, 42);
//! # Ok(()) }
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
//! #     .block_on(ready()).unwrap();
//! ```
//!
//! # Time
//! Everything is timed by tokio's clock. Under `#[tokio::test(start_paused = true)]` the clock jumps to the
//! next timer whenever nothing is left to do, so that a lost connection's idle time passes in milliseconds;
//! such a runtime has one thread. tokio's timers are as fine as a millisecond, and so are the delays.
//!
//! # What a seed fixes
//! Each client has a path of its own to the servers. For the same seed, the n-th packet in one direction of the k-th
//! client's path is treated the same (lost, duplicated, held back, delayed), whatever the other clients do. The
//! content of the packets is not fixed: QUIC and TLS draw random keys, ids and padding, so the sizes, and sometimes
//! the number of packets, differ slightly between runs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::time::Instant;

use crate::client::{Client, ClientBuilder, ConnectError};
use crate::server::{BindError, Server, ServerBuilder};
use crate::session::socket::Socket;
use crate::transport::endpoint::Via;
use crate::transport::memory::Cut;
pub use crate::transport::memory::{Net, Path, Traffic};
#[doc(hidden)]
pub use crate::transport::mux::records::hear as hear_records;
use crate::trust::auth::{Deny, Hello, Peer};
use crate::trust::identity::Identity;

impl Net {
    /// Cuts one client off, on whatever address it has or takes; the others stay connected. `socket` is the
    /// client's socket, or the server's socket to that client.
    pub fn cut_client(&self, socket: &Socket) {
        self.set_cut(self.host_of(socket), Cut::Open);
    }

    /// As [`cut_client`](Self::cut_client), for this time.
    pub fn cut_client_for(&self, socket: &Socket, time: Duration) {
        self.set_cut(self.host_of(socket), Cut::Until(Instant::now() + time));
    }

    /// Ends a [`cut_client`](Self::cut_client).
    pub fn mend_client(&self, socket: &Socket) {
        if let Some(host) = self.host_of(socket) {
            self.mend_host(host);
        }
    }

    /// Gives a client another address, like a phone that changes networks: its packets now come from there, and
    /// packets to the old address are lost. Returns the new IP address; `None` if `socket` does not belong to this
    /// network.
    pub fn move_client(&self, socket: &Socket) -> Option<IpAddr> {
        self.move_host(self.host_of(socket)?)
    }

    /// Binds a server to the next free address, 10.1.0.1:45456 being the first.
    ///
    /// # Errors
    /// As [`ServerBuilder::bind`].
    pub async fn bind(&self, builder: ServerBuilder) -> Result<Server, BindError> {
        let address = self.server_address();
        self.bind_at(builder, address).await
    }

    /// Binds a server to this address: where a client expects a server that was
    /// [taken down](Self::take_down), for instance.
    ///
    /// # Errors
    /// As [`ServerBuilder::bind`], also when the address is in use.
    pub async fn bind_at(
        &self,
        builder: ServerBuilder,
        address: SocketAddr,
    ) -> Result<Server, BindError> {
        let host = self.server_host();
        builder.via(Via::Net(host)).bind(address).await
    }

    /// Takes a server off the network as if its machine had lost power: no peer is told, and its address is free. The
    /// server itself only receives no more packets; drop it.
    pub fn take_down(&self, server: &Server) {
        self.unplug(server.local_addr());
    }

    /// Puts a client on this network, at an address of its own (10.129.0.1 being the first): clients of the builder
    /// dial over it, also when they reconnect. A local address that was set is ignored.
    pub fn attach(&self, builder: ClientBuilder) -> ClientBuilder {
        builder.via(Via::Net(self.client_host()))
    }

    /// [Attaches](Self::attach) a client and connects it to a server of this network.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    ///
    /// # Cancel safety
    /// As [`Client::connect`].
    pub async fn connect(
        &self,
        builder: ClientBuilder,
        server: &Server,
    ) -> Result<Socket, ConnectError> {
        let address = server.local_addr().to_string();
        self.attach(builder).connect(&address).await
    }

    /// A server and a client with default settings, connected: the server's socket, then the client's. Both pass the
    /// channels that the other opens to `accept_channel`. The server lives as long as the client's socket.
    ///
    /// # Panics
    /// When the two cannot connect, because the network is cut or loses too many packets.
    pub async fn pair(&self) -> (Socket, Socket) {
        let server = self.bind(server()).await.expect("a free address");
        let here = self
            .connect(client(&server), &server)
            .await
            .expect("a network that lets two connect");
        let there = server.accept().await.expect("the client that came in");
        here.extensions().insert(Keep { _server: server });
        (there, here)
    }

    /// The client at this end of a socket.
    fn host_of(&self, socket: &Socket) -> Option<usize> {
        self.host_at(client_address(socket)?.ip())
    }
}

/// The address of the client of this socket, which may be at either end.
fn client_address(socket: &Socket) -> Option<SocketAddr> {
    match &socket.session().endpoint() {
        Some(endpoint) => endpoint.local_addr().ok(),
        None => Some(socket.remote_address()),
    }
}

/// Keeps the server of a pair.
struct Keep {
    _server: Server,
}

/// A server and a client on a clean network of their own, connected: the server's socket, then the client's.
/// See [`Net::pair`].
///
/// # Panics
/// Never in practice: on this network the two can connect.
pub async fn pair() -> (Socket, Socket) {
    Net::new(0).pair().await
}

/// A server builder for tests: a new identity, and a verifier that admits every client, with the token as its id
/// (`tester` if the token is empty).
///
/// # Panics
/// When the system has no random numbers.
pub fn server() -> ServerBuilder {
    Server::builder()
        .identity(Identity::generate().expect("random numbers"))
        .auth(|hello: Hello| async move {
            let id = match hello.token() {
                "" => "tester",
                token => token,
            };
            Ok::<_, Deny>(Peer::new(id))
        })
}

/// A client builder that trusts this server.
pub fn client(server: &Server) -> ClientBuilder {
    Client::builder().pin(server.fingerprint())
}
