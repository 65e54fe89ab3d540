//! What comes in (RFC 6733 6.1): whose it is, and whether it may go on at all.

use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, ClassId, Closing, Endpoint, Message, Note, Outbox, Refusal, RequestOutcome, Router,
};

use crate::answer::{error, result};
use crate::avp::{
    Avps, BadLength, FLAG_ERROR, FLAG_PROXIABLE, HEADER_BYTES, Header, Summary, code,
};
use crate::engine::DiameterEngine;
use crate::frame::is_sound;
use crate::peer::{CAPABILITIES_EXCHANGE, State};

/// A request that may go on.
pub(crate) struct Asked<'a> {
    pub(crate) message: &'a Message<'a>,
    pub(crate) header: &'a Header,
    pub(crate) summary: Summary<'a>,
    pub(crate) class: ClassId,
    /// The backend that it came from, if it came from one.
    pub(crate) sender: Option<BackendId>,
}

impl DiameterEngine {
    pub(crate) fn dispatch(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let bytes = message.bytes;
        let Some(header) = Header::read(bytes) else { return out.drop_message("too_short") };
        if !is_sound(bytes) {
            return self.refuse_framing(message, &header, out);
        }
        self.heard(now, message.from, &header, router);
        let introduced = self.peer(message.from).map(|peer| peer.state != State::Introducing);
        if introduced == Some(false) && header.command != CAPABILITIES_EXCHANGE {
            // RFC 6733 5.6: nothing comes before the capabilities.
            out.drop_message("before_capabilities");
            return out.close(message.from, Closing::Flushed);
        }
        if self.on_upkeep(now, message.from, bytes, &header, router, out) {
            return;
        }
        if header.is_request() {
            let from_client = matches!(message.from, Endpoint::Client(_));
            match if from_client { self.changes.revealed(bytes) } else { None } {
                Some(bytes) => {
                    let message = Message { bytes: &bytes, ..*message };
                    self.on_request(now, &message, &header, router, out);
                    self.changes.recycle(bytes);
                }
                None => self.on_request(now, message, &header, router, out),
            }
        } else {
            self.on_answer(now, message, &header, router, out);
        }
    }

    /// What follows a message of another version or of an odd length cannot be trusted: it is answered
    /// (RFC 6733 7.1.5), and the connection ends.
    fn refuse_framing(&self, message: &Message<'_>, header: &Header, out: &mut Outbox) {
        let (code_of_result, text) = if message.bytes[0] == 1 {
            (result::INVALID_MESSAGE_LENGTH, "the length is no multiple of four")
        } else {
            (result::UNSUPPORTED_VERSION, "the version is not 1")
        };
        out.drop_message("bad_framing");
        if header.is_request() {
            self.refuse(message, code_of_result, text, None, out);
        }
        out.close(message.from, Closing::Flushed);
    }

    pub(crate) fn refuse(
        &self,
        message: &Message<'_>,
        code_of_result: u32,
        text: &str,
        failed: Option<BadLength>,
        out: &mut Outbox,
    ) {
        let identity = self.settings.identity();
        out.send(message.from, ClassId::CONTROL, |bytes| {
            error(message.bytes, identity, code_of_result, text, failed, bytes)
        });
    }

    /// Refuses before the router was asked.
    pub(crate) fn refuse_early(
        &self,
        now: Instant,
        message: &Message<'_>,
        class: ClassId,
        what: (u32, &str),
        failed: Option<BadLength>,
        out: &mut Outbox,
    ) {
        self.refuse(message, what.0, what.1, failed, out);
        note(now, message.arrived, class, RequestOutcome::Rejected, None, Duration::ZERO, out);
    }

    fn on_request(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let summary = Summary::of(message.bytes);
        let class = self.settings.class(header, &summary, message.bytes);
        let mut no =
            |what: (u32, &str), failed| self.refuse_early(now, message, class, what, failed, out);
        if header.flags & FLAG_ERROR != 0 {
            return no((result::INVALID_HDR_BITS, "E must not be set in a request"), None);
        }
        if message.bytes.len() == HEADER_BYTES {
            return no((result::INVALID_MESSAGE_LENGTH, "the message has no AVPs"), None);
        }
        if let Some(bad) = summary.broken {
            let what = (result::INVALID_AVP_LENGTH, "an AVP has an impossible length");
            return no(what, Some(bad));
        }
        if header.flags & FLAG_PROXIABLE == 0 {
            return no(
                (result::APPLICATION_UNSUPPORTED, "P is not set, and this node only relays"),
                None,
            );
        }
        if summary.route_recorded && self.has_looped(message.bytes) {
            return no((result::LOOP_DETECTED, "this node is in the Route-Record"), None);
        }
        let sender = self.link_of(message.from).map(|(backend, _)| backend);
        if let Some(sender) = sender
            && !self.is_for_backends(sender, &summary, router)
        {
            let asked = Asked { message, header, summary, class, sender: Some(sender) };
            return self.towards_client(now, &asked, router, out);
        }
        let asked = Asked { message, header, summary, class, sender };
        self.towards_backend(now, &asked, router, out);
    }

    fn has_looped(&self, bytes: &[u8]) -> bool {
        let records =
            Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.is(code::ROUTE_RECORD));
        records.into_iter().any(|record| self.settings.is_us(record.data))
    }
}

/// A refusal in Diameter's words.
pub(crate) fn words(refusal: Refusal) -> (u32, &'static str) {
    match refusal {
        Refusal::NoCapability => {
            (result::APPLICATION_UNSUPPORTED, "no server supports this application")
        }
        Refusal::Overloaded { .. } => (result::TOO_BUSY, "all servers are busy"),
        Refusal::TooLate => (result::TOO_BUSY, "the deadline has passed"),
        Refusal::ShuttingDown => (result::TOO_BUSY, "this node is leaving"),
        Refusal::SessionLost => (result::UNABLE_TO_DELIVER, "the session's server is gone"),
        _ => (result::UNABLE_TO_DELIVER, "no server is reachable"),
    }
}

/// Counts a request that ended.
pub(crate) fn note(
    now: Instant,
    arrived: Instant,
    class: ClassId,
    outcome: RequestOutcome,
    backend: Option<BackendId>,
    at_backend: Duration,
    out: &mut Outbox,
) {
    let total = now.saturating_duration_since(arrived);
    out.note(Note::Request { class, outcome, backend, total, at_backend });
}
