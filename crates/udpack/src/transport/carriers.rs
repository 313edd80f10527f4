//! Connections over TCP that are passed to a server: the listener of the TCP port handles TLS and HTTP, and passes
//! each WebSocket on. After that such a connection is accepted like any other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::base::lock;
use crate::transport::mux::{self, Ends, Side};
use crate::wire::code::CloseCode;
use crate::wire::config::{Limits, Timeouts};

/// The most connections that wait to be accepted.
const QUEUE: usize = 64;

/// The connections over TCP of a server.
#[derive(Debug)]
pub(crate) struct Carriers {
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    waiting: Mutex<VecDeque<mux::Connection>>,
    arrived: Notify,
    live: Mutex<Live>,
    tasks: TaskTracker,
}

/// The connections to close when the server ends.
#[derive(Debug, Default)]
struct Live {
    closers: Vec<mux::Closer>,
    /// At this number of entries, those of ended connections are removed.
    tidy_at: usize,
    closed: Option<(CloseCode, String)>,
}

impl Carriers {
    pub(crate) fn new(limits: Arc<Limits>, timeouts: Arc<Timeouts>) -> Arc<Self> {
        let tasks = TaskTracker::new();
        // A closed tracker lets `wait` return when no task is left.
        tasks.close();
        Arc::new(Self {
            limits,
            timeouts,
            waiting: Mutex::default(),
            arrived: Notify::new(),
            live: Mutex::default(),
            tasks,
        })
    }

    /// Adds a connection to the queue. If the queue is full, the connection is closed with a reason.
    pub(crate) async fn take_in<S>(&self, stream: S, ends: Ends)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let socket = mux::upgraded(stream, Side::Server).await;
        let terms = (&*self.limits, &*self.timeouts);
        let conn = mux::Connection::begin(socket, Side::Server, ends, terms, &self.tasks);
        {
            let mut live = lock(&self.live);
            if let Some((code, text)) = &live.closed {
                conn.close(*code, text);
                return;
            }
            if live.closers.len() >= live.tidy_at {
                live.closers.retain(mux::Closer::is_of_use);
                live.tidy_at = 2 * live.closers.len() + 16;
            }
            live.closers.push(conn.closer());
        }
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= QUEUE {
            drop(waiting);
            busy(&conn);
            return;
        }
        waiting.push_back(conn);
        drop(waiting);
        self.arrived.notify_one();
    }

    /// The next connection.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn next(&self) -> mux::Connection {
        loop {
            if let Some(conn) = lock(&self.waiting).pop_front() {
                return conn;
            }
            // `Notify` keeps a notification that no task waited for.
            self.arrived.notified().await;
        }
    }

    /// Closes all connections, and accepts no more.
    pub(super) fn close(&self, code: CloseCode, text: &str) {
        let closers = {
            let mut live = lock(&self.live);
            live.closed.get_or_insert_with(|| (code, text.to_owned()));
            std::mem::take(&mut live.closers)
        };
        for closer in closers {
            closer.close(code, text);
        }
        lock(&self.waiting).clear();
    }

    /// Waits until no connection is left.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn wait_idle(&self) {
        self.tasks.wait().await;
    }
}

/// Closes a connection for which there is no room.
pub(super) fn busy(conn: &mux::Connection) {
    let text = "the server accepts no connection right now";
    conn.close(CloseCode::SERVER_BUSY, text);
}
