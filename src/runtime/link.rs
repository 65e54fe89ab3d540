//! Stream links to backends: opened on demand by each worker, or kept by one worker for all.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, CloseCause, Endpoint, Link, Links, Opened, PeerChange, PeerFacts, Protocol, Router,
    Transport,
};
use tokio::net::{TcpStream, UnixStream};

use super::host::{Dial, Host};
use super::intake::connect_tls;
use super::shared::NodeEvent;
use super::socket::Stream;
use super::stream::{Connection, serve};

/// The first pause after a link failed; each further failure doubles it.
const BACK_OFF_FIRST: Duration = Duration::from_millis(100);

/// The longest pause. A backend that returns waits so long at most.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// How often kept links are compared with the snapshot.
const RECONCILE_EVERY: Duration = Duration::from_millis(200);

/// How long a retired link has for its goodbyes.
const RETIRED_GRACE: Duration = Duration::from_secs(5);

/// A link: to which backend, and which of those to it (`Endpoint::link`).
pub(crate) type LinkId = (BackendId, u8);

/// The links of one worker.
#[derive(Default)]
pub(crate) struct LinkTable {
    links: HashMap<LinkId, LinkState>,
}

enum LinkState {
    /// Being opened; what waits for it.
    Connecting(Vec<u8>),
    Open(Rc<Connection>),
    /// Failed lately; `failures` in a row.
    Paused {
        until: Instant,
        failures: u32,
        cause: CloseCause,
    },
}

/// What becomes of bytes for a backend.
pub(crate) enum Offer {
    /// Push them there.
    Open(Rc<Connection>),
    /// They wait for the link.
    Waits,
    /// They wait, and the link must now be opened.
    Dial,
    /// They cannot go.
    Down(CloseCause),
}

impl LinkTable {
    /// Bytes for a backend.
    pub(crate) fn offer(
        &mut self,
        link: LinkId,
        bytes: &[u8],
        limit: usize,
        links: Links,
        now: Instant,
    ) -> Offer {
        match self.links.entry(link) {
            Entry::Occupied(mut entry) => match entry.get_mut() {
                LinkState::Open(connection) if connection.is_closing() => {
                    Offer::Down(CloseCause::Local)
                }
                LinkState::Open(connection) => Offer::Open(Rc::clone(connection)),
                LinkState::Connecting(waiting) if waiting.len() + bytes.len() <= limit => {
                    waiting.extend_from_slice(bytes);
                    Offer::Waits
                }
                LinkState::Connecting(_) => Offer::Down(CloseCause::Overflow),
                LinkState::Paused { until, cause, .. }
                    if links == Links::Single || now < *until =>
                {
                    Offer::Down(*cause)
                }
                LinkState::Paused { .. } => {
                    entry.insert(LinkState::Connecting(bytes.to_vec()));
                    Offer::Dial
                }
            },
            Entry::Vacant(_) if links == Links::Single => Offer::Down(CloseCause::Unreachable),
            Entry::Vacant(entry) => {
                entry.insert(LinkState::Connecting(bytes.to_vec()));
                Offer::Dial
            }
        }
    }

    /// The open link to a backend.
    pub(crate) fn open(&self, link: LinkId) -> Option<Rc<Connection>> {
        match self.links.get(&link) {
            Some(LinkState::Open(connection)) => Some(Rc::clone(connection)),
            _ => None,
        }
    }

    /// All open links.
    pub(crate) fn connections(&self) -> impl Iterator<Item = &Rc<Connection>> {
        self.links.values().filter_map(|link| match link {
            LinkState::Open(connection) => Some(connection),
            _ => None,
        })
    }

