//! Pool names and their numbers.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use strowger_contract::PoolId;

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

    /// The name of a number.
    pub fn name(&self, id: PoolId) -> Option<Arc<str>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).names.get(id.0 as usize).cloned()
    }
}
