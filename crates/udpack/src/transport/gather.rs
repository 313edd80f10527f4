//! Combines the sends of one poll into as few system calls as possible.
//!
//! quinn passes at most ten datagrams in one send and twenty in one poll. With an Ethernet's MTU ten datagrams are 15
//! kB, and most of the cost of a send, here, in the kernel and at the receiver, does not depend on its size. So the
//! datagrams that a driver of quinn sends in one poll are kept until the end of that poll, and sent in as few system
//! calls as the kernel permits.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{EcnCodepoint, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::transport::udp::SEND;

/// Datagrams after which quinn ends a poll, though it may have more (`MAX_TRANSMIT_DATAGRAMS` in its `connection.rs`).
const TURN: usize = 20;

thread_local! {
    static STAGE: Cell<Stage> = const { Cell::new(Stage::Outside) };
    static GATHERED: RefCell<Gathered> = const {
        RefCell::new(Gathered { batch: None, spare: Vec::new() })
    };
}

/// The state of this thread. Most polls send one datagram or none, and need no other state.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Outside,
    /// A driver is being polled: the end of the poll sends the kept datagrams.
    Polling,
    /// A driver is being polled, and datagrams are kept.
    Keeping,
}

/// The datagrams that the current poll on this thread has kept.
struct Gathered {
    batch: Option<Batch>,
    /// Buffers of earlier batches, for reuse.
    spare: Vec<u8>,
}

/// Datagrams of one size for one peer; the last may be smaller.
struct Batch {
    socket: Arc<dyn AsyncUdpSocket>,
    heading: Heading,
    segment: usize,
    /// The most datagrams in one send.
    most: usize,
    bytes: Vec<u8>,
}

/// The properties that all datagrams of a send share.
#[derive(PartialEq)]
struct Heading {
    destination: SocketAddr,
    ecn: Option<EcnCodepoint>,
    src_ip: Option<IpAddr>,
}

impl Batch {
    /// Whether the datagrams can be added to the batch.
    fn takes(&self, socket: &Arc<dyn AsyncUdpSocket>, transmit: &Transmit<'_>) -> bool {
        let length = self.bytes.len() + transmit.contents.len();
        let segment = segment_of(transmit);
        let last = transmit.segment_size.is_none() && segment <= self.segment;
        length <= self.most.saturating_mul(self.segment)
            && self.bytes.len().is_multiple_of(self.segment)
            && (segment == self.segment || last)
            && self.heading == heading_of(transmit)
            && Arc::ptr_eq(&self.socket, socket)
    }

    fn send(&self) -> io::Result<()> {
        self.socket.try_send(&Transmit {
            destination: self.heading.destination,
            ecn: self.heading.ecn,
            contents: &self.bytes,
            segment_size: (self.bytes.len() > self.segment).then_some(self.segment),
            src_ip: self.heading.src_ip,
        })
    }
}

impl Gathered {
    fn send(
        &mut self,
        socket: &Arc<dyn AsyncUdpSocket>,
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        if let Some(batch) = &mut self.batch {
            if batch.takes(socket, transmit) {
                batch.bytes.extend_from_slice(transmit.contents);
                return Ok(());
            }
            batch.send()?;
            self.clear();
        }
        let segment = segment_of(transmit);
        let most = most_segments(socket, segment);
        if most < TURN {
            return socket.try_send(transmit);
        }
        let mut bytes = mem::take(&mut self.spare);
        bytes.extend_from_slice(transmit.contents);
        self.batch = Some(Batch {
            socket: socket.clone(),
            heading: heading_of(transmit),
            segment,
            most,
            bytes,
        });
        STAGE.set(Stage::Keeping);
        Ok(())
    }

    fn clear(&mut self) {
        if let Some(batch) = self.batch.take() {
            self.spare = batch.bytes;
            self.spare.clear();
        }
    }

