//! The phase of a transfer, as a word of the protocol.

use std::sync::atomic::{AtomicU8, Ordering};

/// The phase of a transfer, as its server sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Phase {
    /// The transfer waits for its turn.
    Waiting,
    /// The server receives bytes.
    Receiving,
    /// The server reads existing bytes, compares size and hash, or asks a hook.
    Checking,
    /// The server syncs the bytes to disk.
    Syncing,
    /// The server publishes the file.
    Storing,
    /// The server sends bytes.
    Sending,
}

impl Phase {
    const ALL: [Self; 6] = [
        Self::Waiting,
        Self::Receiving,
        Self::Checking,
        Self::Syncing,
        Self::Storing,
        Self::Sending,
    ];

    /// The word of the protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Receiving => "receiving",
            Self::Checking => "checking",
            Self::Syncing => "syncing",
            Self::Storing => "storing",
            Self::Sending => "sending",
        }
    }

    /// The phase of this word, if it is one.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == word)
    }

    /// Whether bytes are transferred in this phase.
    pub(crate) fn moves(self) -> bool {
        matches!(self, Self::Receiving | Self::Sending)
    }
}

/// A phase that one side sets and others read.
#[derive(Debug)]
pub(crate) struct PhaseCell(AtomicU8);

impl PhaseCell {
    pub(crate) fn new(phase: Phase) -> Self {
        Self(AtomicU8::new(phase as u8))
    }

    pub(crate) fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Phase {
        let number = usize::from(self.0.load(Ordering::Acquire));
        // Only `set` writes it.
        Phase::ALL.get(number).copied().unwrap_or(Phase::Waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_phases_agree() {
        for phase in Phase::ALL {
            assert_eq!(Phase::from_word(phase.as_str()), Some(phase));
            let cell = PhaseCell::new(phase);
            assert_eq!(cell.get(), phase);
        }
        assert_eq!(Phase::from_word("thinking"), None);
    }
}
