//! Pool names and their numbers, and those of classes.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use strowger_contract::{Class, ClassId, PoolId};

/// Gives each pool name a number that stays, whatever is loaded later. Names are never forgotten:
/// there are as many as an operator has ever written down, and a configuration is bounded.
#[derive(Debug, Default)]
pub struct PoolNames {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    ids: HashMap<Arc<str>, PoolId>,
    names: Vec<Arc<str>>,
    /// Of classes that are not built in, by their numbers; empty where there is none.
    classes: Vec<Arc<str>>,
}

impl PoolNames {
    /// The number of a name, new or known.
    pub fn id(&self, name: &str) -> PoolId {
        let known =
            self.inner.read().unwrap_or_else(PoisonError::into_inner).ids.get(name).copied();
        known.unwrap_or_else(|| {
            let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(&id) = inner.ids.get(name) {
                return id;
            }
            let (name, id) = (Arc::<str>::from(name), PoolId(inner.names.len() as u32));
            inner.names.push(Arc::clone(&name));
            inner.ids.insert(name, id);
            id
        })
    }

    /// All names, by their numbers.
    pub(super) fn all(&self) -> Vec<String> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.names.iter().map(|name| name.to_string()).collect()
    }

    /// The number that a class had in an earlier configuration, or else one that none of `used` has: better one that
    /// no class ever had than that of one that is no more, which sessions may still bear. `None`: there are
    /// `most` already.
    pub fn class(&self, name: &str, used: &[Class], most: usize) -> Option<ClassId> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let built_in = Class::built_in().len();
        let is_free = |number: &usize| used.get(*number).is_none_or(Class::is_vacant);
        let known =
            |number: usize| inner.classes.get(number - built_in).filter(|it| !it.is_empty());
        let numbers = || (built_in..most).filter(is_free);
        let same = numbers().find(|number| known(*number).is_some_and(|known| **known == *name));
        let new = || numbers().find(|number| known(*number).is_none());
        let number = same.or_else(new).or_else(|| numbers().next())?;
        u8::try_from(number).ok().map(ClassId)
    }

    /// Whether a class of that name has a number.
    pub fn has_class(&self, name: &str) -> bool {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.classes.iter().any(|known| **known == *name)
    }

    /// Remembers the numbers of classes that are in force from now on.
    pub(super) fn keep_classes(&self, classes: &[Class]) {
        let names = classes.iter().skip(Class::built_in().len()).map(|class| &*class.name);
        self.plant_classes(names);
    }

    /// Takes over names by their numbers; where there is none, the one known before stays.
    pub(super) fn plant_classes<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        for (number, name) in names.enumerate() {
            if inner.classes.len() <= number {
                inner.classes.push("".into());
            }
            if !name.is_empty() && *inner.classes[number] != *name {
                inner.classes[number] = name.into();
            }
        }
    }

    /// All classes there are and were: those that are no more bear their names on, and are treated as bulk.
    pub(super) fn with_former(&self, wanted: &[Class]) -> Vec<Class> {
        let mut classes = if wanted.is_empty() { Class::built_in() } else { wanted.to_vec() };
        let first = Class::built_in().len();
        for (number, name) in self.classes().into_iter().enumerate() {
            if classes.len() <= first + number {
                classes.push(Class::vacant());
            }
            let class = &mut classes[first + number];
            if class.is_vacant() {
                class.name = name.as_str().into();
            }
        }
        classes
    }

    /// The names of classes that are not built in, by their numbers.
    pub(super) fn classes(&self) -> Vec<String> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.classes.iter().map(|name| name.to_string()).collect()
    }

    /// The name of a number.
    pub fn name(&self, id: PoolId) -> Option<Arc<str>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).names.get(id.0 as usize).cloned()
    }
}
