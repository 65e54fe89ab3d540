//! Diameter: clients on one side of the edge, servers on the other.

mod client;
mod server;

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use strowger_contract::Framer;
use strowger_diameter::DiameterFramer;

use self::client::Clients;
use self::server::Servers;
use super::net::{Handler, Net, Pace, Place, Role};
use super::report::Report;
use super::{Address, Common};

/// Gx (3GPP TS 29.212).
pub(crate) const GX: u32 = 16_777_238;
/// Gy: credit control (RFC 8506).
pub(crate) const GY: u32 = 4;
/// S6a (3GPP TS 29.272).
pub(crate) const S6A: u32 = 16_777_251;

/// Diameter load.
#[derive(clap::Args, Clone, Debug)]
pub struct DiameterOptions {
    /// Where requests go: tcp://IP:PORT; several are used in turn. Without it only servers run.
    #[arg(long = "target", value_name = "ADDRESS")]
    targets: Vec<Address>,
    /// Play a server there; may be given several times. It calls itself server-N.REALM.
    #[arg(long = "answer", value_name = "ADDRESS")]
    answers: Vec<Address>,
    /// Client connections.
    #[arg(long, default_value_t = 4, value_name = "N")]
    connections: usize,
    /// Shares of new sessions, such as gx=60,gy=20,s6a=20.
    #[arg(long, default_value = "gx=1", value_name = "SHARES")]
    mix: Mix,
    /// Updates between a session's first and last request (Gx, Gy).
    #[arg(long, default_value_t = 1, value_name = "N")]
    updates: u32,
    /// A request's size.
    #[arg(long, default_value_t = 500, value_name = "BYTES")]
    bytes: usize,
    /// Later requests of a session name their server (Destination-Host).
    #[arg(long)]
    follow_host: bool,
    /// Everybody's realm, and what requests are for.
    #[arg(long, default_value = "example.net")]
    realm: String,
    /// Clients' own realm: a relay that looks for servers by realm must not find clients.
    #[arg(long, value_name = "REALM")]
    client_realm: Option<String>,
    /// The first client calls itself NAME-0.REALM.
    #[arg(long, default_value = "client", value_name = "NAME")]
    name: String,
    /// The first server calls itself NAME-0.REALM.
    #[arg(long, default_value = "server", value_name = "NAME")]
    server_name: String,
    /// How long servers take for an answer.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = super::duration)]
    service: Duration,
    /// Without an answer for so long a request has failed.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = super::duration)]
    timeout: Duration,
    #[command(flatten)]
    common: Common,
}

impl DiameterOptions {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    fn client_realm(&self) -> &str {
        self.client_realm.as_deref().unwrap_or(&self.realm)
    }
}

/// Shares of kinds of sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mix(pub(crate) Vec<(u32, u32)>);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = |part: &str| {
            let (name, share) = part.split_once('=').unwrap_or((part, "1"));
            let application = match name {
                "gx" => GX,
                "gy" => GY,
                "s6a" => S6A,
                other => return Err(format!("{other}: expected gx, gy or s6a")),
            };
            let share = share.parse().map_err(|error| format!("{share}: {error}"))?;
            Ok((application, share))
        };
        let shares: Vec<(u32, u32)> = text.split(',').map(share).collect::<Result<_, _>>()?;
        if shares.iter().all(|(_, share)| *share == 0) {
            return Err("all shares are 0".into());
        }
        Ok(Self(shares))
    }
}

struct Parties {
    clients: Clients,
    servers: Servers,
    report: Report,
}

/// Clients' roles begin here; servers' roles are their numbers.
const FIRST_CLIENT: Role = 1 << 20;

impl Handler for Parties {
    fn opened(&mut self, net: &mut Net, _: Instant, stream: usize, role: Role) {
        if role >= FIRST_CLIENT {
            self.clients.on_open(net, stream, role - FIRST_CLIENT);
        }
    }

    fn message(&mut self, net: &mut Net, now: Instant, from: Place, role: Role, bytes: &[u8]) {
        let Place::Stream(stream) = from else { return };
        if role >= FIRST_CLIENT {
            self.clients.on_message(net, now, stream, role - FIRST_CLIENT, bytes, &mut self.report);
        } else {
            self.servers.on_message(net, now, stream, role, bytes, &mut self.report);
        }
    }

    fn closed(&mut self, _: &mut Net, _: Instant, stream: usize, role: Role) {
        if role >= FIRST_CLIENT {
            self.report.count("connections_closed");
            self.clients.on_closed(stream);
        }
    }
}

/// Runs it.
pub(crate) fn run(options: &DiameterOptions) -> Result<(Report, Instant)> {
    let mut net = Net::new(|| Box::new(DiameterFramer) as Box<dyn Framer>)?;
    let now = Instant::now();
    for (number, address) in options.answers.iter().enumerate() {
        net.listen(address.address, number)
            .with_context(|| format!("cannot listen at {address}"))?;
    }
    let servers = Servers::new(now, options);
    let clients = Clients::new(now, options);
    let mut parties = Parties { clients, servers, report: Report::new("diameter", now) };
    net.idle(options.common.settle, &mut parties)?;
    if !options.targets.is_empty() {
        for number in 0..options.connections.max(1) {
            let target: SocketAddr = options.targets[number % options.targets.len()].address;
            net.connect(target, FIRST_CLIENT + number)?;
        }
        let limit = Instant::now() + Duration::from_secs(10);
        while parties.clients.ready() < options.connections.max(1) {
            ensure!(
                Instant::now() < limit,
                "only {} of {} connections were let in (CER/CEA)",
                parties.clients.ready(),
                options.connections
            );
            net.turn(Instant::now() + Duration::from_millis(10), &mut parties)?;
        }
    }
    drive(&mut net, &mut parties, options)?;
    let end = Instant::now();
    Ok((parties.report, end))
}

fn drive(net: &mut Net, parties: &mut Parties, options: &DiameterOptions) -> Result<()> {
    let common = &options.common;
    let start = Instant::now();
    parties.report.restart(start);
    let plays_clients = !options.targets.is_empty();
    let mut pace = Pace::new(start, common.rate, common.lasting);
    let end = start + common.lasting + options.timeout;
    loop {
        let now = Instant::now();
        if plays_clients {
            while let Some(intended) = pace.take(now) {
                parties.clients.begin(net, now, intended, &mut parties.report);
            }
            if pace.next().is_none() && parties.clients.under_way() == 0 || now > end {
                return Ok(());
            }
            parties.clients.on_time(now, &mut parties.report);
        } else if now > start + common.lasting {
            return Ok(());
        }
        parties.servers.on_time(net, now);
        let next =
            [pace.next().filter(|_| plays_clients), parties.clients.next(), parties.servers.next()];
        let longest = now + Duration::from_millis(100);
        let until = next.into_iter().flatten().min().unwrap_or(longest).min(longest);
        net.turn(until, parties)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_nonsense_is_named() {
        assert_eq!("gx=60,s6a".parse(), Ok(Mix(vec![(GX, 60), (S6A, 1)])));
        assert_eq!("cx=1".parse::<Mix>(), Err("cx: expected gx, gy or s6a".into()));
        assert_eq!("gx=0".parse::<Mix>(), Err("all shares are 0".into()));
    }
}
