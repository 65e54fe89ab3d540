//! A worker: one thread, one single-threaded runtime, its own sockets and engines.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strowger_contract::{Level, WorkerId};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::LocalSet;

use super::handover::{Gate, Giver, HandOver, Legacy, SavedFlow, Verdict};
use super::launch::{BoundSocket, Late, Launch, LaunchPlace, Place, RunningListener, To};
use super::shared::Shared;
use crate::observe::{Event, Events, Metrics, WorkerMetrics};
use crate::routing::ListenerSpec;

/// How often the worker's own delay is measured.
const LAG_EVERY: Duration = Duration::from_millis(100);

/// The pause before a worker that died is started again, so that one that dies at once does not
/// take the core.
const RESTART_PAUSE: Duration = Duration::from_millis(50);

/// A listener as a worker starts it, and starts it again after its death.
pub(crate) struct Start {
    pub(crate) launch: Arc<dyn Launch>,
    pub(crate) spec: Arc<ListenerSpec>,
    /// This worker's sockets; it works on clones.
    pub(crate) sockets: Vec<Arc<BoundSocket>>,
    pub(crate) shared: Arc<Shared>,
    /// Tells apart two uses of one name.
    pub(crate) serial: u64,
    /// What another process had of it on this worker; taken at its first start.
    pub(crate) legacy: Mutex<Option<Legacy>>,
}

/// What a worker is told.
enum Order {
    Start(u64),
    Reconfigure(u64),
    Stop(u64),
    Drain,
    End,
    /// Starts listeners with what another process had, all or none, and waits at the gate.
    Inherit(Vec<u64>, Arc<Gate>),
    /// Stands still and writes all out, then does as it is told.
    HandOver(Arc<HandOver>),
    /// A connection that another process sent after.
    Enter(u64, Box<SavedFlow>, Vec<OwnedFd>),
}

/// The handle of a worker's thread.
pub(crate) struct Worker {
    orders: UnboundedSender<Order>,
    starts: Arc<Mutex<Vec<Arc<Start>>>>,
    thread: Option<JoinHandle<()>>,
}

struct Inside {
    id: WorkerId,
    starts: Arc<Mutex<Vec<Arc<Start>>>>,
    metrics: WorkerMetrics,
    events: Arc<Events>,
    pause_us: Arc<AtomicU32>,
}

impl Worker {
    /// Starts the thread; `pause_us`: see [`super::gather`].
    pub(crate) fn new(
        id: WorkerId,
        metrics: &Metrics,
        events: &Arc<Events>,
        pause_us: &Arc<AtomicU32>,
    ) -> std::io::Result<Self> {
        #[expect(clippy::disallowed_methods, reason = "orders: the fleet sends one and awaits it")]
        let (orders, mut received) = unbounded_channel();
        let starts = Arc::default();
        let inside = Inside {
            id,
            starts: Arc::clone(&starts),
            metrics: metrics.worker(id),
            events: Arc::clone(events),
            pause_us: Arc::clone(pause_us),
        };
        let thread =
            std::thread::Builder::new().name(format!("worker-{}", id.0)).spawn(move || {
                // A worker that panics all the same is started again, with all its listeners.
                while catch_unwind(AssertUnwindSafe(|| inside.live(&mut received))).is_err() {
                    inside.metrics.panicked();
                    let detail = format!(
                        "worker {} died and was started again; its connections are lost",
                        inside.id.0
                    );
                    inside.events.emit(Event::engine(Level::Warn, "", "worker_panicked", detail));
                    std::thread::sleep(RESTART_PAUSE);
                }
            })?;
        Ok(Self { orders, starts, thread: Some(thread) })
    }

    fn starts(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Start>>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        // The thread ends only by `Order::End`.
        let _ended = self.orders.send(order);
    }

    /// Starts a listener.
    pub(crate) fn start(&self, start: Start) {
        let serial = start.serial;
        self.starts().push(Arc::new(start));
        self.order(Order::Start(serial));
    }

