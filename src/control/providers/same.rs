//! The same events by each way give the same pool.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::dns::{DnsPoolSettings, actions as dns_actions};
use super::message::{Action, Isolation, Mapping, RouteMessage};
use super::tcp_routes::TcpRoute;
use crate::control::config::{self, Source};
use crate::control::registry::{
    Identity, InstanceEndpoint, LeaseState, Locality, Model, Registration,
};
use crate::control::resolve::Discovered;
use crate::protocols::Protocols;
use crate::routing::PoolNames;

const POOL: &str = "db";
const LEASE_S: u64 = 3;

/// What happens to one of some instances.
#[derive(Clone, Copy, Debug)]
enum Happens {
    /// It is heard of.
    There(u8),
    /// It says that it leaves.
    Leaves(u8),
    /// So many milliseconds pass.
    Time(u16),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => (0..5_u8).prop_map(Happens::There),
        1 => (0..5_u8).prop_map(Happens::Leaves),
        4 => (100..2_500_u16).prop_map(Happens::Time),
    ]
}

fn port(instance: u8) -> u16 {
    7_000 + u16::from(instance)
}

/// One way of telling.
trait Way {
    fn there(&self, instance: u8) -> Action;
    fn leaves(&self, instance: u8) -> Action;
}

struct LeaseApi;

impl Way for LeaseApi {
    fn there(&self, instance: u8) -> Action {
        let address = format!("tcp://10.0.0.5:{}", port(instance));
        let registration = Registration {
            generation: 1,
            lease_ttl_ms: LEASE_S * 1_000,
            state: LeaseState::Ready,
            endpoints: vec![InstanceEndpoint { protocol: "tcp".to_owned(), address }],
            weight: 100,
            priority: 1,
            capacity: None,
            locality: Locality::default(),
            release: String::new(),
            identity: Identity::default(),
        };
        Action::Put { pool: POOL.to_owned(), id: format!("i{instance}"), registration }
    }

    fn leaves(&self, instance: u8) -> Action {
        let address = format!("tcp://10.0.0.5:{}", port(instance));
        Action::Remove { pool: POOL.to_owned(), address, id: Some(format!("i{instance}")) }
    }
}

struct CloudFoundry;

impl CloudFoundry {
    fn message(instance: u8) -> (RouteMessage, Mapping) {
        let message = RouteMessage {
            host: "10.0.0.5".to_owned(),
            port: port(instance),
            uris: vec![POOL.to_owned()],
            private_instance_id: format!("i{instance}"),
            ..RouteMessage::default()
        };
        let mapping = Mapping {
            pools: Vec::new(),
            isolation: Isolation::All,
            segments: Vec::new(),
            stale_threshold: Duration::from_secs(LEASE_S),
        };
        (message, mapping)
    }
}

impl Way for CloudFoundry {
    fn there(&self, instance: u8) -> Action {
        let (message, mapping) = Self::message(instance);
        message.register(&mapping, &|pool| pool == POOL).expect("a good message").remove(0)
    }

    fn leaves(&self, instance: u8) -> Action {
        let (message, mapping) = Self::message(instance);
        message.unregister(&mapping, &|pool| pool == POOL).expect("a good message").remove(0)
    }
}

struct RoutingApi;

impl RoutingApi {
    fn route(instance: u8) -> TcpRoute {
        TcpRoute {
            router_group_guid: "g".to_owned(),
            port: 5_200,
            backend_ip: "10.0.0.5".to_owned(),
            backend_port: port(instance),
            instance_id: format!("i{instance}"),
            ttl: LEASE_S,
            ..TcpRoute::default()
        }
    }
}

impl Way for RoutingApi {
    fn there(&self, instance: u8) -> Action {
        let route = Self::route(instance);
        let registration = route.registration().expect("a good route");
        Action::Put { pool: POOL.to_owned(), id: route.id(), registration }
    }

    fn leaves(&self, instance: u8) -> Action {
        let route = Self::route(instance);
        let address = route.address().expect("a good route");
        Action::Remove { pool: POOL.to_owned(), address, id: Some(route.id()) }
    }
}

/// The pool after each event: address and state.
fn told(way: &dyn Way, events: &[Happens]) -> Vec<BTreeMap<String, LeaseState>> {
    let mut model = Model::default();
    let mut now = 1;
    let mut pools = Vec::new();
    for event in events {
        match *event {
            Happens::Time(millis) => now += u64::from(millis),
            Happens::There(instance) => apply(&mut model, now, way.there(instance)),
            Happens::Leaves(instance) => apply(&mut model, now, way.leaves(instance)),
        }
        model.sweep(now, &|_, _| false);
        let pool = model
            .pool(POOL)
            .map(|(_, lease)| (lease.registration.endpoints[0].address.clone(), lease.state()));
        pools.push(pool.collect());
    }
    pools
}

