//! `strowger load`: an open-loop load generator that plays both sides of an edge.
//!
//! Things are begun at intended times that no slow answer delays, and latencies count from those
//! times, so that a stall shows in them as it would to users (no coordinated omission). Sessions are
//! checked to stay on their instance. How late the generator itself was, and how much of a core it
//! took, stands in every report.
//!
//! | module | what it does |
//! |---|---|
//! | `net` | sockets, one thread, batches; the pace of an open loop |
//! | `report` | counts, histograms, JSON |
//! | `sip`, `diameter`, `tcp` | clients and servers of each protocol |
//! | `floor` | the bare forwarders that proxies are measured against |

mod diameter;
mod floor;
mod net;
mod report;
mod sip;
mod tcp;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

/// What to load.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Load {
    /// SIP: calls with Record-Route and Contact followed, registrations, OPTIONS.
    Sip(sip::SipOptions),
    /// Diameter: Gx sessions, Gy sessions, S6a transactions.
    Diameter(diameter::DiameterOptions),
    /// TCP: requests on open connections, new connections, streams, idle connections.
    Tcp(tcp::TcpOptions),
    /// A bare forwarder: what a proxy on this machine could do if it did nothing.
    Floor(floor::FloorOptions),
}

/// What all loads have in common.
#[derive(clap::Args, Clone, Debug)]
pub struct Common {
    /// Things begun a second.
    #[arg(long, default_value_t = 100.0, value_name = "PER-SECOND")]
    rate: f64,
    /// How long things are begun.
    #[arg(long = "for", default_value = "10s", value_name = "TIME", value_parser = duration)]
    lasting: Duration,
    /// How long servers run before the first thing is begun: an edge needs a moment to find them.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = duration)]
    settle: Duration,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Tells runs against one edge apart; drawn from the clock if not given.
    #[arg(long)]
    run: Option<u32>,
}

impl Common {
    fn seed(&self) -> u32 {
        self.run.unwrap_or_else(|| {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            since.map_or(1, |since| since.as_micros() as u32)
        })
    }

    /// The local address for a target.
    fn source_for(&self, target: SocketAddr) -> IpAddr {
        match (target.ip().is_loopback(), target.is_ipv4()) {
            (true, true) => Ipv4Addr::LOCALHOST.into(),
            (true, false) => Ipv6Addr::LOCALHOST.into(),
            // The kernel knows which address reaches the target.
            _ => std::net::UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
                .and_then(|socket| socket.connect(target).and_then(|()| socket.local_addr()))
                .map_or_else(|_| target.ip(), |local| local.ip()),
        }
    }
}

/// What runs under an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Udp,
    Tcp,
}

/// `udp://HOST:PORT` or `tcp://HOST:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) scheme: Scheme,
    pub(crate) address: SocketAddr,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| format!("{text}: expected udp://IP:PORT or tcp://IP:PORT"))?;
        let scheme = match scheme {
            "udp" => Scheme::Udp,
            "tcp" => Scheme::Tcp,
            other => return Err(format!("{other}: expected udp or tcp")),
        };
        let address = rest.parse().map_err(|error| format!("{rest}: {error}; expected IP:PORT"))?;
        Ok(Self { scheme, address })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.scheme == Scheme::Udp { "udp" } else { "tcp" };
        write!(out, "{scheme}://{}", self.address)
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    strowger_contract::duration::parse(text)
}

/// Runs a load and prints its report.
///
/// # Errors
/// Sockets that cannot be had; anything that failed or was answered by the wrong instance.
pub fn run(load: &Load) -> Result<()> {
    let ((report, end), common) = match load {
        Load::Sip(options) => (sip::run(options)?, options.common()),
        Load::Diameter(options) => (diameter::run(options)?, options.common()),
        Load::Tcp(options) => (tcp::run(options)?, options.common()),
        Load::Floor(options) => return floor::run(options),
    };
    if common.json {
        println!("{}", report.json(end));
    } else {
        print!("{}", report.text(end));
    }
    if report.bad() > 0 {
        bail!("{} of {} failed", report.bad(), report.begun);
    }
    Ok(())
}
