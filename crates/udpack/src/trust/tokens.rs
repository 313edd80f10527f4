//! The file with the tokens of the clients that a server admits.
//!
//! One entry a line: `TOKEN`, `ID TOKEN` or `ID sha256:HEX`, then `key=value` fields if any. The field `expires=TIME`
//! ends the entry: TIME is like 2027-01-31T12:00:00Z, or seconds since 1970. Blank lines and everything from a word
//! that starts with `#` are ignored. Edits take effect on the next login. Tokens are random, not passwords: they are
//! hashed once, without key stretching, which would only let unknown peers cause processor load.
//!
//! The field `parent=ID:HEX` makes an entry a share: a token that another token made, here the one of that id and
//! digest. It is valid as long as its parent is. The field `once=open` restricts the entry to the first client that
//! uses it: the field becomes `once=HEX`, the digest of a secret that this client has chosen.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use subtle::{Choice, ConstantTimeEq};

use crate::trust::auth::Peer;
use crate::trust::fingerprint::{decode_hex, sha256};
use crate::trust::secret_file::{self, SecretFileError, Version};

/// The tokens a server accepts, read from a file that may change while the server runs.
///
/// Clones share one set. Only digests are kept in memory.
#[derive(Clone)]
pub struct TokenFile {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    state: Mutex<State>,
}

impl TokenFile {
    /// Reads the token file at `path`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, gives others access, belongs to somebody else, or holds no
    /// entry or a bad one; the error names the line.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, TokenFileError> {
        let path = path.into();
        let (content, version) = secret_file::read(&path, MAX_FILE)?;
        let state = State {
            set: Arc::new(TokenSet::parse(&path, &content)?),
            version: settled(version, since_1970()),
            content: sha256(&content),
            complaint: None,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                path,
                state: Mutex::new(state),
            }),
        })
    }

    /// Reads the token file at `path`, or creates it with one new token named `default`.
    ///
    /// The file is created with mode 0600, a missing directory with 0700. When several processes
    /// do so together, all of them end up with the token of the first.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and when the file cannot be created. An existing file is never
    /// changed.
    pub fn load_or_create(path: impl Into<PathBuf>) -> Result<Self, TokenFileError> {
        let path = path.into();
        match Self::open(&path) {
            Err(TokenFileError::File(error)) if error.is_missing() => {}
            result => return result,
        }
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            secret_file::create_dir(dir)?;
        }
        let line = format!("{DEFAULT_ID} {}\n", generate_token());
        if secret_file::create(&path, line.as_bytes())? {
            tracing::info!(path = %path.display(), "new token file");
        }
        Self::open(path)
    }

    /// Returns the entry that `token` belongs to, if there is one that has not expired.
    ///
    /// The file is read again first if it changed. If it is gone or no longer acceptable, the last good set stays in
    /// force and the log says so. An unknown token and a wrong one take the same path and the same time. A token for
    /// one client is bound to the first client that presents it, which changes the file; then this blocks.
    pub fn verify(&self, token: &str) -> Option<TokenEntry> {
        let found = match self.find(token)? {
            Found::Entry(entry) => entry,
            Found::Open(_) => self.bind(token)?,
        };
        let peer = self.current().peer(&found)?;
        peer.expires()
            .is_none_or(|time| !is_over(time))
            .then_some(found)
    }

    /// The entry that `token` belongs to, expired or not.
    pub(crate) fn find(&self, token: &str) -> Option<Found> {
        self.current().verify(token)
    }

    /// The peer of this entry, if all entries that it depends on are still in the file.
    pub(crate) fn peer(&self, entry: &TokenEntry) -> Option<Peer> {
        self.current().peer(entry)
    }

    /// Binds an unused token for one client to the client that presents it now. Blocks.
    pub(crate) fn bind(&self, token: &str) -> Option<TokenEntry> {
        let bound = edit(&self.inner.path, |path, content| {
            let (Some(content), Some((_, secret))) = (content, split_once_token(token)) else {
                return Ok(None);
            };
            let set = TokenSet::parse(path, content)?;
            let Some(Found::Open(entry)) = set.verify(token) else {
                return Ok(None);
            };
            let line = entry
                .bound(&sha256(secret.as_bytes()))
                .line(&entry.digest)?;
            Ok(Some(changed(content, |found| {
                (found.id == entry.id).then(|| line.clone())
            })))
        });
        if let Err(error) = bound {
            let path = self.inner.path.display();
            tracing::error!(%path, %error, "a token for one client cannot be bound to it, and is refused");
            return None;
        }
        match self.find(token)? {
            Found::Entry(entry) => Some(entry),
            Found::Open(_) => None,
        }
    }

    /// Whether the peer's entry is still in the file, with the same token, and all entries that it depends on.
    pub(crate) fn has(&self, peer: &Peer) -> bool {
        let set = self.current();
        peer.digest
            .and_then(|digest| set.get(&digest))
            .is_some_and(|found| found.id == peer.id() && set.is_in_force(found))
    }

    /// Whether `entry` is still in the file, with the same token, and all entries that it depends on.
    ///
    /// Used to close the connections of a revoked token.
    pub fn contains(&self, entry: &TokenEntry) -> bool {
        let set = self.current();
        set.get(&entry.digest)
            .is_some_and(|found| found.id == entry.id && set.is_in_force(found))
    }

    /// Whether a peer came with a token of this file, so that it can have shares.
    pub fn can_share(&self, peer: &Peer) -> bool {
        self.has(peer)
    }

    /// Makes a share for this peer: a new token that is valid as long as the peer's token is. Its line is added as by
    /// [`issue`](Self::issue), and the lines of expired shares are removed. The caller decides what the share may do.
    /// Blocks.
    ///
    /// # Errors
    ///
    /// When the peer's token is not in the file any more, or has [`MAX_SHARES`](Self::MAX_SHARES); else as [`issue`](Self::issue).
    pub fn share(&self, peer: &Peer, new: NewShare) -> Result<Share, TokenFileError> {
        let path = &self.inner.path;
        let gone = || TokenFileError::NoParent {
            path: path.clone(),
            id: peer.id().to_owned(),
        };
        let parent = Parent {
            id: peer.id().to_owned(),
            digest: peer.digest.ok_or_else(gone)?,
        };
        let token = match new.once {
            true => format!("{ONCE_TOKEN}{}", generate_token()),
            false => generate_token(),
        };
        let random = generate_token();
        let tail = random.chars().filter(char::is_ascii_alphanumeric).take(10);
        let id: String = "link-".chars().chain(tail).collect();
        let mut fields = new.fields;
        let mut add = |key: &str, value: String| fields.push((key.to_owned(), value));
        if let Some(time) = new.expires {
            add(
                EXPIRES,
                format_time(time).ok_or(TokenFileError::New(TokenLineError::Expires))?,
            );
        }
        if new.once {
            add(ONCE, OPEN.to_owned());
        }
        add(PARENT, parent.to_string());
        let new = NewToken { id, fields };
        let line = new.line(&sha256(token.as_bytes()))?;
        edit(path, |path, content| {
            let content = content.unwrap_or_default();
            let set = TokenSet::parse(path, content)?;
            let stands = set
                .get(&parent.digest)
                .filter(|entry| entry.id == parent.id);
            if !stands.is_some_and(|entry| set.is_in_force(entry) && !entry.is_expired()) {
                return Err(gone());
            }
            let of = |entry: &TokenEntry| entry.parent.as_ref() == Some(&parent);
            let alive = set
                .entries
                .iter()
                .filter(|entry| of(entry) && !entry.is_expired());
            if alive.count() >= Self::MAX_SHARES {
                return Err(TokenFileError::TooManyShares {
                    limit: Self::MAX_SHARES,
                });
            }
            let over = |entry: &TokenEntry| of(entry) && entry.is_expired();
            let kept = changed(content, |entry| over(entry).then(String::new));
            Ok(Some(with_line(kept, &line)))
        })?;
        Ok(Share { id: new.id, token })
    }

    /// The shares of this peer that have not expired, in the order of the file.
    pub fn shares(&self, peer: &Peer) -> Vec<TokenEntry> {
        let set = self.current();
        let of = |entry: &&TokenEntry| entry.is_share_of(peer) && !entry.is_expired();
        set.entries.iter().filter(of).cloned().collect()
    }

    /// Removes the line of one of this peer's shares. Returns whether there was one. Blocks.
    ///
    /// # Errors
    ///
    /// When the file is not acceptable or cannot be changed.
    pub fn unshare(&self, peer: &Peer, id: &str) -> Result<bool, TokenFileError> {
        edit(&self.inner.path, |path, content| {
            let content = content.unwrap_or_default();
            let entries = TokenSet::entries(path, content)?;
            let is = |entry: &TokenEntry| entry.id == id && entry.is_share_of(peer);
            // The parent's own line stays, so this is not the last one.
            Ok(entries
                .iter()
                .any(is)
                .then(|| changed(content, |entry| is(entry).then(String::new))))
        })
    }

    /// Most shares that one token may have at a time.
    pub const MAX_SHARES: usize = 64;

    /// Returns the first valid token that the file holds as plain text, for a client on the same machine.
    ///
    /// This reads the file, because plain tokens are not kept in memory.
    pub fn first_token(&self) -> Option<String> {
        let (content, _) = secret_file::read(&self.inner.path, MAX_FILE).ok()?;
        lines(std::str::from_utf8(&content).ok()?)
            .filter_map(|(_, line)| parse_line(line).ok())
            .find_map(|line| match line.secret {
                Secret::Plain(token) if !line.is_expired() => Some(token.to_owned()),
                Secret::Plain(_) | Secret::Digest(_) => None,
            })
    }

    /// Returns the valid entries, in the order of the file.
    pub fn entries(&self) -> Vec<TokenEntry> {
        self.current().entries.clone()
    }

    /// Makes a token for `new` and adds it to the file at `path` as `ID sha256:HEX key=value…`. Returns the token: it
    /// is stored nowhere, the file holds only its digest.
    ///
    /// The other lines stay byte for byte. The file is replaced atomically, so a running server sees all of the
    /// change or nothing of it; concurrent changes wait for each other. A missing file is created with mode 0600, a
    /// missing directory with 0700. Blocks.
    ///
    /// # Errors
    ///
    /// When the id is in the file, when the id or a field cannot be written, when the file is not acceptable
    /// (see [`open`](Self::open); one without entries is), or when it cannot be changed. It is unchanged then.
    pub fn issue(path: impl AsRef<Path>, new: &NewToken) -> Result<String, TokenFileError> {
        let once = new.fields.iter().any(|(key, _)| key == ONCE);
        let token = match once {
            true => format!("{ONCE_TOKEN}{}", generate_token()),
            false => generate_token(),
        };
        if new
            .fields
            .iter()
            .any(|(key, value)| key == EXPIRES && parse_time(value).is_some_and(is_over))
        {
            return Err(TokenFileError::New(TokenLineError::Expired));
        }
        let line = new.line(&sha256(token.as_bytes()))?;
        let path = path.as_ref();
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            secret_file::create_dir(dir)?;
        }
        edit(path, |path, content| {
            let entries = match content {
                Some(content) => TokenSet::entries(path, content)?,
                None => Vec::new(),
            };
            if entries.iter().any(|entry| entry.id == new.id) {
                return Err(TokenFileError::IdTaken {
                    path: path.to_owned(),
                    id: new.id.clone(),
                });
            }
            Ok(Some(with_line(content.unwrap_or_default().to_vec(), &line)))
        })?;
        Ok(token)
    }

    /// Removes the line of `id` from the file at `path`. Returns whether there was one.
    ///
    /// A line without an id goes by the id that [`entries`](Self::entries) shows for it. The lines of its shares go
    /// with it. All other lines stay byte for byte; the file is replaced as by [`issue`](Self::issue). Blocks.
    ///
    /// # Errors
    ///
    /// When the file is not acceptable or cannot be changed, and when it is the last token: a server does not
    /// start without one, and one that runs would keep the last good set in force.
    pub fn revoke(path: impl AsRef<Path>, id: &str) -> Result<bool, TokenFileError> {
        edit(path.as_ref(), |path, content| {
            let Some(content) = content else {
                // What is missing is reported as a read of it would be.
                secret_file::read(path, MAX_FILE)?;
                return Ok(None);
            };
            let entries = TokenSet::entries(path, content)?;
            if !entries.iter().any(|entry| entry.id == id) {
                return Ok(None);
            }
            let goes = |entry: &TokenEntry| {
                entry.id == id || entry.parent.as_ref().is_some_and(|parent| parent.id == id)
            };
            if entries.iter().all(goes) {
                return Err(TokenFileError::LastToken {
                    path: path.to_owned(),
                    id: id.to_owned(),
                });
            }
            Ok(Some(changed(content, |entry| {
                goes(entry).then(String::new)
            })))
        })
    }

    /// Returns the number of valid entries.
    #[expect(clippy::len_without_is_empty, reason = "a token file is never empty")]
    pub fn len(&self) -> usize {
        self.current().entries.len()
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    fn current(&self) -> Arc<TokenSet> {
        let mut state = self
            .inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.refresh(&self.inner.path);
        state.set.clone()
    }
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenFile")
            .field("path", &self.inner.path)
            .finish_non_exhaustive()
    }
}

