//! The extension module `udpack._udpack`: udpack for Python, below the classes of the package `udpack`.
//!
//! | file | what |
//! | --- | --- |
//! | `runtime.rs` | the tokio runtime, and forks |
//! | `op.rs` | operations that wait, and how they wake an event loop |
//! | `value.rs` | Python objects and MessagePack |
//! | `error.rs` | errors as exceptions |
//! | `socket.rs`, `channel.rs` | clients, and what both sides do on a channel |
//! | `server.rs` | servers |
//! | `transfer.rs` | files |
//!
//! What a program sees is in `python/udpack`: asyncio classes, the blocking `udpack.sync`, exceptions.

mod channel;
mod error;
mod op;
mod runtime;
mod server;
mod settings;
mod socket;
mod transfer;
mod value;

use pyo3::prelude::*;

/// The parts of the package `udpack` that are written in Rust.
#[pymodule(gil_used = true)]
fn _udpack(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DEFAULT_PORT", udpack::DEFAULT_PORT)?;
    module.add_class::<op::Op>()?;
    module.add_class::<op::Bridge>()?;
    module.add_class::<value::Timestamp>()?;
    module.add_class::<socket::PySocket>()?;
    module.add_class::<socket::States>()?;
    module.add_class::<channel::PyChannel>()?;
    module.add_class::<channel::PyMessage>()?;
    module.add_class::<channel::ItemSender>()?;
    module.add_class::<channel::ItemReader>()?;
    module.add_class::<channel::PyPresence>()?;
    module.add_class::<server::PyServer>()?;
    module.add_class::<server::Served>()?;
    module.add_class::<server::Call>()?;
    module.add_class::<server::Judged>()?;
    module.add_class::<transfer::PyLink>()?;
    module.add_class::<transfer::Transfer>()?;
    module.add_function(wrap_pyfunction!(runtime::forked, module)?)?;
    module.add_function(wrap_pyfunction!(channel::pack, module)?)?;
    module.add_function(wrap_pyfunction!(channel::unpack, module)?)?;
    module.add_function(wrap_pyfunction!(socket::connect, module)?)?;
    module.add_function(wrap_pyfunction!(socket::close_codes, module)?)?;
    module.add_function(wrap_pyfunction!(server::bind, module)?)
}
