//! Errors of the Rust libraries as exceptions of the module `udpack.errors`.

use std::error::Error;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use udpack::{
    BindError, CloseReason, ConnectError, EncodeError, Fault, JoinError, OpenError, RecvError,
    RefreshError, RequestError, SendError, ServerError, Side, TrackError,
};
use udpack_transfer::{ErrorKind, FetchError, TransferError};

use crate::value::{self, Value};

/// An exception to be: made on any thread, raised on one that has the GIL.
#[derive(Debug)]
pub(crate) struct Failure(Box<Parts>);

#[derive(Debug)]
struct Parts {
    class: &'static str,
    code: String,
    text: String,
    number: Option<u64>,
    retry: bool,
    by: Option<&'static str>,
    detail: Option<Value>,
}

impl Failure {
    pub(crate) fn new(
        class: &'static str,
        code: impl Into<String>,
        text: impl Into<String>,
    ) -> Self {
        Self(Box::new(Parts {
            class,
            code: code.into(),
            text: text.into(),
            number: None,
            retry: false,
            by: None,
            detail: None,
        }))
    }

    fn again(mut self, retry: bool) -> Self {
        self.0.retry = retry;
        self
    }

    fn closed(class: &'static str, text: String, reason: &CloseReason) -> Self {
        let mut failure = Self::new(class, reason.code.name(), text);
        failure.0.number = Some(reason.code.value());
        failure.0.retry = reason.retry;
        failure.0.by = Some(side(reason.by));
        failure.0.detail = Some(Value::Str(reason.text.clone()));
        failure
    }

    /// The exception.
    pub(crate) fn raise(self, py: Python<'_>) -> PyErr {
        match self.object(py) {
            Ok(object) => PyErr::from_value(object),
            Err(error) => error,
        }
    }

    /// The exception as an object.
    pub(crate) fn object(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let parts = *self.0;
        let class = py.import("udpack.errors")?.getattr(parts.class)?;
        let kwargs = PyDict::new(py);
        kwargs.set_item("code", parts.code)?;
        kwargs.set_item("number", parts.number)?;
        kwargs.set_item("retry", parts.retry)?;
        kwargs.set_item("by", parts.by)?;
        let detail = parts.detail.as_ref();
        kwargs.set_item(
            "detail",
            detail
                .map(|value| value::to_python(py, value))
                .transpose()?,
        )?;
        class.call((parts.text,), Some(&kwargs))
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| failure.raise(py))
    }
}

pub(crate) fn side(side: Side) -> &'static str {
    match side {
        Side::Local => "local",
        Side::Peer => "peer",
        Side::Transport => "transport",
    }
}

/// An error and its sources, each after a colon.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

impl From<EncodeError> for Failure {
    fn from(error: EncodeError) -> Self {
        let code = match &error {
            EncodeError::TooLarge { .. } => "frame_too_large",
            EncodeError::Name(_) | EncodeError::Reserved(_) => "name",
            _ => "bad_payload",
        };
        Self::new("EncodeError", code, chain(&error))
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        let text = error.to_string();
        match error {
            SendError::Encode(error) => error.into(),
            SendError::Closed(reason) => Self::closed("ClosedError", text, &reason),
            _ => Self::new("ClosedError", "finished", text),
        }
    }
}

impl From<RecvError> for Failure {
    fn from(error: RecvError) -> Self {
        let text = error.to_string();
        match error {
            RecvError::Protocol(reason) => Self::closed("ProtocolError", text, &reason),
            error => Self::closed("ClosedError", text, error.reason()),
        }
    }
}

impl From<CloseReason> for Failure {
    fn from(reason: CloseReason) -> Self {
        Self::closed("ClosedError", reason.to_string(), &reason)
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let text = error.to_string();
        match error {
            OpenError::Encode(error) => error.into(),
            OpenError::Closed(reason) => Self::closed("ClosedError", text, &reason),
            OpenError::TooManyChannels(_) => {
                Self::new("OpenError", "too_many_channels", text).again(true)
            }
            OpenError::NoConnection(_) => Self::new("OpenError", "no_connection", text).again(true),
            OpenError::GoingAway(_) => Self::new("OpenError", "going_away", text).again(true),
            _ => Self::new("OpenError", "internal", text),
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        let text = error.to_string();
        match error {
            RequestError::NoHandler => Self::new("NoHandlerError", Fault::NO_HANDLER, text),
            RequestError::Fault(fault) => {
                let mut failure = Self::new("Fault", fault.code.clone(), fault.message.clone());
                failure.0.detail = fault.data::<Value>().ok().flatten();
                failure
            }
            RequestError::Cancelled => Self::new("RequestCancelledError", Fault::CANCELLED, text),
            RequestError::Stream => Self::new("RequestError", "stream", text),
            RequestError::Timeout(_) => {
                Self::new("RequestTimeoutError", Fault::TIMEOUT, text).again(true)
            }
            RequestError::Backlog { .. } => Self::new("RequestError", "backlog", text),
            RequestError::Send(error) => error.into(),
            RequestError::Closed(reason) => Self::closed("ClosedError", text, &reason),
            RequestError::Decode(_) => Self::new("RequestError", "bad_payload", text),
            _ => Self::new("RequestError", "internal", text),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let (retry, text) = (error.retry(), chain(&error));
        let code = match &error {
            ConnectError::Denied(reason) => {
                let class = if error.is_auth() {
                    "AuthError"
                } else {
                    "ConnectError"
                };
                return Self::closed(class, text, reason);
            }
            ConnectError::PinMismatch { .. } => {
                return Self::new("AuthError", "pin_mismatch", text);
            }
            ConnectError::Untrusted { .. } => return Self::new("AuthError", "untrusted", text),
            ConnectError::Setting(_) | ConnectError::MissingState { .. } => "setting",
            ConnectError::Tls(_) => "tls",
            ConnectError::Token(_) => "token",
            ConnectError::Address(_) => "address",
            ConnectError::Resolve { .. } => "resolve",
            ConnectError::Local(_) => "local",
            ConnectError::Handshake { .. } => "handshake",
            _ => "unreachable",
        };
        Self::new("ConnectError", code, text).again(retry)
    }
}

impl From<RefreshError> for Failure {
    fn from(error: RefreshError) -> Self {
        Self::new("AuthError", "refresh", chain(&error))
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        Self::new("BindError", "bind", chain(&error))
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        Self::new("UdpackError", "stopped", chain(&error))
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Self {
        Self::new("RoomError", "join", chain(&error))
    }
}

impl From<TrackError> for Failure {
    fn from(error: TrackError) -> Self {
        Self::new("RoomError", "track", chain(&error))
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        let (kind, retry, text) = (error.kind(), error.retry(), chain(&error));
        let code = match &error {
            TransferError::Refused { code, .. } => code.to_string(),
            TransferError::Closed(reason) => reason.code.name().to_owned(),
            _ => kind_name(kind).to_owned(),
        };
        Self::new("TransferError", code, text).again(retry)
    }
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        error.cause.into()
    }
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::LocalFile => "local_file",
        ErrorKind::Network => "network",
        ErrorKind::Auth => "auth",
        ErrorKind::Policy => "policy",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Integrity => "integrity",
        ErrorKind::RemoteStorage => "remote_storage",
        _ => "other",
    }
}
