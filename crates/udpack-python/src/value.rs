//! Values of MessagePack, between Python and the wire.
//!
//! What is sent at once is written from the Python object itself, and what was received is made into Python objects from
//! the bytes of its message. [`Value`] is for what crosses threads in between: questions, answers and items.
//!
//! | Python | MessagePack |
//! | --- | --- |
//! | `None`, `bool`, `float`, `str` | nil, boolean, float 64, text |
//! | `int` from -2^63 to 2^64 - 1 | integer |
//! | `bytes`, `bytearray`, `memoryview`, arrays with the buffer protocol | binary |
//! | `list`, `tuple` | array |
//! | `dict` | map |
//! | `udpack.Timestamp`, `datetime` with a time zone | timestamp |

use std::fmt;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyMemoryView, PyString, PyTuple,
    PyType,
};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Error as _, Serialize, SerializeMap, SerializeSeq, Serializer};
use udpack::wire::MAX_DEPTH;

/// The name by which the codec knows extension types.
const EXT: &str = "_ExtStruct";
/// The extension type of timestamps.
const TIMESTAMP: i8 = -1;

/// A moment of MessagePack: seconds since 1970, and nanoseconds. What came from a peer may be out of every range.
#[pyclass(frozen, eq, hash, from_py_object, module = "udpack")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z.
    #[pyo3(get)]
    seconds: i64,
    /// Nanoseconds of that second.
    #[pyo3(get)]
    nanoseconds: u32,
}

#[pymethods]
impl Timestamp {
    #[new]
    #[pyo3(signature = (seconds, nanoseconds=0))]
    fn new(seconds: i64, nanoseconds: u32) -> Self {
        Self {
            seconds,
            nanoseconds,
        }
    }

    /// As an aware `datetime` in UTC, without what is finer than a microsecond.
    fn datetime<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let delta = py.import("datetime")?.getattr("timedelta")?;
        let delta = delta.call1((0, self.seconds, self.nanoseconds / 1000))?;
        epoch(py)?.call_method1("__add__", (delta,))
    }

    fn __repr__(&self) -> String {
        format!("Timestamp({}, {})", self.seconds, self.nanoseconds)
    }
}

impl Timestamp {
    /// Its shortest content.
    fn content(self) -> Vec<u8> {
        let (seconds, nanos) = (self.seconds, self.nanoseconds);
        if let (Ok(seconds), 0) = (u32::try_from(seconds), nanos) {
            return seconds.to_be_bytes().to_vec();
        }
        match u64::try_from(seconds) {
            Ok(seconds) if seconds < 1 << 34 && nanos < 1 << 30 => {
                (u64::from(nanos) << 34 | seconds).to_be_bytes().to_vec()
            }
            _ => [&nanos.to_be_bytes()[..], &seconds.to_be_bytes()].concat(),
        }
    }

    fn of(content: &[u8]) -> Option<Self> {
        let (seconds, nanoseconds) = match *content {
            [a, b, c, d] => (u32::from_be_bytes([a, b, c, d]).into(), 0),
            [a, b, c, d, e, f, g, h] => {
                let both = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
                let seconds = i64::try_from(both & ((1 << 34) - 1)).ok()?;
                (seconds, u32::try_from(both >> 34).ok()?)
            }
            [a, b, c, d, ref seconds @ ..] => (
                i64::from_be_bytes(seconds.try_into().ok()?),
                u32::from_be_bytes([a, b, c, d]),
            ),
            _ => return None,
        };
        Some(Self {
            seconds,
            nanoseconds,
        })
    }
}

fn epoch(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static EPOCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let epoch = EPOCH.get_or_try_init(py, || {
        let module = py.import("datetime")?;
        let utc = module.getattr("timezone")?.getattr("utc")?;
        let epoch = module
            .getattr("datetime")?
            .call_method1("fromtimestamp", (0, utc))?;
        Ok::<_, PyErr>(epoch.unbind())
    })?;
    Ok(epoch.bind(py).clone())
}

fn datetime_type(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static TYPE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    TYPE.import(py, "datetime", "datetime")
}

/// A value that no thread's interpreter owns.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Nil,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Str(String),
    Bin(Vec<u8>),
    List(Vec<Self>),
    Map(Vec<(Self, Self)>),
    Time(Timestamp),
}

