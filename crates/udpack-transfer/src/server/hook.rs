//! [`Hook`]: an operator's code that decides about uploads and requests.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

/// An upload that waits to be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookOffer {
    /// The name in the store, valid, in its [text form](crate::base::names).
    pub path: String,
    /// Its size in bytes, if known.
    pub size: Option<u64>,
    /// The id of the client's token.
    pub peer: String,
}

/// An upload that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookStored {
    /// The name in the store, in its [text form](crate::base::names).
    pub path: String,
    /// The path of the file on the server's file system.
    pub file: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// The id of the client's token.
    pub peer: String,
}

/// An upload that is complete and verified, and not published yet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookWhole {
    /// Its future name in the store.
    pub path: String,
    /// The path of its bytes until the answer; read-only.
    pub file: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// The id of the client's token.
    pub peer: String,
}

/// The operation that a client requests on an existing entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// Get a file, or its hash.
    Read,
    /// List a directory, or stat one entry.
    List,
    /// Remove an entry, and everything below it.
    Remove,
}

/// A request about existing entries, which the client's token permits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookAccess {
    /// The name in the store, valid; empty for the root.
    pub path: String,
    /// The requested operation.
    pub access: Access,
    /// The id of the client's token.
    pub peer: String,
}

/// A future with the hook's answer.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// The answer to an offer: `Ok(None)` accepts it, `Ok(Some(name))` accepts it under another name, `Err` refuses it
/// with a sentence for the client.
pub type Accepted = Result<Option<String>, String>;

/// Called for each upload, and before entries are read, listed or removed. A slow hook delays only the operation that
/// it is asked about.
///
/// ```
/// use std::{future::ready, pin::Pin};
/// use udpack_transfer::{Accepted, Access, Answer, Hook, HookAccess, HookOffer, HookStored, HookWhole};
///
/// struct Archive;
///
/// impl Hook for Archive {
///     fn accept<'a>(&'a self, _: &'a HookOffer) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
///         Box::pin(ready(Ok(None)))
///     }
///
///     // Nothing of the year is taken away again.
///     fn allow<'a>(&'a self, what: &'a HookAccess) -> Answer<'a> {
///         let kept = what.access == Access::Remove && what.path.starts_with("2026/");
///         Box::pin(ready(if kept { Err("kept for the archive".into()) } else { Ok(()) }))
///     }
///
///     // Stored, and `done` said, only when it is in the catalogue, too.
///     fn verify<'a>(&'a self, whole: &'a HookWhole) -> Answer<'a> {
///         Box::pin(async move { catalogue(&whole.path, whole.size).await.map_err(|_| "not catalogued".into()) })
///     }
///
///     fn done(&self, _: HookStored) {}
/// }
/// # async fn catalogue(_: &str, _: u64) -> Result<(), ()> { Ok(()) }
/// ```
pub trait Hook: Send + Sync + 'static {
    /// Called before any byte of the file is accepted. A returned name is checked like a client's.
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>>;

    /// Called before an entry is read, listed or removed; `Err` is sent to the client with `forbidden`. For a
    /// directory it is called once, not for each entry. The default allows everything.
    fn allow<'a>(&'a self, what: &'a HookAccess) -> Answer<'a> {
        let _ = what;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Called when a file is complete and verified, before it is published and the client gets `done`; `Err` removes
    /// it and is sent to the client with `refused`. Not called for a file that existed already. The default agrees.
    fn verify<'a>(&'a self, whole: &'a HookWhole) -> Answer<'a> {
        let _ = whole;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Called after the file is stored, before or while the client is notified. Must not block: start slow work
    /// elsewhere.
    fn done(&self, stored: HookStored);
}
