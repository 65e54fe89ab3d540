//! TCP: requests on open connections, new connections, streams, idle connections.
//!
//! A request is a length (4 bytes, of the whole), the answer's length (4 bytes), and filling; an
//! answer is its length, the instance's number (4 bytes), and filling.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hashbrown::HashMap;
use strowger_contract::{FrameError, Framer, Framing};

use super::net::{Handler, Net, Pace, Place, Role};
use super::report::Report;
use super::{Address, Common};

/// TCP load.
#[derive(clap::Args, Clone, Debug)]
pub struct TcpOptions {
    /// Where connections go: tcp://IP:PORT. Without it only the servers run.
    #[arg(long, value_name = "ADDRESS")]
    target: Option<Address>,
    /// Play a server there; may be given several times.
    #[arg(long = "answer", value_name = "ADDRESS")]
    answers: Vec<Address>,
    /// What is done.
    #[arg(long, value_enum, default_value = "requests")]
    kind: Kind,
    /// Open connections (requests, streams, idle).
    #[arg(long, default_value_t = 16, value_name = "N")]
    connections: usize,
    /// A request's size.
    #[arg(long, default_value_t = 200, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    bytes: u32,
    /// An answer's size.
    #[arg(long, default_value_t = 1_000, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    answer_bytes: u32,
    /// Without an answer for so long a request has failed.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = super::duration)]
    timeout: Duration,
    #[command(flatten)]
    common: Common,
}

impl TcpOptions {
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// `--rate` requests a second over `--connections` open connections.
    Requests,
    /// `--rate` connections a second, one request on each.
    Connects,
    /// As many bytes as pass, from server to client, over `--connections`.
    Streams,
    /// `--connections` opened, proved by one request each, and held.
    Idle,
}

/// The largest frame: a bound for what a broken peer can make the generator buffer.
const FRAME_BYTES_MAX: usize = 2 << 20;

/// An answer's length that asks for a stream without end.
const ENDLESS: u32 = u32::MAX;

/// What a streaming server keeps queued for each client.
const STREAM_AHEAD_BYTES: usize = 512 << 10;

const CLIENT: Role = usize::MAX;

/// Frames by their length; once a stream without end was asked for, all that comes.
#[derive(Default)]
struct LengthFramer;

impl Framer for LengthFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        let need =
            |size: usize| Framing::Need(NonZeroUsize::new(size).unwrap_or(NonZeroUsize::MIN));
        let Some(length) = number(buffer, 0) else { return Ok(need(4)) };
        if length == ENDLESS {
            // A part of a stream: whatever is there.
            return Ok(NonZeroUsize::new(buffer.len()).map_or_else(|| need(1), Framing::Message));
        }
        let length = length as usize;
        if !(8..=FRAME_BYTES_MAX).contains(&length) {
            return Err(FrameError::Malformed("length"));
        }
        Ok(match NonZeroUsize::new(length) {
            Some(whole) if buffer.len() >= length => Framing::Message(whole),
            _ => need(length),
        })
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

struct Parties {
    options: TcpOptions,
    report: Report,
    /// Open client connections, and the intended times of what is under way on each, in order.
    open: Vec<usize>,
    asked: HashMap<usize, VecDeque<Instant>>,
    under_way: usize,
    /// Server streams that send without end.
    streaming: Vec<usize>,
    /// What was received of streams.
    streamed: u64,
    filling: Vec<u8>,
}

impl Handler for Parties {
    fn opened(&mut self, net: &mut Net, _: Instant, stream: usize, role: Role) {
        if role != CLIENT {
            return;
        }
        self.open.push(stream);
        match self.options.kind {
            Kind::Connects | Kind::Idle => self.ask(net, stream, self.options.answer_bytes),
            Kind::Streams => self.ask(net, stream, ENDLESS),
            Kind::Requests => {}
        }
    }

    fn message(&mut self, net: &mut Net, now: Instant, from: Place, role: Role, bytes: &[u8]) {
        let Place::Stream(stream) = from else { return };
        if role != CLIENT {
            return self.serve(net, stream, role, bytes);
        }
        if self.options.kind == Kind::Streams {
            self.streamed += bytes.len() as u64;
            return;
        }
        let Some(intended) = self.asked.get_mut(&stream).and_then(VecDeque::pop_front) else {
            return self.report.count("strange_answers");
        };
        self.under_way -= 1;
        self.report.good += 1;
        let instance = number(bytes, 4).unwrap_or(0) as usize;
        *self.report.instances.entry(instance).or_default() += 1;
        let what = if self.options.kind == Kind::Requests { "request" } else { "connection" };
        self.report.latency(what, now.saturating_duration_since(intended));
        if self.options.kind == Kind::Connects {
            net.close(stream);
            self.forget(stream);
        }
    }

    fn closed(&mut self, _: &mut Net, _: Instant, stream: usize, role: Role) {
        self.streaming.retain(|&sending| sending != stream);
        if role == CLIENT {
            let lost = self.forget(stream);
            self.under_way -= lost;
            for _ in 0..lost {
                self.report.fail("connection closed");
            }
            if lost == 0 {
                self.report.count("connections_closed");
            }
        }
    }
}

impl Parties {
    fn forget(&mut self, stream: usize) -> usize {
        if let Some(place) = self.open.iter().position(|&open| open == stream) {
            self.open.swap_remove(place);
        }
        self.asked.remove(&stream).map_or(0, |asked| asked.len())
    }

