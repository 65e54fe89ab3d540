//! The routing core, as an engine sees it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::{
    BackendId, BindingKey, Class, ClassId, CloseCause, Endpoint, FlowId, Keyer, Outcome,
    PeerReport, Pin, PoolId, Query, Rate, SessionKey, Ticket, Token, TokenKeys, Transport, Verdict,
};

/// What a stream link to a backend tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link<'a> {
    /// It is there, and whether it can be used is being found out.
    Introducing,
    /// It can take requests. For protocols that introduce themselves: only after that.
    Up {
        /// What the backend calls itself (Diameter: its Origin-Host); empty if nothing.
        identity: &'a [u8],
        /// What it can do (Diameter: its application identifiers); empty means anything.
        capabilities: &'a [u32],
    },
    /// It takes nothing new for now (Diameter: watchdog unanswered, or a DPR was received).
    Suspect,
    /// It is down.
    Down(CloseCause),
}

/// What an engine may know of a backend.
#[derive(Clone, Copy, Debug)]
pub struct BackendView<'a> {
    /// The instance id.
    pub name: &'a str,
    /// Its pool.
    pub pool: PoolId,
    /// Its stable name.
    pub pin: Pin,
    /// How it is reached.
    pub transport: Transport,
    /// Where it is reached.
    pub address: SocketAddr,
    /// What it must call itself, when the configuration says so (`origin_host`).
    pub identity: Option<&'a str>,
    /// Requests under way at it, over all workers.
    pub in_flight: u32,
    /// Whether its link takes requests now, or one of its links does.
    pub is_linked: bool,
    /// How many links its pool wants to it.
    pub connections: u8,
    /// Whether a link to it is wanted at all: it is in its pool, and its drain is not over.
    pub is_wanted: bool,
    /// Where its links stand.
    pub lanes: Lanes,
    /// When it last answered a request, on any link.
    pub answered: Option<Instant>,
}

/// Where the links to one backend stand: a bit for each lane ([`Endpoint::link`],
/// [`crate::LANE_ACCEPTED`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    /// They take requests.
    pub up: u32,
    /// They are dead: what they were sent and have not answered is lost.
    pub down: u32,
    /// It is being found out whether they can be used.
    pub introducing: u32,
    /// They were given up ([`Router::give_up`]), and have not proven themselves since.
    pub given_up: u32,
}

impl Lanes {
    /// The bit of a lane.
    #[must_use]
    pub const fn bit(lane: u8) -> u32 {
        1 << (lane & 31)
    }
}

/// How a pool fares, over about the last second: what neighbours that understand it (RFC 7339,
/// RFC 7683) are told of its load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolLoad {
    /// Requests refused for want of slots or time, in thousandths of all that came for the pool.
    /// 0 as long as none is refused.
    pub refused_permille: u32,
    /// Requests in a second that were let in and not refused afterwards.
    pub admitted_per_second: u32,
}

