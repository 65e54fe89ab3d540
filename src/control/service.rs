//! What a service manager is told (sd_notify(3)): ready, reloading, stopping, alive. Without a
//! `NOTIFY_SOCKET` in the environment all of it does nothing.

use std::future::Future;
use std::time::Duration;

use sd_notify::NotifyState;

/// The edge serves. Also said after each reload, as `Type=notify-reload` wants it.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// A reload has begun; [`ready`] follows.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    if let Ok(now) = now {
        tell(&[NotifyState::Reloading, now]);
    }
}

/// Another process serves from now on: it is the service's main one.
pub fn main_process(pid: i32) {
    if let Ok(pid) = u32::try_from(pid) {
        tell(&[NotifyState::MainPid(pid)]);
    }
}

/// The edge leaves.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Says that the control side is alive, twice in the time that the manager gives it; pending for
/// ever where it gives none (`WATCHDOG_USEC`). Workers need no watching from outside: one that dies
/// is started again by the process itself.
pub fn keep_watchdog() -> impl Future<Output = ()> {
    let interval = sd_notify::watchdog_enabled().map(|timeout| timeout / 2);
    async move {
        let Some(interval) = interval.filter(|interval| !interval.is_zero()) else {
            return std::future::pending().await;
        };
        loop {
            tell(&[NotifyState::Watchdog]);
            tokio::time::sleep(interval.max(Duration::from_millis(10))).await;
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    // A manager that does not listen is its own fault, and no reason to stop serving.
    let _unheard = sd_notify::notify(states);
}
