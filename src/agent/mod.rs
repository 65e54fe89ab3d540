//! The agent: deploys applications on one host and registers their instances with every edge.
//!
//! Its one distinctive job is a life cycle that is safe for sessions: it stops no process before the
//! edges report that it has none (or the deadline is over), and it takes a release back when they report
//! missed deadlines. Everything else is ordinary on purpose.
//!
//! | module | what it does |
//! |---|---|
//! | `manifest`, `read`, `verify`, `expand` | what is to run: read, checked, filled in |
//! | `plan` | pure: what a manifest changes |
//! | `supervisor` | pure: the life of instances, rollouts, autoscaling |
//! | `ports`, `placement` | pure: ports and their quarantine; CPUs |
//! | `daemon`, `orders` | the loop that owns all state; what it does when asked |
//! | `watcher`, `keeper`, `launch`, `limits`, `pass` | processes: started, kept, limited, found again |
//! | `logs` | output: ring, files, syslog |
//! | `checks` | exec, tcp, http, sip-options, diameter |
//! | `edges`, `registration`, `http` | registers, renews, drains at every edge |
//! | `release`, `store` | immutable directories; what is kept |
//! | `api`, `commands` | the unix socket and the command line |

mod api;
mod checks;
mod commands;
mod daemon;
mod edges;
mod expand;
mod http;
mod keeper;
mod launch;
mod limits;
mod logs;
mod manifest;
mod orders;
mod pass;
mod placement;
mod plan;
mod ports;
mod read;
mod registration;
mod release;
mod store;
mod supervisor;
mod verify;
mod watcher;

pub use api::RolloutOrder;
pub use commands::{AgentCommand, Reach, deploy, kill_instances, run};
pub use daemon::{Options, run as serve};
pub use manifest::{
    App, Autoscale, Check, Drain, EdgeAddress, Gate, Health, HttpCheck, Logs, Manifest,
    OnSecretChange, Placement, Port, PortTransport, Register, ReleaseSource, Resources, Restart,
    RolloutPlan, Scalar, Service, Strategy,
};
pub use read::{read, schema};
