//! [`Base`]: the chunks of a file that the server has, which come page by page while a file is compared with them.
//!
//! Both sides work at the same time: the server cuts the end of its file while this side is at the beginning of its own.

use tokio::sync::mpsc;

use crate::base::sums::{Cutter, Place, Sums};

/// Bytes of the base that are known ahead of the file before a chunk counts as new.
const AHEAD: u64 = 32 << 20;
/// So many of a file's bytes may be sent although a later page may have them: one in this many, and at least these.
const SHARE: u64 = 64;
const LEAST: u64 = 1 << 20;

/// A page of the list of chunks, and the offset at which it begins.
pub(crate) type Page = (u64, Vec<u8>);

/// The chunks of a base.
#[derive(Debug)]
pub(crate) struct Base {
    sums: Sums,
    /// The pages that are still to come, in order; `None` after the last one.
    pages: Option<mpsc::Receiver<Page>>,
    /// Bytes that may be sent before all pages have come.
    left: u64,
}

impl Base {
    /// With these chunks, and those of the pages: the list ends where their channel is closed. `size`: that of the file.
    pub(crate) fn new(sums: Sums, pages: mpsc::Receiver<Page>, size: u64) -> Self {
        Self {
            sums,
            pages: Some(pages),
            left: (size / SHARE).max(LEAST),
        }
    }

    pub(crate) fn cutter(&self) -> Cutter {
        self.sums.cutter()
    }

    /// Whether these bytes begin with the chunk behind this one; if so, its place and length.
    pub(crate) fn goes_on(&self, place: Place, bytes: &[u8]) -> Option<(Place, usize)> {
        self.sums.goes_on(place, bytes)
    }

    /// Where the base has these bytes, which are at the offset `at` of the file. Waits for pages that probably have them;
    /// blocks.
    pub(crate) fn find(&mut self, at: u64, chunk: &[u8]) -> Option<Place> {
        let len = chunk.len() as u64;
        loop {
            if let Some(place) = self.sums.find(chunk) {
                return Some(place);
            }
            let pages = self.pages.as_mut()?;
            let near = self.sums.end() < at.saturating_add(AHEAD);
            let page = match near || self.left < len {
                true => pages.blocking_recv().ok_or(true),
                false => pages
                    .try_recv()
                    .map_err(|error| error == mpsc::error::TryRecvError::Disconnected),
            };
            match page {
                Ok((from, list)) => {
                    if let Err(error) = self.sums.read(from, &list) {
                        tracing::debug!(error, "the list of chunks ends here");
                        self.pages = None;
                    }
                }
                Err(true) => self.pages = None,
                Err(false) => {
                    self.left -= len;
                    return None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::sums;

    const SIZE: u64 = 1 << 30;

    /// A base of pages that are given by hand.
    fn base() -> (Base, mpsc::Sender<Page>) {
        let (give, pages) = mpsc::channel(4);
        (Base::new(Sums::new(Cutter::fit(1)), pages, SIZE), give)
    }

    fn page(from: u64, chunks: &[&[u8]]) -> Page {
        let mut list = Vec::new();
        for chunk in chunks {
            sums::write(&mut list, chunk);
        }
        (from, list)
    }

    #[test]
    fn a_chunk_is_looked_for_in_the_pages_around_it() {
        let (mut base, give) = base();
        for (from, chunk) in [(0, &b"one"[..]), (10, b"two"), (AHEAD + 100, b"three")] {
            give.try_send(page(from, &[chunk])).expect("room");
        }
        let from = |place: Option<Place>| place.map(|place| place.from);
        assert_eq!(from(base.find(0, b"two")), Some(10));
        // The list reaches far beyond: the bytes are new, although more pages may come.
        assert_eq!(base.find(50, b"four"), None);
        assert_eq!(from(base.find(50, b"three")), Some(AHEAD + 100));
        drop(give);
        assert_eq!(base.find(u64::MAX, b"five"), None, "all pages have come");
        assert_eq!(from(base.find(0, b"one")), Some(0));
    }

    #[test]
    fn only_a_share_of_the_file_is_sent_before_all_pages_have_come() {
        let (mut base, give) = base();
        give.try_send(page(AHEAD * 2, &[b"far"])).expect("room");
        assert_eq!(base.find(0, &[7; 8 << 10]), None);
        for _ in 1..SIZE / SHARE / (8 << 10) {
            assert_eq!(base.find(0, &[7; 8 << 10]), None);
        }
        // The share is used up: from here on the last page is waited for.
        give.try_send(page(AHEAD * 3, &[&[7; 8 << 10]]))
            .expect("room");
        drop(give);
        let found = base.find(0, &[7; 8 << 10]).map(|place| place.from);
        assert_eq!(found, Some(AHEAD * 3));
    }

    #[test]
    fn a_page_that_cannot_be_one_ends_the_list() {
        let (mut base, give) = base();
        give.try_send(page(0, &[b"one"])).expect("room");
        give.try_send((3, vec![0; 19])).expect("room");
        assert_eq!(base.find(0, b"two"), None);
        assert!(base.find(0, b"one").is_some());
        assert!(give.is_closed());
    }
}