/// The core. One per worker; what is shared lies behind it, without a lock per message.
pub trait Router {
    /// Decides where a message goes.
    fn route(&mut self, now: Instant, query: &Query<'_>) -> Verdict;

    /// Withdraws a waiting request; nothing more is heard of the ticket.
    fn withdraw(&mut self, now: Instant, ticket: Ticket);

    /// Ends what [`Verdict::Go`] began. Feeds health, latency and limits.
    fn outcome(&mut self, now: Instant, backend: BackendId, outcome: Outcome);

    /// Takes a place in flight at a backend for a request that another process had sent there before
    /// this one took over; [`Router::outcome`] ends it.
    fn resume(&mut self, now: Instant, backend: BackendId) {
        let _unused = (now, backend);
    }

    /// Tells of a backend's stream link. Backends of protocols with [`crate::Links::Single`] take
    /// no message before their link is up, or one of their links. `lane` says which link it is: 0
    /// where there is one only.
    fn link(&mut self, now: Instant, backend: BackendId, lane: u8, link: Link<'_>);

    /// Notes of links to a backend, a bit for each lane, that they were given up (RFC 3539 3.4: by the
    /// watchdog), or with `false` that the backend has proven itself since. Told by [`Lanes`] to all
    /// workers; it outlives the connections.
    fn give_up(&mut self, backend: BackendId, lanes: u32, given_up: bool);

    /// Notes a number that grows when the backend starts anew (Diameter: its Origin-State-Id), as it
    /// told it on any of its links; whether it grew. `fresh`: it was told by a new link, and one that
    /// is smaller counts from now on.
    fn note_start(&mut self, backend: BackendId, number: u32, fresh: bool) -> bool;

    /// Notes that a session lives on a backend; a session that was noted already is refreshed.
    /// Counted in the backend's sessions until forgotten or `ttl` after the last refresh.
    fn learn(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    );

    /// As [`Router::learn`], for a session that takes one of the backend's slots until it ends (a
    /// call): a backend with a capacity takes new sessions only while its requests in flight and its
    /// held sessions are fewer. A session that was learned before becomes a held one.
    fn hold(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    );

    /// As [`Router::learn`], for what is remembered only so that the next flow of the same source finds
    /// the same backend: it holds no drain up, and counts as no session.
    fn remember(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) {
        self.learn(now, session, backend, class, ttl);
    }

    /// Whether what lives on the backend may stay there: it is neither gone nor ill.
    fn keeps(&self, now: Instant, backend: BackendId) -> bool;

    /// Ends a session, held or not. Unknown ones are ignored.
    fn forget(&mut self, now: Instant, session: SessionKey);

    /// Where the table says that a session lives, if it says so.
    fn lookup(&mut self, now: Instant, session: SessionKey) -> Option<BackendId>;

    /// The class that the table has of a session: that of the request that it was noted with last.
    fn session_class(&mut self, now: Instant, session: SessionKey) -> Option<ClassId>;

    /// Makes keys for sessions and names.
    fn keyer(&self) -> &Keyer;

    /// Signs an instance's pin and four bits of the caller's for the place that `binding` names.
    fn seal(&self, pin: Pin, mark: u8, binding: u64) -> Token;

    /// The keys that sign tokens, and cloak what one side shall not see.
    fn token_keys(&self) -> &TokenKeys;

    /// Reads a token back.
    fn unseal(&self, text: &[u8], binding: u64) -> Option<(Pin, u8)>;

    /// The backend that a pin names now, in whatever state it is; `None` if it is gone.
    fn resolve(&self, pin: Pin) -> Option<BackendId>;

    /// What is known of a backend; `None` if it is gone.
    fn backend(&self, backend: BackendId) -> Option<BackendView<'_>>;

    /// The backend of the pool that calls itself so (any letter case), configured or learned.
    fn named(&self, pool: PoolId, identity: &[u8]) -> Option<BackendId>;

    /// The backend at an address, if any: tells a backend's own requests from clients'.
    fn backend_at(&self, address: SocketAddr) -> Option<BackendId>;

    /// Whether some backend has this IP address, with whatever port: an instance's connections come from
    /// ports of the kernel's choice.
    fn is_backend_ip(&self, ip: IpAddr) -> bool;

    /// Calls back with each capability that some backend of the pool has told, each once.
    fn capabilities(&self, pool: PoolId, each: &mut dyn FnMut(u32));

    /// What the class promises. An unknown one answers as [`ClassId::BULK`].
    fn class(&self, class: ClassId) -> &Class;

    /// How long sessions of the pool are remembered without traffic.
    fn session_ttl(&self, pool: PoolId) -> Duration;

    /// The pool's `session.key`, one of [`crate::Protocol::SESSION_KEYS`] or empty for the default.
    fn session_key_name(&self, pool: PoolId) -> &str;

    /// Among which pools a client's address names one session: a number that is the same for all of
    /// them.
    fn session_scope(&self, pool: PoolId) -> u64 {
        u64::from(pool.0)
    }

    /// Lets every worker find a client's flow by a name (a Diameter identity, a registered contact).
    /// A later one of the same name replaces it. Bounded; the bound's hit is counted.
    fn name_flow(&mut self, name: SessionKey, flow: FlowId);

    /// The flow of that name.
    fn named_flow(&self, name: SessionKey) -> Option<FlowId>;

    /// Takes the name back, if the flow still has it.
    fn unname_flow(&mut self, name: SessionKey, flow: FlowId);

    /// The pool's `bind_keys` in the configured order, as places in [`crate::Protocol::BIND_KEYS`].
    fn bind_keys(&self, pool: PoolId) -> &[u8];

    /// The backend that has the subscriber of this name, if one has.
    fn bound(&mut self, now: Instant, name: BindingKey) -> Option<BackendId>;

    /// Notes that `session` lives on `backend` and is its subscriber's, by all of `names` (at most
    /// [`crate::BINDING_KEYS_MAX`]). The backend that has the subscriber: another one when a session
    /// of the same subscriber was faster, which then nothing was noted of this one. With `force` the
    /// names move to `backend` whatever they said before.
    fn bind(
        &mut self,
        now: Instant,
        session: SessionKey,
        names: &[BindingKey],
        backend: BackendId,
        ttl: Duration,
        force: bool,
    ) -> BackendId;

    /// The session goes on: its names are kept for another `ttl`.
    fn keep_bound(&mut self, now: Instant, session: SessionKey, ttl: Duration);

    /// The session ended; names that no other session holds are forgotten. Whether it had any.
    fn unbind(&mut self, now: Instant, session: SessionKey) -> bool;

    /// Forgets one name: whoever it led to does not know the subscriber.
    fn forget_bound(&mut self, now: Instant, name: BindingKey);

    /// The backend lost all its sessions (it restarted under the same address and identity): from
    /// now on they are [`crate::Refusal::SessionLost`].
    fn restarted(&mut self, now: Instant, backend: BackendId);

    /// Scales the backend's share of new sessions to `permille` thousandths for so long: it told of
    /// load or overload.
    fn favour(&mut self, now: Instant, backend: BackendId, permille: u32, lasting: Duration);

    /// Takes a place in the backend's bucket number `bucket` (0 or 1), which all workers share;
    /// whether there was one.
    fn pace(&mut self, now: Instant, backend: BackendId, bucket: usize, rate: Rate) -> bool;

    /// How the pool fares; as if idle if there is no such pool. Cheap: a few loads of atomics.
    fn pool_load(&self, pool: PoolId) -> PoolLoad;

    /// How many backends of the pool have a link that takes requests.
    fn linked(&self, pool: PoolId) -> usize;

    /// How many connections of that identity were reported, over all workers.
    fn peers_named(&self, listener: &str, identity: &str) -> usize;

    /// Tells operators of a peer; `None`: it is gone.
    fn report_peer(&mut self, listener: &str, peer: Endpoint, report: Option<PeerReport>);

    /// Whether the node is leaving: no new sessions.
    fn is_draining(&self) -> bool;
}
