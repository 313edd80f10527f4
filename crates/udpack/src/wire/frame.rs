//! Frames: a length, then exactly that many bytes.
//!
//! QUIC streams carry bytes, not messages; the prefix is where one message ends and the next begins. A length is a
//! peer's claim, so it is checked before any memory depends on it, and memory then follows the bytes that really
//! came. The module `message` decodes the content of frames.

use std::collections::VecDeque;

use crate::wire::code::CloseCode;
use bytes::{Buf, Bytes, BytesMut};

/// Bytes of the length prefix: an unsigned 32-bit integer, most significant byte first.
pub const PREFIX: usize = 4;

/// Why a stream of bytes is not a stream of frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A frame of no bytes.
    #[error("frame length is 0")]
    Empty,
    /// A frame above the limit; none of it was read.
    #[error("frame of {len} bytes is above the limit: {limit}")]
    TooLarge {
        /// What the prefix claims.
        len: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame: {got} of {need} bytes")]
    Truncated {
        /// Bytes of the frame that came, prefix included.
        got: usize,
        /// Bytes that it needs, prefix included; just the prefix if that was not complete.
        need: usize,
    },
}

impl FrameError {
    /// The close code that tells the peer.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Empty => CloseCode::BAD_FRAME,
            Self::TooLarge { .. } => CloseCode::FRAME_TOO_LARGE,
            Self::Truncated { .. } => CloseCode::TRUNCATED,
        }
    }
}

/// Cuts a stream of bytes, however it is split into chunks, into frames.
///
/// A frame whose body lies inside one chunk is a slice of that chunk; any other is copied once.
/// After an error the decoder stays at the frame that caused it.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    /// The bytes that were pushed and not decoded yet.
    chunk: Bytes,
    prefix: [u8; PREFIX],
    prefix_len: usize,
    /// Length of the frame under way, once its prefix is complete and accepted.
    need: Option<usize>,
    /// The part of that frame that came in earlier chunks.
    body: BytesMut,
    /// The memory of large frames that were handed out, oldest first. It is reused when the caller has dropped the
    /// frame.
    given: VecDeque<BytesMut>,
}

