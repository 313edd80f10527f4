//! [`Hook`]: what an operator wants to say to an upload before and after.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

/// An upload that waits to be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookOffer {
    /// The name in the store, valid.
    pub path: String,
    /// Its size in bytes, if told.
    pub size: Option<u64>,
    /// The id of the client's token.
    pub peer: String,
}

/// An upload that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookStored {
    /// The name in the store.
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

/// The answer to an offer: `Ok(None)` takes it as it is, `Ok(Some(name))` under another name, `Err` refuses
/// it with a sentence for the client.
pub type Accepted = Result<Option<String>, String>;

/// Called for each upload. Both calls are made off the file's own path: a slow hook delays that upload only.
pub trait Hook: Send + Sync + 'static {
    /// Before anything of the file is taken. A name that is given back is checked like a client's.
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>>;

    /// After the file is stored and before or while the client is told. Must not block: start what takes time.
    fn done(&self, stored: HookStored);
}
