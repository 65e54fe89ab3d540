//! SIP: callers on one side of the edge, instances on the other.

mod answerer;
mod caller;
mod message;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use strowger_contract::Framer;
use strowger_sip::SipFramer;
use strowger_sip::scan::{Scan, Start};

use self::answerer::Answerers;
use self::caller::{Callers, Kind};
use self::message::Identity;
use super::net::{Handler, Net, Pace, Place, Role};
use super::report::Report;
use super::{Address, Common, Scheme};

/// SIP load.
#[derive(clap::Args, Clone, Debug)]
pub struct SipOptions {
    /// Where calls go: udp://HOST:PORT or tcp://HOST:PORT. Without it only the instances run.
    #[arg(long, value_name = "ADDRESS")]
    target: Option<Address>,
    /// Play an instance there; may be given several times. Its number is its place.
    #[arg(long = "answer", value_name = "ADDRESS")]
    answers: Vec<Address>,
    /// The number of the first instance: tells instances of several processes apart.
    #[arg(long, default_value_t = 0, value_name = "N")]
    first: usize,
    /// What is begun.
    #[arg(long, value_enum, default_value = "call")]
    kind: Kind,
    /// How long calls last from the ACK to the BYE.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = super::duration)]
    hold: Duration,
    /// How long instances ring before they answer.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = super::duration)]
    ring: Duration,
    /// Instances send no 180.
    #[arg(long)]
    no_ringing: bool,
    /// Without an answer for so long a request has failed.
    #[arg(long, default_value = "32s", value_name = "TIME", value_parser = super::duration)]
    timeout: Duration,
    /// Connections to a tcp:// target.
    #[arg(long, default_value_t = 4, value_name = "N")]
    connections: usize,
    /// Bytes added to each request.
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    padding: usize,
    #[command(flatten)]
    common: Common,
}

impl SipOptions {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }
}

struct Parties {
    callers: Option<Callers>,
    answerers: Answerers,
    scan: Scan,
    report: Report,
}

/// The callers' role; instances' roles are their numbers.
const CALLER: Role = usize::MAX;

impl Handler for Parties {
    fn opened(&mut self, _: &mut Net, _: Instant, stream: usize, role: Role) {
        if role == CALLER
            && let Some(callers) = &mut self.callers
        {
            callers.streams.push(stream);
        }
    }

    fn message(&mut self, net: &mut Net, now: Instant, from: Place, role: Role, bytes: &[u8]) {
        if self.scan.scan(bytes).is_err() {
            return self.report.count("unreadable_messages");
        }
        let read = (bytes, &self.scan);
        match (self.scan.start, &mut self.callers) {
            (Start::Response { .. }, Some(callers)) => {
                callers.on_answer(net, now, read, &mut self.report);
            }
            (Start::Request { .. }, _) if role != CALLER => {
                self.answerers.on_request(net, now, from, role, read, &mut self.report);
            }
            _ => self.report.count("strange_messages"),
        }
    }

    fn closed(&mut self, _: &mut Net, _: Instant, stream: usize, role: Role) {
        if role == CALLER
            && let Some(callers) = &mut self.callers
        {
            callers.streams.retain(|&open| open != stream);
            self.report.count("connections_closed");
        }
    }
}

/// Runs it.
pub(crate) fn run(options: &SipOptions) -> Result<(Report, Instant)> {
    let mut net = Net::new(|| Box::<SipFramer>::default() as Box<dyn Framer>)?;
    let now = Instant::now();
    let mut identities = Vec::new();
    for (number, address) in options.answers.iter().enumerate() {
        let local = listen(&mut net, *address, number)
            .with_context(|| format!("cannot listen at {address}"))?;
        identities.push(identity(options, *address, local, String::new()));
    }
    let rings = !options.no_ringing;
    let answerers = Answerers::new(now, (options.first, identities), rings, options.ring);
    let callers =
        options.target.map(|target| connect(&mut net, options, now, target)).transpose()?;
    let report = Report::new("sip", now);
    let mut parties = Parties { callers, answerers, scan: Scan::default(), report };
    net.idle(options.common.settle, &mut parties)?;
    if options.target.is_some_and(|target| target.scheme == Scheme::Tcp) {
        settle(&mut net, &mut parties, options.connections)?;
    }
    drive(&mut net, &mut parties, options)?;
    let end = Instant::now();
    let report = &mut parties.report;
    if parties.answerers.misrouted > 0 {
        report.failed.insert("reached another's instance".into(), parties.answerers.misrouted);
    }
    if net.unsent > 0 {
        report.counts.insert("datagrams_unsent", net.unsent);
    }
    Ok((parties.report, end))
}

fn identity(options: &SipOptions, at: Address, local: SocketAddr, domain: String) -> Identity {
    Identity {
        transport: if at.scheme == Scheme::Udp { "UDP" } else { "TCP" },
        local,
        domain,
        run: options.common.seed(),
        padding: options.padding,
    }
}

fn listen(net: &mut Net, at: Address, role: Role) -> std::io::Result<SocketAddr> {
    match at.scheme {
        Scheme::Udp => net.bind_datagrams(at.address, role).map(|(_, local)| local),
        Scheme::Tcp => net.listen(at.address, role),
    }
}

fn connect(net: &mut Net, options: &SipOptions, now: Instant, target: Address) -> Result<Callers> {
    let any = SocketAddr::new(options.common.source_for(target.address), 0);
    let (socket, local) = net.bind_datagrams(any, CALLER)?;
    if target.scheme == Scheme::Tcp {
        for _ in 0..options.connections.max(1) {
            net.connect(target.address, CALLER)
                .with_context(|| format!("cannot connect to {target}"))?;
        }
    }
    let identity = identity(options, target, local, target.address.to_string());
    let how = (options.kind, options.hold, options.timeout);
    Ok(Callers::new(now, identity, how, target.address, socket))
}

/// Waits until the connections are open.
fn settle(net: &mut Net, parties: &mut Parties, wanted: usize) -> Result<()> {
    let limit = Instant::now() + Duration::from_secs(5);
    while parties.callers.as_ref().is_some_and(|callers| callers.streams.len() < wanted) {
        anyhow::ensure!(Instant::now() < limit, "the target accepts no connection");
        net.turn(Instant::now() + Duration::from_millis(10), parties)?;
    }
    Ok(())
}

fn drive(net: &mut Net, parties: &mut Parties, options: &SipOptions) -> Result<()> {
    let common = &options.common;
    let start = Instant::now();
    parties.report.restart(start);
    let mut pace = Pace::new(start, common.rate, common.lasting);
    // What is under way at the end has the time that it would have had anyway.
    let end = start + common.lasting + options.hold + options.ring + options.timeout;
    loop {
        let now = Instant::now();
        if let Some(callers) = &mut parties.callers {
            while let Some(intended) = pace.take(now) {
                callers.begin(net, now, intended, &mut parties.report);
            }
            if pace.next().is_none() && callers.under_way() == 0 || now > end {
                return Ok(());
            }
            callers.on_time(net, now, &mut parties.report);
        } else if now > start + common.lasting {
            return Ok(());
        }
        parties.answerers.on_time(net, now, &mut parties.report);
        let next = [
            pace.next().filter(|_| parties.callers.is_some()),
            parties.callers.as_ref().and_then(Callers::next),
            parties.answerers.next(),
        ];
        let longest = now + Duration::from_millis(100);
        let until = next.into_iter().flatten().min().unwrap_or(longest).min(longest);
        net.turn(until, parties)?;
    }
}