/// A Python object, to be written.
pub(crate) struct Data<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    depth: usize,
}

impl<'a, 'py> Data<'a, 'py> {
    pub(crate) fn new(object: &'a Bound<'py, PyAny>) -> Self {
        Self { object, depth: 0 }
    }

    fn below<'b>(&self, object: &'b Bound<'py, PyAny>) -> Data<'b, 'py> {
        Data {
            object,
            depth: self.depth + 1,
        }
    }
}

/// What an object is.
enum Shape<'a, 'py> {
    Plain(Value),
    Str(&'a Bound<'py, PyString>),
    Bytes(Bound<'py, PyBytes>),
    List(&'a Bound<'py, PyList>),
    Tuple(&'a Bound<'py, PyTuple>),
    Dict(&'a Bound<'py, PyDict>),
    /// The value of an array of no dimensions.
    Scalar(Bound<'py, PyAny>),
}

fn shape<'a, 'py>(object: &'a Bound<'py, PyAny>) -> PyResult<Shape<'a, 'py>> {
    if let Ok(text) = object.cast::<PyString>() {
        return Ok(Shape::Str(text));
    }
    if object.is_none() {
        return Ok(Shape::Plain(Value::Nil));
    }
    if let Ok(value) = object.cast::<PyBool>() {
        return Ok(Shape::Plain(Value::Bool(value.is_true())));
    }
    if object.cast::<PyInt>().is_ok() {
        return integer(object).map(Shape::Plain);
    }
    if object.cast::<PyFloat>().is_ok() {
        return Ok(Shape::Plain(Value::Float(object.extract()?)));
    }
    if let Ok(dict) = object.cast::<PyDict>() {
        return Ok(Shape::Dict(dict));
    }
    if let Ok(list) = object.cast::<PyList>() {
        return Ok(Shape::List(list));
    }
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(Shape::Bytes(bytes.clone()));
    }
    if let Ok(tuple) = object.cast::<PyTuple>() {
        return Ok(Shape::Tuple(tuple));
    }
    rare(object)
}

/// Whether it is a text, a number, a boolean, bytes or `None`, and of no class that a program has made.
fn is_plain(object: &Bound<'_, PyAny>) -> bool {
    object.is_exact_instance_of::<PyString>()
        || object.is_exact_instance_of::<PyInt>()
        || object.is_exact_instance_of::<PyFloat>()
        || object.is_exact_instance_of::<PyBool>()
        || object.is_exact_instance_of::<PyBytes>()
        || object.is_none()
}

fn rare<'a, 'py>(object: &'a Bound<'py, PyAny>) -> PyResult<Shape<'a, 'py>> {
    let py = object.py();
    if let Ok(time) = object.extract::<Timestamp>() {
        return Ok(Shape::Plain(Value::Time(time)));
    }
    if let Ok(bytes) = object.cast::<PyByteArray>() {
        return Ok(Shape::Bytes(PyBytes::new(py, &bytes.to_vec())));
    }
    if object.is_instance(datetime_type(py)?)? {
        return moment(object).map(|time| Shape::Plain(Value::Time(time)));
    }
    if let Ok(view) = PyMemoryView::from(object) {
        if view.getattr("ndim")?.extract::<usize>()? == 0 && object.hasattr("item")? {
            return Ok(Shape::Scalar(object.call_method0("item")?));
        }
        let bytes = view.call_method0("tobytes")?;
        return Ok(Shape::Bytes(bytes.cast_into::<PyBytes>()?));
    }
    let name = object.get_type().name()?;
    Err(PyTypeError::new_err(format!(
        "MessagePack has no form of the type {name}"
    )))
}

fn integer(object: &Bound<'_, PyAny>) -> PyResult<Value> {
    match object.extract::<i64>() {
        Ok(number) => Ok(Value::Int(number)),
        Err(_) => object
            .extract::<u64>()
            .map(Value::Uint)
            .map_err(|_| PyTypeError::new_err("an integer is below -2^63 or above 2^64 - 1")),
    }
}

fn moment(object: &Bound<'_, PyAny>) -> PyResult<Timestamp> {
    if object.getattr("tzinfo")?.is_none() {
        return Err(PyTypeError::new_err(
            "a datetime without a time zone is no moment",
        ));
    }
    let delta = object.call_method1("__sub__", (epoch(object.py())?,))?;
    let part = |name: &str| delta.getattr(name)?.extract::<i64>();
    let seconds = part("days")? * 86_400 + part("seconds")?;
    let micros = delta.getattr("microseconds")?.extract::<u32>()?;
    Ok(Timestamp {
        seconds,
        nanoseconds: micros * 1000,
    })
}

impl Serialize for Data<'_, '_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        // A message's own array is one level.
        if self.depth + 1 > MAX_DEPTH {
            return Err(S::Error::custom(
                "lists and dicts are nested too deep, or contain themselves",
            ));
        }
        match shape(self.object).map_err(S::Error::custom)? {
            Shape::Plain(value) => value.serialize(to),
            Shape::Str(text) => to.serialize_str(text.to_str().map_err(S::Error::custom)?),
            Shape::Bytes(bytes) => to.serialize_bytes(bytes.as_bytes()),
            Shape::Scalar(value) => self.below(&value).serialize(to),
            Shape::List(list) => {
                let len = list.len();
                let mut seq = to.serialize_seq(Some(len))?;
                for index in 0..len {
                    let item = list.get_item(index).map_err(S::Error::custom)?;
                    seq.serialize_element(&self.below(&item))?;
                }
                seq.end()
            }
            Shape::Tuple(tuple) => {
                let mut seq = to.serialize_seq(Some(tuple.len()))?;
                for item in tuple.iter() {
                    seq.serialize_element(&self.below(&item))?;
                }
                seq.end()
            }
            // Writing what is plain runs no code that could change the dict meanwhile.
            Shape::Dict(dict)
                if dict
                    .iter()
                    .all(|(key, value)| is_plain(&key) && is_plain(&value)) =>
            {
                let mut map = to.serialize_map(Some(dict.len()))?;
                for (key, value) in dict.iter() {
                    map.serialize_entry(&self.below(&key), &self.below(&value))?;
                }
                map.end()
            }
            Shape::Dict(dict) => {
                let items = dict.items();
                let mut map = to.serialize_map(Some(items.len()))?;
                for item in items.iter() {
                    let (key, value) = item
                        .extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()
                        .map_err(S::Error::custom)?;
                    map.serialize_entry(&self.below(&key), &self.below(&value))?;
                }
                map.end()
            }
        }
    }
}