/// The id and the fields of a new token; see [`TokenFile::issue`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewToken {
    /// The id: 1 to 64 characters from `A-Z a-z 0-9 . _ @ -`.
    pub id: String,
    /// Fields: each key once, from `a-z 0-9 _ -`; values without white space or control characters. The field
    /// `expires` holds a time to come: like 2027-01-31T12:00:00Z, or seconds since 1970. `once=open` is for the
    /// first client that presents the token.
    pub fields: Vec<(String, String)>,
}

/// The fields of a new share; see [`TokenFile::share`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewShare {
    /// Fields as those of a [`NewToken`], without `expires`, `once` and `parent`.
    pub fields: Vec<(String, String)>,
    /// The expiry, in whole seconds; `None`: it expires with the token of its peer.
    pub expires: Option<SystemTime>,
    /// Whether only the first client that presents the share may use it.
    pub once: bool,
}

/// A new share.
#[derive(Clone, PartialEq, Eq)]
pub struct Share {
    /// The id of its entry.
    pub id: String,
    /// Its token, which is stored nowhere else.
    pub token: String,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Share").field(&self.id).finish()
    }
}

/// The token that a client presents for `token`: itself, or for a token of one client itself and a secret of this
/// client, `once~…~SECRET`, which is made here unless it has one already.
///
/// Such a token belongs to the first client that presents it. The client must present the same secret each time, so
/// keep the returned token and not the given one.
pub fn claimed_token(token: &str) -> String {
    match split_once_token(token) {
        None if token.starts_with(ONCE_TOKEN) => {
            let token = token.strip_suffix('~').unwrap_or(token);
            format!("{token}~{}", generate_token())
        }
        _ => token.to_owned(),
    }
}

/// Splits a token for one client into the part whose digest is in the file and the client's secret.
fn split_once_token(token: &str) -> Option<(&str, &str)> {
    let (head, secret) = token.strip_prefix(ONCE_TOKEN)?.split_once('~')?;
    let head = token.get(..ONCE_TOKEN.len() + head.len())?;
    (secret.len() >= MIN_TOKEN).then_some((head, secret))
}

impl NewToken {
    /// Returns the line for the file, with its end.
    fn line(&self, digest: &Digest) -> Result<String, TokenFileError> {
        let mut line = format!("{} sha256:", self.id);
        for byte in digest {
            let _ = write!(line, "{byte:02x}");
        }
        for (key, value) in &self.fields {
            let _ = write!(line, " {key}={value}");
        }
        if !is_id(&self.id) {
            return Err(TokenFileError::New(TokenLineError::Id));
        }
        // The server must read exactly the requested entry.
        let read = parse_line(&line).map_err(TokenFileError::New)?;
        if line.contains(char::is_control) || read.fields != self.fields {
            return Err(TokenFileError::New(TokenLineError::Field));
        }
        line.push('\n');
        Ok(line)
    }
}

