//! Many calls at once from this process, each checked: what became of it, and who answered what.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::phone::{headers, status};

const T1: Duration = Duration::from_millis(500);
const T2: Duration = Duration::from_secs(4);

/// Timers B and F of a caller.
const GIVES_UP: Duration = Duration::from_secs(32);

/// Who has heard a provisional answer waits as long as a proxy's Timer C lets it ring.
const RINGS: Duration = Duration::from_secs(200);

/// What a call went through.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    pub(crate) begun: Option<Instant>,
    /// From the INVITE to the first 2xx.
    pub(crate) setup: Option<Duration>,
    pub(crate) answered: Option<Instant>,
    /// Whose Contact the 2xx had: `i3@127.0.0.1:5070`.
    pub(crate) instance: String,
    pub(crate) ended: Option<Instant>,
    /// Final codes of INVITE, INFO and BYE; 0: none came.
    pub(crate) codes: BTreeMap<&'static str, u16>,
    /// Answers within the dialog that came from somebody else than who answered the INVITE.
    pub(crate) strangers: Vec<String>,
    /// Further 2xx of other instances, acknowledged and ended at once.
    pub(crate) second_answers: u32,
}

impl Record {
    /// A code, or 0.
    pub(crate) fn code(&self, method: &str) -> u16 {
        self.codes.get(method).copied().unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asked,
    Talking,
    Informing,
    Leaving,
    Over,
}

struct Call {
    record: Record,
    stage: Stage,
    hold: Duration,
    /// What is repeated, in what pauses.
    repeat: String,
    interval: Duration,
    gives_up: Instant,
    dialog: String,
}

/// A BYE that ends the dialog of a second answer.
struct Extra {
    text: String,
    instance: String,
    next: Instant,
    gives_up: Instant,
}

/// Callers behind one socket.
pub(crate) struct Callers {
    socket: UdpSocket,
    name: String,
    calls: Vec<Call>,
    timers: BinaryHeap<Reverse<(Instant, usize, u32)>>,
    /// BYEs of second answers, by branch, until each is answered.
    extra: HashMap<String, Extra>,
    /// Second answers whose BYE was sent.
    ended: HashSet<(usize, String)>,
    open: usize,
}

impl Callers {
    pub(crate) fn new(edge: SocketAddr, name: &str) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.connect(edge).expect("loopback");
        // It stands for many telephones: what one of them would take must not be lost here.
        socket2::SockRef::from(&socket).set_recv_buffer_size(8 << 20).expect("a socket option");
        Self {
            socket,
            name: name.to_owned(),
            calls: Vec::new(),
            timers: BinaryHeap::new(),
            extra: HashMap::new(),
            ended: HashSet::new(),
            open: 0,
        }
    }

    pub(crate) fn open(&self) -> usize {
        self.open
    }

    pub(crate) fn records(self) -> Vec<Record> {
        self.calls.into_iter().map(|call| call.record).collect()
    }

    /// BYEs of second answers that nobody has answered (yet).
    pub(crate) fn unanswered_extra(&self) -> Vec<&str> {
        self.extra.values().map(|extra| &*extra.instance).collect()
    }

    fn send(&self, text: &str) {
        // A refused datagram is a lost one: the edge may just be restarting.
        let _lost = self.socket.send(text.as_bytes());
    }

    fn request(&self, method: &str, number: u32, call: usize, uri: &str, dialog: &str) -> String {
        let (local, name) = (self.socket.local_addr().expect("bound"), &self.name);
        format!(
            "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/UDP {local};rport;branch=z9hG4bK{name}-{call}-{number}-{method}\r\nMax-Forwards: 70\r\nFrom: <sip:caller@{local}>;tag={name}{call}\r\n{dialog}Call-ID: {name}-{call}\r\nCSeq: {number} {method}\r\nContact: <sip:caller@{local}>\r\nContent-Length: 0\r\n\r\n"
        )
    }

