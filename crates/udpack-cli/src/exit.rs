//! How a run ends: every error becomes an exit code, one sentence, and a hint for the next step.
//!
//! The one place that knows which error means what to a user. Codes are a contract with scripts.

use std::fmt;
use std::process::ExitCode;

use udpack::{
    BindError, CloseCode, CloseReason, ConnectError, EncodeError, FingerprintError, IdentityError,
    OpenError, RecvError, RequestError, SecretFileError, SendError, Side, TokenFileError,
};
use udpack_transfer::{Code, ErrorKind, StoreError, TransferError};

use crate::logging::Console;
use crate::output::printable;

/// The exit code after SIGINT or SIGTERM, by the shells' convention for SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a run did not succeed, as scripts see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Other,
    Usage,
    LocalFile,
    Auth,
    Network,
    Policy,
    Integrity,
    RemoteStorage,
    Fault,
    Partial,
    NoHandler,
    NotFound,
    Moving,
    Command,
    Interrupted,
}

impl Kind {
    /// The exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Other => 1,
            Self::Usage => 2,
            Self::LocalFile => 3,
            Self::Auth => 4,
            Self::Network => 5,
            Self::Policy => 6,
            Self::Integrity => 7,
            Self::RemoteStorage => 8,
            Self::Fault => 9,
            Self::Partial => 10,
            Self::NoHandler => 11,
            Self::NotFound => 12,
            Self::Moving => 13,
            Self::Command => 14,
            Self::Interrupted => INTERRUPTED,
        }
    }

    /// The name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::Usage => "usage",
            Self::LocalFile => "local_file",
            Self::Auth => "auth",
            Self::Network => "network",
            Self::Policy => "policy",
            Self::Integrity => "integrity",
            Self::RemoteStorage => "remote_storage",
            Self::Fault => "fault",
            Self::Partial => "partial",
            Self::NoHandler => "no_handler",
            Self::NotFound => "not_found",
            Self::Moving => "moving",
            Self::Command => "command",
            Self::Interrupted => "interrupted",
        }
    }
}

/// An error with its exit code, for failures that no library reports.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    text: String,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Ctrl-C or SIGTERM.
    pub(crate) fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// What a user is told about an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Explained {
    pub(crate) kind: Kind,
    pub(crate) text: String,
    pub(crate) hint: Option<String>,
    /// What the command exited with that is the reason.
    pub(crate) command_exit: Option<i32>,
}

impl Explained {
    /// Finds out what `error` means to a user.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        let secret = secret_file(error);
        let (kind, hint) = match secret {
            Some(secret) => (Kind::LocalFile, Some(secret_hint(secret))),
            None => error
                .chain()
                .find_map(meaning)
                .unwrap_or((Kind::Other, None)),
        };
        let text = printable(&match secret {
            Some(secret @ (SecretFileError::Mode { .. } | SecretFileError::Owner { .. })) => {
                secret.problem()
            }
            _ => match error.downcast_ref() {
                Some(TransferError::Refused { code, message, .. }) => refused(*code, message),
                Some(TransferError::Source { source, .. } | TransferError::Write(source))
                    if EmptyStdin::is(source) || Unfinished::of(source).is_some() =>
                {
                    source.to_string()
                }
                Some(TransferError::Store(error)) => kept(error),
                _ => match ended(error) {
                    Some(reason) => format!("the server ended it: {}", reason.text),
                    None => format!("{error:#}"),
                },
            },
        });
        let hint = hint.or_else(|| usual_hint(kind));
        let unfinished = error.chain().find_map(|error| match error.downcast_ref() {
            Some(TransferError::Source { source, .. } | TransferError::Write(source)) => {
                Unfinished::of(source)
            }
            _ => None,
        });
        Self {
            kind,
            text,
            hint,
            command_exit: unfinished.and_then(|unfinished| unfinished.exit),
        }
    }

    /// Prints the sentence and the hint.
    pub(crate) fn print(&self, console: &Console) {
        console.labelled("error", &self.text);
        if let Some(hint) = &self.hint {
            console.labelled("hint", hint);
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind.code())
    }
}

fn usual_hint(kind: Kind) -> Option<String> {
    match kind {
        Kind::Interrupted => None,
        Kind::Usage => hint("see --help"),
        _ => hint("run it again with -v to see more"),
    }
}