/// Changes the file at `path`: `change` gets its path and content (`None` when there is no file) and returns
/// the new content, or `None` to leave it. Returns whether it was changed.
fn edit<F>(path: &Path, change: F) -> Result<bool, TokenFileError>
where
    F: Fn(&Path, Option<&[u8]>) -> Result<Option<Vec<u8>>, TokenFileError>,
{
    // A link is kept: the file it leads to is changed.
    let real = std::fs::canonicalize(path);
    let path = real.as_deref().unwrap_or(path);
    let _lock = secret_file::lock_dir(path, PATIENCE)?;
    for _ in 0..EDITS {
        let old = match secret_file::read(path, MAX_FILE) {
            Ok(old) => Some(old),
            Err(error) if error.is_missing() => None,
            Err(error) => return Err(error.into()),
        };
        let content = old.as_ref().map(|(content, _)| content.as_slice());
        let Some(new) = change(path, content)? else {
            return Ok(false);
        };
        if new.len() as u64 > MAX_FILE {
            return Err(TokenFileError::File(SecretFileError::TooLarge {
                path: path.to_owned(),
                limit: MAX_FILE,
            }));
        }
        let changed = match old {
            Some((_, version)) => secret_file::replace(path, &new, version)?,
            None => secret_file::create(path, &new)?,
        };
        if changed {
            return Ok(true);
        }
        // A program that does not take the lock, such as an editor, changed the file first: try again with its
        // content.
    }
    Err(TokenFileError::Busy {
        path: path.to_owned(),
    })
}

/// Returns `content`, which was read as sound before, with other lines for the entries for which `change` returns one.
fn changed(content: &[u8], change: impl Fn(&TokenEntry) -> Option<String>) -> Vec<u8> {
    let mark: &[u8] = "\u{feff}".as_bytes();
    let (mut kept, rest) = match content.strip_prefix(mark) {
        Some(rest) => (mark.to_vec(), rest),
        None => (Vec::with_capacity(content.len()), content),
    };
    for line in rest.split_inclusive(|byte| *byte == b'\n') {
        let new = std::str::from_utf8(line).ok().and_then(|text| {
            lines(text)
                .filter_map(|(_, text)| parse_line(text).ok())
                .find_map(|line| change(&line.into_entry()))
        });
        match new {
            Some(new) => kept.extend_from_slice(new.as_bytes()),
            None => kept.extend_from_slice(line),
        }
    }
    kept
}

/// Returns `content` with a line behind it.
fn with_line(mut content: Vec<u8>, line: &str) -> Vec<u8> {
    if content.last().is_some_and(|byte| *byte != b'\n') {
        content.push(b'\n');
    }
    content.extend_from_slice(line.as_bytes());
    content
}

/// One line of a token file: the identity that its token represents.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenEntry {
    id: String,
    fields: Vec<(String, String)>,
    expires: Option<SystemTime>,
    digest: Digest,
    parent: Option<Parent>,
    once: Option<Once>,
}

/// The entry whose token made a share.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parent {
    id: String,
    digest: Digest,
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.id)?;
        self.digest
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for Parent {
    type Err = TokenLineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once(':').filter(|(id, _)| is_id(id));
        let (id, hex) = parts.ok_or(TokenLineError::Parent)?;
        Ok(Self {
            id: id.to_owned(),
            digest: decode_hex(hex.as_bytes()).ok_or(TokenLineError::Parent)?,
        })
    }
}

/// The client to which a token for one client belongs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Once {
    /// The next client that presents it.
    Open,
    /// The client with this secret.
    Bound(Digest),
}

/// The result of looking a token up.
pub(crate) enum Found {
    /// The token of this entry.
    Entry(TokenEntry),
    /// The token of this entry, which no client has presented so far.
    Open(TokenEntry),
}

impl TokenEntry {
    /// Returns the id on the line, or one made from the token's digest if there is none.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the `key=value` fields in the order of the line.
    pub fn fields(&self) -> &[(String, String)] {
        &self.fields
    }

    /// Returns the value of the field `key`.
    pub fn field(&self, key: &str) -> Option<&str> {
        let (_, value) = self.fields.iter().find(|(name, _)| name == key)?;
        Some(value)
    }

    /// Returns when the entry expires, if it has the field `expires`.
    pub fn expires(&self) -> Option<SystemTime> {
        self.expires
    }

    /// Whether the entry has expired.
    pub fn is_expired(&self) -> bool {
        self.expires.is_some_and(is_over)
    }

    /// The id of the entry whose token made this one, if it is a share.
    pub fn parent(&self) -> Option<&str> {
        self.parent.as_ref().map(|parent| parent.id.as_str())
    }

    /// Whether the token is for one client.
    pub fn is_once(&self) -> bool {
        self.once.is_some()
    }

    /// Whether the token is for one client, and that client has used it.
    pub fn is_used(&self) -> bool {
        matches!(self.once, Some(Once::Bound(_)))
    }

    /// Whether this peer's token made the entry.
    fn is_share_of(&self, peer: &Peer) -> bool {
        let of = |parent: &Parent| parent.id == peer.id() && Some(parent.digest) == peer.digest;
        self.parent.as_ref().is_some_and(of)
    }

    /// The same entry, bound to the client with this secret, and with a short expiry.
    fn bound(&self, secret: &Digest) -> NewToken {
        let end = SystemTime::now() + CLAIMED;
        let end = self.expires.map_or(end, |time| time.min(end));
        let mut fields = self.fields.clone();
        fields.retain(|(key, _)| key != ONCE && key != EXPIRES);
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        fields.push((ONCE.to_owned(), hex));
        let end = format_time(end).map(|end| (EXPIRES.to_owned(), end));
        fields.extend(end);
        NewToken {
            id: self.id.clone(),
            fields,
        }
    }

    /// The peer of this entry, without its parent.
    fn alone(&self) -> Peer {
        let mut peer = Peer::new(&self.id).with_claims(self.fields.clone());
        peer.digest = Some(self.digest);
        match self.expires {
            Some(time) => peer.expires_at(time),
            None => peer,
        }
    }
}

impl fmt::Debug for TokenEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenEntry")
            .field("id", &self.id)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

/// Why a token file was not accepted. No text here ever quotes a line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenFileError {
    /// The file could not be read or created, or is not private.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// A line is not an entry.
    #[error("{} line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: TokenLineError,
    },
    /// There is no entry.
    #[error("no token in {}: at least one line must hold one", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Another entry has the id.
    #[error("there is a token {id} in {} already", path.display())]
    IdTaken {
        /// The file.
        path: PathBuf,
        /// The id.
        id: String,
    },
    /// The entry to be removed is the only one.
    #[error("{id} is the last token in {}: add another one first", path.display())]
    LastToken {
        /// The file.
        path: PathBuf,
        /// The id.
        id: String,
    },
    /// The token that a share would depend on is not valid.
    #[error("there is no token {id} in {} any more", path.display())]
    NoParent {
        /// The file.
        path: PathBuf,
        /// The id.
        id: String,
    },
    /// A token has as many shares as it may have.
    #[error("one token may have {limit} shares: revoke one first")]
    TooManyShares {
        /// The limit.
        limit: usize,
    },
    /// The id or the fields of a new token cannot be written.
    #[error("{0}")]
    New(TokenLineError),
    /// The file changed whenever it was about to be replaced.
    #[error("somebody else keeps changing {}", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The file is not text.
    #[error("not UTF-8 text: {}", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
}

/// What is wrong with a line of a token file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenLineError {
    /// The line does not have the words of an entry.
    #[error("expected TOKEN, ID TOKEN or ID sha256:HEX, then key=value fields")]
    Form,
    /// The id is too long or has other characters.
    #[error("an id is 1 to 64 characters from A-Z a-z 0-9 . _ @ -")]
    Id,
    /// The token is too short to be safe, or too long for the protocol.
    #[error("the token has {length} characters: 22 (128 random bits) to 512 are allowed")]
    TokenLength {
        /// The length of the token, in bytes.
        length: usize,
    },
    /// The token has other characters.
    #[error("a token has only characters from A-Z a-z 0-9 . _ ~ -")]
    TokenCharacters,
    /// The digest is not 64 hex digits.
    #[error("a digest is sha256: and 64 hex digits")]
    Digest,
    /// A field is not `key=value`, or its key came before.
    #[error("a field is key=value, each key once, its characters from a-z 0-9 _ -")]
    Field,
    /// The field `expires` holds no time.
    #[error("expires is a time like 2027-01-31T12:00:00Z, or seconds since 1970")]
    Expires,
    /// The field `parent` names no entry.
    #[error("parent is ID:HEX, an id and the SHA-256 digest of its token")]
    Parent,
    /// The field `once` is not understood.
    #[error("once is open, or the SHA-256 digest of a client's secret")]
    Once,
    /// A new token would have ended already.
    #[error("expires is a time that has passed")]
    Expired,
    /// Another line has the same id.
    #[error("the id is already on line {first}")]
    DuplicateId {
        /// The other line.
        first: usize,
    },
    /// Another line has the same token.
    #[error("the token is already on line {first}")]
    DuplicateToken {
        /// The other line.
        first: usize,
    },
}

