//! Overload control between neighbours (RFC 7339, RFC 7415): what upstream neighbours are told when
//! they ask in their Via, and what is held back from instances that told of their own load.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{BackendId, ClassId, Note, Outbox, PoolId, PoolLoad, Router};

use crate::branch::decimal;
use crate::engine::SipEngine;
use crate::uri::parameter;
use crate::via::Via;

/// Upstream neighbours that share a rate, at most.
const NEIGHBOURS_MAX: usize = 64;

/// A neighbour that has not asked for so long takes no share.
const NEIGHBOUR_FOR: Duration = Duration::from_secs(30);

/// Pools of a listener whose load is followed, and instances, at most.
const POOLS_MAX: usize = 256;
const BACKENDS_MAX: usize = 65_536;

/// RFC 7339 4.3: what an absent `oc-validity` means; and the longest that is believed.
const VALIDITY: Duration = Duration::from_millis(500);
const VALIDITY_MAX: Duration = Duration::from_secs(30);

/// Which algorithm a neighbour that knows both is told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Percent of requests to leave out (RFC 7339).
    #[default]
    Loss,
    /// Requests in a second (RFC 7415).
    Rate,
}

/// The option `overload_control`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OverloadControl {
    /// Answer neighbours whose Via asks by `oc`.
    pub server: bool,
    /// Ask instances by `oc` in our Via, and send them less when they say so.
    pub client: bool,
    /// For neighbours that know `loss` and `rate`.
    pub prefer: Algorithm,
    /// How long an answer holds, 100ms to 30s.
    pub validity: Span,
}

impl Default for OverloadControl {
    fn default() -> Self {
        Self { server: true, client: false, prefer: Algorithm::Loss, validity: Span::millis(500) }
    }
}

impl OverloadControl {
    pub(crate) fn check(&self) -> Option<String> {
        (self.validity < Span::millis(100) || self.validity.0 > VALIDITY_MAX)
            .then(|| "must be 100ms to 30s (RFC 7339 says 500ms)".to_owned())
    }
}

/// What neighbours are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Percent.
    pub(crate) loss: u32,
    /// In a second; `None`: as many as there are.
    pub(crate) rate: Option<u32>,
    pub(crate) prefer: Algorithm,
    pub(crate) validity_ms: u32,
    /// Seconds and milliseconds: it only grows.
    pub(crate) sequence: (u64, u32),
}

/// What a pool's neighbours shall leave out next, in thousandths. What is refused is a share of what
/// still comes, so shares multiply; only half of the step is taken at a time, since all neighbours
/// take it at once. Without refusals a tenth is given back.
pub(crate) fn next_loss(loss: u32, load: PoolLoad) -> u32 {
    let loss = loss.min(1_000);
    let refused = load.refused_permille.min(1_000);
    if refused == 0 {
        return loss - (loss / 10).max(loss.min(5));
    }
    // Not all: who hears nothing of an overload's end would stay away for ever.
    (loss + ((1_000 - loss) * refused / 1_000).div_ceil(2)).min(950)
}

#[derive(Debug)]
struct Pool {
    pool: PoolId,
    loss: u32,
    load: PoolLoad,
    due: Instant,
}

/// What an instance told.
#[derive(Clone, Copy, Debug)]
struct Heard {
    loss: u32,
    until: Instant,
    sequence: (u64, u32),
    /// Percent that have not yet made a whole request.
    owed: u32,
}

/// What is known of others' load, and told of ours.
#[derive(Debug, Default)]
pub(crate) struct Overload {
    began: Option<Instant>,
    pools: Vec<Pool>,
    neighbours: Vec<(IpAddr, Instant)>,
    heard: HashMap<BackendId, Heard>,
    /// What whoever is answered now is told.
    pub(crate) telling: Option<Told>,
}