/// A value of a Python object.
pub(crate) fn from_python(object: &Bound<'_, PyAny>) -> PyResult<Value> {
    copy(object, 1)
}

fn copy(object: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    if depth > MAX_DEPTH {
        return Err(PyTypeError::new_err(
            "lists and dicts are nested too deep, or contain themselves",
        ));
    }
    let below = |object: &Bound<'_, PyAny>| copy(object, depth + 1);
    Ok(match shape(object)? {
        Shape::Plain(value) => value,
        Shape::Str(text) => Value::Str(text.to_str()?.to_owned()),
        Shape::Bytes(bytes) => Value::Bin(bytes.as_bytes().to_vec()),
        Shape::Scalar(value) => below(&value)?,
        Shape::List(list) => {
            let mut items = Vec::with_capacity(list.len());
            for index in 0..list.len() {
                items.push(below(&list.get_item(index)?)?);
            }
            Value::List(items)
        }
        Shape::Tuple(tuple) => {
            let items = tuple.iter().map(|item| below(&item));
            Value::List(items.collect::<PyResult<_>>()?)
        }
        Shape::Dict(dict) => {
            let items = dict.items();
            let items = items.iter().map(|item| {
                let (key, value) = item.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
                Ok((below(&key)?, below(&value)?))
            });
            Value::Map(items.collect::<PyResult<_>>()?)
        }
    })
}

/// The Python object of a value.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    make(py, value, false)
}

/// `key`: the object must be one that a dict can have as a key.
fn make<'py>(py: Python<'py>, value: &Value, key: bool) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::Nil => Ok(py.None().into_bound(py)),
        Value::Bool(value) => value.into_bound_py_any(py),
        Value::Int(value) => value.into_bound_py_any(py),
        Value::Uint(value) => value.into_bound_py_any(py),
        Value::Float(value) => value.into_bound_py_any(py),
        Value::Str(text) => Ok(PyString::new(py, text).into_any()),
        Value::Bin(bytes) => Ok(PyBytes::new(py, bytes).into_any()),
        Value::Time(time) => time.into_bound_py_any(py),
        Value::List(items) => {
            let items = items.iter().map(|item| make(py, item, key));
            sequence(py, items.collect::<PyResult<_>>()?, key)
        }
        Value::Map(pairs) => {
            let pairs = pairs
                .iter()
                .map(|(name, value)| Ok((make(py, name, true)?, make(py, value, key)?)));
            mapping(py, pairs.collect::<PyResult<_>>()?, key)
        }
    }
}