    /// What waits for links that are being opened.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (LinkId, &[u8])> {
        self.links.iter().filter_map(|(link, state)| match state {
            LinkState::Connecting(waiting) if !waiting.is_empty() => {
                Some((*link, waiting.as_slice()))
            }
            _ => None,
        })
    }

    /// Bytes wait for a link that another process was opening; whether it is to be opened here.
    pub(crate) fn await_link(&mut self, link: LinkId, waiting: &[u8]) -> bool {
        let vacant = !self.links.contains_key(&link);
        if vacant {
            self.links.insert(link, LinkState::Connecting(waiting.to_vec()));
        }
        vacant
    }

    /// A link that another process had.
    pub(crate) fn inherit(&mut self, link: LinkId, connection: Rc<Connection>) {
        self.links.insert(link, LinkState::Open(connection));
    }

    /// The link is open; what waited for it.
    fn opened(&mut self, link: LinkId, connection: Rc<Connection>) -> Vec<u8> {
        match self.links.insert(link, LinkState::Open(connection)) {
            Some(LinkState::Connecting(waiting)) => waiting,
            _ => Vec::new(),
        }
    }

    /// The link is down; how long to pause. Only one that `worked` starts the pauses anew: a port
    /// that accepts and closes again must not be dialed ten times a second for ever.
    fn failed(
        &mut self,
        link: LinkId,
        worked: bool,
        cause: CloseCause,
        now: Instant,
        failures: u32,
    ) -> Duration {
        let failures = if worked { 1 } else { failures + 1 };
        let pause = (BACK_OFF_FIRST * 2u32.saturating_pow(failures.min(10) - 1)).min(BACK_OFF_MAX);
        self.links.insert(link, LinkState::Paused { until: now + pause, failures, cause });
        pause
    }

    fn failures(&self, link: LinkId) -> u32 {
        match self.links.get(&link) {
            Some(LinkState::Paused { failures, .. }) => *failures,
            _ => 0,
        }
    }

    fn forget(&mut self, link: LinkId) {
        self.links.remove(&link);
    }
}

/// Opens a connection that the engine wants, in a task of its own.
pub(crate) fn dial<P: Protocol>(host: &Rc<Host<P>>, dial: Dial) {
    let host = Rc::clone(host);
    tokio::task::spawn_local(async move {
        let _alarm = host.alarm();
        match dial {
            Dial::Link(link) => {
                let failures = host.state().links.failures(link);
                let _pause = run_link(&host, link, failures).await;
            }
            Dial::Remote(transport, address) => dial_remote(host, transport, address).await,
        }
    });
}

async fn dial_remote<P: Protocol>(host: Rc<Host<P>>, transport: Transport, address: SocketAddr) {
    if transport != Transport::Tcp {
        // Whom a stranger's TLS must be, and how a browser is reached, nobody has said.
        return host.not_dialed(transport, address, CloseCause::Unreachable);
    }
    let timeout = host.state().spec.limits.connect;
    let connected = connect(address, timeout).await;
    if host.has_left() {
        return;
    }
    let stream = match connected {
        Ok(stream) => stream,
        Err(cause) => return host.not_dialed(transport, address, cause),
    };
    let Ok(local) = stream.local_addr() else {
        return host.not_dialed(transport, address, CloseCause::Reset);
    };
    let (flow, connection) = host.adopt(Stream::Tcp(stream), address, local, transport);
    let opened = Opened { remote: address, local, transport, facts: &PeerFacts::NONE };
    host.opened(Endpoint::Client(flow), opened);
    host.dialed(&connection);
    let idle = host.state().spec.limits.idle;
    let cause = serve(&host, &connection, idle, Vec::new()).await;
    host.release(flow, &connection, cause);
}