    /// Whether quinn has stopped before sending everything, and there is room for its next datagrams.
    fn wants_another_turn(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| {
            let count = batch.bytes.len() / batch.segment;
            count >= TURN && count + TURN <= batch.most
        })
    }
}

fn segment_of(transmit: &Transmit<'_>) -> usize {
    let whole = transmit.contents.len();
    transmit.segment_size.unwrap_or(whole).max(1)
}

fn heading_of(transmit: &Transmit<'_>) -> Heading {
    Heading {
        destination: transmit.destination,
        ecn: transmit.ecn,
        src_ip: transmit.src_ip,
    }
}

/// How many datagrams of this size one send can hold.
fn most_segments(socket: &Arc<dyn AsyncUdpSocket>, segment: usize) -> usize {
    socket.max_transmit_segments().min(SEND / segment)
}

/// Sends the datagrams, or keeps them until the end of the current poll of a [`Gather`].
///
/// # Errors
/// As the socket's `try_send`. After `WouldBlock` no datagram was accepted.
pub(crate) fn send(socket: &Arc<dyn AsyncUdpSocket>, transmit: &Transmit<'_>) -> io::Result<()> {
    match STAGE.get() {
        // A single datagram is all that quinn has to send.
        Stage::Polling if transmit.segment_size.is_some() => {}
        Stage::Keeping => {}
        Stage::Polling | Stage::Outside => return socket.try_send(transmit),
    }
    GATHERED.with_borrow_mut(|gathered| gathered.send(socket, transmit))
}

/// A driver of quinn whose sends of one poll are combined.
///
/// When the kernel has no room for them, the driver is not polled until it has. Datagrams that are kept when this is
/// dropped, or when the driver has ended, are lost, which QUIC tolerates.
pub(crate) struct Gather {
    driver: Pin<Box<dyn Future<Output = ()> + Send>>,
    left: Option<Box<Left>>,
}

/// Datagrams for which the kernel had no room.
struct Left {
    batch: Batch,
    poller: Pin<Box<dyn UdpPoller>>,
}

impl Gather {
    pub(crate) fn new(driver: Pin<Box<dyn Future<Output = ()> + Send>>) -> Self {
        Self { driver, left: None }
    }

    fn poll_left(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some(left) = &mut self.left {
            match left.poller.as_mut().poll_writable(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if blocked(&left.batch.send()) => {}
                // A socket that fails reports the error to quinn itself.
                Poll::Ready(_) => self.left = None,
            }
        }
        Poll::Ready(())
    }
}