    /// Begins a call that is held so long.
    pub(crate) fn begin(&mut self, now: Instant, hold: Duration) {
        let (call, uri) = (self.calls.len(), "sip:service@example.net");
        let invite = self.request("INVITE", 1, call, uri, &format!("To: <{uri}>\r\n"));
        self.send(&invite);
        let record = Record { begun: Some(now), ..Record::default() };
        self.calls.push(Call {
            record,
            stage: Stage::Asked,
            hold,
            repeat: invite,
            interval: T1,
            gives_up: now + GIVES_UP,
            dialog: String::new(),
        });
        self.open += 1;
        self.timers.push(Reverse((now + T1, call, 0)));
    }

    /// Receives and repeats until this time.
    pub(crate) fn run_until(&mut self, until: Instant) {
        let mut buffer = vec![0; 65_536];
        loop {
            let now = Instant::now();
            while let Some(Reverse((at, call, stage))) = self.timers.peek().copied()
                && at <= now
            {
                self.timers.pop();
                self.on_time(now, call, stage);
            }
            for extra in self.extra.values_mut() {
                if extra.next <= now && now < extra.gives_up {
                    extra.next = now + Duration::from_secs(1);
                    let _lost = self.socket.send(extra.text.as_bytes());
                }
            }
            if now >= until {
                return;
            }
            let next = self.timers.peek().map_or(until, |Reverse((at, ..))| (*at).min(until));
            let pause = next.saturating_duration_since(now).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(pause)).expect("an option");
            if let Ok(length) = self.socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                self.on_message(Instant::now(), &text);
            }
        }
    }

    fn on_time(&mut self, now: Instant, number: usize, stage: u32) {
        let call = &mut self.calls[number];
        if call.stage as u32 != stage {
            return;
        }
        if call.stage == Stage::Talking {
            let informs = number.is_multiple_of(4) && call.record.code("INFO") == 0;
            let (method, order, next) =
                if informs { ("INFO", 2, Stage::Informing) } else { ("BYE", 3, Stage::Leaving) };
            return self.ask(now, number, method, order, next);
        }
        if now >= call.gives_up {
            return self.over(now, number);
        }
        if !call.repeat.is_empty() {
            call.interval *= 2;
            if call.stage != Stage::Asked {
                call.interval = call.interval.min(T2);
            }
        }
        let (text, at) = (call.repeat.clone(), (now + call.interval).min(call.gives_up));
        if !text.is_empty() {
            self.send(&text);
        }
        self.timers.push(Reverse((at, number, stage)));
    }

    fn ask(&mut self, now: Instant, number: usize, method: &str, order: u32, next: Stage) {
        let (uri, rest) = split(&self.calls[number].dialog);
        let text = self.request(method, order, number, uri, rest);
        self.send(&text);
        let call = &mut self.calls[number];
        (call.stage, call.repeat, call.interval) = (next, text, T1);
        call.gives_up = now + GIVES_UP;
        self.timers.push(Reverse((now + T1, number, next as u32)));
    }

    fn over(&mut self, now: Instant, number: usize) {
        let call = &mut self.calls[number];
        call.stage = Stage::Over;
        call.repeat.clear();
        call.record.ended = Some(now);
        self.open -= 1;
    }

    fn on_message(&mut self, now: Instant, text: &str) {
        let code = status(text);
        let sequence = headers(text, "CSeq", "").first().copied().unwrap_or_default();
        let method = ["INVITE", "INFO", "BYE"].into_iter().find(|known| sequence.ends_with(known));
        let call_id = headers(text, "Call-ID", "i").first().copied().unwrap_or_default();
        let number = call_id.strip_prefix(&format!("{}-", self.name));
        let number = number.and_then(|number| number.parse::<usize>().ok());
        let (Some(method), Some(number)) = (method, number) else { return };
        if number >= self.calls.len() {
            return;
        }
        if sequence.starts_with("9 ") {
            if code >= 200 {
                self.extra.remove(&branch(text));
            }
            return;
        }
        if method == "INVITE" {
            return self.on_invite_answer(now, number, code, text);
        }
        let stage = if method == "INFO" { Stage::Informing } else { Stage::Leaving };
        let call = &mut self.calls[number];
        if code < 200 || call.stage != stage {
            return;
        }
        let instance = contact(text);
        if !instance.is_empty() && instance != call.record.instance {
            call.record.strangers.push(instance);
        }
        call.record.codes.insert(method, code);
        if method == "INFO" {
            call.stage = Stage::Talking;
            call.repeat.clear();
            let at = now + call.hold / 2;
            self.timers.push(Reverse((at, number, Stage::Talking as u32)));
        } else {
            self.over(now, number);
        }
    }

    fn on_invite_answer(&mut self, now: Instant, number: usize, code: u16, text: &str) {
        let to = headers(text, "To", "t").first().copied().unwrap_or_default().to_owned();
        let call = &mut self.calls[number];
        match (call.stage, code) {
            // No more repeats (RFC 3261 17.1.1.2).
            (Stage::Asked, ..200) => {
                call.repeat.clear();
                call.interval = RINGS;
                call.gives_up = call.record.begun.unwrap_or(now) + RINGS;
            }
            (_, 200..300) => {
                let dialog = dialog(text, &to);
                let (uri, rest) = split(&dialog);
                let ack = self.request("ACK", 1, number, uri, rest);
                self.send(&ack);
                let call = &mut self.calls[number];
                if call.stage == Stage::Asked {
                    call.record.instance = contact(text);
                    call.record.answered = Some(now);
                    call.record.setup = call.record.begun.map(|begun| now - begun);
                    call.record.codes.insert("INVITE", code);
                    (call.stage, call.dialog) = (Stage::Talking, dialog);
                    call.repeat.clear();
                    let part = if number.is_multiple_of(4) { 2 } else { 1 };
                    let at = now + call.hold / part;
                    self.timers.push(Reverse((at, number, Stage::Talking as u32)));
                } else if let second = contact(text)
                    && second != call.record.instance
                {
                    // Another instance answered too: that call is not wanted.
                    let bye = self.request("BYE", 9, number, uri, rest);
                    // Each instance's dialog has a BYE of its own.
                    let own = branch(&bye);
                    let text =
                        bye.replace(&own, &format!("{own}-{}", second.replace(['@', ':'], "-")));
                    if self.ended.insert((number, second.clone())) {
                        self.calls[number].record.second_answers += 1;
                        let next = now + Duration::from_secs(1);
                        self.send(&text);
                        let extra =
                            Extra { instance: second, next, gives_up: now + GIVES_UP, text };
                        self.extra.insert(branch(&extra.text), extra);
                    }
                }
            }
            (Stage::Asked, 300..) => {
                let uri = "sip:service@example.net";
                // The ACK has the INVITE's branch (RFC 3261 17.1.1.3).
                let ack = self.request("ACK", 1, number, uri, &format!("To: {to}\r\n"));
                self.send(&ack.replace("-1-ACK", "-1-INVITE"));
                self.calls[number].record.codes.insert("INVITE", code);
                self.over(now, number);
            }
            (Stage::Over, 300..) => {
                let uri = "sip:service@example.net";
                let ack = self.request("ACK", 1, number, uri, &format!("To: {to}\r\n"));
                self.send(&ack.replace("-1-ACK", "-1-INVITE"));
            }
            _ => {}
        }
    }
}

/// The branch of the first Via.
fn branch(text: &str) -> String {
    let via = headers(text, "Via", "v").first().copied().unwrap_or_default().to_owned();
    let branch = via.split(';').find_map(|parameter| parameter.strip_prefix("branch="));
    branch.unwrap_or_default().to_owned()
}

/// `i3@127.0.0.1:5070` of `<sip:i3@127.0.0.1:5070>`.
fn contact(text: &str) -> String {
    let value = headers(text, "Contact", "m").first().copied().unwrap_or_default().to_owned();
    let value = value.trim_start_matches("<sip:");
    value.split(['>', ';']).next().unwrap_or_default().to_owned()
}

/// The remote target in the first line, then Route and To as they are sent.
fn dialog(text: &str, to: &str) -> String {
    let routes: String = headers(text, "Record-Route", "")
        .into_iter()
        .rev()
        .map(|route| format!("Route: {route}\r\n"))
        .collect();
    format!("sip:{}\n{routes}To: {to}\r\n", contact(text))
}

fn split(dialog: &str) -> (&str, &str) {
    dialog.split_once('\n').unwrap_or_default()
}
