//! Extended attributes of files and directories: read from an open file, and given to one before it has its name.
//!
//! A file system that holds none, or not these, is no failure: how many were stored is counted.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

/// Most attributes of one file or directory.
pub(crate) const XATTRS: usize = 256;
/// Most bytes of all names and values of one file or directory.
pub(crate) const XATTR_BYTES: usize = 64 << 10;
/// Most bytes of a name.
const NAME: usize = 255;
/// How often a list or a value is read again that grows between two calls.
const TRIES: u32 = 4;

/// Which extended attributes are copied with files and directories. Only Linux has them; elsewhere there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Xattrs {
    /// None.
    #[default]
    None,
    /// Those of programs and users, `user.*`.
    User,
    /// `user.*`, `security.*`, `trusted.*`, and access control lists (`system.posix_acl_access`,
    /// `system.posix_acl_default`), as far as the process may read and set them. Some of them give rights: a file with
    /// `security.capability` can run with them.
    All,
}

impl Xattrs {
    /// The choice with this name on the wire and the command line.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::None, Self::User, Self::All]
            .into_iter()
            .find(|which| which.to_string() == word)
    }

    /// Whether an attribute of this name is among them.
    fn takes(self, name: &[u8]) -> bool {
        let begins = |with: &str| name.starts_with(with.as_bytes());
        match self {
            Self::None => false,
            Self::User => begins("user."),
            Self::All => {
                let spaces = ["user.", "security.", "trusted.", "system.posix_acl_"];
                spaces.into_iter().any(begins)
            }
        }
    }
}

impl fmt::Display for Xattrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::User => "user",
            Self::All => "all",
        })
    }
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Its name with its name space, such as `user.comment`: 1 to 255 bytes without a NUL.
    pub name: Box<[u8]>,
    /// Its value.
    pub value: Box<[u8]>,
}

/// The extended attributes of a file: at most 256, and 64 KiB of names and values. A cheap clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrList(Option<Arc<[Xattr]>>);

impl XattrList {
    /// Checks the limits.
    ///
    /// # Errors
    /// When there are too many attributes or bytes, or a name is empty, too long or has a NUL.
    pub fn new(xattrs: Vec<Xattr>) -> Result<Self, BadXattrs> {
        if xattrs.is_empty() {
            return Ok(Self(None));
        }
        let bytes = xattrs
            .iter()
            .fold(0, |sum, one| sum + one.name.len() + one.value.len());
        if xattrs.len() > XATTRS || bytes > XATTR_BYTES {
            return Err(BadXattrs::TooMany);
        }
        let sound = |one: &Xattr| (1..=NAME).contains(&one.name.len()) && !one.name.contains(&0);
        match xattrs.iter().all(sound) {
            true => Ok(Self(Some(xattrs.into()))),
            false => Err(BadXattrs::Name),
        }
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Xattr] {
        self.0.as_deref().unwrap_or_default()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.as_slice().len()).unwrap_or(u32::MAX)
    }

    /// Those of this kind.
    pub(crate) fn only(self, which: Xattrs) -> Self {
        let takes = |one: &&Xattr| which.takes(&one.name);
        if self.as_slice().iter().all(|one| takes(&one)) {
            return self;
        }
        let kept: Vec<Xattr> = self.as_slice().iter().filter(takes).cloned().collect();
        Self((!kept.is_empty()).then(|| kept.into()))
    }

    /// Bytes of all names and values, and what a message needs for each.
    pub(crate) fn wire_len(&self) -> usize {
        let each = |one: &Xattr| one.name.len() + one.value.len() + 16;
        self.as_slice().iter().map(each).sum()
    }
}

/// Why attributes are not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadXattrs {
    /// More than 256, or more bytes than 64 KiB.
    #[error("more than 256 extended attributes, or more than 65536 bytes of them")]
    TooMany,
    /// A name that no file system can hold.
    #[error("the name of an extended attribute is empty, longer than 255 bytes, or has a NUL")]
    Name,
}

impl BadXattrs {
    /// Whether this is why [reading](read) them failed.
    pub(crate) fn caused(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|cause| cause.is::<Self>())
    }
}

