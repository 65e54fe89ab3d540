//! One running edge: the control side's tasks, and the workers they direct.
//!
//! The control side (configuration, probes, admin HTTP, ticks of the core) runs on the caller's
//! thread and never on a worker's; the two meet in the core's snapshot.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use strowger_contract::{Keyer, TokenKeys};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::control::admin::{self, AdminBackend, Check, PutError};
use crate::control::config::{self, ConfigErrors, Loaded};
use crate::control::{probes, watch};
use crate::observe::{Event, Events, Metrics};
use crate::protocols::Protocols;
use crate::routing::{Core, CoreSettings, SnapshotSpec};
use crate::runtime::{Fleet, ListenerView, Prepared};

/// How often the core's own time goes on: expiries, drains' ends, ejections' ends.
const TICK: Duration = Duration::from_millis(100);