/// Makes a token of 256 random bits: 43 characters that need no escaping in a URL or a shell.
pub fn generate_token() -> String {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes)
        .expect("the system's random source is seeded before any process starts");
    base64url(&bytes)
}

type Digest = [u8; 32];

/// The valid entries, and the version of the file that was read last.
struct State {
    set: Arc<TokenSet>,
    /// `None` means that the file must be read again even if it looks unchanged.
    version: Option<Version>,
    /// The digest of the content that was read last, valid or not.
    content: Digest,
    /// The last logged problem, so that one change is logged once.
    complaint: Option<(Option<Version>, String)>,
}

impl State {
    fn refresh(&mut self, path: &Path) {
        let version = std::fs::metadata(path).map(|metadata| Version::of(&metadata));
        if let Ok(version) = version
            && self.version == Some(version)
        {
            return;
        }
        let seen = version.ok();
        match self.reload(path) {
            Ok(false) => {}
            Ok(true) => {
                tracing::info!(path = %path.display(), tokens = self.set.entries.len(), "token file read again");
            }
            Err(error) => self.complain(path, seen, &error),
        }
    }

    /// Reads the file. Returns whether it held something new.
    fn reload(&mut self, path: &Path) -> Result<bool, TokenFileError> {
        let (content, version) = match secret_file::read(path, MAX_FILE) {
            Ok(read) => read,
            Err(error) => {
                self.version = None;
                self.content = Digest::default();
                return Err(error.into());
            }
        };
        self.version = settled(version, since_1970());
        let digest = sha256(&content);
        if digest == self.content {
            return Ok(false);
        }
        self.content = digest;
        self.set = Arc::new(TokenSet::parse(path, &content)?);
        self.complaint = None;
        Ok(true)
    }

    fn complain(&mut self, path: &Path, version: Option<Version>, error: &TokenFileError) {
        let complaint = Some((version, error.to_string()));
        if self.complaint == complaint {
            return;
        }
        self.complaint = complaint;
        let path = path.display();
        match error {
            TokenFileError::File(missing) if missing.is_missing() => {
                tracing::warn!(%path, "token file is gone: the last tokens stay in force");
            }
            _ => {
                tracing::error!(%path, %error, "token file refused: the last tokens stay in force")
            }
        }
    }
}

/// The entries of one version of the file.
struct TokenSet {
    entries: Vec<TokenEntry>,
    index: HashMap<Digest, usize>,
}

impl TokenSet {
    fn parse(path: &Path, content: &[u8]) -> Result<Self, TokenFileError> {
        let set = Self::parse_any(path, content)?;
        if set.entries.is_empty() {
            return Err(TokenFileError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(set)
    }

    /// The entries of `content`, of which there may be none.
    fn entries(path: &Path, content: &[u8]) -> Result<Vec<TokenEntry>, TokenFileError> {
        Ok(Self::parse_any(path, content)?.entries)
    }

    fn parse_any(path: &Path, content: &[u8]) -> Result<Self, TokenFileError> {
        let path = || path.to_owned();
        let text =
            std::str::from_utf8(content).map_err(|_| TokenFileError::NotText { path: path() })?;
        let mut entries: Vec<TokenEntry> = Vec::new();
        let mut index = HashMap::new();
        let mut ids = HashMap::new();
        let mut numbers = Vec::new();
        for (line, text) in lines(text) {
            let failed = |problem| TokenFileError::Line {
                path: path(),
                line,
                problem,
            };
            let entry = parse_line(text).map_err(failed)?.into_entry();
            let next = entries.len();
            if let Some(first) = index.insert(entry.digest, next) {
                let first = numbers[first];
                return Err(failed(TokenLineError::DuplicateToken { first }));
            }
            if let Some(first) = ids.insert(entry.id.clone(), line) {
                return Err(failed(TokenLineError::DuplicateId { first }));
            }
            entries.push(entry);
            numbers.push(line);
        }
        Ok(Self { entries, index })
    }

    fn get(&self, digest: &Digest) -> Option<&TokenEntry> {
        self.entries.get(*self.index.get(digest)?)
    }

    fn verify(&self, token: &str) -> Option<Found> {
        if let Some(entry) = self.find(token).filter(|entry| entry.once.is_none()) {
            return Some(Found::Entry(entry.clone()));
        }
        let (head, secret) = split_once_token(token)?;
        let entry = self.find(head)?;
        match entry.once? {
            Once::Open => Some(Found::Open(entry.clone())),
            Once::Bound(digest) => {
                let equal = digest.ct_eq(&sha256(secret.as_bytes()));
                bool::from(equal).then(|| Found::Entry(entry.clone()))
            }
        }
    }

    fn find(&self, token: &str) -> Option<&TokenEntry> {
        let digest = sha256(token.as_bytes());
        // The position of a digest in the table reveals nothing about a token that was not guessed completely. The
        // final comparison always runs, if necessary against a dummy digest.
        let found = self.index.get(&digest).map(|index| &self.entries[*index]);
        let (candidate, known) = found.map_or((&NO_DIGEST, 0), |entry| (&entry.digest, 1));
        let equal = candidate.ct_eq(&digest) & Choice::from(known);
        found.filter(|_| bool::from(equal))
    }

    /// The entries that this one depends on, the nearest first; `None` where one is missing.
    fn parents(&self, entry: &TokenEntry) -> Option<Vec<&TokenEntry>> {
        let mut parents = Vec::new();
        let mut next = &entry.parent;
        while let Some(parent) = next {
            let found = self.get(&parent.digest)?;
            if found.id != parent.id || parents.len() == MAX_PARENTS {
                return None;
            }
            parents.push(found);
            next = &found.parent;
        }
        Some(parents)
    }

    /// Whether all entries that an entry depends on are valid.
    fn is_in_force(&self, entry: &TokenEntry) -> bool {
        let in_force = |parents: Vec<&TokenEntry>| parents.iter().all(|one| !one.is_expired());
        self.parents(entry).is_some_and(in_force)
    }

    /// The peer of an entry, with the peers of its parents attached; `None` if one of them is missing.
    fn peer(&self, entry: &TokenEntry) -> Option<Peer> {
        let mut above: Option<Peer> = None;
        let parents = self.parents(entry)?;
        for entry in parents.into_iter().rev().chain([entry]) {
            let peer = entry.alone();
            above = Some(match above {
                Some(parent) => peer.with_parent(parent),
                None => peer,
            });
        }
        above
    }
}

/// A line's content, checked.
struct Line<'a> {
    id: Option<&'a str>,
    secret: Secret<'a>,
    fields: Vec<(String, String)>,
    expires: Option<SystemTime>,
    parent: Option<Parent>,
    once: Option<Once>,
}

enum Secret<'a> {
    Plain(&'a str),
    Digest(Digest),
}

impl Line<'_> {
    fn into_entry(self) -> TokenEntry {
        let digest = match self.secret {
            Secret::Plain(token) => sha256(token.as_bytes()),
            Secret::Digest(digest) => digest,
        };
        let id = self.id.map_or_else(
            || {
                let [a, b, c, d, ..] = digest;
                format!("token-{a:02x}{b:02x}{c:02x}{d:02x}")
            },
            str::to_owned,
        );
        TokenEntry {
            id,
            fields: self.fields,
            expires: self.expires,
            digest,
            parent: self.parent,
            once: self.once,
        }
    }

    fn is_expired(&self) -> bool {
        self.expires.is_some_and(is_over)
    }
}

/// Returns the lines that hold something, each with its number.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    (1..).zip(text.lines()).filter(|(_, line)| {
        let content = line.trim_ascii_start();
        !content.is_empty() && !content.starts_with('#')
    })
}

