//! Cloud Foundry over NATS: `router.register`, `router.unregister`, `router.greet`, `router.start`, as
//! gorouter speaks them. Plain publish and subscribe; heartbeats are the state.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event as NatsEvent, Message};
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::sync::mpsc;

use super::feed::Feed;
use super::message::{self, Mapping};

/// The provider's name: in the registry, in figures, in events.
pub(super) const NAME: &str = "cloud_foundry";

/// Messages that wait for us, at most (gorouter's own figure); what is over it is lost and told of.
const PENDING_MAX: usize = 131_072;

/// How often a silent server is asked whether it is there: two missed and it is gone.
const PING: Duration = Duration::from_secs(5);

/// How long to wait before the next server is tried, at most.
const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// How it is reached and read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudFoundrySettings {
    /// `nats://host:port` or `tls://host:port`; any of them.
    pub servers: Vec<String>,
    /// Who we are there.
    pub user: Option<String>,
    /// And our word for it.
    pub password: Option<String>,
    /// Where that was read from.
    pub password_file: Option<String>,
    /// Whom to believe, for TLS.
    pub ca: Option<PathBuf>,
    /// Our own certificate.
    pub certificate: Option<PathBuf>,
    /// And its key.
    pub key: Option<PathBuf>,
    /// Which messages are whose.
    pub mapping: Mapping,
    /// How often instances are asked to register.
    pub register_interval: Duration,
    /// Our addresses, as registrars are told; none: the one that reaches the servers.
    pub hosts: Vec<IpAddr>,
}

/// Serves until it is dropped.
pub(super) async fn run(settings: CloudFoundrySettings, feed: Feed) {
    feed.state(Err("not connected yet".to_owned()));
    loop {
        let why = serve(&settings, &feed).await;
        feed.state(Err(why));
        tokio::time::sleep(RECONNECT_MAX).await;
    }
}

async fn serve(settings: &CloudFoundrySettings, feed: &Feed) -> String {
    let (events, mut heard) = mpsc::channel(64);
    let client = match options(settings, events).connect(&settings.servers[..]).await {
        Ok(client) => client,
        Err(error) => return error.to_string(),
    };
    let mut messages = match client.subscribe("router.*").await {
        Ok(messages) => messages,
        Err(error) => return error.to_string(),
    };
    let id = format!("0-{}", feed.registry().router_id());
    loop {
        tokio::select! {
            event = heard.recv() => match event {
                Some(NatsEvent::Connected) => {
                    feed.state(Ok(()));
                    // Everybody registers again: what was missed meanwhile is made good.
                    let start = greeting(settings, &id);
                    if let Err(error) = client.publish("router.start", start.into()).await {
                        return error.to_string();
                    }
                }
                Some(NatsEvent::Disconnected | NatsEvent::LameDuckMode) => {
                    feed.state(Err("no NATS server is connected".to_owned()));
                }
                Some(NatsEvent::SlowConsumer(_)) => {
                    feed.reject("lost", "more messages at a time than are held; some are lost");
                }
                Some(NatsEvent::Closed) | None => return "the connection was closed".to_owned(),
                Some(NatsEvent::ServerError(error)) => feed.reject("server", &error.to_string()),
                Some(NatsEvent::ClientError(error)) => feed.state(Err(error.to_string())),
                Some(NatsEvent::Draining) => {}
            },
            message = messages.next() => match message {
                Some(message) => on_message(settings, feed, &client, &id, message).await,
                None => return "the subscription ended".to_owned(),
            },
        }
    }
}

fn options(settings: &CloudFoundrySettings, events: mpsc::Sender<NatsEvent>) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        .name("strowger")
        .retry_on_initial_connect()
        .subscription_capacity(PENDING_MAX)
        .ping_interval(PING)
        .connection_timeout(Duration::from_secs(5))
        .reconnect_delay_callback(|attempts| {
            let millis = 100u64.saturating_mul(1 << attempts.min(8));
            RECONNECT_MAX.min(Duration::from_millis(millis))
        })
        .event_callback(move |event| {
            let events = events.clone();
            async move {
                // Who listens ends with the connection.
                let _ended = events.send(event).await;
            }
        });
    if let Some(user) = &settings.user {
        let password = settings.password.clone().unwrap_or_default();
        options = options.user_and_password(user.clone(), password);
    }
    if let Some(ca) = &settings.ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    if let (Some(certificate), Some(key)) = (&settings.certificate, &settings.key) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options
}

async fn on_message(
    settings: &CloudFoundrySettings,
    feed: &Feed,
    client: &Client,
    id: &str,
    message: Message,
) {
    let mapping = &settings.mapping;
    let registry = feed.registry();
    let is_pool = |name: &str| registry.has_pool(name);
    let parsed = || message::parse(&message.payload);
    match message.subject.as_str() {
        "router.register" => {
            let body = parsed();
            let changed = body.as_ref().map_or(0, |body| body.endpoint_updated_at_ns);
            let actions = body.and_then(|body| body.register(mapping, &is_pool));
            feed.take_changed_at(changed, actions);
        }
        "router.unregister" => {
            let body = parsed();
            let changed = body.as_ref().map_or(0, |body| body.endpoint_updated_at_ns);
            let actions = body.and_then(|body| body.unregister(mapping, &is_pool));
            feed.take_changed_at(changed, actions);
        }
        "router.greet" => {
            if let Some(reply) = message.reply
                && let Err(error) = client.publish(reply, greeting(settings, id).into()).await
            {
                feed.reject("reply", &error.to_string());
            }
        }
        // `router.start` of other routers, and of our own.
        _ => {}
    }
}

/// The body of `router.start`, and of the answer to `router.greet`.
fn greeting(settings: &CloudFoundrySettings, id: &str) -> String {
    let hosts = if settings.hosts.is_empty() {
        settings.servers.iter().filter_map(|server| facing(server)).take(1).collect()
    } else {
        settings.hosts.clone()
    };
    json!({
        "id": id,
        "hosts": hosts,
        "minimumRegisterIntervalInSeconds": settings.register_interval.as_secs(),
        "pruneThresholdInSeconds": settings.mapping.stale_threshold.as_secs(),
    })
    .to_string()
}

/// The address of ours that reaches a server whose address is known.
fn facing(server: &str) -> Option<IpAddr> {
    let place: SocketAddr = server.split_once("://")?.1.parse().ok()?;
    let any = if place.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = std::net::UdpSocket::bind(any).ok()?;
    // Connecting a datagram socket sends nothing; it asks the routing table.
    socket.connect(place).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