impl Overload {
    /// A neighbour has asked.
    fn asked(&mut self, now: Instant, neighbour: IpAddr) {
        if let Some(known) = self.neighbours.iter_mut().find(|(ip, _)| *ip == neighbour) {
            known.1 = now;
        } else {
            self.neighbours.retain(|(_, last)| now.duration_since(*last) < NEIGHBOUR_FOR);
            if self.neighbours.len() < NEIGHBOURS_MAX {
                self.neighbours.push((neighbour, now));
            }
        }
    }

    fn told(
        &mut self,
        now: Instant,
        epoch_seconds: u32,
        option: &OverloadControl,
        pool: PoolId,
        load: impl FnOnce() -> PoolLoad,
    ) -> Told {
        let began = *self.began.get_or_insert(now);
        let known = self.pools.iter().position(|known| known.pool == pool);
        let at = known.unwrap_or_else(|| {
            if self.pools.len() >= POOLS_MAX {
                self.pools.clear();
            }
            self.pools.push(Pool { pool, loss: 0, load: PoolLoad::default(), due: now });
            self.pools.len() - 1
        });
        let known = &mut self.pools[at];
        if known.due <= now {
            known.load = load();
            known.loss = next_loss(known.loss, known.load);
            known.due = now + option.validity.0;
        }
        let share = self.neighbours.len().max(1) as u32;
        let passed = now.saturating_duration_since(began);
        Told {
            loss: known.loss.div_ceil(10),
            rate: (known.loss > 0).then(|| (known.load.admitted_per_second / share).max(1)),
            prefer: option.prefer,
            validity_ms: option.validity.0.as_millis() as u32,
            sequence: (u64::from(epoch_seconds) + passed.as_secs(), passed.subsec_millis()),
        }
    }

    /// What an instance's answer says of its load, in the Via that was ours (RFC 7339 5.3).
    pub(crate) fn heard(&mut self, now: Instant, backend: BackendId, via: &Via<'_>) {
        let Some(Some(value)) = parameter(via.parameters, b"oc") else { return };
        let named = |name: &[u8]| parameter(via.parameters, name).flatten();
        let algorithm = named(b"oc-algo").unwrap_or(b"loss");
        let (Some(loss), true) = (number(value), lists(algorithm, b"loss")) else { return };
        let sequence = named(b"oc-seq").and_then(sequence).unwrap_or_default();
        let validity = named(b"oc-validity").and_then(number);
        let validity =
            validity.map_or(VALIDITY, |ms| Duration::from_millis(u64::from(ms))).min(VALIDITY_MAX);
        let known = self.heard.get(&backend).copied();
        if known.is_some_and(|known| known.sequence > sequence && known.until > now) {
            // 4.4: an answer that was overtaken.
            return;
        }
        if loss == 0 || validity.is_zero() {
            self.heard.remove(&backend);
            return;
        }
        if self.heard.len() >= BACKENDS_MAX {
            self.heard.clear();
        }
        let owed = known.map_or(0, |known| known.owed);
        let told = Heard { loss: loss.min(100), until: now + validity, sequence, owed };
        self.heard.insert(backend, told);
    }

    /// Whether this request is one of those to be left out: of a hundred as many as were asked for,
    /// spread evenly. Emergencies and what belongs to a session always go (RFC 7339 5.10.1).
    pub(crate) fn is_left_out(
        &mut self,
        now: Instant,
        backend: BackendId,
        class: ClassId,
        in_session: bool,
    ) -> bool {
        if self.heard.is_empty() || in_session || class <= ClassId::IN_SESSION {
            return false;
        }
        let Some(known) = self.heard.get_mut(&backend) else { return false };
        if known.until <= now {
            self.heard.remove(&backend);
            return false;
        }
        known.owed += known.loss;
        let out = known.owed >= 100;
        if out {
            known.owed -= 100;
        }
        out
    }

