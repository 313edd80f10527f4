/*! udpack, MIT OR Apache-2.0. Contains parts of @msgpack/msgpack, Copyright 2019 The MessagePack Community, ISC, or of hash-wasm, Copyright 2020 Dani Biro, MIT. */