/// Opens a link, serves it until it ends, and says how long to pause before the next try.
async fn run_link<P: Protocol>(host: &Rc<Host<P>>, link: LinkId, failures: u32) -> Duration {
    let (backend, lane) = link;
    let peer = Endpoint::link(backend, lane);
    let known = host.state().router.backend(backend).is_some();
    if !known {
        // It left the pool after the engine chose it: whoever waits for the link must hear of it.
        host.state().links.forget(link);
        host.tell(peer, PeerChange::Closed(CloseCause::Unreachable));
        return BACK_OFF_FIRST;
    }
    let timeout = host.state().spec.limits.connect;
    let dialed = open(host, backend, timeout).await;
    if host.has_left() {
        return BACK_OFF_MAX;
    }
    let Dialed { stream, address, local, transport, facts } = match dialed {
        Ok(dialed) => dialed,
        Err(cause) => return link_down(host, link, None, cause, failures),
    };
    let connection = Connection::new(stream, peer, address, local, transport);
    let waiting = host.state().links.opened(link, Rc::clone(&connection));
    host.shared.event(NodeEvent::LinkUp { backend: host.shared.backend_name(backend) });
    if P::LINKS == Links::PerWorker {
        // The transport is all there is to such a link; others introduce themselves first.
        connection.proven.set(true);
        let up = Link::Up { identity: &[], capabilities: &[] };
        host.state().router.link(Instant::now(), backend, lane, up);
    }
    host.opened(peer, Opened { remote: address, local, transport, facts: &facts });
    if !waiting.is_empty() {
        connection.push(&waiting, usize::MAX);
        host.write(&connection);
    }
    serve_link(host, link, &connection, failures).await
}

/// Serves an open link until it ends, and says how long to pause before the next try.
pub(crate) async fn serve_link<P: Protocol>(
    host: &Rc<Host<P>>,
    link: LinkId,
    connection: &Rc<Connection>,
    failures: u32,
) -> Duration {
    // A link is the edge's own: it stays open however long nothing passes.
    let cause = serve(host, connection, Duration::ZERO, Vec::new()).await;
    if host.has_left() {
        return BACK_OFF_MAX;
    }
    if connection.congested.get() {
        host.shared.core.set_congested(link.0, false);
    }
    link_down(host, link, Some(&**connection), cause, failures)
}

fn link_down<P: Protocol>(
    host: &Rc<Host<P>>,
    link: LinkId,
    connection: Option<&Connection>,
    cause: CloseCause,
    failures: u32,
) -> Duration {
    let (backend, lane) = link;
    let now = Instant::now();
    let peer = Endpoint::link(backend, lane);
    let was_open = connection.is_some();
    let worked = connection.is_some_and(|connection| connection.proven.get());
    let pause = host.state().links.failed(link, worked, cause, now, failures);
    if P::LINKS == Links::Single || cause.is_far_fault() {
        host.state().router.link(now, backend, lane, Link::Down(cause));
    }
    host.shared.event(NodeEvent::LinkDown {
        backend: host.shared.backend_name(backend),
        was_open,
        cause,
    });
    host.tell(peer, PeerChange::Closed(cause));
    if P::LINKS == Links::Single && was_open {
        host.shared.tell_others(host.worker, peer, PeerChange::Closed(cause));
    }
    pause
}

/// A connection to a backend, ready to use.
pub(crate) struct Dialed {
    pub(crate) stream: Stream,
    pub(crate) address: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) facts: PeerFacts,
}

/// Opens a stream to a backend over its own transport, all within `timeout`.
pub(crate) async fn open<P: Protocol>(
    host: &Rc<Host<P>>,
    backend: BackendId,
    timeout: Duration,
) -> Result<Dialed, CloseCause> {
    let began = Instant::now();
    let target = {
        let state = host.state();
        state.router.backend(backend).map(|view| (view.transport, view.address))
    };
    let (transport, address) = target.ok_or(CloseCause::Unreachable)?;
    if transport == Transport::Unix {
        return open_unix(address, timeout).await;
    }
    #[cfg(feature = "sctp")]
    if transport == Transport::Sctp {
        let (socket, local) = open_sctp(host, address, timeout).await?;
        let (stream, facts) = (Stream::Tcp(socket), PeerFacts::NONE);
        return Ok(Dialed { stream, address, local, transport, facts });
    }
    let socket = connect(address, timeout).await?;
    let local = socket.local_addr().map_err(|_| CloseCause::Reset)?;
    let (stream, facts) = match transport {
        Transport::Tls => {
            let rest = timeout.saturating_sub(began.elapsed());
            let (stream, facts) = connect_tls(host, socket, backend, address, rest).await?;
            (Stream::Tls(Box::new(stream)), facts)
        }
        _ => (Stream::Tcp(socket), PeerFacts::NONE),
    };
    Ok(Dialed { stream, address, local, transport, facts })
}