/// Reads the attributes of this kind. Blocks.
///
/// # Errors
/// When there are more than [`XattrList`] takes, or reading fails. A file system without attributes has none.
#[cfg(target_os = "linux")]
pub(crate) fn read(file: impl AsFd, which: Xattrs) -> io::Result<XattrList> {
    if which == Xattrs::None {
        return Ok(XattrList::default());
    }
    let file = file.as_fd();
    let names = match grown(
        || rustix::fs::flistxattr_query(file),
        |room| rustix::fs::flistxattr(file, room),
    ) {
        Ok(names) => names,
        Err(Errno::OPNOTSUPP) => return Ok(XattrList::default()),
        Err(errno) => return Err(errno.into()),
    };
    let mut xattrs = Vec::new();
    let mut bytes = 0;
    for name in names.split(|byte| *byte == 0) {
        if name.is_empty() || !which.takes(name) {
            continue;
        }
        let value = grown(
            || rustix::fs::fgetxattr_query(file, name),
            |room| rustix::fs::fgetxattr(file, name, room),
        );
        let value = match value {
            Ok(value) => value,
            // It was removed meanwhile, or is not for this process.
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => continue,
            Err(errno) => return Err(errno.into()),
        };
        bytes += name.len() + value.len();
        if xattrs.len() == XATTRS || bytes > XATTR_BYTES {
            return Err(io::Error::other(BadXattrs::TooMany));
        }
        xattrs.push(Xattr {
            name: name.into(),
            value: value.into(),
        });
    }
    XattrList::new(xattrs).map_err(io::Error::other)
}

/// Asks for a size and reads so many bytes, again if there are more by then.
#[cfg(target_os = "linux")]
fn grown(
    size: impl Fn() -> rustix::io::Result<usize>,
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut tries = 0;
    loop {
        let mut bytes = vec![0; size()?];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        match read(&mut bytes) {
            Ok(filled) => {
                bytes.truncate(filled);
                return Ok(bytes);
            }
            Err(Errno::RANGE) if tries < TRIES => tries += 1,
            Err(errno) => return Err(errno),
        }
    }
}

/// Gives a file or a directory those attributes that are of this kind and that its file system holds, and says how many
/// they are. Others that it has stay. Blocks.
///
/// # Errors
/// When its disk fails.
#[cfg(target_os = "linux")]
pub(crate) fn apply(file: impl AsFd, xattrs: &XattrList, which: Xattrs) -> io::Result<u32> {
    let mut stored = 0;
    for one in xattrs.as_slice() {
        let set = match which.takes(&one.name) {
            true => rustix::fs::fsetxattr(
                file.as_fd(),
                &*one.name,
                &one.value,
                rustix::fs::XattrFlags::empty(),
            ),
            false => Err(Errno::PERM),
        };
        match set {
            Ok(()) => stored += 1,
            Err(errno) if is_limit(errno) => {
                let name = udpack::text::printable_bytes(&one.name);
                tracing::debug!(%name, %errno, "an extended attribute is not stored");
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(stored)
}

/// Whether this says that a file system does not hold an attribute, or that the process may not set it. ext4 says `NOSPC`
/// of one that is too large for it.
#[cfg(target_os = "linux")]
fn is_limit(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP
            | Errno::PERM
            | Errno::ACCESS
            | Errno::NOSPC
            | Errno::TOOBIG
            | Errno::RANGE
            | Errno::INVAL
            | Errno::NAMETOOLONG
            | Errno::DQUOT
    )
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn read(_: impl AsFd, _: Xattrs) -> io::Result<XattrList> {
    Ok(XattrList::default())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn apply(_: impl AsFd, _: &XattrList, _: Xattrs) -> io::Result<u32> {
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &[u8], value: usize) -> Xattr {
        Xattr {
            name: name.into(),
            value: vec![0; value].into(),
        }
    }

    #[test]
    fn lists_have_limits() {
        let many = |count: usize| (0..count).map(|_| xattr(b"user.a", 0)).collect();
        assert_eq!(XattrList::new(many(256)).map(|list| list.count()), Ok(256));
        assert_eq!(XattrList::new(many(257)), Err(BadXattrs::TooMany));
        let full = |bytes: usize| XattrList::new(vec![xattr(b"user.a", bytes - 6)]);
        assert!(full(65_536).is_ok());
        assert_eq!(full(65_537), Err(BadXattrs::TooMany));
        for bad in [&b""[..], b"user.\0", &[b'x'; 256]] {
            let list = XattrList::new(vec![xattr(b"user.a", 1), xattr(bad, 1)]);
            assert_eq!(list, Err(BadXattrs::Name));
        }
    }

    #[test]
    fn a_kind_takes_its_names_and_no_others() {
        let names = [
            "user.a",
            "security.capability",
            "trusted.a",
            "system.posix_acl_access",
            "system.nfs4_acl",
            "username",
            "a",
        ];
        let all: Vec<Xattr> = names.iter().map(|name| xattr(name.as_bytes(), 1)).collect();
        let all = XattrList::new(all).expect("few and small ones");
        for (which, taken) in [(Xattrs::None, 0), (Xattrs::User, 1), (Xattrs::All, 4)] {
            assert_eq!(all.clone().only(which).count(), taken, "{which}");
            assert_eq!(Xattrs::from_word(&which.to_string()), Some(which));
        }
        assert_eq!(Xattrs::from_word("some"), None);
    }
}