    /// Starts listeners with what another process had; the worker then waits at the gate.
    pub(crate) fn inherit(&self, starts: Vec<Start>, gate: &Arc<Gate>) {
        let serials = starts.iter().map(|start| start.serial).collect();
        self.starts().extend(starts.into_iter().map(Arc::new));
        self.order(Order::Inherit(serials, Arc::clone(gate)));
    }

    /// Has the worker stand still and write out what it has.
    pub(crate) fn hand_over(&self, handover: &Arc<HandOver>) {
        self.order(Order::HandOver(Arc::clone(handover)));
    }

    /// Another process has the listener: a worker that dies does not start it again.
    pub(crate) fn forget(&self, serial: u64) {
        self.starts().retain(|start| start.serial != serial);
    }

    /// A connection that another process sent after.
    pub(crate) fn enter(&self, serial: u64, flow: Box<SavedFlow>, fds: Vec<OwnedFd>) {
        self.order(Order::Enter(serial, flow, fds));
    }

    /// Gives a listener new options and routes.
    pub(crate) fn reconfigure(&self, serial: u64, spec: &Arc<ListenerSpec>) {
        for start in self.starts().iter_mut().filter(|start| start.serial == serial) {
            *start = Arc::new(Start {
                launch: Arc::clone(&start.launch),
                spec: Arc::clone(spec),
                sockets: start.sockets.clone(),
                shared: Arc::clone(&start.shared),
                serial,
                legacy: Mutex::default(),
            });
        }
        self.order(Order::Reconfigure(serial));
    }

    /// Closes a listener.
    pub(crate) fn stop(&self, serial: u64) {
        self.starts().retain(|start| start.serial != serial);
        self.order(Order::Stop(serial));
    }

    /// Tells all engines that the node is leaving.
    pub(crate) fn drain(&self) {
        self.order(Order::Drain);
    }

    /// Ends the thread and waits for it.
    pub(crate) fn end(&mut self) {
        self.order(Order::End);
        if let Some(thread) = self.thread.take() {
            // Its panics were caught and counted inside.
            let _ended = thread.join();
        }
    }
}