#[cfg(feature = "sctp")]
async fn open_sctp<P: Protocol>(
    host: &Rc<Host<P>>,
    address: SocketAddr,
    timeout: Duration,
) -> Result<(TcpStream, SocketAddr), CloseCause> {
    let socket = match tokio::time::timeout(timeout, super::sctp::connect(address)).await {
        Err(_) => return Err(CloseCause::ConnectTimeout),
        Ok(Err(error)) => {
            if super::sctp::is_missing(&error) {
                host.shared.event(NodeEvent::NoSctp { error: error.to_string() });
            }
            return Err(cause_of(&error));
        }
        Ok(Ok(socket)) => socket,
    };
    let local = socket.local_addr().map_err(|_| CloseCause::Reset)?;
    Ok((socket, local))
}

async fn open_unix(address: SocketAddr, timeout: Duration) -> Result<Dialed, CloseCause> {
    let path = strowger_contract::unix::path(address).ok_or(CloseCause::Unreachable)?;
    let stream = match tokio::time::timeout(timeout, UnixStream::connect(&*path)).await {
        Err(_) => return Err(CloseCause::ConnectTimeout),
        Ok(Err(error)) => return Err(cause_of(&error)),
        Ok(Ok(stream)) => stream,
    };
    let facts = PeerFacts { credentials: super::intake::credentials(&stream), ..PeerFacts::NONE };
    let (local, transport) = (strowger_contract::unix::client(0), Transport::Unix);
    Ok(Dialed { stream: Stream::Unix(stream), address, local, transport, facts })
}

fn cause_of(error: &std::io::Error) -> CloseCause {
    // connect(2), socket(2): what the process or the machine has no more of.
    const OURS: [i32; 5] =
        [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EADDRNOTAVAIL];
    if error.raw_os_error().is_some_and(|number| OURS.contains(&number)) {
        return CloseCause::Exhausted;
    }
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => CloseCause::Refused,
        std::io::ErrorKind::ConnectionReset => CloseCause::Reset,
        _ => CloseCause::Unreachable,
    }
}

/// Opens a stream within `timeout`.
pub(crate) async fn connect(
    address: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, CloseCause> {
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Err(_) => Err(CloseCause::ConnectTimeout),
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(cause_of(&error)),
    }
}

/// Keeps the links to every backend that the listener may need and this worker owns. Never ends.
pub(crate) async fn keep_links<P: Protocol>(host: Rc<Host<P>>, inherited: Vec<LinkId>) {
    let keep = |link| tokio::task::spawn_local(keep_link(Rc::clone(&host), link));
    let mut kept: HashMap<LinkId, tokio::task::JoinHandle<()>> =
        inherited.into_iter().map(|link| (link, keep(link))).collect();
    let mut tick = tokio::time::interval(RECONCILE_EVERY);
    loop {
        tick.tick().await;
        let wanted = wanted_links(&host);
        for &link in &wanted {
            kept.entry(link).or_insert_with(|| keep(link));
        }
        kept.retain(|link, task| {
            let keep = wanted.contains(link);
            if !keep {
                task.abort();
                retire(&host, *link);
            }
            keep
        });
    }
}

fn wanted_links<P: Protocol>(host: &Rc<Host<P>>) -> std::collections::HashSet<LinkId> {
    let mut state = host.state();
    state.router.refresh();
    let pools = state.spec.pools.clone();
    let snapshot = state.router.snapshot();
    let mine = |link: &LinkId| host.shared.owner(P::LINKS, *link, host.worker) == host.worker;
    pools.iter().flat_map(|&pool| snapshot.linkable(pool)).filter(mine).collect()
}