fn apply(model: &mut Model, now: u64, action: Action) {
    match action {
        Action::Put { pool, id, registration } => {
            model.put(now, &pool, &id, registration, "it", false).expect("it is taken");
        }
        Action::Remove { pool, id, .. } => {
            // One that is not there cannot leave.
            let _absent = model.delete(&pool, &id.expect("it is named"), None);
        }
    }
}

/// The addresses of a pool, after each of some comings and goings.
type Addresses = Vec<BTreeSet<String>>;

/// Who is there after each event: what a zone's records and a file's backends say.
fn present(events: &[Happens]) -> Vec<BTreeSet<u8>> {
    let mut there = BTreeSet::new();
    let each = events.iter().map(|event| {
        match *event {
            Happens::There(instance) => {
                there.insert(instance);
            }
            Happens::Leaves(instance) => {
                there.remove(&instance);
            }
            Happens::Time(_) => {}
        }
        there.clone()
    });
    each.collect()
}

fn by_dns(events: &[Happens]) -> Addresses {
    let settings = DnsPoolSettings {
        pool: POOL.to_owned(),
        name: "_db._tcp.example.net".to_owned(),
        port: None,
        transport: strowger_contract::Transport::Tcp,
        grace: Duration::ZERO,
        protocols: vec!["tcp".to_owned()],
    };
    let (mut model, mut missing) = (Model::default(), HashMap::new());
    let each = present(events).into_iter().map(|there| {
        let found: Vec<Discovered> = there
            .into_iter()
            .map(|instance| Discovered {
                address: ([10, 0, 0, 5], port(instance)).into(),
                priority: 1,
                weight: 0,
            })
            .collect();
        let known = model
            .pool(POOL)
            .map(|(id, lease)| (POOL.to_owned(), id.to_owned(), lease.registration.clone()))
            .collect();
        for action in dns_actions(&settings, known, &found, &mut missing, Instant::now()) {
            apply(&mut model, 1, action);
        }
        addresses(&model)
    });
    each.collect()
}

fn by_files(events: &[Happens]) -> Addresses {
    let protocols = Protocols::standard();
    let each = present(events).into_iter().map(|there| {
        let backends: Vec<String> = there
            .into_iter()
            .map(|instance| {
                format!("{{ id: i{instance}, address: tcp://10.0.0.5:{} }}", port(instance))
            })
            .collect();
        let text = format!(
            "version: 1\nlisteners: [{{ name: l, protocol: tcp, bind: [tcp://127.0.0.1:5200], pool: {POOL} }}]\npools: {{ {POOL}: {{ backends: [{}] }} }}\n",
            backends.join(", ")
        );
        let source = Source { name: "pools.yaml".to_owned(), text };
        let loaded = config::load(&[source], &protocols.configurers(), &PoolNames::default());
        let pools = loaded.expect("a good file").spec.pools;
        let backends = pools.iter().flat_map(|pool| &pool.backends);
        backends.map(|it| format!("{}://{}", it.transport.scheme(), it.address)).collect()
    });
    each.collect()
}

fn addresses(model: &Model) -> BTreeSet<String> {
    let pool = model.pool(POOL);
    pool.map(|(_, lease)| lease.registration.endpoints[0].address.clone()).collect()
}

fn by_way(way: &dyn Way, events: &[Happens]) -> Addresses {
    told(way, events).into_iter().map(|pool| pool.into_keys().collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_same_events_give_the_same_pool(events in prop::collection::vec(happens(), 1..60)) {
        let by_lease = told(&LeaseApi, &events);
        prop_assert_eq!(&told(&CloudFoundry, &events), &by_lease);
        prop_assert_eq!(&told(&RoutingApi, &events), &by_lease);
    }

    /// Where nobody falls silent, also those agree that say all that is there at once: zones and files.
    #[test]
    fn all_providers_agree_on_who_is_there(
        events in prop::collection::vec(happens(), 1..30).prop_map(|mut events| {
            events.retain(|event| !matches!(event, Happens::Time(_)));
            events
        })
    ) {
        let by_files = by_files(&events);
        prop_assert_eq!(&by_way(&LeaseApi, &events), &by_files);
        prop_assert_eq!(&by_way(&CloudFoundry, &events), &by_files);
        prop_assert_eq!(&by_way(&RoutingApi, &events), &by_files);
        prop_assert_eq!(&by_dns(&events), &by_files);
    }
}