fn blocked(sent: &io::Result<()>) -> bool {
    matches!(sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

impl Future for Gather {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.poll_left(context).is_pending() {
            return Poll::Pending;
        }
        let turn = Turn::begin();
        let mut polled = self.driver.as_mut().poll(context);
        if STAGE.get() != Stage::Keeping {
            return polled;
        }
        if polled.is_pending() && GATHERED.with_borrow(Gathered::wants_another_turn) {
            polled = self.driver.as_mut().poll(context);
        }
        if let Some(batch) = turn.end() {
            let poller = batch.socket.clone().create_io_poller();
            self.left = Some(Box::new(Left { batch, poller }));
            // Registers the waker. If the kernel has room by now, the driver's own wakers are in place.
            let _ = self.poll_left(context);
        }
        polled
    }
}

/// Marks this thread while a driver is polled.
struct Turn;

impl Turn {
    fn begin() -> Self {
        STAGE.set(Stage::Polling);
        Self
    }

    /// Sends the kept datagrams. Returns those for which the kernel had no room.
    fn end(self) -> Option<Batch> {
        GATHERED.with_borrow_mut(|gathered| {
            let sent = gathered.batch.as_ref().map(Batch::send)?;
            if blocked(&sent) {
                return gathered.batch.take();
            }
            gathered.clear();
            None
        })
    }
}

impl Drop for Turn {
    /// Runs after a panic, too.
    fn drop(&mut self) {
        if STAGE.replace(Stage::Outside) == Stage::Keeping {
            GATHERED.with_borrow_mut(Gathered::clear);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;
    use std::task::Waker;

    use super::*;
    use crate::transport::udp::tests::{Kernel, batch};

    const DATAGRAM: usize = 1452;

    /// Polls a driver once, that hands these over: sends that the kernel refuses are lost.
    fn poll_once(kernel: &Arc<Kernel>, sends: &[Transmit<'static>]) -> Gather {
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        let mut sends: VecDeque<_> = sends.iter().cloned().collect();
        let mut driver = Gather::new(Box::pin(poll_fn(move |_| {
            for next in sends.drain(..) {
                let _ = send(&socket, &next);
            }
            Poll::Pending
        })));
        poll(&mut driver);
        driver
    }

    fn poll(driver: &mut Gather) {
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(driver).poll(&mut context).is_pending());
    }

    /// Datagrams of this size, all different.
    fn datagrams(count: usize, size: usize, seed: usize) -> &'static [u8] {
        let bytes = (0..count * size).map(|at| ((at / size + seed) % 251) as u8);
        bytes.collect::<Vec<_>>().leak()
    }

    fn sizes(kernel: &Kernel) -> Vec<(usize, Option<usize>)> {
        let sends = kernel.sends();
        sends
            .iter()
            .map(|(bytes, segment)| (bytes.len(), *segment))
            .collect()
    }

    fn all(kernel: &Kernel) -> Vec<u8> {
        kernel
            .sends()
            .into_iter()
            .flat_map(|(bytes, _)| bytes)
            .collect()
    }

    #[test]
    fn sends_of_one_poll_leave_together() {
        let kernel = Kernel::with_room(9);
        let (one, two) = (datagrams(10, DATAGRAM, 0), datagrams(10, DATAGRAM, 10));
        let last = datagrams(1, 300, 20);
        let sends = [
            batch(one, DATAGRAM),
            batch(two, DATAGRAM),
            batch(last, DATAGRAM),
        ];
        poll_once(&kernel, &sends);
        assert_eq!(sizes(&kernel), [(20 * DATAGRAM + 300, Some(DATAGRAM))]);
        assert_eq!(all(&kernel), [one, two, last].concat());
    }

    #[test]
    fn no_send_is_larger_than_the_kernel_takes() {
        for (segments, expected) in [(64, 40), (30, 30), (19, 10)] {
            let kernel = Kernel::with_segments(99, segments);
            let bytes = datagrams(10, DATAGRAM, 0);
            let sends = vec![batch(bytes, DATAGRAM); 12];
            poll_once(&kernel, &sends);
            let most = sizes(&kernel).iter().map(|send| send.0 / DATAGRAM).max();
            assert_eq!(most, Some(expected), "{segments} segments");
            assert_eq!(all(&kernel), bytes.repeat(12));
        }
    }

    #[test]
    fn what_does_not_go_together_leaves_in_its_order() {
        let kernel = Kernel::with_room(9);
        let (short, large) = (datagrams(1, 40, 1), datagrams(1, 9000, 2));
        let row = datagrams(2, DATAGRAM, 3);
        let elsewhere = Transmit {
            destination: SocketAddr::from(([127, 0, 0, 1], 2)),
            ..batch(row, DATAGRAM)
        };
        let marked = Transmit {
            ecn: Some(EcnCodepoint::Ect0),
            ..elsewhere.clone()
        };
        let alike = batch(row, DATAGRAM);
        let sends = [
            batch(short, DATAGRAM),
            alike.clone(),
            batch(short, DATAGRAM),
            alike,
            elsewhere,
            marked,
            batch(large, 9000),
        ];
        poll_once(&kernel, &sends);
        let (two, three) = (2 * DATAGRAM, 2 * DATAGRAM + 40);
        let segment = Some(DATAGRAM);
        assert_eq!(
            sizes(&kernel),
            [
                (40, None),
                (three, segment),
                (two, segment),
                (two, segment),
                (two, segment),
                (9000, None)
            ]
        );
        assert_eq!(
            all(&kernel),
            [short, row, short, row, row, row, large].concat()
        );
    }

    #[test]
    fn outside_of_a_driver_nothing_waits() {
        let kernel = Kernel::with_room(1);
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        send(&socket, &batch(datagrams(1, 40, 1), 40)).expect("room");
        assert_eq!(sizes(&kernel), [(40, None)]);
    }

    #[test]
    fn one_alone_waits_for_nothing() {
        let kernel = Kernel::with_room(1);
        let (socket, watched) = (kernel.clone() as Arc<dyn AsyncUdpSocket>, kernel.clone());
        let mut driver = Gather::new(Box::pin(poll_fn(move |_| {
            send(&socket, &batch(datagrams(1, 40, 1), 40)).expect("room");
            assert_eq!(sizes(&watched), [(40, None)]);
            Poll::Pending
        })));
        poll(&mut driver);
        assert_eq!(sizes(&kernel), [(40, None)]);
    }

    #[test]
    fn a_driver_that_stopped_in_the_midst_goes_on_at_once() {
        let kernel = Kernel::with_room(9);
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        let bytes = datagrams(20, DATAGRAM, 0);
        let mut driver = Gather::new(Box::pin(poll_fn(move |_| {
            let _ = send(&socket, &batch(bytes, DATAGRAM));
            Poll::Pending
        })));
        poll(&mut driver);
        assert_eq!(sizes(&kernel), [(40 * DATAGRAM, Some(DATAGRAM))]);
    }

    #[test]
    fn what_found_no_room_is_sent_before_all_else() {
        let kernel = Kernel::with_room(0);
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        let (first, second) = (datagrams(2, DATAGRAM, 1), datagrams(2, DATAGRAM, 3));
        let mut sends = VecDeque::from([batch(first, DATAGRAM), batch(second, DATAGRAM)]);
        let mut driver = Gather::new(Box::pin(poll_fn(move |_| {
            if let Some(next) = sends.pop_front() {
                let _ = send(&socket, &next);
            }
            Poll::Pending
        })));
        poll(&mut driver);
        poll(&mut driver);
        assert_eq!(sizes(&kernel), [], "no room");
        kernel.make_room(9);
        poll(&mut driver);
        assert_eq!(all(&kernel), [first, second].concat());
    }

    #[test]
    fn quinn_hears_that_there_is_no_room_for_the_next() {
        let kernel = Kernel::with_room(0);
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        let (first, other) = (datagrams(2, DATAGRAM, 1), datagrams(2, 1200, 3));
        let mut driver = Gather::new(Box::pin(poll_fn(move |_| {
            send(&socket, &batch(first, DATAGRAM)).expect("kept");
            let refused = send(&socket, &batch(other, 1200)).expect_err("no room");
            assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
            Poll::Ready(())
        })));
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut driver).poll(&mut context).is_ready());
        assert_eq!(sizes(&kernel), []);
    }

    #[test]
    fn a_driver_that_panics_leaves_nothing_behind() {
        let kernel = Kernel::with_room(9);
        let socket: Arc<dyn AsyncUdpSocket> = kernel.clone();
        let (bytes, row) = (datagrams(1, 40, 1), datagrams(2, 40, 2));
        let sends = socket.clone();
        let mut driver = Gather::new(Box::pin(async move {
            send(&sends, &batch(row, 40)).expect("kept");
            panic!("as it must");
        }));
        let mut context = Context::from_waker(Waker::noop());
        let poll = std::panic::AssertUnwindSafe(|| Pin::new(&mut driver).poll(&mut context));
        assert!(std::panic::catch_unwind(poll).is_err());
        send(&socket, &batch(bytes, 40)).expect("room");
        assert_eq!(
            sizes(&kernel),
            [(40, None)],
            "at once, and the other one is lost"
        );
    }
}