fn parse_line(line: &str) -> Result<Line<'_>, TokenLineError> {
    let words: Vec<&str> = line
        .split_ascii_whitespace()
        .take_while(|word| !word.starts_with('#'))
        .collect();
    let names = words.iter().take_while(|word| !word.contains('=')).count();
    let (names, fields) = words.split_at(names);
    let (id, secret) = match names {
        [secret] => (None, *secret),
        [id, secret] => (Some(*id), *secret),
        _ => return Err(TokenLineError::Form),
    };
    if id.is_some_and(|id| !is_id(id)) {
        return Err(TokenLineError::Id);
    }
    let secret = match secret.strip_prefix("sha256:") {
        Some(_) if id.is_none() => return Err(TokenLineError::Form),
        Some(hex) => Secret::Digest(decode_hex(hex.as_bytes()).ok_or(TokenLineError::Digest)?),
        None => Secret::Plain(checked_token(secret)?),
    };
    let fields = parse_fields(fields)?;
    let value = |key| {
        let found = fields.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    };
    let expires = value(EXPIRES).map(|text| parse_time(text).ok_or(TokenLineError::Expires));
    let once = value(ONCE).map(|text| match decode_hex(text.as_bytes()) {
        _ if text == OPEN => Ok(Once::Open),
        digest => digest.map(Once::Bound).ok_or(TokenLineError::Once),
    });
    let parent = value(PARENT).map(str::parse);
    Ok(Line {
        id,
        secret,
        expires: expires.transpose()?,
        parent: parent.transpose()?,
        once: once.transpose()?,
        fields,
    })
}

fn parse_fields(words: &[&str]) -> Result<Vec<(String, String)>, TokenLineError> {
    let mut fields: Vec<(String, String)> = Vec::with_capacity(words.len());
    for word in words {
        let (key, value) = word.split_once('=').ok_or(TokenLineError::Field)?;
        let good = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        let repeated = fields.iter().any(|(other, _)| other == key);
        if key.is_empty() || !key.bytes().all(good) || value.is_empty() || repeated {
            return Err(TokenLineError::Field);
        }
        fields.push((key.to_owned(), value.to_owned()));
    }
    Ok(fields)
}

/// A time as `2027-01-31T12:00:00Z` or in seconds since 1970.
fn parse_time(text: &str) -> Option<SystemTime> {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if digits(text) {
        return SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(text.parse().ok()?));
    }
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    let parts = |text: &str, mark: char, widths: [usize; 3]| {
        let mut words = text.split(mark);
        let mut numbers = [0_u16; 3];
        for (number, width) in numbers.iter_mut().zip(widths) {
            let word = words.next()?;
            *number = (word.len() == width && digits(word)).then(|| word.parse().ok())??;
        }
        words.next().is_none().then_some(numbers)
    };
    let [year, month, day] = parts(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = parts(clock, ':', [2, 2, 2])?.map(|part| part as u8);
    let month = time::Month::try_from(month as u8).ok()?;
    let date = time::Date::from_calendar_date(year.into(), month, day as u8).ok()?;
    let clock = time::Time::from_hms(hour, minute, second).ok()?;
    Some(
        time::PrimitiveDateTime::new(date, clock)
            .assume_utc()
            .into(),
    )
}

/// A time as [`parse_time`] reads it, to the second; `None` in the years that it cannot write.
fn format_time(time: SystemTime) -> Option<String> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let time = time::OffsetDateTime::from_unix_timestamp(since.as_secs().try_into().ok()?).ok()?;
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second) = time.to_hms();
    let month = u8::from(month);
    Some(format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
    ))
}

fn is_over(time: SystemTime) -> bool {
    time <= SystemTime::now()
}

fn checked_token(token: &str) -> Result<&str, TokenLineError> {
    if !token.bytes().all(is_token_byte) {
        return Err(TokenLineError::TokenCharacters);
    }
    let length = token.len();
    if !(MIN_TOKEN..=MAX_TOKEN).contains(&length) {
        return Err(TokenLineError::TokenLength { length });
    }
    Ok(token)
}

/// Whether a token may contain `byte`: the characters that a URL never escapes.
pub(crate) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._~-".contains(&byte)
}

fn is_id(id: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._@-".contains(&byte);
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(good)
}

/// Returns the version if the file can no longer change without looking changed.
///
/// File systems count time in ticks. A second write within the tick of the first leaves the same metadata, so a file
/// that has just changed must be read again.
fn settled(version: Version, now: Duration) -> Option<Version> {
    let (seconds, nanoseconds) = version.changed();
    let seconds = Duration::from_secs(u64::try_from(seconds).ok()?);
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).ok()?);
    // A change in the future means that a clock was set back; waiting would not help.
    match now.checked_sub(seconds + nanoseconds) {
        Some(age) if age < TICK => None,
        _ => Some(version),
    }
}

fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

fn base64url(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0, |bits, i| {
            bits << 8 | usize::from(group.get(i).copied().unwrap_or(0))
        });
        for i in 0..=group.len() {
            out.push(char::from(BASE64URL[bits >> (18 - 6 * i) & 0x3f]));
        }
    }
    out
}

