//! Servers: they introduce themselves, answer watchdogs, and answer every request with success.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{Avps, FLAG_PROXIABLE, Header, code};
use strowger_diameter::build::Builder;

use super::{DiameterOptions, GX, GY, S6A};
use crate::load::net::{Net, Place};
use crate::load::report::Report;

const CAPABILITIES_EXCHANGE: u32 = 257;
const DEVICE_WATCHDOG: u32 = 280;
const DISCONNECT_PEER: u32 = 282;
const CC_REQUEST_NUMBER: u32 = 415;

/// All servers of this process.
pub(crate) struct Servers {
    hosts: Vec<String>,
    realm: String,
    service: Duration,
    /// Answers that wait for their time; all wait equally long, so they leave in order.
    delayed: VecDeque<(Instant, usize, Vec<u8>)>,
}

impl Servers {
    pub(crate) fn new(_: Instant, options: &DiameterOptions) -> Self {
        let hosts = (0..options.answers.len())
            .map(|number| format!("{}-{number}.{}", options.server_name, options.realm))
            .collect();
        Self {
            hosts,
            realm: options.realm.clone(),
            service: options.service,
            delayed: VecDeque::new(),
        }
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.delayed.front().map(|(at, ..)| *at)
    }

    pub(crate) fn on_time(&mut self, net: &mut Net, now: Instant) {
        while self.delayed.front().is_some_and(|(at, ..)| *at <= now) {
            if let Some((_, stream, answer)) = self.delayed.pop_front() {
                net.send(Place::Stream(stream), |out| out.extend_from_slice(&answer));
            }
        }
    }

    pub(crate) fn on_message(
        &mut self,
        net: &mut Net,
        now: Instant,
        stream: usize,
        number: usize,
        bytes: &[u8],
        report: &mut Report,
    ) {
        let Some(header) = Header::read(bytes) else { return };
        if !header.is_request() {
            return;
        }
        let (host, realm) = (&self.hosts[number], &self.realm);
        match header.command {
            CAPABILITIES_EXCHANGE => net.send(Place::Stream(stream), |out| {
                let mut builder = base(out, &header, host, realm)
                    .address(code::HOST_IP_ADDRESS, std::net::Ipv4Addr::LOCALHOST.into())
                    .number(code::VENDOR_ID, 10_415)
                    .text(code::PRODUCT_NAME, "strowger load")
                    .number(code::SUPPORTED_VENDOR_ID, 10_415);
                for application in [GX, GY, S6A] {
                    builder = builder.application(application);
                }
                builder.finish();
            }),
            DEVICE_WATCHDOG | DISCONNECT_PEER => {
                net.send(Place::Stream(stream), |out| base(out, &header, host, realm).finish());
            }
            _ => {
                report.count("requests_at_servers");
                if header.flags & strowger_diameter::avp::FLAG_RETRANSMITTED != 0 {
                    report.count("requests_with_t");
                }
                if self.service.is_zero() {
                    net.send(Place::Stream(stream), |out| {
                        answer(out, &header, bytes, host, realm);
                    });
                } else {
                    let mut out = Vec::new();
                    answer(&mut out, &header, bytes, host, realm);
                    self.delayed.push_back((now + self.service, stream, out));
                }
            }
        }
    }
}

fn base<'a>(out: &'a mut Vec<u8>, header: &Header, host: &str, realm: &str) -> Builder<'a> {
    Builder::new(out, 0, header.command, 0, header.hop_by_hop, header.end_to_end)
        .number(code::RESULT_CODE, 2_001)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, realm)
}

fn answer(out: &mut Vec<u8>, header: &Header, request: &[u8], host: &str, realm: &str) {
    let (mut session, mut kind, mut number) = (None, None, None);
    for avp in Avps::of(request).map_while(Result::ok) {
        match avp.code {
            code::SESSION_ID if avp.vendor == 0 => session = Some(avp.whole),
            code::CC_REQUEST_TYPE if avp.vendor == 0 => kind = Some(avp.whole),
            CC_REQUEST_NUMBER if avp.vendor == 0 => number = Some(avp.whole),
            _ => {}
        }
    }
    let mut builder = Builder::new(
        out,
        FLAG_PROXIABLE,
        header.command,
        header.application,
        header.hop_by_hop,
        header.end_to_end,
    );
    if let Some(session) = session {
        builder = builder.raw(session);
    }
    builder = builder
        .number(code::RESULT_CODE, 2_001)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, realm)
        .number(code::AUTH_APPLICATION_ID, header.application);
    for avp in [kind, number].into_iter().flatten() {
        builder = builder.raw(avp);
    }
    builder.finish();
}
