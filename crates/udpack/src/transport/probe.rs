//! Probes for a QUIC server at an address, without a connection, by datagrams of a chosen size.
//!
//! A server answers a datagram of an unknown QUIC version with the versions that it supports (RFC 9000, section 6).
//! The server keeps no state for it, and the client needs neither key nor token.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use quinn::udp::UdpSocketState;
use tokio::net::UdpSocket;
use tokio::time::Instant;

/// The smallest datagram that is answered, in bytes (RFC 9000, section 14.1).
const LEAST: u16 = 1200;
/// The largest one that one packet of IPv4 carries, in bytes.
const MOST: u16 = 65_507;
/// One of the versions that are reserved for being unknown (RFC 9000, section 15).
const NO_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];

/// Probes one address, from a port of its own.
#[derive(Debug)]
pub struct Probe {
    socket: UdpSocket,
    address: SocketAddr,
}

/// The result of one probe; see [`Probe::ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// A QUIC server answered after this time.
    Came(Duration),
    /// No answer came in time.
    None,
    /// The system does not send a datagram of this size: the first link, or a link that a router reported, carries
    /// less.
    TooLarge,
}

impl Probe {
    /// Opens a port. Nothing is sent yet.
    ///
    /// # Errors
    /// When there is no route to the address, or the system has no port.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn to(address: SocketAddr) -> io::Result<Self> {
        let any = match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
        // Configured like the sockets of connections: datagrams must not be fragmented.
        UdpSocketState::new((&socket).into())?;
        socket.connect(address).await?;
        Ok(Self { socket, address })
    }

    /// Sends one datagram of `payload` bytes (1,200 to 65,507; others are brought into this range), and waits for the answer. Late answers to
    /// earlier questions are skipped.
    ///
    /// # Errors
    /// Errors that the system reports for the path: `ConnectionRefused` if nothing listens at the port,
    /// `HostUnreachable` or `NetworkUnreachable` if there is no route, `PermissionDenied` if this machine's packet
    /// filter blocks it.
    ///
    /// # Cancel safety
    /// A dropped future may have sent the datagram; the next call ignores its answer.
    pub async fn ask(&self, payload: u16, within: Duration) -> io::Result<Answer> {
        let mark = mark()?;
        let question = question(mark, payload.clamp(LEAST, MOST));
        let begun = Instant::now();
        let asked = async {
            match self.socket.send(&question).await {
                Err(error) if is_too_large(&error) => return Ok(Answer::TooLarge),
                sent => sent?,
            };
            let mut heard = [0; 1500];
            loop {
                let length = self.socket.recv(&mut heard).await?;
                if is_answer(heard.get(..length).unwrap_or_default(), mark) {
                    return Ok(Answer::Came(begun.elapsed()));
                }
            }
        };
        let asked = tokio::time::timeout(within, asked).await;
        asked.unwrap_or(Ok(Answer::None))
    }

    /// Largest UDP payload that the system sends to this address in one piece, as far as it knows, in bytes.
    pub fn first_link(&self) -> Option<u16> {
        crate::transport::udp::route_payload(self.address)
    }
}

/// Whether this address answers a datagram of this size in time.
///
/// # Errors
/// When nobody listens there.
pub(crate) async fn takes(address: SocketAddr, payload: u16, within: Duration) -> io::Result<bool> {
    let asked = async { Probe::to(address).await?.ask(payload, within).await };
    match asked.await {
        Ok(answer) => Ok(matches!(answer, Answer::Came(_))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Err(error),
        // The handshake will meet the same error and report it.
        Err(_) => Ok(false),
    }
}

/// The connection id of one probe.
type Mark = [u8; 8];

fn mark() -> io::Result<Mark> {
    let mut mark = Mark::default();
    aws_lc_rs::rand::fill(&mut mark).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(mark)
}

/// A long header with an unknown version, followed by zeros.
fn question(mark: Mark, payload: u16) -> Vec<u8> {
    let mut question = Vec::with_capacity(usize::from(payload));
    question.push(0xc0);
    question.extend(NO_VERSION);
    for id in [mark, mark] {
        question.push(id.len() as u8);
        question.extend(id);
    }
    question.resize(usize::from(payload), 0);
    question
}

/// Whether this is a version negotiation packet that answers that probe.
fn is_answer(datagram: &[u8], mark: Mark) -> bool {
    let Some((&[first, 0, 0, 0, 0, length], rest)) = datagram.split_first_chunk::<6>() else {
        return false;
    };
    first & 0x80 != 0 && usize::from(length) == mark.len() && rest.starts_with(&mark)
}

fn is_too_large(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = *b"question";

    #[test]
    fn a_question_is_as_large_as_asked_for() {
        for payload in [1200, 1252, MOST] {
            let question = question(MARK, payload);
            assert_eq!(question.len(), usize::from(payload));
            assert_eq!(question[..5], [0xc0, 0x1a, 0x2a, 0x3a, 0x4a]);
            assert_eq!(question[5..23], *b"\x08question\x08question");
        }
    }

    #[test]
    fn only_the_answer_to_this_question_counts() {
        let answer = b"\x80\0\0\0\0\x08question\x08question\0\0\0\x01";
        assert!(is_answer(answer, MARK));
        assert!(!is_answer(answer, *b"anothers"));
        for cut in 0..14 {
            assert!(!is_answer(&answer[..cut], MARK), "{cut}");
        }
        for (at, byte) in [(0, 0x40), (1, 1), (5, 7)] {
            let mut other = answer.to_vec();
            other[at] = byte;
            assert!(!is_answer(&other, MARK), "{at}");
        }
        assert!(!is_answer(&question(MARK, 1200), MARK), "an echo");
    }

    #[tokio::test]
    async fn a_server_answers_and_an_empty_port_refuses() {
        let server = crate::testing::server().bind("127.0.0.1:0").await.unwrap();
        let probe = Probe::to(server.local_addr()).await.unwrap();
        let patience = Duration::from_secs(60);
        for payload in [0, 1200, 1472, 30_000] {
            let answer = probe.ask(payload, patience).await.unwrap();
            assert!(matches!(answer, Answer::Came(_)), "{payload}: {answer:?}");
        }
        let nobody = {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.local_addr().unwrap()
        };
        let error = Probe::to(nobody).await.unwrap().ask(1200, patience).await;
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_silent_port_gives_no_answer() {
        let mute = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let probe = Probe::to(mute.local_addr().unwrap()).await.unwrap();
        let answer = probe.ask(1200, Duration::from_millis(20)).await;
        assert_eq!(answer.unwrap(), Answer::None);
    }
}