/// The field that ends an entry.
const EXPIRES: &str = "expires";
/// The field that names the entry whose token made a share.
const PARENT: &str = "parent";
/// The largest depth of shares of shares.
const MAX_PARENTS: usize = 4;
/// The field of a token for one client, and its value before that client has used it.
const ONCE: &str = "once";
const OPEN: &str = "open";
/// The prefix of a token for one client. It tells the client to add a secret.
const ONCE_TOKEN: &str = "once~";
/// How long the client to which a token is bound may use it.
const CLAIMED: Duration = Duration::from_secs(24 * 60 * 60);
const DEFAULT_ID: &str = "default";
const MIN_TOKEN: usize = 22;
pub(crate) const MAX_TOKEN: usize = 512;
const MAX_ID: usize = 64;
/// Size limit of the file in bytes: more than a million entries.
const MAX_FILE: u64 = 256 * 1024 * 1024;
/// How long one change of the file waits for another.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a change is retried when a program without the lock changes the file.
const EDITS: usize = 10;
const TICK: Duration = Duration::from_millis(100);
const NO_DIGEST: Digest = [0; 32];
const BASE64URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    use super::*;

    const TOKEN: &str = "abcdefghijklmnopqrstuv";
    const OTHER: &str = "ABCDEFGHIJKLMNOPQRSTUV";

    /// The entry of a token in a set.
    fn found(set: &TokenSet, token: &str) -> Option<TokenEntry> {
        match set.verify(token)? {
            Found::Entry(entry) | Found::Open(entry) => Some(entry),
        }
    }

    fn put(path: &Path, content: impl AsRef<[u8]>) {
        // As an editor does it: a new file under the old name.
        let new = path.with_extension("new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .unwrap();
        file.write_all(content.as_ref()).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    fn file(content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        put(&path, content);
        (dir, path)
    }

    fn parse(content: &str) -> Result<TokenSet, TokenFileError> {
        TokenSet::parse(Path::new("tokens"), content.as_bytes())
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn generated_tokens_are_43_url_safe_characters_and_differ() {
        let token = generate_token();
        assert_eq!(token.len(), 43);
        assert!(token.bytes().all(is_token_byte));
        checked_token(&token).unwrap();
        assert_ne!(token, generate_token());
    }

    #[test]
    fn base64url_agrees_with_rfc_4648() {
        for (bytes, text) in [
            (&b""[..], ""),
            (b"f", "Zg"),
            (b"fo", "Zm8"),
            (b"foo", "Zm9v"),
            (b"foob", "Zm9vYg"),
            (b"\xfb\xff\xfe", "-__-"),
        ] {
            assert_eq!(base64url(bytes), text);
        }
    }

    #[test]
    fn creates_one_default_token_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/token");
        let tokens = TokenFile::load_or_create(&path).unwrap();
        let token = tokens.first_token().unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("default {token}\n")
        );
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let again = TokenFile::load_or_create(&path).unwrap();
        assert_eq!(again.verify(&token).unwrap().id(), "default");
        assert_eq!(again.len(), 1);
    }

    #[test]
    fn racing_first_starts_agree_on_one_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/token");
        let barrier = std::sync::Barrier::new(8);
        let tokens: Vec<String> = std::thread::scope(|scope| {
            let start = || {
                barrier.wait();
                TokenFile::load_or_create(&path)
                    .unwrap()
                    .first_token()
                    .unwrap()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(tokens.iter().all(|token| *token == tokens[0]));
        assert_eq!(
            std::fs::read_dir(dir.path().join("keys")).unwrap().count(),
            1
        );
    }

    #[test]
    fn accepts_every_form_of_line() {
        let digest = hex(&sha256(b"hashed-token-hashed-token"));
        let text = format!(
            "\u{feff}# who may come in\r\n\r\n  {TOKEN}\r\nalice {OTHER} scope=put dir=in/a=b # hers\n\
             \tbob@x.org\tsha256:{}\n",
            digest.to_uppercase()
        );
        let set = parse(&text).unwrap();
        let anonymous = found(&set, TOKEN).unwrap();
        assert_eq!(
            anonymous.id(),
            format!("token-{}", &hex(&sha256(TOKEN.as_bytes()))[..8])
        );
        assert!(anonymous.fields().is_empty());
        let alice = found(&set, OTHER).unwrap();
        assert_eq!(alice.id(), "alice");
        assert_eq!(alice.field("scope"), Some("put"));
        assert_eq!(alice.field("dir"), Some("in/a=b"));
        assert_eq!(alice.field("none"), None);
        assert_eq!(
            found(&set, "hashed-token-hashed-token").unwrap().id(),
            "bob@x.org"
        );
        assert_eq!(set.entries.len(), 3);
    }

    #[test]
    fn lets_nobody_else_in() {
        let set = parse(&format!("alice {TOKEN}\n")).unwrap();
        let digest = format!("sha256:{}", hex(&sha256(TOKEN.as_bytes())));
        for wrong in [
            "",
            "alice",
            OTHER,
            &TOKEN[1..],
            &format!("{TOKEN}\n"),
            &format!("{TOKEN}\0"),
            &format!("alice {TOKEN}"),
            &TOKEN.to_uppercase(),
            &digest,
            &"x".repeat(1 << 20),
        ] {
            assert!(found(&set, wrong).is_none());
        }
    }

    #[test]
    fn names_the_line_and_what_is_wrong_with_it() {
        use TokenLineError as Problem;

        let long = "t".repeat(513);
        let long_id = format!("{} {TOKEN}", "i".repeat(65));
        let digest = hex(&sha256(TOKEN.as_bytes()));
        for (line, expected) in [
            ("a b c", Problem::Form),
            ("key=value", Problem::Form),
            (&format!("sha256:{digest}"), Problem::Form),
            (&format!("a/b {TOKEN}"), Problem::Id),
            (&long_id, Problem::Id),
            ("alice", Problem::TokenLength { length: 5 }),
            ("abcdefghijklmnopqrstu", Problem::TokenLength { length: 21 }),
            (&long, Problem::TokenLength { length: 513 }),
            ("bob abcdefghijklmnop+rstuv", Problem::TokenCharacters),
            ("bob sha256:00", Problem::Digest),
            (&format!("bob {OTHER} x="), Problem::Field),
            (&format!("bob {OTHER} x=1 x=2"), Problem::Field),
            (&format!("bob {OTHER} X=1"), Problem::Field),
            (&format!("bob {OTHER} =1"), Problem::Field),
            (&format!("bob {OTHER} x=1 y"), Problem::Field),
            (&format!("alice {OTHER}"), Problem::DuplicateId { first: 2 }),
            (
                &format!("bob {TOKEN}"),
                Problem::DuplicateToken { first: 2 },
            ),
            (
                &format!("bob sha256:{digest}"),
                Problem::DuplicateToken { first: 2 },
            ),
        ] {
            match parse(&format!("# first\nalice {TOKEN}\n\n{line}\n")).map(|_| ()) {
                Err(TokenFileError::Line {
                    line: 4, problem, ..
                }) => {
                    assert_eq!(problem, expected, "{line}");
                }
                other => panic!("{line}: {other:?}"),
            }
        }
    }

    #[test]
    fn refuses_a_file_without_entries_and_one_that_is_no_text() {
        for empty in ["", "\u{feff}", "# nothing\n\n"] {
            assert!(matches!(parse(empty), Err(TokenFileError::Empty { .. })));
        }
        let (_dir, path) = file([0xff, 0xfe]);
        assert!(matches!(
            TokenFile::open(path),
            Err(TokenFileError::NotText { .. })
        ));
    }

    #[test]
    fn refuses_a_file_that_others_can_read() {
        let (_dir, path) = file(format!("{TOKEN}\n"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let error = TokenFile::open(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        let error = TokenFile::load_or_create(&path).unwrap_err();
        assert!(error.to_string().contains("mode 0644"), "{error}");
    }

    #[test]
    fn edits_take_effect_at_once() {
        let (_dir, path) = file(format!("alice {TOKEN}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let alice = tokens.verify(TOKEN).unwrap();
        assert!(tokens.contains(&alice));
        for _ in 0..20 {
            put(&path, format!("alice {OTHER}\n"));
            assert!(tokens.verify(TOKEN).is_none());
            assert_eq!(tokens.clone().verify(OTHER).unwrap().id(), "alice");
            assert!(!tokens.contains(&alice));
            // In place, of the same length, within one tick of the clock.
            std::fs::write(&path, format!("alice {TOKEN}\n")).unwrap();
            assert!(tokens.verify(OTHER).is_none());
            assert!(tokens.contains(&alice));
        }
    }

    #[test]
    fn an_entry_under_another_id_is_another_entry() {
        let (_dir, path) = file(format!("alice {TOKEN}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let alice = tokens.verify(TOKEN).unwrap();
        put(&path, format!("bob {TOKEN}\n"));
        assert!(!tokens.contains(&alice));
    }

    #[test]
    fn a_bad_edit_keeps_the_last_tokens_and_is_logged_once() {
        let (_dir, path) = file(format!("alice {TOKEN}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let log = Log::default();
        let admitted = |times: usize| {
            let subscriber = tracing_subscriber::fmt()
                .with_writer(log.clone())
                .with_ansi(false)
                .finish();
            tracing::subscriber::with_default(subscriber, || {
                (0..times).all(|_| tokens.verify(TOKEN).is_some())
            })
        };

        put(&path, format!("alice {OTHER}\nalice {TOKEN}\n"));
        assert!(admitted(3));
        assert_eq!(log.count("ERROR"), 1);
        put(&path, "short\n");
        assert!(admitted(3));
        assert_eq!(log.count("ERROR"), 2);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(admitted(3));
        assert_eq!(log.count("ERROR"), 3);
        std::fs::remove_file(&path).unwrap();
        assert!(admitted(3));
        assert_eq!(log.count("WARN"), 1);
        assert_eq!(tokens.len(), 1);

        put(&path, format!("bob {OTHER}\n"));
        assert!(!admitted(1));
        assert_eq!(tokens.verify(OTHER).unwrap().id(), "bob");
        for secret in [TOKEN, OTHER, "short"] {
            assert_eq!(log.count(secret), 0);
        }
    }

    fn new_token(id: &str, fields: &[(&str, &str)]) -> NewToken {
        NewToken {
            id: id.to_owned(),
            fields: fields
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn a_new_token_is_added_and_what_was_there_stays() {
        // No end of line at the end, an empty line, DOS ends, a comment: none of it is touched.
        let before = format!("\u{feff}# ours\r\n\r\n alice  {TOKEN}\tscope=write # hers\r\n#end");
        let (dir, path) = file(&before);
        let tokens = TokenFile::open(&path).unwrap();
        let fields = [("scope", "read,write"), ("prefix", "a/b"), ("quota", "10G")];
        let token = TokenFile::issue(&path, &new_token("bob@x.org", &fields)).unwrap();
        let after = std::fs::read_to_string(&path).unwrap();
        let digest = hex(&sha256(token.as_bytes()));
        assert_eq!(
            after,
            format!("{before}\nbob@x.org sha256:{digest} scope=read,write prefix=a/b quota=10G\n")
        );
        assert!(!after.contains(&token));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        // The set that was open before sees it.
        let bob = tokens.verify(&token).unwrap();
        assert_eq!((bob.id(), bob.field("quota")), ("bob@x.org", Some("10G")));
        let ids: Vec<_> = tokens.entries().iter().map(|e| e.id().to_owned()).collect();
        assert_eq!(ids, ["alice", "bob@x.org"]);
    }

    #[test]
    fn a_new_token_makes_the_file_if_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/token");
        let token = TokenFile::issue(&path, &new_token("alice", &[])).unwrap();
        assert_eq!(
            TokenFile::open(&path).unwrap().verify(&token).unwrap().id(),
            "alice"
        );
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&dir.path().join("keys")), 0o700);

        let (_dir, path) = file("# nobody yet\n");
        TokenFile::issue(&path, &new_token("alice", &[])).unwrap();
        assert_eq!(TokenFile::open(&path).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_added_leaves_the_file_alone() {
        let before = format!("alice {TOKEN}\n{OTHER}");
        let (dir, path) = file(&before);
        let anonymous = TokenFile::open(&path).unwrap().entries()[1].id().to_owned();
        for id in ["alice", &anonymous] {
            assert!(matches!(
                TokenFile::issue(&path, &new_token(id, &[])),
                Err(TokenFileError::IdTaken { .. })
            ));
        }
        for id in ["", "a b", "a=b", "#a", "ä", "a\n", &"x".repeat(65)] {
            assert!(
                matches!(
                    TokenFile::issue(&path, &new_token(id, &[])),
                    Err(TokenFileError::New(_))
                ),
                "{id:?}"
            );
        }
        for (key, value) in [
            ("", "x"),
            ("K", "x"),
            ("k=", "x"),
            ("#k", "x"),
            ("k", ""),
            ("k", "a b"),
            ("k", " a"),
            ("k", "a\nmallory sha256:00"),
            ("k", "a\r"),
            ("k", "a\u{0}"),
            ("k", "a\u{85}"),
            ("k", "a j=b"),
        ] {
            let result = TokenFile::issue(&path, &new_token("bob", &[(key, value)]));
            assert!(
                matches!(result, Err(TokenFileError::New(_))),
                "{key:?} {value:?}"
            );
        }
        let twice = new_token("bob", &[("k", "1"), ("k", "2")]);
        assert!(TokenFile::issue(&path, &twice).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);

        put(&path, "alice short\n");
        assert!(matches!(
            TokenFile::issue(&path, &new_token("bob", &[])),
            Err(TokenFileError::Line { line: 1, .. })
        ));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(matches!(
            TokenFile::issue(&path, &new_token("bob", &[])),
            Err(TokenFileError::File(SecretFileError::Mode { .. }))
        ));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "alice short\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_revoked_line_goes_and_the_others_stay() {
        let before = format!("\u{feff}alice {TOKEN}\r\n# alice is gone\r\n{OTHER} k=v");
        let (dir, path) = file(&before);
        let tokens = TokenFile::open(&path).unwrap();
        let alice = tokens.verify(TOKEN).unwrap();
        let anonymous = tokens.entries()[1].id().to_owned();
        assert!(!TokenFile::revoke(&path, "nobody").unwrap());
        assert!(!TokenFile::revoke(&path, "").unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);

        assert!(TokenFile::revoke(&path, "alice").unwrap());
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("\u{feff}# alice is gone\r\n{OTHER} k=v")
        );
        assert!(!tokens.contains(&alice));
        assert!(tokens.verify(TOKEN).is_none());
        assert!(!TokenFile::revoke(&path, "alice").unwrap());

        // The last one must stay, or else a running server would keep it in force for ever.
        let text = TokenFile::revoke(&path, &anonymous).unwrap_err();
        assert!(text.to_string().contains("last token"), "{text}");
        TokenFile::issue(&path, &new_token("bob", &[])).unwrap();
        assert!(TokenFile::revoke(&path, &anonymous).unwrap());
        assert!(tokens.verify(OTHER).is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let missing = TokenFile::revoke(dir.path().join("missing"), "bob").unwrap_err();
        assert!(matches!(missing, TokenFileError::File(error) if error.is_missing()));
    }

    #[test]
    fn a_link_to_the_file_stays_a_link() {
        let (dir, path) = file(format!("alice {TOKEN}\n"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("token", &link).unwrap();
        TokenFile::issue(&link, &new_token("bob", &[])).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(TokenFile::open(&path).unwrap().len(), 2);
    }

    #[test]
    fn changes_at_the_same_time_all_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/token");
        let barrier = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (path, barrier) = (&path, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for n in 0..5 {
                        let id = format!("t{thread}-{n}");
                        TokenFile::issue(path, &new_token(&id, &[])).unwrap();
                        if n % 2 == 1 {
                            assert!(TokenFile::revoke(path, &id).unwrap());
                        }
                    }
                });
            }
        });
        let tokens = TokenFile::open(&path).unwrap();
        assert_eq!(tokens.len(), 8 * 3);
        assert!(
            tokens
                .entries()
                .iter()
                .all(|entry| !entry.id().ends_with("1"))
        );
        assert_eq!(
            std::fs::read_dir(dir.path().join("keys")).unwrap().count(),
            1
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let (_dir, path) = file(format!("alice {TOKEN} scope=put\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let entry = tokens.verify(TOKEN).unwrap();
        let text = format!("{tokens:?} {entry:?}");
        assert!(!text.contains(TOKEN) && !text.contains("digest"), "{text}");
        assert!(text.contains("alice"));
    }

    #[test]
    fn the_first_plain_token_is_for_clients() {
        let digest = hex(&sha256(TOKEN.as_bytes()));
        let (_dir, path) = file(format!("hashed sha256:{digest}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        assert_eq!(tokens.first_token(), None);
        put(
            &path,
            format!("# x\nhashed sha256:{digest}\nplain {OTHER}\n"),
        );
        assert_eq!(tokens.first_token().as_deref(), Some(OTHER));
    }

    #[test]
    fn a_file_that_just_changed_is_looked_at_again() {
        let (_dir, path) = file(format!("{TOKEN}\n"));
        let version = Version::of(&std::fs::metadata(&path).unwrap());
        let (seconds, nanoseconds) = version.changed();
        let changed = Duration::new(seconds.try_into().unwrap(), nanoseconds.try_into().unwrap());
        assert_eq!(settled(version, changed), None);
        assert_eq!(settled(version, changed + TICK / 2), None);
        assert_eq!(settled(version, changed + TICK), Some(version));
        assert_eq!(settled(version, changed - TICK), Some(version));
    }

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        fn count(&self, text: &str) -> usize {
            let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            log.matches(text).count()
        }
    }

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl tracing_subscriber::fmt::MakeWriter<'_> for Log {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    proptest::proptest! {
        #[test]
        fn no_content_makes_the_parser_panic(content: Vec<u8>, text: String) {
            let _ = TokenSet::parse(Path::new("tokens"), &content);
            let _ = parse(&text);
        }
    }

    #[test]
    fn times_have_one_form_or_are_seconds() {
        let at = |secs| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(secs));
        for (text, time) in [
            ("1970-01-01T00:00:00Z", at(0)),
            ("2000-02-29T00:00:00Z", at(951_782_400)),
            ("2023-11-14T22:13:20Z", at(1_700_000_000)),
            ("1700000000", at(1_700_000_000)),
            ("18446744073709551615", None),
            ("99999999999999999999", None),
            ("2023-02-29T00:00:00Z", None),
            ("2023-11-14T24:00:00Z", None),
            ("2023-11-14T22:60:00Z", None),
            ("2023-11-14T22:13:20", None),
            ("2023-11-14T22:13:20+01:00", None),
            ("2023-11-14", None),
            ("2023-1-14T22:13:20Z", None),
            ("2023-11-14-1T22:13:20Z", None),
            ("+023-11-14T22:13:20Z", None),
            ("-1", None),
            ("30d", None),
        ] {
            assert_eq!(parse_time(text), time, "{text}");
        }
        let error = parse(&format!("anna {TOKEN} expires=soon")).err().unwrap();
        assert!(
            error.to_string().contains("line 1: expires is a time"),
            "{error}"
        );
    }

    #[test]
    fn an_ended_entry_is_found_and_lets_nobody_in() {
        let (_dir, path) = file(format!(
            "old {TOKEN} expires=2001-01-01T00:00:00Z\nanna {OTHER} expires=4102444800\n"
        ));
        let tokens = TokenFile::open(&path).unwrap();
        assert!(tokens.verify(TOKEN).is_none());
        let old = tokens.entries().remove(0);
        assert!(old.is_expired() && tokens.peer(&old).is_some());
        let anna = tokens.verify(OTHER).unwrap();
        assert!(!anna.is_expired());
        let peer = tokens.peer(&anna).unwrap();
        assert_eq!(peer.expires(), anna.expires());
        assert_eq!(tokens.first_token().as_deref(), Some(OTHER));
        assert!(tokens.has(&peer));
        assert!(
            !tokens.has(&Peer::new("anna")),
            "an id alone proves nothing"
        );
    }

    fn peer(tokens: &TokenFile, token: &str) -> Option<Peer> {
        tokens.peer(&tokens.verify(token)?)
    }

    #[test]
    fn a_share_is_in_force_as_long_as_its_parent() {
        let (_dir, path) = file(format!("alice {TOKEN} quota=9\nbob {OTHER} x=y\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let alice = peer(&tokens, TOKEN).unwrap();
        let bob = peer(&tokens, OTHER).unwrap();
        let new = NewShare {
            fields: vec![("prefix".to_owned(), "a".to_owned())],
            ..NewShare::default()
        };
        let share = tokens.share(&alice, new.clone()).unwrap();
        assert!(
            !std::fs::read_to_string(&path)
                .unwrap()
                .contains(&share.token)
        );
        let visitor = peer(&tokens, &share.token).unwrap();
        assert_eq!(
            (visitor.id(), visitor.claim("prefix")),
            (&*share.id, Some("a"))
        );
        let parent = visitor.parent().unwrap();
        assert_eq!((parent.id(), parent.claim("quota")), ("alice", Some("9")));
        assert!(tokens.has(&visitor));
        assert_eq!(tokens.shares(&alice)[0].id(), share.id);
        assert!(tokens.shares(&bob).is_empty());

        // Nobody else revokes it, and it revokes nothing.
        assert!(!tokens.unshare(&bob, &share.id).unwrap());
        assert!(!tokens.unshare(&alice, "bob").unwrap());
        assert!(tokens.unshare(&alice, &share.id).unwrap());
        assert!(!tokens.has(&visitor) && tokens.verify(&share.token).is_none());

        let share = tokens.share(&alice, new.clone()).unwrap();
        let visitor = peer(&tokens, &share.token).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        // The operator ends the parent early: the share ends with it.
        put(
            &path,
            text.replace("quota=9", "expires=2001-01-01T00:00:00Z"),
        );
        assert!(!tokens.has(&visitor) && tokens.verify(&share.token).is_none());
        assert!(matches!(
            tokens.share(&alice, new.clone()),
            Err(TokenFileError::NoParent { .. })
        ));
        put(&path, &text);
        assert!(tokens.has(&visitor));
        // Another token under the same name is another parent.
        put(&path, text.replace(TOKEN, "zzzzzzzzzzzzzzzzzzzzzz"));
        assert!(!tokens.has(&visitor) && tokens.verify(&share.token).is_none());
        put(&path, &text);
        assert!(TokenFile::revoke(&path, "alice").unwrap());
        assert!(!tokens.has(&visitor) && tokens.verify(&share.token).is_none());
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("bob {OTHER} x=y\n"),
            "its shares go with it"
        );
        assert!(
            tokens.share(&Peer::new("bob"), new).is_err(),
            "not of the file"
        );
    }

    #[test]
    fn a_token_has_so_many_shares_and_those_that_ended_go() {
        let (_dir, path) = file(format!("alice {TOKEN}\nbob {OTHER}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let alice = peer(&tokens, TOKEN).unwrap();
        for _ in 0..TokenFile::MAX_SHARES {
            tokens.share(&alice, NewShare::default()).unwrap();
        }
        let full = tokens.share(&alice, NewShare::default());
        assert!(matches!(
            full,
            Err(TokenFileError::TooManyShares { limit: 64 })
        ));
        let bob = peer(&tokens, OTHER).unwrap();
        tokens.share(&bob, NewShare::default()).unwrap();

        let ended = tokens.shares(&alice)[0].id().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| match line.starts_with(&ended) {
            true => format!("{line} expires=1000000000\n"),
            false => format!("{line}\n"),
        });
        put(&path, lines.collect::<String>());
        assert_eq!(tokens.shares(&alice).len(), 63);
        let share = tokens.share(&alice, NewShare::default()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&ended) && text.contains(&share.id));
        assert_eq!(tokens.shares(&alice).len(), 64);
    }

    #[test]
    fn a_share_of_a_share_depends_on_both_and_no_ring_of_them_stands() {
        let (_dir, path) = file(format!("alice {TOKEN} expires=4102444800\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let mut above = peer(&tokens, TOKEN).unwrap();
        let mut made = Vec::new();
        for _ in 0..MAX_PARENTS {
            let share = tokens.share(&above, NewShare::default()).unwrap();
            above = peer(&tokens, &share.token).unwrap();
            assert_eq!(above.expires(), parse_time("4102444800"));
            made.push(share);
        }
        let deepest = tokens.share(&above, NewShare::default()).unwrap();
        assert!(tokens.verify(&deepest.token).is_none(), "too deep");
        let first = made[0].id.clone();
        assert!(TokenFile::revoke(&path, &first).unwrap());
        assert!(
            made.iter()
                .all(|share| tokens.verify(&share.token).is_none())
        );

        let (one, two) = (
            hex(&sha256(TOKEN.as_bytes())),
            hex(&sha256(OTHER.as_bytes())),
        );
        put(
            &path,
            format!("a {TOKEN} parent=b:{two}\nb {OTHER} parent=a:{one}\n"),
        );
        assert!(tokens.verify(TOKEN).is_none() && tokens.verify(OTHER).is_none());
    }

    #[test]
    fn a_token_for_one_client_is_for_the_first() {
        let (_dir, path) = file(format!("alice {TOKEN}\n"));
        let tokens = TokenFile::open(&path).unwrap();
        let alice = peer(&tokens, TOKEN).unwrap();
        let once = NewShare {
            once: true,
            ..NewShare::default()
        };
        let share = tokens.share(&alice, once).unwrap();
        let issued = TokenFile::issue(&path, &new_token("guest", &[("once", "open")])).unwrap();
        for token in [&share.token, &issued] {
            assert!(token.starts_with("once~"));
            let before = std::fs::read_to_string(&path).unwrap();
            // Without a secret, or with one that could be guessed, nobody comes in and nothing is used up.
            for bad in [token.clone(), format!("{token}~"), format!("{token}~short")] {
                assert!(tokens.verify(&bad).is_none(), "{bad}");
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), before);

            let mine = claimed_token(token);
            assert_eq!(claimed_token(&mine), mine);
            let found = tokens.verify(&mine).unwrap();
            assert!(found.is_used());
            let most = SystemTime::now() + CLAIMED;
            assert!(found.expires().unwrap() <= most);
            assert!(tokens.verify(&mine).is_some(), "again, after a reload");
            let other = claimed_token(token);
            assert_ne!(other, mine);
            assert!(tokens.verify(&other).is_none());
            // So it is after a restart.
            let again = TokenFile::open(&path).unwrap();
            assert!(again.verify(&mine).is_some() && again.verify(&other).is_none());
        }
        assert_eq!(claimed_token(TOKEN), TOKEN);
        assert!(tokens.entries()[0].once.is_none() && tokens.verify(TOKEN).is_some());
    }

    #[test]
    fn of_those_who_come_together_one_has_the_token() {
        let (_dir, path) = file(format!("alice {TOKEN}\n"));
        let token = TokenFile::issue(&path, &new_token("guest", &[("once", "open")])).unwrap();
        let tokens = TokenFile::open(&path).unwrap();
        let barrier = std::sync::Barrier::new(8);
        let admitted = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mine = claimed_token(&token);
                        barrier.wait();
                        tokens.verify(&mine).is_some()
                    })
                })
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join().unwrap());
            ended.filter(|admitted| *admitted).count()
        });
        assert_eq!(admitted, 1);
    }

    #[test]
    fn bad_fields_of_shares_are_refused() {
        for (fields, problem) in [
            ("once=yes", TokenLineError::Once),
            ("once=00ff", TokenLineError::Once),
            ("parent=alice", TokenLineError::Parent),
            ("parent=alice:00", TokenLineError::Parent),
            ("parent=a/b:00", TokenLineError::Parent),
        ] {
            let error = parse_line(&format!("x {TOKEN} {fields}")).err().unwrap();
            assert_eq!(error, problem, "{fields}");
        }
        let text = "2024-02-29T23:59:07Z";
        assert_eq!(
            format_time(parse_time(text).unwrap()).as_deref(),
            Some(text)
        );
    }
}
