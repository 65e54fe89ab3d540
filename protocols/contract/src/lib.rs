//! The contract between the codecs, the routing core and the runtime.
//!
//! Nothing here opens a socket, reads a clock or draws a random number: time and seeds are
//! arguments. A codec ([`Protocol`], [`Engine`], [`Framer`]) inspects bytes and asks a [`Router`]
//! where a message goes; the runtime feeds the engine and flushes its [`Outbox`]. The router never
//! sees a protocol's words, the codec never sees a socket, the runtime never sees a header.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ids`] | numbers that name workers, flows, pools, backends, classes |
//! | [`message`] | where a message came from, where one goes, what happens to a peer |
//! | [`framing`] | cutting a byte stream into messages |
//! | [`call`] | what becomes of calls: records and outcomes |
//! | [`class`] | QoS classes: tier, deadline, shares |
//! | [`binding`] | subscriber bindings, rates, reports of peers |
//! | [`session`] | session keys: one stable hash to place by, one keyed hash to look up by |
//! | [`token`] | the signed text that carries an instance through a protocol field |
//! | [`cloak`] | text that one side of the edge carries and cannot read |
//! | [`query`] | what the core is asked and what it answers |
//! | [`resolve`] | names of next hops: questions and answers |
//! | [`router`] | the core, as an engine sees it |
//! | [`outbox`] | what an engine wants done |
//! | [`engine`] | the per-worker state machine of a protocol |
//! | [`facts`] | what is known of a peer before its first message |
//! | [`network`] | networks as configurations write them |
//! | [`unix`] | unix sockets among socket addresses |
//! | [`protocol`] | the pluggable unit: options, factory, probes |
//! | [`duration`] | durations as configurations write them |
//! | [`trace`] | which messages belong to a trace |
//! | [`wheel`] | timers without a clock |
#![forbid(unsafe_code)]

pub mod binding;
pub mod call;
pub mod class;
pub mod cloak;
pub mod duration;
pub mod engine;
pub mod facts;
pub mod framing;
pub mod handover;
pub mod ids;
pub mod message;
pub mod network;
pub mod numbers;
pub mod outbox;
pub mod protocol;
pub mod query;
pub mod resolve;
pub mod router;
pub mod session;
pub mod token;
pub mod trace;
pub mod unix;
pub mod wheel;

pub use binding::{BINDING_KEYS_MAX, BindingKey, PeerReport, Rate};
pub use call::{AttemptOutcome, CallEnd, CallPhase, CallRecord, CallSide};
pub use class::{Class, OnMiss};
pub use engine::Engine;
pub use facts::{Certificate, Credentials, Intake, Opened, Peek, PeerFacts, Proxied};
pub use framing::{DatagramFramer, FrameError, Framer, Framing};
pub use ids::{BackendId, ClassId, FlowId, Pin, PoolId, Ticket, WorkerId};
pub use message::{CloseCause, Endpoint, LANE_ACCEPTED, LANES_MAX, Message, PeerChange, Transport};
pub use numbers::NumberMap;
pub use outbox::{Closing, Command, Frame, Level, Note, Outbox, RequestOutcome};
pub use protocol::{
    ClassRule, Context, Links, LocalSocket, OptionsError, Probe, ProbeReply, Protocol, Scope,
};
pub use query::{Attempt, Fault, Outcome, Query, Refusal, Route, RouteReason, Verdict};
pub use resolve::{
    HOST_NAME_MAX, Lookup, LookupId, NameScheme, PLACES_MAX, Place, Transports, Unresolved,
};
pub use router::{BackendView, Lanes, Link, PoolLoad, Router};
pub use session::{Keyer, SessionKey, stable_hash};
pub use token::{Token, TokenKeys};
pub use trace::Tracer;
pub use wheel::Wheel;