async fn keep_link<P: Protocol>(host: Rc<Host<P>>, link: LinkId) {
    loop {
        let failures = host.state().links.failures(link);
        // One that another process had is open already.
        let open = host.state().links.open(link);
        if open.is_none() && host.shared.core.is_served(link.0) {
            // The backend was faster: its own connection serves as the link while it is there.
            tokio::time::sleep(RECONCILE_EVERY).await;
            continue;
        }
        let held_off = host.shared.core.held_off(Instant::now(), link.0);
        if open.is_none() && !held_off.is_zero() {
            // It asked to be left alone, over this link or another, or before an upgrade.
            tokio::time::sleep(host.shared.jitter(held_off)).await;
            continue;
        }
        let task = {
            let host = Rc::clone(&host);
            // In a task of its own: the keeper may be aborted, a link's end must still be told.
            tokio::task::spawn_local(async move {
                let _alarm = host.alarm();
                match open {
                    Some(connection) => serve_link(&host, link, &connection, failures).await,
                    None => run_link(&host, link, failures).await,
                }
            })
        };
        let Ok(pause) = task.await else { return };
        if host.has_left() {
            return;
        }
        tokio::time::sleep(host.shared.jitter(pause)).await;
    }
}

/// The link is no longer wanted: the engine says goodbye, and in the end it is cut.
fn retire<P: Protocol>(host: &Rc<Host<P>>, link: LinkId) {
    let Some(connection) = host.state().links.open(link) else {
        host.state().links.forget(link);
        return;
    };
    host.tell(connection.endpoint, PeerChange::Retired);
    let host = Rc::clone(host);
    tokio::task::spawn_local(async move {
        tokio::time::sleep(RETIRED_GRACE).await;
        connection.close(strowger_contract::Closing::Flushed, CloseCause::Local);
        tokio::time::sleep(RETIRED_GRACE).await;
        host.state().links.forget(link);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_link_pauses_longer_each_time_and_then_dials_again() {
        let (mut table, now, backend) = (LinkTable::default(), Instant::now(), (BackendId(1), 0));
        let offer = |table: &mut LinkTable, now| match table.offer(
            backend,
            b"x",
            100,
            Links::PerWorker,
            now,
        ) {
            Offer::Open(_) => "open",
            Offer::Waits => "waits",
            Offer::Dial => "dial",
            Offer::Down(_) => "down",
        };
        assert_eq!(offer(&mut table, now), "dial");
        assert_eq!(offer(&mut table, now), "waits");
        let first = table.failed(backend, false, CloseCause::Refused, now, 0);
        assert_eq!(first, BACK_OFF_FIRST);
        assert_eq!(offer(&mut table, now), "down");
        let failures = table.failures(backend);
        assert_eq!(offer(&mut table, now + first), "dial");
        assert_eq!(
            table.failed(backend, false, CloseCause::Refused, now, failures),
            BACK_OFF_FIRST * 2
        );
        assert_eq!(table.failed(backend, false, CloseCause::Refused, now, 50), BACK_OFF_MAX);
        assert_eq!(
            table.failed(backend, true, CloseCause::End, now, 0),
            BACK_OFF_FIRST,
            "it had worked"
        );
    }

    #[test]
    fn what_waits_for_a_link_is_bounded() {
        let (mut table, now, backend) = (LinkTable::default(), Instant::now(), (BackendId(1), 0));
        for _ in 0..10 {
            let _waits = table.offer(backend, &[0; 10], 100, Links::PerWorker, now);
        }
        let over = table.offer(backend, &[0; 10], 100, Links::PerWorker, now);
        assert!(matches!(over, Offer::Down(CloseCause::Overflow)));
    }
}