    /// As [`Overload::is_left_out`] where nothing is remembered: what a request's key says of it holds for
    /// its retransmissions too.
    pub(crate) fn leaves_out(
        &self,
        now: Instant,
        backend: BackendId,
        class: ClassId,
        in_session: bool,
        key: u64,
    ) -> bool {
        let known = self.heard.get(&backend).filter(|known| known.until > now);
        let loss = known.map_or(0, |known| known.loss);
        !in_session && class > ClassId::IN_SESSION && (key >> 32) % 100 < u64::from(loss)
    }
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok().filter(|text| text.len() <= 9)?.parse().ok()
}

fn sequence(text: &[u8]) -> Option<(u64, u32)> {
    let (whole, part) = std::str::from_utf8(text).ok()?.split_once('.')?;
    if whole.len() > 12 || part.len() > 5 {
        return None;
    }
    Some((whole.parse().ok()?, part.parse().ok()?))
}

/// Whether a list in quotes, or a bare word, has an algorithm.
fn lists(text: &[u8], algorithm: &[u8]) -> bool {
    text.split(|byte| matches!(byte, b',' | b'"'))
        .any(|one| one.trim_ascii().eq_ignore_ascii_case(algorithm))
}

/// Writes what we tell into the Via line that begins at `at`, if its first value asks (RFC 7339 5.3):
/// in place of what it says of `oc` so far.
pub(crate) fn tell(out: &mut Vec<u8>, at: usize, told: &Told) {
    let Some(colon) = out.get(at..).and_then(|line| memchr::memchr(b':', line)) else { return };
    let from = at + colon + 1;
    let line_end = memchr::memchr(b'\n', &out[from..]).map_or(out.len(), |end| from + end);
    // A folded line is looked at as far as its first break, where hardly anybody puts one.
    let value = &out[from..line_end];
    // What is no Via at all is not written to, whatever stands in it.
    let Some((Via { whole, parameters, .. }, _)) = Via::first(value) else { return };
    if parameter(parameters, b"oc").is_none() {
        return;
    }
    let value_end = line_end - value.trim_ascii_start().len() + whole.len();
    let parameters_at = value_end - parameters.len();
    let algorithms = parameter(parameters, b"oc-algo").flatten().unwrap_or(b"loss");
    let rates = lists(algorithms, b"rate")
        && (told.prefer == Algorithm::Rate || !lists(algorithms, b"loss"));
    let end = strip(out, parameters_at, value_end);
    let tail = out.len();
    let (value, validity) = match (rates, told.rate) {
        (false, _) => (told.loss, told.validity_ms),
        (true, Some(rate)) => (rate, told.validity_ms),
        // RFC 7339 4.3: there is no limit any more.
        (true, None) => (0, 0),
    };
    out.extend_from_slice(b";oc=");
    decimal(u64::from(value), out);
    out.extend_from_slice(if rates { b";oc-algo=\"rate\"" } else { b";oc-algo=\"loss\"" });
    out.extend_from_slice(b";oc-validity=");
    decimal(u64::from(validity), out);
    out.extend_from_slice(b";oc-seq=");
    decimal(told.sequence.0, out);
    out.push(b'.');
    for scale in [100, 10, 1] {
        out.push(b'0' + (told.sequence.1 / scale % 10) as u8);
    }
    let added = out.len() - tail;
    out[end..].rotate_right(added);
}

/// Takes the parameters of overload control out of `out[from..to]`; where the rest ends.
fn strip(out: &mut Vec<u8>, from: usize, mut to: usize) -> usize {
    let mut at = from;
    while at < to {
        // `at` stands on a semicolon.
        let (mut quoted, mut end) = (false, to);
        for (offset, byte) in out[at + 1..to].iter().enumerate() {
            match byte {
                b'"' => quoted = !quoted,
                b';' if !quoted => {
                    end = at + 1 + offset;
                    break;
                }
                _ => {}
            }
        }
        let name = out[at + 1..end].split(|byte| *byte == b'=').next().unwrap_or_default();
        let ours = [&b"oc"[..], b"oc-algo", b"oc-validity", b"oc-seq"]
            .iter()
            .any(|known| name.trim_ascii().eq_ignore_ascii_case(known));
        if ours {
            out.drain(at..end);
            to -= end - at;
        } else {
            at = end;
        }
    }
    to
}

