//! The one list of protocols. A new one is added here, or by [`Protocols::with`], and nowhere else.

use strowger_contract::Protocol;

use crate::control::config::{Configure, configurer};
use crate::runtime::{Launch, launcher};

/// The protocols that an edge speaks.
#[derive(Default)]
pub struct Protocols {
    configurers: Vec<Box<dyn Configure>>,
    launchers: Vec<Box<dyn Launch>>,
}

impl Protocols {
    /// SIP, Diameter, raw TCP, raw UDP.
    #[must_use]
    pub fn standard() -> Self {
        Self::default()
            .with::<strowger_sip::Sip>()
            .with::<strowger_diameter::Diameter>()
            .with::<strowger_tcp::Tcp>()
            .with::<strowger_udp::Udp>()
    }

    /// One more.
    #[must_use]
    pub fn with<P: Protocol>(mut self) -> Self {
        self.configurers.push(configurer::<P>());
        self.launchers.push(launcher::<P>());
        self
    }

    /// What the control side needs of them.
    #[must_use]
    pub fn configurers(&self) -> Vec<&dyn Configure> {
        self.configurers.iter().map(AsRef::as_ref).collect()
    }

    /// What the runtime needs of them, once.
    pub fn take_launchers(&mut self) -> Vec<Box<dyn Launch>> {
        std::mem::take(&mut self.launchers)
    }
}
