//! What the node has of itself: memory and descriptors, as the kernel tells.

use std::fs;
use std::time::{Duration, Instant};

use crate::routing::Pressure;

/// How often the kernel is asked; it answers in some tens of microseconds.
const EVERY: Duration = Duration::from_millis(300);

/// Reads it, not too often.
#[derive(Debug, Default)]
pub struct Gauge {
    asked: Option<Instant>,
    known: Pressure,
}

impl Gauge {
    /// What there is now; `loop_lag` is the workers' own word.
    pub fn read(&mut self, now: Instant, loop_lag: Duration) -> Pressure {
        if self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= EVERY) {
            self.asked = Some(now);
            self.known.memory_permille = memory().unwrap_or(0);
            self.known.descriptors_permille = descriptors().unwrap_or(0);
        }
        Pressure { loop_lag, ..self.known }
    }
}

fn permille(used: u64, all: u64) -> Option<u32> {
    u32::try_from(used.saturating_mul(1_000).checked_div(all)?).ok()
}

/// Open descriptors by the limit of the process. Since Linux 6.2 the size of `/proc/self/fd` is their
/// number; before, they are counted.
fn descriptors() -> Option<u32> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    let limit: u64 = line.split_whitespace().nth(3)?.parse().ok()?;
    let told = fs::metadata("/proc/self/fd").map_or(0, |folder| folder.len());
    let open = if told > 0 { told } else { fs::read_dir("/proc/self/fd").ok()?.count() as u64 };
    permille(open, limit)
}

/// The more pressing of two: what the process takes of the machine's memory, and what its control
/// group takes of its limit (without the page cache that can be dropped at once).
fn memory() -> Option<u32> {
    let own = permille(resident()?, of_machine()?);
    own.into_iter().chain(of_group()).max()
}

fn resident() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

fn of_machine() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// cgroup v2; a group without a limit has no say.
fn of_group() -> Option<u32> {
    let path = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = path.lines().find_map(|line| line.strip_prefix("0::"))?.trim();
    let folder = format!("/sys/fs/cgroup{path}");
    let read = |name: &str| fs::read_to_string(format!("{folder}/{name}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat")?;
    let cache = kilobytes(&stat, "inactive_file ").unwrap_or(0);
    permille(used.saturating_sub(cache), limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells() {
        let pressure = Gauge::default().read(Instant::now(), Duration::from_millis(3));
        assert!(pressure.descriptors_permille <= 1_000, "{pressure:?}");
        assert!(pressure.memory_permille <= 1_000, "{pressure:?}");
        assert_eq!(pressure.loop_lag, Duration::from_millis(3));
        assert!(resident().is_some_and(|kilobytes| kilobytes > 1_000));
        assert_eq!(permille(1, 0), None);
    }
}
