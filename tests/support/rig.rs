//! One engine and the real routing core, made from a configuration's text, with a clock of its own and
//! no socket: for benches, fuzz targets and counts of allocations.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger::control::config::{self, Source};
use strowger::protocols::Protocols;
use strowger::routing::{Core, CoreRouter, CoreSettings, Setup};
use strowger_contract::{
    BackendId, Context, Endpoint, Engine, Keyer, Message, Outbox, PeerChange, Protocol, TokenKeys,
    WorkerId,
};

/// The engine of the first listener of a configuration, as one worker runs it.
pub struct Rig<P: Protocol> {
    pub core: Arc<Core>,
    pub router: CoreRouter,
    pub engine: P::Engine,
    pub out: Outbox,
    pub now: Instant,
}

impl<P: Protocol> Rig<P> {
    pub fn new(yaml: &str, workers: u8) -> Self {
        let now = Instant::now();
        let core = Core::new(
            CoreSettings {
                token_keys: TokenKeys::new(vec![[1; 16]]),
                keyer: Keyer::new([2; 16]),
                seed: 7,
                sessions_max: 1 << 14,
                bindings_max: 1 << 12,
                workers,
                advise: strowger::routing::no_advice,
            },
            now,
        );
        core.apply(now, spec(yaml, &core));
        Self::of_worker(yaml, core, 0, workers, now)
    }

    /// The engine of another worker, over the same core.
    pub fn other_worker(&self, yaml: &str, worker: u8, workers: u8) -> Self {
        Self::of_worker(yaml, Arc::clone(&self.core), worker, workers, self.now)
    }

    fn of_worker(yaml: &str, core: Arc<Core>, worker: u8, workers: u8, now: Instant) -> Self {
        let setup = Arc::clone(&spec(yaml, &core).listeners[0].setup);
        let setup = setup.downcast_ref::<Setup<P>>().expect("a listener of this protocol");
        let engine = P::engine(&Context {
            worker: WorkerId(worker),
            workers,
            seed: 5,
            started: 1,
            scope: &setup.scope,
            options: &setup.options,
        });
        let router = core.router(WorkerId(worker));
        Self { core, router, engine, out: Outbox::new(), now }
    }

    /// Takes another configuration; the engine stays.
    pub fn apply(&mut self, yaml: &str) {
        let spec = spec(yaml, &self.core);
        self.core.apply(self.now, spec);
        self.router.refresh();
    }

    /// What came in; the outbox holds what comes of it.
    pub fn message(&mut self, from: Endpoint, bytes: &[u8]) {
        self.out.clear();
        let (transport, remote) = match from {
            Endpoint::Datagram { remote, .. } => (strowger_contract::Transport::Udp, remote),
            _ => (strowger_contract::Transport::Tcp, ([198, 51, 100, 1], 40_000).into()),
        };
        let local = ([192, 0, 2, 1], 5_060).into();
        let arrived = self.now;
        let message = Message { from, transport, remote, local, arrived, bytes };
        self.engine.on_message(self.now, message, &mut self.router, &mut self.out);
    }

    pub fn peer(&mut self, peer: Endpoint, change: PeerChange) {
        self.out.clear();
        self.engine.on_peer(self.now, peer, change, &mut self.router, &mut self.out);
    }

    /// Time goes on; the engine is called as often as it wants to. What it sends goes to `sent`.
    pub fn pass(&mut self, time: Duration, mut sent: impl FnMut(&Outbox)) {
        let until = self.now + time;
        let mut spins = 0;
        while let Some(due) = self.engine.next_timeout().filter(|due| *due <= until) {
            spins = if due <= self.now { spins + 1 } else { 0 };
            assert!(spins < 1_000, "the engine wants to be called for ever");
            self.now = self.now.max(due);
            self.out.clear();
            self.engine.on_timeout(self.now, &mut self.router, &mut self.out);
            sent(&self.out);
        }
        self.now = until;
        self.core.tick(self.now);
        self.router.refresh();
    }

    /// The backend of that pool and instance.
    pub fn backend(&self, pool: &str, id: &str) -> Option<BackendId> {
        let snapshot = self.core.snapshot();
        let pool = snapshot.pool(self.core.pool_names().id(pool))?;
        pool.backends().find(|backend| backend.spec.id == id).map(|backend| backend.id)
    }
}

fn spec(yaml: &str, core: &Core) -> strowger::routing::SnapshotSpec {
    let source = Source { name: "rig".to_owned(), text: yaml.to_owned() };
    let protocols = Protocols::standard();
    config::load(&[source], &protocols.configurers(), core.pool_names())
        .unwrap_or_else(|errors| panic!("{errors}"))
        .spec
}
