//! The `sip-options` health check.

use std::io::Write;
use std::net::SocketAddr;

use strowger_contract::{Probe, ProbeReply, Transport};

use crate::scan::{Name, Scan, Start};
use crate::via::Via;

/// Asks with OPTIONS. Any final answer but 5xx says that the instance is alive and takes requests;
/// 5xx (a 503 above all) says that it does not.
#[derive(Debug, Default)]
pub(crate) struct OptionsProbe {
    branch: Vec<u8>,
    scan: Scan,
}

impl Probe for OptionsProbe {
    fn request(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        transport: Transport,
        nonce: u64,
        out: &mut Vec<u8>,
    ) {
        self.branch = format!("z9hG4bKprobe{nonce:016x}").into_bytes();
        let branch = String::from_utf8_lossy(&self.branch);
        let (upper, parameter) = match transport {
            Transport::Udp => ("UDP", ""),
            _ => ("TCP", ";transport=tcp"),
        };
        // Writing to a vector cannot fail.
        let _ok = write!(
            out,
            "OPTIONS sip:{to}{parameter} SIP/2.0\r\n\
             Via: SIP/2.0/{upper} {from};branch={branch};rport\r\n\
             Max-Forwards: 0\r\n\
             From: <sip:probe@{from}>;tag={nonce:x}\r\n\
             To: <sip:{to}>\r\n\
             Call-ID: probe-{nonce:016x}\r\n\
             CSeq: 1 OPTIONS\r\n\
             Contact: <sip:probe@{from}{parameter}>\r\n\
             Accept: application/sdp\r\n\
             Content-Length: 0\r\n\r\n"
        );
    }

    fn reply(&mut self, _from: SocketAddr, bytes: &[u8]) -> ProbeReply {
        if self.scan.scan(bytes).is_err() {
            return ProbeReply::Incomplete;
        }
        let Start::Response { code } = self.scan.start else { return ProbeReply::Other };
        let via = self.scan.value(bytes, Name::Via).and_then(Via::first);
        let ours = via.and_then(|(via, _)| via.branch()) == Some(self.branch.as_slice());
        match code {
            _ if !ours => ProbeReply::Other,
            100..200 => ProbeReply::Other,
            500..600 => ProbeReply::Unhealthy("answered 5xx to OPTIONS"),
            _ => ProbeReply::Healthy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_this_probe_counts() {
        let mut probe = OptionsProbe::default();
        let (from, to) = (
            "127.0.0.1:9000".parse().expect("an address"),
            "[::1]:5060".parse().expect("an address"),
        );
        let mut request = Vec::new();
        probe.request(from, to, Transport::Udp, 7, &mut request);
        let text = String::from_utf8(request).expect("text");
        assert!(text.starts_with("OPTIONS sip:[::1]:5060 SIP/2.0\r\n"));
        let answer = |code: u16| {
            text.replacen("OPTIONS sip:[::1]:5060 SIP/2.0", &format!("SIP/2.0 {code} X"), 1)
                .into_bytes()
        };
        assert_eq!(probe.reply(to, &answer(100)), ProbeReply::Other);
        assert_eq!(probe.reply(to, &answer(200)), ProbeReply::Healthy);
        assert_eq!(probe.reply(to, &answer(404)), ProbeReply::Healthy);
        assert!(matches!(probe.reply(to, &answer(503)), ProbeReply::Unhealthy(_)));
        let other = String::from_utf8(answer(200)).expect("text").replace("probe0", "probe9");
        assert_eq!(probe.reply(to, other.as_bytes()), ProbeReply::Other);
    }
}