impl Inside {
    fn live(&self, orders: &mut UnboundedReceiver<Order>) {
        super::gather::start(&self.pause_us, &self.metrics);
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(super::gather::pause)
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => {
                let detail = format!("worker {} cannot start: {error}", self.id.0);
                self.events.emit(Event::engine(Level::Warn, "", "worker_failed", detail));
                std::thread::sleep(Duration::from_secs(1));
                return;
            }
        };
        let local = LocalSet::new();
        let excused = Rc::new(Cell::new(Instant::now()));
        local.spawn_local(measure_lag(self.metrics.clone(), Rc::clone(&excused)));
        local.block_on(&runtime, self.obey(orders, &excused));
        drop(local);
        runtime.shutdown_background();
    }

    async fn obey(&self, orders: &mut UnboundedReceiver<Order>, excused: &Cell<Instant>) {
        let mut running: HashMap<u64, Rc<dyn RunningListener>> = HashMap::new();
        let broken = Rc::new(Notify::new());
        for start in self.wanted() {
            let _told = self.start(&mut running, &start, &broken);
        }
        loop {
            let order = tokio::select! {
                order = orders.recv() => order,
                () = broken.notified() => panic!("a task of worker {} panicked", self.id.0),
            };
            let Some(order) = order else { return };
            match order {
                Order::Start(serial) => {
                    let start = self.wanted().into_iter().find(|start| start.serial == serial);
                    if let Some(start) = start.filter(|_| !running.contains_key(&serial)) {
                        let _told = self.start(&mut running, &start, &broken);
                    }
                }
                Order::Inherit(serials, gate) => {
                    let mut result = Ok(());
                    for start in self.wanted() {
                        if serials.contains(&start.serial) {
                            let started = self.start(&mut running, &start, &broken);
                            result = result.and(started);
                        }
                    }
                    // No task runs before the gate opens: this thread stands here.
                    gate.pass(result);
                    excused.set(Instant::now());
                }
                Order::HandOver(handover) => {
                    self.hand_over(&running, &handover);
                    excused.set(Instant::now());
                }
                Order::Enter(serial, flow, fds) => {
                    if let Some(listener) = running.get(&serial) {
                        listener.enter(Late(*flow, fds));
                    }
                }
                Order::Reconfigure(serial) => {
                    let spec = self.wanted().into_iter().find(|start| start.serial == serial);
                    if let (Some(start), Some(listener)) = (spec, running.get(&serial)) {
                        listener.reconfigure(&start.spec);
                    }
                }
                Order::Stop(serial) => {
                    if let Some(listener) = running.remove(&serial) {
                        listener.stop();
                    }
                }
                Order::Drain => running.values().for_each(|listener| listener.drain()),
                Order::End => {
                    running.values().for_each(|listener| listener.stop());
                    // One turn for the connections' goodbyes.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    return;
                }
            }
        }
    }

    fn wanted(&self) -> Vec<Arc<Start>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start(
        &self,
        running: &mut HashMap<u64, Rc<dyn RunningListener>>,
        start: &Arc<Start>,
        broken: &Rc<Notify>,
    ) -> Result<(), String> {
        let sockets = start
            .sockets
            .iter()
            .map(|socket| socket.try_clone())
            .collect::<std::io::Result<Vec<_>>>();
        let listener = sockets.and_then(|sockets| {
            let (spec, shared, broken) =
                (Arc::clone(&start.spec), Arc::clone(&start.shared), Rc::clone(broken));
            start.launch.start(LaunchPlace(Place {
                worker: self.id,
                spec,
                sockets,
                shared,
                broken,
                legacy: start.legacy.lock().unwrap_or_else(PoisonError::into_inner).take(),
            }))
        });
        match listener {
            Ok(listener) => {
                running.insert(start.serial, listener);
                Ok(())
            }
            Err(error) => {
                let detail = format!("on worker {}: {error}", self.id.0);
                self.events.emit(Event::engine(
                    Level::Warn,
                    &start.spec.name,
                    "listener_failed",
                    detail.clone(),
                ));
                Err(detail)
            }
        }
    }

    /// Stands still until it is known who goes on. No task of this worker runs meanwhile, and so
    /// none is half way through anything.
    fn hand_over(&self, running: &HashMap<u64, Rc<dyn RunningListener>>, handover: &Arc<HandOver>) {
        if !handover.freeze() {
            return;
        }
        let mut given = Vec::new();
        let mut result = Ok(());
        for start in self.wanted().iter().filter(|start| handover.takes(&start.spec.name)) {
            let Some(listener) = running.get(&start.serial) else { continue };
            let giver = To(Giver {
                handover: Arc::clone(handover),
                listener: start.spec.name.as_str().into(),
                worker: self.id.0,
            });
            // What a protocol that knows no hand-over has stays here and ends here.
            result = result.and_then(|()| listener.save(&giver));
            given.push((listener, giver));
        }
        handover.saved(result);
        let left = handover.verdict() == Verdict::Release;
        for (listener, giver) in given {
            listener.settle(&giver, left);
        }
    }
}

/// How late the worker comes to what it wanted to do: what every message waits as well.
/// A worker that stood still for a hand-over is not late: that is no overload, and must not have the
/// node refuse what comes next.
async fn measure_lag(metrics: WorkerMetrics, excused: Rc<Cell<Instant>>) {
    loop {
        let wanted = Instant::now() + LAG_EVERY;
        tokio::time::sleep_until(wanted.into()).await;
        metrics.loop_lag(wanted.max(excused.get()).elapsed());
    }
}