fn sequence<'py>(
    py: Python<'py>,
    items: Vec<Bound<'py, PyAny>>,
    key: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if key {
        return Ok(PyTuple::new(py, items)?.into_any());
    }
    Ok(PyList::new(py, items)?.into_any())
}

fn mapping<'py>(
    py: Python<'py>,
    pairs: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    key: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if key {
        return Ok(PyTuple::new(py, pairs)?.into_any());
    }
    let dict = PyDict::new(py);
    for (name, value) in pairs {
        dict.set_item(name, value)?;
    }
    Ok(dict.into_any())
}

/// The Python object of a message's data, which is sound MessagePack.
pub(crate) fn decode<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    Names::default().decode(py, data)
}

/// Names of events and of fields that messages of one batch have in common, as objects that are made once.
#[derive(Default)]
pub(crate) struct Names<'py>(Vec<(String, Bound<'py, PyString>)>);

impl<'py> Names<'py> {
    /// How many names are kept, and how long they are at most, in bytes.
    const MOST: usize = 16;
    const LONGEST: usize = 32;

    /// As [`decode`].
    pub(crate) fn decode(&mut self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyAny>> {
        let mut reader = Reader {
            rest: data,
            names: self,
        };
        reader.object(py, false, 0)
    }

    /// The object of a name.
    pub(crate) fn object(&mut self, py: Python<'py>, name: &str) -> Bound<'py, PyString> {
        if let Some((_, object)) = self.0.iter().find(|(known, _)| known == name) {
            return object.clone();
        }
        let object = PyString::new(py, name);
        if self.0.len() < Self::MOST && name.len() <= Self::LONGEST {
            self.0.push((name.to_owned(), object.clone()));
        }
        object
    }
}

struct Reader<'a, 'n, 'py> {
    rest: &'a [u8],
    names: &'n mut Names<'py>,
}

fn broken() -> PyErr {
    PyTypeError::new_err("the data is no sound MessagePack")
}

impl<'a, 'py> Reader<'a, '_, 'py> {
    fn take(&mut self, len: usize) -> PyResult<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(broken)?;
        self.rest = rest;
        Ok(head)
    }

    fn bytes<const N: usize>(&mut self) -> PyResult<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| broken())
    }

    fn len(&mut self, width: usize) -> PyResult<usize> {
        let mut len = 0;
        for byte in self.take(width)? {
            len = len << 8 | usize::from(*byte);
        }
        Ok(len)
    }

    fn object(&mut self, py: Python<'py>, key: bool, depth: usize) -> PyResult<Bound<'py, PyAny>> {
        let [head] = self.bytes()?;
        match head {
            0x00..=0x7f => head.into_bound_py_any(py),
            0xe0..=0xff => i8::from_be_bytes([head]).into_bound_py_any(py),
            0xa0..=0xbf => self.text(py, usize::from(head & 0x1f)),
            0x80..=0x8f => self.map(py, usize::from(head & 0x0f), key, depth),
            0x90..=0x9f => self.array(py, usize::from(head & 0x0f), key, depth),
            0xc0 => Ok(py.None().into_bound(py)),
            0xc2 | 0xc3 => (head == 0xc3).into_bound_py_any(py),
            0xc4..=0xc6 => {
                let len = self.len(1 << (head - 0xc4))?;
                Ok(PyBytes::new(py, self.take(len)?).into_any())
            }
            0xca => f32::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xcb => f64::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xcc => u8::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xcd => u16::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xce => u32::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xcf => u64::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xd0 => i8::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xd1 => i16::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xd2 => i32::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xd3 => i64::from_be_bytes(self.bytes()?).into_bound_py_any(py),
            0xd9..=0xdb => {
                let len = self.len(1 << (head - 0xd9))?;
                self.text(py, len)
            }
            0xdc | 0xdd => {
                let len = self.len(2 << (head - 0xdc))?;
                self.array(py, len, key, depth)
            }
            0xde | 0xdf => {
                let len = self.len(2 << (head - 0xde))?;
                self.map(py, len, key, depth)
            }
            0xc7..=0xc9 => {
                let len = self.len(1 << (head - 0xc7))?;
                self.extension(py, len)
            }
            0xd4..=0xd8 => self.extension(py, 1 << (head - 0xd4)),
            0xc1 => Err(broken()),
        }
    }

    fn str(&mut self, len: usize) -> PyResult<&'a str> {
        std::str::from_utf8(self.take(len)?).map_err(|_| broken())
    }

    /// A key of a map.
    fn name(&mut self, py: Python<'py>, depth: usize) -> PyResult<Bound<'py, PyAny>> {
        match self.rest.first() {
            Some(head @ 0xa0..=0xbf) => {
                self.take(1)?;
                let name = self.str(usize::from(head & 0x1f))?;
                Ok(self.names.object(py, name).into_any())
            }
            _ => self.object(py, true, depth),
        }
    }

    fn text(&mut self, py: Python<'py>, len: usize) -> PyResult<Bound<'py, PyAny>> {
        Ok(PyString::new(py, self.str(len)?).into_any())
    }

    fn extension(&mut self, py: Python<'py>, len: usize) -> PyResult<Bound<'py, PyAny>> {
        let [kind] = self.bytes()?;
        let content = self.take(len)?;
        if i8::from_be_bytes([kind]) != TIMESTAMP {
            return Err(broken());
        }
        Timestamp::of(content)
            .ok_or_else(broken)?
            .into_bound_py_any(py)
    }

    fn array(
        &mut self,
        py: Python<'py>,
        len: usize,
        key: bool,
        depth: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let deeper = deeper(depth)?;
        // Each value takes a byte at least, so memory follows what is there.
        let mut items = Vec::with_capacity(len.min(self.rest.len()));
        for _ in 0..len {
            items.push(self.object(py, key, deeper)?);
        }
        sequence(py, items, key)
    }

    fn map(
        &mut self,
        py: Python<'py>,
        len: usize,
        key: bool,
        depth: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let deeper = deeper(depth)?;
        if key {
            let mut pairs = Vec::with_capacity(len.min(self.rest.len()));
            for _ in 0..len {
                pairs.push((
                    self.object(py, true, deeper)?,
                    self.object(py, true, deeper)?,
                ));
            }
            return mapping(py, pairs, true);
        }
        let dict = PyDict::new(py);
        for _ in 0..len {
            let name = self.name(py, deeper)?;
            dict.set_item(name, self.object(py, false, deeper)?)?;
        }
        Ok(dict.into_any())
    }
}

fn deeper(depth: usize) -> PyResult<usize> {
    if depth >= MAX_DEPTH {
        return Err(broken());
    }
    Ok(depth + 1)
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => to.serialize_unit(),
            Self::Bool(value) => to.serialize_bool(*value),
            Self::Int(value) => to.serialize_i64(*value),
            Self::Uint(value) => to.serialize_u64(*value),
            Self::Float(value) => to.serialize_f64(*value),
            Self::Str(text) => to.serialize_str(text),
            Self::Bin(bytes) => to.serialize_bytes(bytes),
            Self::Time(time) => {
                let content = time.content();
                to.serialize_newtype_struct(EXT, &(TIMESTAMP, serde_bytes::Bytes::new(&content)))
            }
            Self::List(items) => {
                let mut seq = to.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(item)?;
                }
                seq.end()
            }
            Self::Map(pairs) => {
                let mut map = to.serialize_map(Some(pairs.len()))?;
                for (key, value) in pairs {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Nil)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Nil)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Uint(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Str(text.to_owned()))
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Value, E> {
        Ok(Value::Bin(bytes.to_vec()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Value::Map(pairs))
    }

    /// An extension type.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        let (kind, content) = <(i8, serde_bytes::ByteBuf)>::deserialize(from)?;
        let time = (kind == TIMESTAMP)
            .then(|| Timestamp::of(&content))
            .flatten();
        let time = time.ok_or_else(|| serde::de::Error::custom("an unknown extension type"))?;
        Ok(Value::Time(time))
    }
}
