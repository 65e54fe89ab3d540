//! What a request is: its class, and what it does to its session (DESIGN 5; RFC 7944, 8506).

use std::time::Duration;

use strowger_contract::{ClassId, ClassRule, Router};

use crate::avp::{Header, Summary};
use crate::engine::Settings;

pub(crate) const RE_AUTH: u32 = 258;
pub(crate) const CREDIT_CONTROL: u32 = 272;
pub(crate) const ABORT_SESSION: u32 = 274;
pub(crate) const SESSION_TERMINATION: u32 = 275;

/// CC-Request-Type (RFC 8506 8.3).
const INITIAL_REQUEST: u32 = 1;
const TERMINATION_REQUEST: u32 = 3;
const EVENT_REQUEST: u32 = 4;

/// The class of a request.
pub(crate) fn class(header: &Header, summary: &Summary<'_>) -> ClassId {
    match summary.drmp {
        Some(0 | 1) => return ClassId::EMERGENCY,
        // Its sender says that it can wait (RFC 7944 8: 10 is the default).
        Some(11..=15) => return ClassId::BULK,
        _ => {}
    }
    match header.command {
        RE_AUTH | SESSION_TERMINATION | ABORT_SESSION => ClassId::IN_SESSION,
        CREDIT_CONTROL => match summary.cc_request_type {
            Some(INITIAL_REQUEST | EVENT_REQUEST) | None => ClassId::SETUP,
            Some(_) => ClassId::IN_SESSION,
        },
        // ACR.
        271 => ClassId::BULK,
        // PUR; SAR, MAR of Cx and SWx.
        321 | 301 | 303 => ClassId::MOBILITY,
        // AAR, AIR, ULR, and what is unknown: somebody waits for it.
        _ => ClassId::SETUP,
    }
}

/// Whether it belongs to a session that must exist.
pub(crate) fn in_session(header: &Header, summary: &Summary<'_>) -> bool {
    match header.command {
        RE_AUTH | SESSION_TERMINATION | ABORT_SESSION => true,
        CREDIT_CONTROL => {
            !matches!(summary.cc_request_type, Some(INITIAL_REQUEST | EVENT_REQUEST) | None)
        }
        _ => false,
    }
}

/// The class of a request of a session that the table knows: an emergency session stays one to its
/// end, and no session falls into a later tier than it began in.
pub(crate) fn inherited(own: ClassId, of_session: ClassId, router: &dyn Router) -> ClassId {
    let tier = |class| router.class(class).tier;
    if of_session == ClassId::EMERGENCY || tier(of_session) < tier(own) { of_session } else { own }
}

/// Whether it begins a credit-control session.
pub(crate) fn begins_session(header: &Header, summary: &Summary<'_>) -> bool {
    header.command == CREDIT_CONTROL && summary.cc_request_type == Some(INITIAL_REQUEST)
}

/// Whether its good answer ends the session.
pub(crate) fn ends_session(header: &Header, summary: &Summary<'_>) -> bool {
    header.command == SESSION_TERMINATION
        || header.command == CREDIT_CONTROL
            && matches!(summary.cc_request_type, Some(TERMINATION_REQUEST | EVENT_REQUEST))
}

impl Settings {
    /// The class of a request: by the first rule of the configuration that matches, else by what it
    /// is.
    pub(crate) fn class(&self, header: &Header, summary: &Summary<'_>, bytes: &[u8]) -> ClassId {
        let class = class(header, summary);
        if self.classify.is_empty() {
            return class;
        }
        let carried = class == ClassId::EMERGENCY;
        ClassRule::first(&self.classify, carried, |rule| rule.matches(header, summary, bytes))
            .unwrap_or(class)
    }

    /// Whether nothing is to be remembered of it: the application or the request itself says that the
    /// server keeps no state (RFC 6733 8.11). A drain must not wait for sessions that are none.
    pub(crate) fn is_stateless(&self, header: &Header, summary: &Summary<'_>) -> bool {
        const NO_STATE_MAINTAINED: u32 = 1;
        summary.auth_session_state == Some(NO_STATE_MAINTAINED)
            || self.stateless.contains(&header.application)
    }

    /// How long its answer is waited for.
    pub(crate) fn answer_timeout(&self, header: &Header, summary: &Summary<'_>) -> Duration {
        /// RFC 7944 9.1: what carries no DRMP has this priority.
        const PRIORITY_DEFAULT: u32 = 10;
        let priority = summary.drmp.unwrap_or(PRIORITY_DEFAULT);
        let found = self.answer_timeouts.iter().find(|entry| {
            (entry.applications.is_empty() || entry.applications.contains(&header.application))
                && (entry.commands.is_empty() || entry.commands.contains(&header.command))
                && entry.priority.is_none_or(|most| priority <= u32::from(most))
        });
        found.map_or(self.options.answer_timeout.0, |entry| entry.timeout)
    }

    /// Whether another backend is asked after this answer.
    pub(crate) fn reroutes(&self, application: u32, code: u32) -> bool {
        self.reroutes
            .iter()
            .any(|&(of, wanted)| wanted == code && of.is_none_or(|of| of == application))
    }
}

/// `Gx-CCR` and the like, for metrics: bounded by this table.
pub(crate) fn word(application: u32, command: u32) -> &'static str {
    match (application, command) {
        (16_777_238, 272) => "Gx-CCR",
        (16_777_238, 258) => "Gx-RAR",
        (16_777_266, 272) => "Gxx-CCR",
        (16_777_236, 265) => "Rx-AAR",
        (16_777_236, 275) => "Rx-STR",
        (16_777_236, 258) => "Rx-RAR",
        (16_777_236, 274) => "Rx-ASR",
        (16_777_302, 8_388_635) => "Sy-SLR",
        (16_777_302, 8_388_636) => "Sy-SNR",
        (16_777_302, 275) => "Sy-STR",
        (4, 272) => "Gy-CCR",
        (4, 258) => "Gy-RAR",
        (16_777_251, 316) => "S6a-ULR",
        (16_777_251, 317) => "S6a-CLR",
        (16_777_251, 318) => "S6a-AIR",
        (16_777_251, 319) => "S6a-IDR",
        (16_777_251, 321) => "S6a-PUR",
        (16_777_251, 323) => "S6a-NOR",
        (16_777_252, 324) => "S13-ECR",
        (16_777_216, 300) => "Cx-UAR",
        (16_777_216, 301) => "Cx-SAR",
        (16_777_216, 302) => "Cx-LIR",
        (16_777_216, 303) => "Cx-MAR",
        (16_777_217, 306) => "Sh-UDR",
        (16_777_217, 307) => "Sh-PUR",
        (16_777_217, 308) => "Sh-SNR",
        (16_777_265, 301) => "SWx-SAR",
        (16_777_265, 303) => "SWx-MAR",
        (16_777_272, 265) => "S6b-AAR",
        (3, 271) => "Rf-ACR",
        (_, 258) => "RAR",
        (_, 265) => "AAR",
        (_, 271) => "ACR",
        (_, 272) => "CCR",
        (_, 274) => "ASR",
        (_, 275) => "STR",
        _ => "other",
    }
}
