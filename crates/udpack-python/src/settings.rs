//! Settings by name: limits, timeouts, and how to reconnect.

use std::ffi::CString;

use pyo3::exceptions::{PyRuntimeWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use udpack::{Limits, Proxy, Reconnect, Timeouts, TransportChoice};

use crate::channel::seconds;

macro_rules! by_name {
    ($settings:expr, $dict:expr, $what:literal, $value:ident => $read:expr, [$($field:ident),* $(,)?]) => {
        for (name, $value) in $dict.items().iter().map(|item| item.extract::<(String, Bound<'_, PyAny>)>()).collect::<PyResult<Vec<_>>>()? {
            match name.as_str() {
                $(stringify!($field) => $settings.$field = $read,)*
                other => {
                    let known = [$(stringify!($field)),*].join(", ");
                    let text = format!(concat!("there is no ", $what, " {:?}; there are {}"), other, known);
                    return Err(PyValueError::new_err(text));
                }
            }
        }
    };
}

pub(crate) fn timeouts(dict: Option<&Bound<'_, PyDict>>) -> PyResult<Timeouts> {
    let mut timeouts = Timeouts::default();
    if let Some(dict) = dict {
        by_name!(timeouts, dict, "timeout", value => seconds(value.extract()?)?, [
            handshake, auth, auth_failure, auth_pause, frame, slow_peer, idle, keep_alive, resume, close, request, handler,
            recheck, presence,
        ]);
    }
    Ok(timeouts)
}

pub(crate) fn limits(dict: Option<&Bound<'_, PyDict>>) -> PyResult<Limits> {
    let mut limits = Limits::default();
    if let Some(dict) = dict {
        by_name!(limits, dict, "limit", value => value.extract()?, [
            frame, channels, sockets, sockets_per_address, handshakes, handshake_rate, retry_from, channel_rate,
            outbound_bytes, outbound_messages, replay_bytes, replay_messages, resume_bytes, detached_sockets, backlog_messages,
            backlog_bytes, rooms, rooms_per_channel, history_bytes, stream_window, connection_window, send_window, receive_budget,
            auth_failures, volatile_keys, volatile_bytes, socket_buffer,
        ]);
    }
    Ok(limits)
}

pub(crate) fn transport(name: &str) -> PyResult<TransportChoice> {
    match name {
        "auto" => Ok(TransportChoice::Auto),
        "quic" => Ok(TransportChoice::Quic),
        "wss" => Ok(TransportChoice::WebSocket),
        other => {
            let text = format!("there is no transport {other:?}; there are auto, quic, wss");
            Err(PyValueError::new_err(text))
        }
    }
}

/// `True`: what the environment names. `False`: none. Otherwise the text of one.
pub(crate) fn proxy(value: &Bound<'_, PyAny>) -> PyResult<Option<Proxy>> {
    if let Ok(text) = value.extract::<String>() {
        // The text may hold a password: only the reason is shown.
        let proxy = text.parse::<Proxy>();
        let proxy = proxy.map_err(|error| PyValueError::new_err(format!("proxy: {error}")))?;
        return Ok(Some(proxy.except_env()));
    }
    if !value.extract::<bool>()? {
        return Ok(None);
    }
    match Proxy::from_env() {
        Some((_, Ok(proxy))) => Ok(Some(proxy)),
        Some((name, Err(error))) => {
            let text = CString::new(format!("{name} is not used: {error}"))?;
            let category = value.py().get_type::<PyRuntimeWarning>();
            PyErr::warn(value.py(), &category, &text, 1)?;
            Ok(None)
        }
        None => Ok(None),
    }
}

/// `True`, `False`, or a dict of `attempts`, `patience`, `first`, `most` and `first_too`.
pub(crate) fn reconnect(value: &Bound<'_, PyAny>) -> PyResult<Option<Reconnect>> {
    if let Ok(on) = value.extract::<bool>() {
        return Ok(on.then(Reconnect::default));
    }
    let dict = value.cast::<PyDict>()?;
    let mut reconnect = Reconnect::default();
    for (name, value) in dict.iter() {
        match name.extract::<String>()?.as_str() {
            "attempts" => reconnect.attempts = value.extract()?,
            "patience" => reconnect.patience = seconds(value.extract()?)?,
            "first" => reconnect.first = seconds(value.extract()?)?,
            "most" => reconnect.most = seconds(value.extract()?)?,
            "first_too" => reconnect.first_too = value.extract()?,
            other => {
                return Err(PyValueError::new_err(format!(
                    "there is no setting {other:?} of reconnect"
                )));
            }
        }
    }
    Ok(Some(reconnect))
}
