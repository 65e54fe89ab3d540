//! Leases go to another process as the state file has them.

use std::sync::atomic::Ordering;

use super::{Registry, file};

impl Registry {
    /// All leases.
    #[must_use]
    pub fn saved(&self) -> Vec<u8> {
        // It is what the state file holds, and that can be written.
        serde_json::to_vec(&self.state()).unwrap_or_default()
    }

    /// Takes another process's leases in; each gets a fresh term.
    ///
    /// # Errors
    /// It is something else.
    pub fn take_over(&self, saved: &[u8]) -> Result<(), String> {
        let state: file::State =
            serde_json::from_slice(saved).map_err(|error| format!("leases: {error}"))?;
        self.epoch.store(state.epoch, Ordering::Relaxed);
        let now = self.now();
        self.inner().model.restore(now, state.instances);
        Ok(())
    }
}