impl SipEngine {
    /// What is answered from now on tells of this pool's load, or of the listener's own pool's, if
    /// anybody has asked at all.
    pub(crate) fn be_telling(&mut self, now: Instant, pool: Option<PoolId>, router: &dyn Router) {
        if self.overload.neighbours.is_empty() {
            return;
        }
        let option = &self.settings.options.overload_control;
        let pool = pool.or(self.settings.pool).filter(|_| option.server);
        let started = self.settings.started;
        self.overload.telling = pool
            .map(|pool| self.overload.told(now, started, option, pool, || router.pool_load(pool)));
    }

    /// Notes a neighbour whose Via asks.
    pub(crate) fn note_neighbour(&mut self, now: Instant, via: &Via<'_>, ip: IpAddr) {
        if self.settings.options.overload_control.server
            && parameter(via.parameters, b"oc").is_some()
        {
            self.overload.asked(now, ip);
        }
    }

    /// An instance's answer may speak of its load.
    pub(crate) fn hear_load(
        &mut self,
        now: Instant,
        backend: BackendId,
        via: Option<&Via<'_>>,
        out: &mut Outbox,
    ) {
        let Some(via) = via.filter(|_| self.settings.options.overload_control.client) else {
            return;
        };
        if parameter(via.parameters, b"oc").flatten().is_some() {
            self.overload.heard(now, backend, via);
            out.note(Note::Count("sip_oc_heard"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(prefer: Algorithm) -> Told {
        Told { loss: 20, rate: Some(150), prefer, validity_ms: 500, sequence: (7, 42) }
    }

    fn tells(line: &str, told: &Told) -> String {
        let mut out = format!("Before: x\r\n{line}\r\nAfter: y\r\n").into_bytes();
        tell(&mut out, 11, told);
        let text = String::from_utf8(out).expect("text");
        let text = text.strip_prefix("Before: x\r\n").expect("untouched");
        text.strip_suffix("\r\nAfter: y\r\n").expect("untouched").to_owned()
    }

    #[test]
    fn a_neighbour_that_asks_is_told_in_its_own_via() {
        let loss = told(Algorithm::Loss);
        let answer = ";oc=20;oc-algo=\"loss\";oc-validity=500;oc-seq=7.042";
        for (asks, kept) in [
            ("Via: SIP/2.0/UDP a;oc;branch=z9hG4bK1", "Via: SIP/2.0/UDP a;branch=z9hG4bK1"),
            ("v: SIP/2.0/UDP a;branch=x;oc-algo=\"loss,A\";oc", "v: SIP/2.0/UDP a;branch=x"),
            ("Via: SIP/2.0/UDP a ; OC=9;oc-seq=1.2;x=\";oc\"", "Via: SIP/2.0/UDP a ;x=\";oc\""),
        ] {
            assert_eq!(tells(asks, &loss), format!("{kept}{answer}"), "{asks}");
        }
        let second = "Via: SIP/2.0/UDP a;branch=1;oc, SIP/2.0/UDP b;oc;branch=2";
        let wanted = format!("Via: SIP/2.0/UDP a;branch=1{answer}, SIP/2.0/UDP b;oc;branch=2");
        assert_eq!(tells(second, &loss), wanted, "4.1: of the neighbour only");
        for silent in [
            "Via: SIP/2.0/UDP a;branch=x",
            "Via: SIP/2.0/UDP a;ocx=1",
            "Via: a",
            "Via: \0\u{6d8};o;oc",
            "Via: HTTP/1.1/TCP a;oc",
            "x",
        ] {
            assert_eq!(tells(silent, &loss), silent);
        }
        let both = "Via: SIP/2.0/UDP a;oc;oc-algo=\"loss,rate\"";
        assert!(tells(both, &loss).ends_with(answer));
        let rate = tells(both, &told(Algorithm::Rate));
        assert!(rate.contains(";oc=150;oc-algo=\"rate\";oc-validity=500;"), "{rate}");
        let only = tells("Via: SIP/2.0/UDP a;oc;oc-algo=\"rate\"", &Told { rate: None, ..loss });
        assert!(only.contains(";oc=0;oc-algo=\"rate\";oc-validity=0;"), "{only}");
    }

    /// A closed loop: neighbours offer twice and ten times what there is room for, and do as they are
    /// told. What they leave out comes to what is too much, and to nothing when the rush is over.
    #[test]
    fn what_is_told_settles_at_what_is_too_much() {
        for times in [2u32, 10] {
            let mut loss = 0;
            let mut seen = Vec::new();
            for round in 0..200 {
                let comes = times * (1_000 - loss);
                let refused = comes.saturating_sub(1_000) * 1_000 / comes.max(1);
                loss =
                    next_loss(loss, PoolLoad { refused_permille: refused, admitted_per_second: 1 });
                if round >= 100 {
                    seen.push(loss);
                }
            }
            let mean = seen.iter().sum::<u32>() / seen.len() as u32;
            let wanted = 1_000 - 1_000 / times;
            assert!(mean.abs_diff(wanted) < 60, "{times}: {mean} for {wanted}");
            for _ in 0..80 {
                loss = next_loss(loss, PoolLoad::default());
            }
            assert_eq!(loss, 0);
        }
    }

    fn via(text: &str) -> Via<'_> {
        Via::first(text.as_bytes()).expect("a Via").0
    }

    #[test]
    fn an_instance_that_asks_for_less_gets_less_but_what_matters() {
        let (mut overload, now, a) = (Overload::default(), Instant::now(), BackendId(1));
        let left_out = |overload: &mut Overload, at: Instant, class, in_session| {
            (0..1_000).filter(|_| overload.is_left_out(at, a, class, in_session)).count()
        };
        assert_eq!(left_out(&mut overload, now, ClassId::SETUP, false), 0);
        overload.heard(
            now,
            a,
            &via("SIP/2.0/UDP e;oc=30;oc-algo=\"loss\";oc-validity=1000;oc-seq=5.1"),
        );
        assert_eq!(left_out(&mut overload, now, ClassId::SETUP, false), 300);
        assert_eq!(left_out(&mut overload, now, ClassId::EMERGENCY, false), 0);
        assert_eq!(left_out(&mut overload, now, ClassId::SETUP, true), 0);
        // Overtaken.
        overload.heard(
            now,
            a,
            &via("SIP/2.0/UDP e;oc=90;oc-algo=\"loss\";oc-validity=1000;oc-seq=4.9"),
        );
        assert_eq!(left_out(&mut overload, now, ClassId::BULK, false), 300);
        assert_eq!(left_out(&mut overload, now + VALIDITY * 3, ClassId::SETUP, false), 0, "over");
        overload.heard(now, a, &via("SIP/2.0/UDP e;oc=90;oc-seq=6.0"));
        overload.heard(now, a, &via("SIP/2.0/UDP e;oc=0;oc-seq=6.1"));
        assert_eq!(left_out(&mut overload, now, ClassId::SETUP, false), 0);
    }

    proptest! {
        #[test]
        fn anything_may_stand_there(line in "[;=a-c,\"oc\\-0-9 :]{0,60}", from in 0usize..70) {
            let mut out = line.clone().into_bytes();
            tell(&mut out, from, &told(Algorithm::Loss));
            let text = format!("SIP/2.0/UDP e{line}");
            if let Some((via, _)) = Via::first(text.as_bytes()) {
                Overload::default().heard(Instant::now(), BackendId(1), &via);
            }
        }
    }
}
