//! Failures of some of many items: counted, each printed once, and one exit code at the end.
//!
//! Only the first error is kept.

use crate::exit::{Explained, Failure, Kind};
use crate::logging::Console;
use crate::output::printable;

/// The failures of one run.
#[derive(Debug)]
pub(super) struct Failures {
    console: Console,
    first: Option<Explained>,
    count: usize,
    /// All are of the first one's kind.
    alike: bool,
    /// A lost connection has been told.
    network: bool,
    /// The same again may do better with one of them.
    again: bool,
    /// The first one's line, until it is known that there is more than it to tell.
    held: Option<String>,
}

impl Failures {
    pub(super) fn new(console: &Console) -> Self {
        Self {
            console: console.clone(),
            first: None,
            count: 0,
            alike: true,
            network: false,
            again: false,
            held: None,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// One more. `alone`: nothing else is known to have been asked for, so that the end may tell it better.
    pub(super) fn add(&mut self, source: &str, explained: Explained, alone: bool) {
        self.count += 1;
        // A lost connection concerns all files and is told once.
        let network = explained.kind == Kind::Network;
        if !(network && self.network) {
            // Most sentences name the file.
            let text = &explained.text;
            let line = if text.contains(source) {
                text.clone()
            } else {
                format!("{}: {text}", printable(source))
            };
            if alone && self.count == 1 {
                self.held = Some(line);
            } else {
                self.tell();
                self.console.labelled("error", &line);
            }
        }
        self.network |= network;
        self.again |= matches!(
            explained.kind,
            Kind::Other | Kind::Network | Kind::Integrity | Kind::RemoteStorage | Kind::Interrupted
        );
        match &self.first {
            Some(first) => self.alike &= first.kind == explained.kind,
            None => self.first = Some(explained),
        }
    }

    /// It is not the only one that was asked for.
    pub(super) fn tell(&mut self) {
        if let Some(line) = self.held.take() {
            self.console.labelled("error", &line);
        }
    }

    /// One failure of one file speaks for itself, and so do equal ones of all files. `did` is what should have
    /// happened to them: `stored`; `hint` what to do where the failures give no single advice, and the same command again
    /// can do better.
    pub(super) fn verdict(
        &mut self,
        total: usize,
        did: &str,
        hint: Option<&str>,
    ) -> anyhow::Result<()> {
        let Some(first) = &self.first else {
            return Ok(());
        };
        let count = self.count;
        let failure = if total == 1 {
            Failure::new(first.kind, first.text.clone())
        } else if count == total && self.alike {
            Failure::new(first.kind, format!("none of the {count} files was {did}"))
        } else {
            let were = if count == 1 { "was" } else { "were" };
            Failure::new(
                Kind::Partial,
                format!("{count} of {total} files {were} not {did}"),
            )
        };
        let own = if self.alike { first.hint.clone() } else { None };
        let hint = own.or_else(|| match hint {
            Some(again) if self.again => Some(again.to_owned()),
            Some(_) => Some("the messages above say what is wrong with each".to_owned()),
            None => None,
        });
        if total > 1 {
            self.tell();
        }
        Err(match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
        .into())
    }
}
