//! Descriptors are bounded by the process's limit, and some are kept back.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::process::{Resource, getrlimit};

/// Kept back, at most: backends of connections that were just accepted, links, the admin API, probes,
/// files that are looked at.
const KEPT_BACK_MAX: u64 = 128;

/// Whether a descriptor that was just opened is one of the last that the process may have. The kernel
/// gives the lowest free number (open(2)), so the number says how many are open.
pub(crate) fn is_one_of_the_last(fd: BorrowedFd<'_>) -> bool {
    static CEILING: OnceLock<u64> = OnceLock::new();
    let ceiling = *CEILING.get_or_init(|| {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        limit - KEPT_BACK_MAX.min(limit / 4)
    });
    u64::try_from(fd.as_raw_fd()).is_ok_and(|number| number >= ceiling)
}
