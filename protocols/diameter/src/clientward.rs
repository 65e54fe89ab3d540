//! Backends' own requests (RAR, ASR, CLR): they go to the client that they name.

use std::time::Instant;

use strowger_contract::{BackendId, Endpoint, FlowId, Outbox, RequestOutcome, Router};

use crate::SPACE;
use crate::answer::result;
use crate::avp::Summary;
use crate::engine::DiameterEngine;
use crate::mediation::Applied;
use crate::onward::place_of;
use crate::pending::{Pending, TRIES_MAX};
use crate::relay::Asked;
use crate::rewrite;

impl DiameterEngine {
    /// Whether a request of a backend's is for other backends: it names one, or nobody. Nodes that are
    /// both client and server, and relays, send such.
    pub(crate) fn is_for_backends(
        &mut self,
        sender: BackendId,
        summary: &Summary<'_>,
        router: &dyn Router,
    ) -> bool {
        let host = summary.destination_host.filter(|host| !host.is_empty());
        let Some(host) = host.filter(|host| !self.settings.is_us(host)) else { return true };
        if self.client_called(host, router).is_some() {
            return false;
        }
        let mut pools = self.settings.pools.iter();
        let named = pools.find_map(|&pool| router.named(pool, host));
        named.is_some_and(|named| named != sender)
    }

    /// The connection of a client, by its identity.
    fn client_called(&mut self, host: &[u8], router: &dyn Router) -> Option<FlowId> {
        self.lower.clear();
        self.lower.extend(host.iter().map(u8::to_ascii_lowercase));
        router.named_flow(router.keyer().session(SPACE + 1, &self.lower))
    }

    pub(crate) fn towards_client(
        &mut self,
        now: Instant,
        asked: &Asked<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (message, header, summary, class) =
            (asked.message, asked.header, &asked.summary, asked.class);
        let host = summary.destination_host.unwrap_or_default();
        let flow = self.client_called(host, router);
        let Some(flow) = flow.filter(|_| !host.is_empty()) else {
            let what =
                (result::UNABLE_TO_DELIVER, "no client of that Destination-Host is connected");
            return self.refuse_early(now, message, class, what, None, out);
        };
        let timeout = self.settings.answer_timeout(header, summary);
        let pending = Pending {
            origin: message.from,
            sender: asked.sender,
            hop_by_hop: header.hop_by_hop,
            end_to_end: header.end_to_end,
            to: Endpoint::Client(flow),
            backend: None,
            pool: None,
            rules: None,
            session: None,
            place: place_of(summary, router),
            ends_session: false,
            in_session: true,
            fixed: true,
            binds: false,
            follows: false,
            resent: false,
            lanes_lost: 0,
            redirects: 0,
            application: header.application,
            command: header.command,
            class,
            arrived: message.arrived,
            deadline: message.arrived + router.class(class).deadline.unwrap_or(timeout),
            expires: now + timeout,
            sent: now,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            hedge_at: None,
            twin: None,
            lost: false,
            request: self.pending.buffer(message.bytes),
        };
        let (expires, limit) = (pending.expires, self.settings.options.max_pending);
        let from = self.identity_of(message.from).unwrap_or_default();
        match self.pending.insert(pending, limit) {
            Err(pending) => {
                let what = (result::TOO_BUSY, "too many requests are under way");
                self.give_up(now, *pending, what, RequestOutcome::Rejected, router, out);
            }
            Ok(identifier) => {
                let client = self.identity_of(Endpoint::Client(flow)).unwrap_or_default();
                let (mut fits, mut applied) = (true, Applied::default());
                let changes = &mut self.changes;
                out.send(Endpoint::Client(flow), class, |bytes| {
                    let start = bytes.len();
                    fits = rewrite::request(message.bytes, identifier, false, &from, bytes);
                    if fits {
                        applied = changes.for_client(bytes, start, &client, None);
                    }
                });
                applied.note(out);
                if fits {
                    return self.schedule(now, expires, identifier);
                }
                if let Some(pending) = self.pending.remove(identifier) {
                    let what = (result::INVALID_MESSAGE_LENGTH, "too long with our Route-Record");
                    self.give_up(now, pending, what, RequestOutcome::Rejected, router, out);
                }
            }
        }
    }
}