type Meaning = (Kind, Option<String>);

fn meaning(error: &(dyn std::error::Error + 'static)) -> Option<Meaning> {
    if let Some(error) = error.downcast_ref::<Failure>() {
        return Some((error.kind, error.hint.clone()));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(connecting(error));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(transferring(error));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(binding(error));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(storing(error));
    }
    if error.is::<IdentityError>() {
        let restore = "restore the file, or choose another directory with --keys";
        return Some((Kind::LocalFile, hint(restore)));
    }
    if error.is::<TokenFileError>() {
        let correct = "correct the file, or choose another one with --token-file";
        return Some((Kind::LocalFile, hint(correct)));
    }
    if error.is::<FingerprintError>() {
        return Some((
            Kind::LocalFile,
            hint(
                "copy pubkey.pem from the server again, or give its fingerprint with --fingerprint",
            ),
        ));
    }
    if let Some(error) = error.downcast_ref::<RequestError>() {
        return Some(match error {
            error if error.is_timeout() => (
                Kind::Network,
                hint("check that the server is well, or let `request --timeout SECS` wait longer"),
            ),
            RequestError::NoHandler => (
                Kind::NoHandler,
                hint("check the name of the event, and choose the channel with --channel"),
            ),
            RequestError::Fault(_) => (
                Kind::Fault,
                hint("the server got the message and refused it; see its log"),
            ),
            RequestError::Cancelled => (Kind::Network, hint("try again in a moment")),
            RequestError::Stream => (Kind::Usage, hint("ask with request --items")),
            RequestError::Send(SendError::Closed(reason)) | RequestError::Closed(reason) => {
                closed(reason)
            }
            RequestError::Send(SendError::Encode(error)) => (Kind::Usage, encoding(error)),
            _ => (Kind::Other, None),
        });
    }
    if let Some(error) = error.downcast_ref::<RecvError>() {
        return Some(closed(error.reason()));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(match error {
            OpenError::Encode(error) => (Kind::Usage, encoding(error)),
            OpenError::Closed(reason) => closed(reason),
            _ => (Kind::Network, hint("try again in a moment")),
        });
    }
    None
}

fn connecting(error: &ConnectError) -> Meaning {
    match error {
        ConnectError::PinMismatch { .. } => (
            Kind::Auth,
            hint(
                "if the server has a new key on purpose, use what `udpack-server url` prints there now, or copy its pubkey.pem again",
            ),
        ),
        ConnectError::Denied(reason) => closed(reason),
        ConnectError::Address(_) => (
            Kind::Usage,
            hint("use HOST:PORT, with an IPv6 address in brackets"),
        ),
        ConnectError::Setting(_) => (Kind::Usage, None),
        ConnectError::Resolve { .. } => {
            (Kind::Network, hint("check the host name and the network"))
        }
        // The error of a server that was reached is more useful than that of an address without one.
        ConnectError::EachAddress { errors, .. } => {
            let reached = |(_, error): &&(_, ConnectError)| {
                matches!(
                    error,
                    ConnectError::PinMismatch { .. }
                        | ConnectError::Untrusted { .. }
                        | ConnectError::Handshake { .. }
                        | ConnectError::ProxyRefused { .. }
                        | ConnectError::Denied(_)
                )
            };
            let telling = errors.iter().find(reached).or_else(|| errors.last());
            telling.map_or((Kind::Network, None), |(_, error)| connecting(error))
        }
        ConnectError::Unreachable { .. } | ConnectError::Dial { .. } => (
            Kind::Network,
            hint(
                "check that udpack-server runs there, that host and port are right, and that UDP is let through",
            ),
        ),
        ConnectError::Proxy { .. } => (
            Kind::Network,
            hint("check the proxy and that it reaches the server; --no-proxy goes without"),
        ),
        ConnectError::ProxyRefused { .. } => (
            Kind::Network,
            hint(
                "check the user and password of the proxy, and what it lets through; --no-proxy goes without",
            ),
        ),
        ConnectError::Untrusted { .. } => (
            Kind::Auth,
            hint(
                "give the server's key: UDPACK_URL as `udpack-server url` prints it there, --fingerprint, or a copy of its pubkey.pem in --keys",
            ),
        ),
        ConnectError::Handshake { .. } => (
            Kind::Network,
            hint("check that it is a udpack server, and of the same version"),
        ),
        ConnectError::Local(_) => (
            Kind::Network,
            hint("check the limits on open files and sockets"),
        ),
        _ => (Kind::Other, None),
    }
}

fn closed(reason: &CloseReason) -> Meaning {
    match reason.code {
        CloseCode::AUTH_FAILED
        | CloseCode::AUTH_REQUIRED
        | CloseCode::AUTH_REVOKED
        | CloseCode::AUTH_EXPIRED => (
            Kind::Auth,
            hint(
                "set UDPACK_URL to what `udpack-server url` or `token new` prints there, or give the token in UDPACK_TOKEN or --token-file",
            ),
        ),
        CloseCode::FORBIDDEN => (Kind::Auth, hint("ask the server's operator")),
        CloseCode::NO_SUCH_CHANNEL => (
            Kind::NoHandler,
            hint("choose a channel that the server serves with --channel"),
        ),
        CloseCode::REFUSED => (
            Kind::Policy,
            hint("ask the server's owner what this token may do"),
        ),
        CloseCode::HANDLER_FAILED | CloseCode::INTERNAL => {
            (Kind::Other, hint("the server failed; its log says more"))
        }
        code if code.retry()
            || code == CloseCode::TRANSPORT_ERROR
            || code == CloseCode::AUTH_TIMEOUT =>
        {
            (Kind::Network, hint("run the same command again"))
        }
        _ => (Kind::Other, None),
    }
}

fn encoding(error: &EncodeError) -> Option<String> {
    match error {
        EncodeError::Name(_) | EncodeError::Reserved(_) => hint(
            "names of events and channels have 1 to 128 bytes, no control characters, and do not begin with $",
        ),
        _ => hint("send something smaller or less deep"),
    }
}

fn transferring(error: &TransferError) -> Meaning {
    let hints = match error {
        TransferError::Connect(error) => return connecting(error),
        TransferError::Refused { code, .. } => refusal(*code),
        TransferError::Store(error) => keeping(error.refusal()),
        TransferError::Closed(reason) => {
            return match closed(reason) {
                // Even after an orderly end the file's outcome is unknown; running the command again settles it.
                (Kind::Other, None) => (Kind::Network, hint("run the same command again")),
                known => known,
            };
        }
        TransferError::Source { source, .. } if EmptyStdin::is(source) => {
            hint("check the command before the pipe; with --allow-empty an empty file is stored")
        }
        TransferError::Source { source, .. } if Unfinished::of(source).is_some() => {
            return (Kind::Command, hint("nothing of it was stored"));
        }
        TransferError::Write(source) if Unfinished::of(source).is_some() => {
            return (
                Kind::Command,
                hint("what the command made of it does not count"),
            );
        }
        TransferError::Source { .. } => hint("check the path and its permissions"),
        TransferError::NotAFile { .. } | TransferError::Special { .. } => {
            hint("leave it out with --exclude")
        }
        TransferError::Name { .. } => hint(ANOTHER_NAME),
        TransferError::Mismatch | TransferError::Silent(_) => hint("run the same command again"),
        TransferError::SourceChanged { .. } => hint("send it again when nothing writes to it"),
        _ => None,
    };
    (kind_of(error.kind()), hints)
}

fn kind_of(kind: ErrorKind) -> Kind {
    match kind {
        ErrorKind::LocalFile => Kind::LocalFile,
        ErrorKind::Auth => Kind::Auth,
        ErrorKind::Network => Kind::Network,
        ErrorKind::Policy => Kind::Policy,
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::Integrity => Kind::Integrity,
        ErrorKind::RemoteStorage => Kind::RemoteStorage,
        _ => Kind::Other,
    }
}

/// The server's sentence, marked as the server's.
fn refused(code: Code, message: &str) -> String {
    match code {
        Code::Exists | Code::Blocked | Code::NotFound => format!("at the server: {message}"),
        Code::Cancelled => message.to_owned(),
        _ => format!("the server refused it: {message}"),
    }
}

/// The sentence of the local store, marked as this machine's where a server could say the same.
fn kept(error: &StoreError) -> String {
    match error.refusal() {
        Code::Exists | Code::Blocked | Code::NoSpace | Code::BadName | Code::SystemLimit => {
            format!("on this machine: {error}")
        }
        _ => error.to_string(),
    }
}

/// What to do about the server's error codes.
fn refusal(code: Code) -> Option<String> {
    hint(match code {
        Code::Blocked => {
            "remove or rename at the server what is in the way, or choose another name with --as"
        }
        Code::Exists => {
            "choose another name with --as, leave the file there with --if-exists skip, or, where the server \
             allows it, use --if-exists rename or overwrite"
        }
        Code::BadName => ANOTHER_NAME,
        Code::SystemLimit => {
            "ask the server's owner to let its process write larger files (ulimit -f, LimitFSIZE)"
        }
        Code::TooLarge => "ask the server's owner for a larger --max-file",
        Code::Quota => {
            "remove files at the server with `udpack-client rm`, or ask its owner for a larger quota"
        }
        Code::NoSpace => "free space at the server, then run the same command again",
        Code::Io => {
            "the server's storage failed and its log says more; then run the same command again"
        }
        Code::NotGranted => {
            "choose another name with --as, or ask the server's owner to start it with another --overwrite"
        }
        Code::BadTarget => {
            "leave the link out with --exclude, or send what it points to, without --links"
        }
        Code::Forbidden => "ask the server's owner for a token whose scope allows it",
        Code::Cancelled => "ask the server's owner why; run the same command again to go on",
        Code::Refused => {
            "the server's owner decides what is taken; if its hook failed, the server's log says why"
        }
        Code::NotFound => "`udpack-client ls -R` shows what is there",
        Code::NotEmpty => "remove it with all that is in it by -r",
        Code::IsDirectory => "name what is in it, or use -r",
        Code::Busy => {
            "another client is sending this file: run the same command again when it is done"
        }
        Code::Superseded => "a later run of the same command took over: wait for that one",
        Code::Unsupported => "use a server and a client of the same version",
        Code::TooManySuspended => {
            "run the interrupted commands again to their ends, or ask the server's owner to run `udpack-server \
             uploads purge`; with --no-resume this one is sent now"
        }
        Code::TooManyShares => {
            "revoke one with `udpack-client share --revoke NAME`; --list shows them"
        }
        Code::TooManyUploads | Code::UploadStalled => "run the same command again in a moment",
        Code::HashMismatch | Code::SizeMismatch | Code::BadOffset => "run the same command again",
        Code::SourceChanged => "send it again when nothing writes to it",
        _ => return None,
    })
}

/// What to do about the same codes where they are about this machine's own directory.
fn keeping(code: Code) -> Option<String> {
    hint(match code {
        Code::Exists | Code::Blocked | Code::IsDirectory | Code::NotAFile => {
            "choose another name with --as, or use --if-exists skip, rename or overwrite"
        }
        Code::BadName => "choose another name with --as",
        Code::NoSpace => "free space, then run the same command again",
        Code::Busy => "another command is fetching this file: run this one again when it is done",
        _ => "check the directory and its permissions, or choose another one with --as DIR/",
    })
}

fn binding(error: &BindError) -> Meaning {
    use std::io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    match error {
        BindError::Bind { source, .. } => (
            Kind::Other,
            match source.kind() {
                AddrInUse => hint(
                    "stop the program that uses the port, or choose another port with --listen",
                ),
                AddrNotAvailable => {
                    hint("choose an address of this machine, or [::] for all, with --listen")
                }
                PermissionDenied => hint("choose a port above 1023 with --listen"),
                _ => None,
            },
        ),
        BindError::Address(_) => (
            Kind::Usage,
            hint("use ADDR:PORT with --listen, such as [::]:45456"),
        ),
        BindError::Setting(_) => (Kind::Usage, None),
        BindError::ClusterMessages { .. } => (
            Kind::Usage,
            hint("write `max_payload: 2MB` into the configuration of the NATS broker"),
        ),
        _ => (Kind::Other, None),
    }
}

fn storing(error: &StoreError) -> Meaning {
    match error {
        StoreError::Locked => (
            Kind::LocalFile,
            hint("stop the other server, or choose another directory with --dir"),
        ),
        StoreError::NoAtomicPublish | StoreError::OtherDevice => (
            Kind::LocalFile,
            hint("choose a directory on another file system with --dir"),
        ),
        _ => (
            Kind::LocalFile,
            hint("check the directory and its permissions, or choose another one with --dir"),
        ),
    }
}

/// The secret file that caused the error, if there is one.
fn secret_file(error: &anyhow::Error) -> Option<&SecretFileError> {
    if let Some(error) = error.downcast_ref::<SecretFileError>() {
        return Some(error);
    }
    if let Some(IdentityError::File(error)) = error.downcast_ref() {
        return Some(error);
    }
    match error.downcast_ref() {
        Some(TokenFileError::File(error)) => Some(error),
        _ => None,
    }
}

fn secret_hint(error: &SecretFileError) -> String {
    match error {
        SecretFileError::Mode { path, allowed, .. } => {
            format!("run chmod {allowed:o} {}", path.display())
        }
        SecretFileError::Owner { path, user, .. } => format!("run chown {user} {}", path.display()),
        SecretFileError::Create { .. } => "check the directory and its permissions".to_owned(),
        _ => "check the file and its permissions".to_owned(),
    }
}

/// Why the server ended a channel or a socket, where it says so in words.
fn ended(error: &anyhow::Error) -> Option<&CloseReason> {
    let reason = error.chain().find_map(|error| {
        if let Some(RequestError::Closed(reason) | RequestError::Send(SendError::Closed(reason))) =
            error.downcast_ref()
        {
            return Some(reason);
        }
        if let Some(OpenError::Closed(reason)) = error.downcast_ref() {
            return Some(reason);
        }
        error.downcast_ref().map(RecvError::reason)
    })?;
    (reason.by == Side::Peer && !reason.text.is_empty()).then_some(reason)
}

/// Standard input was empty: the reason in its reader's error.
#[derive(Debug)]
pub(crate) struct EmptyStdin;

impl EmptyStdin {
    fn is(error: &std::io::Error) -> bool {
        error.get_ref().is_some_and(|error| error.is::<Self>())
    }
}

impl fmt::Display for EmptyStdin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard input is empty")
    }
}

