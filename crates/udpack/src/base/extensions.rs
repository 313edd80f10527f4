//! Typed values that the application attaches to a socket or a peer: one value of each type.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::base::Lazy;

type Values = HashMap<TypeId, Box<dyn Any + Send + Sync>>;

/// A map with at most one value of each type.
///
/// Values are handed out as clones; put something shared behind an `Arc`.
#[derive(Default)]
pub struct Extensions {
    values: Mutex<Lazy<Values>>,
}

impl Extensions {
    /// Stores `value` and returns the one of the same type that it replaces.
    pub fn insert<T: Send + Sync + 'static>(&self, value: T) -> Option<T> {
        let old = self
            .lock()
            .get_or_make()
            .insert(TypeId::of::<T>(), Box::new(value))?;
        old.downcast().ok().map(|old| *old)
    }

    /// A clone of the value of this type.
    pub fn get<T: Clone + Send + Sync + 'static>(&self) -> Option<T> {
        self.lock()
            .get()?
            .get(&TypeId::of::<T>())?
            .downcast_ref::<T>()
            .cloned()
    }

    /// The value of this type, or `make()` stored first.
    pub fn get_or_insert_with<T: Clone + Send + Sync + 'static>(
        &self,
        make: impl FnOnce() -> T,
    ) -> T {
        let mut values = self.lock();
        let values = values.get_or_make();
        if let Some(value) = values
            .get(&TypeId::of::<T>())
            .and_then(|value| value.downcast_ref::<T>())
        {
            return value.clone();
        }
        let value = make();
        values.insert(TypeId::of::<T>(), Box::new(value.clone()));
        value
    }

    /// Takes the value of this type out.
    pub fn remove<T: Send + Sync + 'static>(&self) -> Option<T> {
        self.lock()
            .get_mut()?
            .remove(&TypeId::of::<T>())?
            .downcast()
            .ok()
            .map(|value| *value)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Lazy<Values>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Extensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extensions")
            .field("values", &self.lock().get().map_or(0, HashMap::len))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_one_value_of_each_type() {
        let extensions = Extensions::default();
        assert_eq!(extensions.insert(7_u32), None);
        assert_eq!(extensions.insert("name".to_owned()), None);
        assert_eq!(extensions.insert(8_u32), Some(7));
        assert_eq!(extensions.get::<u32>(), Some(8));
        assert_eq!(extensions.get_or_insert_with(|| 9_u64), 9);
        assert_eq!(extensions.remove::<String>().as_deref(), Some("name"));
        assert_eq!(extensions.get::<String>(), None);
    }
}