impl FrameDecoder {
    /// Starts between frames. A frame's body may have `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            chunk: Bytes::new(),
            prefix: [0; PREFIX],
            prefix_len: 0,
            need: None,
            body: BytesMut::new(),
            given: VecDeque::new(),
        }
    }

    /// Frees memory that is only kept for reuse: all of it between frames, all but one buffer within a frame. Called
    /// when nothing is left to decode.
    pub(crate) fn rest(&mut self) {
        if self.given.capacity() == 0 {
            return;
        }
        if self.held() == 0 {
            self.given = VecDeque::new();
        }
        let mut one = false;
        self.given
            .retain_mut(|given| !given.try_reclaim(LARGE) || !std::mem::replace(&mut one, true));
    }

    /// Changes the limit, in bytes, for every frame whose prefix is not accepted yet.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Adds the next bytes of the stream.
    ///
    /// Meant to be called when [`next_frame`](Self::next_frame) has nothing left; before that it
    /// is correct too, but copies.
    pub fn push(&mut self, chunk: Bytes) {
        if self.chunk.is_empty() {
            self.chunk = chunk;
            return;
        }
        let mut joined = BytesMut::with_capacity(self.chunk.len() + chunk.len());
        joined.extend_from_slice(&self.chunk);
        joined.extend_from_slice(&chunk);
        self.chunk = joined.freeze();
    }

    /// Returns the body of the next frame, or `None` if more bytes are needed first.
    ///
    /// # Errors
    ///
    /// [`FrameError::Empty`] and [`FrameError::TooLarge`], as soon as the prefix is complete.
    #[inline]
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, FrameError> {
        match self.whole()?.map(<[u8]>::len) {
            Some(len) => Ok(Some(self.take_whole(len))),
            None => self.next_in_pieces(),
        }
    }

    /// Whether all pushed bytes are decoded, so that no frame follows before the next push.
    #[inline(always)]
    pub(crate) fn is_drained(&self) -> bool {
        self.chunk.is_empty()
    }

    /// The body of the next frame, if the current chunk holds all of it.
    ///
    /// # Errors
    ///
    /// As [`next_frame`](Self::next_frame).
    #[inline(always)]
    pub(crate) fn whole(&self) -> Result<Option<&[u8]>, FrameError> {
        if self.prefix_len > 0 {
            return Ok(None);
        }
        match self.chunk.split_first_chunk::<PREFIX>() {
            Some((prefix, rest)) => Ok(rest.get(..self.accept(*prefix)?)),
            None => Ok(None),
        }
    }

    /// Takes the frame that [`whole`](Self::whole) returned, whose body has `len` bytes.
    #[inline(always)]
    pub(crate) fn take_whole(&mut self, len: usize) -> Bytes {
        let mut body = self.chunk.split_to(PREFIX + len);
        body.advance(PREFIX);
        body
    }

    /// Assembles the next frame from several chunks.
    fn next_in_pieces(&mut self) -> Result<Option<Bytes>, FrameError> {
        let need = match self.need {
            Some(need) => need,
            None => {
                let Some(need) = self.read_prefix()? else {
                    return Ok(None);
                };
                *self.need.insert(need)
            }
        };
        if self.body.is_empty() && self.chunk.len() >= need {
            let body = self.chunk.split_to(need);
            self.start_over();
            return Ok(Some(body));
        }
        let came = self.chunk.len().min(need - self.body.len());
        self.reserve(came, need);
        self.body.extend_from_slice(&self.chunk[..came]);
        self.consume(came);
        if self.body.len() < need {
            return Ok(None);
        }
        let body = self.give_out();
        self.start_over();
        Ok(Some(body))
    }

    fn give_out(&mut self) -> Bytes {
        if self.body.len() < LARGE {
            return std::mem::take(&mut self.body).freeze();
        }
        let body = self.body.split().freeze();
        if self.given.len() >= KEPT {
            self.given.pop_front();
        }
        self.given.push_back(std::mem::take(&mut self.body));
        body
    }

    /// Reuses the memory of an earlier frame, if that is large enough and the caller has dropped the frame.
    fn take_back(&mut self, need: usize) {
        if let Some(oldest) = self.given.front_mut()
            && oldest.try_reclaim(need)
            && let Some(oldest) = self.given.pop_front()
        {
            self.body = oldest;
        }
    }

    /// The length of the unfinished frame in bytes, if it is large and arrives in pieces.
    pub(crate) fn large(&self) -> Option<usize> {
        self.need.filter(|need| *need >= LARGE)
    }

    /// Bytes that were pushed and not returned. After [`next_frame`](Self::next_frame) returned `None`, these are the
    /// bytes of the unfinished frame, prefix included; 0 means that no frame has begun.
    pub fn held(&self) -> usize {
        self.prefix_len + self.body.len() + self.chunk.len()
    }

    /// Checks that the stream may end here.
    ///
    /// # Errors
    ///
    /// [`FrameError::Truncated`] unless it ends between frames.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.held() {
            0 => Ok(()),
            got => Err(FrameError::Truncated {
                got,
                need: PREFIX + self.need.unwrap_or(0),
            }),
        }
    }

    fn read_prefix(&mut self) -> Result<Option<usize>, FrameError> {
        let came = self.chunk.len().min(PREFIX - self.prefix_len);
        self.prefix[self.prefix_len..self.prefix_len + came].copy_from_slice(&self.chunk[..came]);
        self.prefix_len += came;
        self.consume(came);
        if self.prefix_len < PREFIX {
            return Ok(None);
        }
        self.accept(self.prefix).map(Some)
    }

    /// The length that a prefix announces, if such a frame is accepted.
    #[inline]
    fn accept(&self, prefix: [u8; PREFIX]) -> Result<usize, FrameError> {
        let len = u64::from(u32::from_be_bytes(prefix));
        if len == 0 {
            return Err(FrameError::Empty);
        }
        match usize::try_from(len) {
            Ok(need) if need <= self.limit => Ok(need),
            _ => Err(FrameError::TooLarge {
                len,
                limit: self.limit as u64,
            }),
        }
    }

    /// Makes room for `came` more bytes of a frame of `need`.
    ///
    /// Until an eighth of the frame is here, room only doubles with what came, so that a false prefix costs its
    /// sender more than it costs this side; then room for the rest is allocated at once.
    fn reserve(&mut self, came: usize, need: usize) {
        let have = self.body.len() + came;
        if have == 0 {
            return;
        }
        if self.body.capacity() == 0 && need >= LARGE {
            self.take_back(need);
        }
        let room = if have >= need / 8 {
            need
        } else {
            need.min(FIRST_ROOM.max(have * 2))
        };
        if have > self.body.capacity() {
            self.body.reserve(room - self.body.len());
        }
    }

    fn consume(&mut self, len: usize) {
        self.chunk.advance(len);
        if self.chunk.is_empty() {
            // An empty slice would keep the whole chunk in memory.
            self.chunk = Bytes::new();
        }
    }

    fn start_over(&mut self) {
        self.prefix_len = 0;
        self.need = None;
    }
}

/// Bytes allocated first for a frame that arrives in pieces.
const FIRST_ROOM: usize = 4096;
/// Size in bytes from which on a frame's memory is used again. Fresh pages of that size cost as much as copying
/// into them does, and the system's allocator gives large blocks back at once.
const LARGE: usize = 64 << 10;
/// Frames handed out whose memory may be reused.
const KEPT: usize = 16;

#[cfg(test)]
mod tests;