impl std::error::Error for EmptyStdin {}

/// What was at the other end of a pipe did not end well: the reason in the error of its reader or writer.
#[derive(Debug)]
pub(crate) struct Unfinished {
    text: String,
    exit: Option<i32>,
}

impl Unfinished {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            exit: None,
        }
    }

    /// A command that `how` says ended badly.
    pub(crate) fn command(line: &str, exit: Option<i32>, how: &str) -> Self {
        Self {
            text: format!("the command `{line}` {how}"),
            exit,
        }
    }

    fn of(error: &std::io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Unfinished {}

impl From<Unfinished> for std::io::Error {
    fn from(unfinished: Unfinished) -> Self {
        Self::other(unfinished)
    }
}

const ANOTHER_NAME: &str =
    "rename it, leave it out with --exclude, or send it by itself with --as NAME";

fn hint(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_its_code_a_sentence_and_a_hint() {
        for (code, exit) in [
            ("exists", 6),
            ("bad_name", 6),
            ("too_large", 6),
            ("quota", 6),
            ("forbidden", 6),
            ("too_many_uploads", 6),
            ("no_space", 8),
            ("io", 8),
            ("hash_mismatch", 7),
            ("size_mismatch", 7),
            ("source_changed", 7),
            ("upload_stalled", 5),
        ] {
            let error = TransferError::Refused {
                code: Code::read(code, None),
                message: "because\u{1b}[2J".to_owned(),
                retry: false,
            };
            let explained = Explained::of(&error.into());
            assert_eq!(explained.kind.code(), exit, "{code}");
            assert!(explained.hint.is_some(), "{code}");
            assert!(!explained.text.contains('\u{1b}'), "{}", explained.text);
        }
    }

    #[test]
    fn how_a_connection_ended_decides_the_code() {
        let exit = |code: CloseCode| {
            let reason = CloseReason::new(code, "", Side::Peer);
            let denied = Explained::of(&ConnectError::Denied(reason.clone()).into());
            let lost = Explained::of(&TransferError::Closed(reason).into());
            if denied.kind != Kind::Other {
                assert_eq!(denied.kind, lost.kind);
            }
            lost.kind.code()
        };
        assert_eq!(exit(CloseCode::AUTH_FAILED), 4);
        assert_eq!(exit(CloseCode::AUTH_REVOKED), 4);
        assert_eq!(exit(CloseCode::AUTH_EXPIRED), 4);
        assert_eq!(exit(CloseCode::SHUTTING_DOWN), 5);
        assert_eq!(exit(CloseCode::SERVER_BUSY), 5);
        assert_eq!(exit(CloseCode::TIMED_OUT), 5);
        assert_eq!(exit(CloseCode::PEER_RESTARTED), 5);
        assert_eq!(exit(CloseCode::NORMAL), 5);
        assert_eq!(exit(CloseCode::HANDLER_FAILED), 1);
    }

    #[test]
    fn what_a_server_refuses_says_what_to_do() {
        for (code, exit) in [
            ("forbidden", 6),
            ("not_empty", 6),
            ("refused", 6),
            ("quota", 6),
            ("no_space", 8),
            ("hash_mismatch", 7),
        ] {
            let error = TransferError::Refused {
                code: Code::read(code, None),
                message: "why".to_owned(),
                retry: false,
            };
            let explained = Explained::of(&error.into());
            assert_eq!(explained.kind.code(), exit, "{code}");
            assert_eq!(explained.text, "the server refused it: why");
            assert_ne!(explained.hint, usual_hint(explained.kind), "{code}");
        }
        let name = TransferError::Name {
            path: "x".into(),
            reason: "bad".to_owned(),
        };
        assert_eq!(Explained::of(&name.into()).kind, Kind::Policy);
        let own = StoreError::Exists {
            path: "x".parse().expect("a path"),
        };
        let own = TransferError::Store(std::sync::Arc::new(own));
        let own = Explained::of(&own.into());
        assert_eq!(own.kind, Kind::Policy);
        assert_eq!(own.text, "on this machine: the name is taken: x");
    }

    #[test]
    fn what_is_not_there_or_not_served_or_not_allowed_differs() {
        let refused = |code: Code, message: &str| {
            Explained::of(
                &TransferError::Refused {
                    code,
                    message: message.to_owned(),
                    retry: false,
                }
                .into(),
            )
        };
        let missing = refused(Code::NotFound, "not found: a/b");
        assert_eq!(missing.kind.code(), 12);
        assert_eq!(missing.text, "at the server: not found: a/b");
        assert_eq!(
            refused(Code::Cancelled, "cancelled at the server")
                .kind
                .code(),
            6
        );
        assert_eq!(
            refused(Code::Cancelled, "cancelled at the server").text,
            "cancelled at the server"
        );
        let link = "forbidden: the target of the link a leads out of the root";
        let link = refused(Code::BadTarget, link);
        assert!(link.hint.expect("a hint").contains("--exclude"));
        let hook = refused(Code::Refused, "refused: the server's hook failed");
        assert!(hook.hint.expect("a hint").contains("log"));
        let right = refused(
            Code::Forbidden,
            "forbidden: this token has no right to read",
        );
        assert!(!right.hint.expect("a hint").contains("--overwrite"));
        let replace = refused(
            Code::NotGranted,
            "forbidden: if_exists overwrite is not allowed here",
        );
        assert!(replace.hint.expect("a hint").contains("--overwrite"));
        let reason = CloseReason::new(CloseCode::NO_SUCH_CHANNEL, "", Side::Peer);
        let error = Explained::of(&OpenError::Closed(reason).into());
        assert_eq!(error.kind.code(), 11);
        let text = "no channel named \"x\" is served here";
        let reason = CloseReason::new(CloseCode::NO_SUCH_CHANNEL, text, Side::Peer);
        for error in [
            anyhow::Error::new(OpenError::Closed(reason.clone())),
            RequestError::Closed(reason.clone()).into(),
            RecvError::Closed(reason).into(),
        ] {
            let error = Explained::of(&error);
            assert_eq!(error.text, format!("the server ended it: {text}"));
            assert_eq!(error.kind.code(), 11);
        }
    }

    #[test]
    fn context_does_not_hide_what_is_below_it() {
        let error = anyhow::Error::new(StoreError::Locked).context("cannot use ./uploads");
        let explained = Explained::of(&error);
        assert_eq!(explained.kind, Kind::LocalFile);
        assert_eq!(
            explained.text,
            "cannot use ./uploads: another server uses this directory"
        );
    }
}
