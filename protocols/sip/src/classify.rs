//! Which class a request falls into (DESIGN, section 5).

use strowger_contract::ClassId;

use crate::scan::{Name, Scan};

/// Namespaces of RFC 4412 whose calls are emergencies or as good as that.
const PRIORITY_NAMESPACES: [&[u8]; 3] = [b"esnet", b"wps", b"ets"];

/// The class of a request. `in_dialog`: something of ours vouches for its dialog; `heeds_priority`: its
/// sender may say how urgent it is (RFC 4412 4.7).
pub(crate) fn classify(
    message: &[u8],
    scan: &Scan,
    method: &[u8],
    uri: &[u8],
    in_dialog: bool,
    heeds_priority: bool,
) -> ClassId {
    if matches!(method, b"ACK" | b"CANCEL") {
        return ClassId::CONTROL;
    }
    if is_emergency(message, scan, uri, heeds_priority) {
        return ClassId::EMERGENCY;
    }
    if in_dialog {
        return ClassId::IN_SESSION;
    }
    match method {
        b"INVITE" => ClassId::SETUP,
        b"REGISTER" | b"SUBSCRIBE" => ClassId::MOBILITY,
        b"BYE" | b"PRACK" | b"UPDATE" | b"INFO" => ClassId::IN_SESSION,
        _ => ClassId::BULK,
    }
}

/// Whether it says of itself that it is an emergency. Anybody may call for help; a Resource-Priority counts
/// only from those whom the operator believes.
pub(crate) fn is_emergency(message: &[u8], scan: &Scan, uri: &[u8], heeds_priority: bool) -> bool {
    const SOS: &[u8] = b"urn:service:sos";
    let sos = uri.get(..SOS.len()).is_some_and(|start| start.eq_ignore_ascii_case(SOS))
        && matches!(uri.get(SOS.len()), None | Some(b'.'));
    let priority = |value: &[u8]| {
        value.split(|&byte| byte == b',').any(|one| {
            let namespace = one.trim_ascii().split(|&byte| byte == b'.').next().unwrap_or_default();
            PRIORITY_NAMESPACES.iter().any(|known| namespace.eq_ignore_ascii_case(known))
        })
    };
    sos || heeds_priority
        && scan.all(Name::ResourcePriority).any(|header| priority(header.value.of(message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(method: &str, uri: &str, extra: &str, in_dialog: bool) -> ClassId {
        let text = format!("{method} {uri} SIP/2.0\r\n{extra}\r\n");
        let mut scan = Scan::default();
        scan.scan(text.as_bytes()).expect("well-formed");
        classify(text.as_bytes(), &scan, method.as_bytes(), uri.as_bytes(), in_dialog, true)
    }

    #[test]
    fn follows_the_design() {
        assert_eq!(class("INVITE", "sip:a@b", "", false), ClassId::SETUP);
        assert_eq!(class("INVITE", "sip:a@b", "", true), ClassId::IN_SESSION);
        assert_eq!(class("INVITE", "urn:service:sos", "", false), ClassId::EMERGENCY);
        assert_eq!(class("INVITE", "URN:service:sos.fire", "", false), ClassId::EMERGENCY);
        assert_eq!(class("INVITE", "urn:service:sosa", "", false), ClassId::SETUP);
        assert_eq!(
            class("INVITE", "sip:a@b", "Resource-Priority: q735.1, ESNET.0\r\n", false),
            ClassId::EMERGENCY
        );
        assert_eq!(class("REGISTER", "sip:b", "", false), ClassId::MOBILITY);
        assert_eq!(class("OPTIONS", "sip:b", "", false), ClassId::BULK);
        assert_eq!(class("ACK", "urn:service:sos", "", true), ClassId::CONTROL);
        assert_eq!(class("SHAKE", "sip:b", "", false), ClassId::BULK);
    }
}
