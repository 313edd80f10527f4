//! [`Hook`]: what an operator wants to say to an upload before and after.

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
    /// Where that is on the server's file system.
    pub file: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// The id of the client's token.
    pub peer: String,
}

/// An upload that is whole and checked, and has no name yet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookWhole {
    /// The name in the store that it is to have.
    pub path: String,
    /// Where its bytes are until the answer; to be read only.
    pub file: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// The id of the client's token.
    pub peer: String,
}

/// What a client wants to do with what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// To get a file, or its hash.
    Read,
    /// To list a directory, or to stat one entry.
    List,
    /// To remove it, and what is below.
    Remove,
}

/// A request about what is there, which the client's token has the right to make.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookAccess {
    /// The name in the store, valid; empty for the root.
    pub path: String,
    /// What is to be done.
    pub access: Access,
    /// The id of the client's token.
    pub peer: String,
}

/// Ready with an answer, sooner or later.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// The answer to an offer: `Ok(None)` takes it as it is, `Ok(Some(name))` under another name, `Err` refuses
/// it with a sentence for the client.
pub type Accepted = Result<Option<String>, String>;

/// Called for each upload, and before what is there is read, listed or removed. A slow hook delays only what it is asked
/// about.
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
    /// Before anything of the file is taken. A name that is given back is checked like a client's.
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>>;

    /// Before what is there is read, listed or removed; `Err` is sent to the client with `forbidden`. Of a directory that
    /// is listed or removed it is asked once, not for each entry. Allows everything unless it is implemented.
    fn allow<'a>(&'a self, what: &'a HookAccess) -> Answer<'a> {
        let _ = what;
        Box::pin(std::future::ready(Ok(())))
    }

    /// When all bytes of a file are here and are what the client sent, before the file has its name and the client its
    /// `done`; `Err` removes it and is sent to the client with `refused`. A file that is found to be there already is not
    /// asked about. Agrees unless it is implemented.
    fn verify<'a>(&'a self, whole: &'a HookWhole) -> Answer<'a> {
        let _ = whole;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Called after the file is stored, before or while the client is notified. Must not block: start what takes time.
    fn done(&self, stored: HookStored);
}