    fn ask(&self, net: &mut Net, stream: usize, answer: u32) {
        let bytes = self.options.bytes;
        net.send(Place::Stream(stream), |out| {
            out.extend_from_slice(&bytes.to_be_bytes());
            out.extend_from_slice(&answer.to_be_bytes());
            out.extend_from_slice(&self.filling[..bytes as usize - 8]);
        });
    }

    fn serve(&mut self, net: &mut Net, stream: usize, instance: usize, bytes: &[u8]) {
        let answer = number(bytes, 4).unwrap_or(8);
        if answer == ENDLESS {
            return self.streaming.push(stream);
        }
        let length = (answer as usize).clamp(8, FRAME_BYTES_MAX);
        net.send(Place::Stream(stream), |out| {
            out.extend_from_slice(&(length as u32).to_be_bytes());
            out.extend_from_slice(&(instance as u32).to_be_bytes());
            out.extend_from_slice(&self.filling[..length - 8]);
        });
    }

    /// Tops up the streams without end.
    fn stream_on(&self, net: &mut Net) {
        for &stream in &self.streaming {
            if net.queued(stream) < STREAM_AHEAD_BYTES / 2 {
                net.send(Place::Stream(stream), |out| {
                    out.extend_from_slice(&self.filling[..STREAM_AHEAD_BYTES]);
                });
            }
        }
    }

    /// Begins the next request or connection.
    fn begin(&mut self, net: &mut Net, now: Instant, intended: Instant, target: Address) {
        self.report.begin(intended, now);
        let stream = match self.options.kind {
            Kind::Requests if self.open.is_empty() => return self.report.fail("no connection"),
            Kind::Requests => self.open[self.report.begun as usize % self.open.len()],
            _ => match net.connect(target.address, CLIENT) {
                Ok(stream) => stream,
                Err(error) => return self.report.fail(&format!("connect: {error}")),
            },
        };
        self.under_way += 1;
        self.asked.entry(stream).or_default().push_back(intended);
        if self.options.kind == Kind::Requests {
            self.ask(net, stream, self.options.answer_bytes);
        }
    }
}

/// Runs it.
pub(crate) fn run(options: &TcpOptions) -> Result<(Report, Instant)> {
    let mut net = Net::new(|| Box::new(LengthFramer) as Box<dyn Framer>)?;
    for (number, address) in options.answers.iter().enumerate() {
        net.listen(address.address, number)
            .with_context(|| format!("cannot listen at {address}"))?;
    }
    let mut parties = Parties {
        options: options.clone(),
        report: Report::new("tcp", Instant::now()),
        open: Vec::new(),
        asked: HashMap::new(),
        under_way: 0,
        streaming: Vec::new(),
        streamed: 0,
        // Every byte 0xff: a part of a stream begins with the mark of one wherever it was cut.
        filling: vec![0xff; FRAME_BYTES_MAX],
    };
    net.idle(options.common.settle, &mut parties)?;
    if let Some(target) = options.target.filter(|_| options.kind != Kind::Connects) {
        open_all(&mut net, &mut parties, target)?;
    }
    drive(&mut net, &mut parties)?;
    let end = Instant::now();
    let report = &mut parties.report;
    for _ in 0..parties.under_way {
        report.fail("no answer");
    }
    if options.kind == Kind::Streams {
        report.counts.insert("streamed_bytes", parties.streamed);
    }
    Ok((parties.report, end))
}

fn open_all(net: &mut Net, parties: &mut Parties, target: Address) -> Result<()> {
    let wanted = parties.options.connections;
    let limit = Instant::now() + Duration::from_secs(30);
    for batch in 0..wanted.div_ceil(128) {
        for _ in batch * 128..wanted.min((batch + 1) * 128) {
            let stream = net.connect(target.address, CLIENT)?;
            if parties.options.kind == Kind::Idle {
                let now = Instant::now();
                parties.report.begin(now, now);
                parties.under_way += 1;
                parties.asked.entry(stream).or_default().push_back(now);
            }
        }
        while parties.open.len() < wanted.min((batch + 1) * 128) {
            ensure!(
                Instant::now() < limit,
                "the target accepts no more than {}",
                parties.open.len()
            );
            net.turn(Instant::now() + Duration::from_millis(10), parties)?;
        }
    }
    Ok(())
}

fn drive(net: &mut Net, parties: &mut Parties) -> Result<()> {
    let (common, target) = (parties.options.common.clone(), parties.options.target);
    let start = Instant::now();
    if parties.options.kind != Kind::Idle {
        parties.report.restart(start);
    }
    let paced = matches!(parties.options.kind, Kind::Requests | Kind::Connects);
    let mut pace = Pace::new(start, common.rate, common.lasting);
    let end = start + common.lasting + parties.options.timeout;
    loop {
        let now = Instant::now();
        match target.filter(|_| paced) {
            Some(target) => {
                while let Some(intended) = pace.take(now) {
                    parties.begin(net, now, intended, target);
                }
                if pace.next().is_none() && parties.under_way == 0 || now > end {
                    return Ok(());
                }
            }
            None if now > start + common.lasting => return Ok(()),
            None => {}
        }
        parties.stream_on(net);
        let longest = now + Duration::from_millis(100);
        let next = pace.next().filter(|_| paced && target.is_some());
        net.turn(next.unwrap_or(longest).min(longest), parties)?;
    }
}
