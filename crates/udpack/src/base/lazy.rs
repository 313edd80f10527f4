//! A boxed value that is created on first use. It saves memory: most sockets use few of their optional parts.

/// A boxed value that is created on first use.
#[derive(Debug)]
pub(crate) struct Lazy<T>(Option<Box<T>>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Lazy<T> {
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_deref()
    }

    pub(crate) fn get_mut(&mut self) -> Option<&mut T> {
        self.0.as_deref_mut()
    }

    /// Takes the value out; creates it if it was never used.
    pub(crate) fn take(&mut self) -> T
    where
        T: Default,
    {
        self.0.take().map_or_else(T::default, |value| *value)
    }
}

impl<T: Default> Lazy<T> {
    pub(crate) fn get_or_make(&mut self) -> &mut T {
        self.0.get_or_insert_default()
    }
}
