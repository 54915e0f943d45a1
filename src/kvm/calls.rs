//! Time spent in KVM's set-up calls, by name.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::Error;

/// What the calls of one name took together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CallTime {
    /// Name of the ioctl, or `open`.
    pub name: &'static str,
    /// How often it was called.
    pub count: u32,
    /// Wall-clock time, in nanoseconds.
    pub wall_ns: u64,
    /// Processor time, in nanoseconds.
    pub cpu_ns: u64,
}

thread_local! {
    static TIMES: RefCell<Vec<CallTime>> = const { RefCell::new(Vec::new()) };
}

/// Time that this thread has spent in KVM's set-up calls (everything but `KVM_RUN`) since the last question, in the
/// order in which each was called first.
pub fn take_call_times() -> Vec<CallTime> {
    TIMES.take()
}

/// Does something for KVM and adds the time that it takes to that of its name.
pub(super) fn timed<T>(name: &'static str, f: impl FnOnce() -> T) -> T {
    let start = (Instant::now(), thread_cpu_time());
    let result = f();
    let wall_ns = start.0.elapsed().as_nanos() as u64;
    let cpu_ns = thread_cpu_time().saturating_sub(start.1).as_nanos() as u64;
    tracing::debug!("{name}: {:.1} us, {:.1} us of a processor", wall_ns as f64 / 1e3, cpu_ns as f64 / 1e3);
    TIMES.with_borrow_mut(|times| match times.iter_mut().find(|time| time.name == name) {
        Some(time) => {
            time.count += 1;
            time.wall_ns += wall_ns;
            time.cpu_ns += cpu_ns;
        }
        None => times.push(CallTime { name, count: 1, wall_ns, cpu_ns }),
    });
    result
}

/// Makes a set-up call: times it and names it in the error.
pub(super) fn call<T>(
    name: &'static str,
    f: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, Error> {
    timed(name, f).map_err(|error| Error::Call { call: name, source: error.into() })
}

fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_one_name_are_added_up() {
        take_call_times();
        for _ in 0..2 {
            timed("sleep", || std::thread::sleep(Duration::from_millis(1)));
        }
        timed("nothing", || ());
        let times = take_call_times();
        assert_eq!(
            times.iter().map(|time| (time.name, time.count)).collect::<Vec<_>>(),
            [("sleep", 2), ("nothing", 1)]
        );
        assert!(times[0].wall_ns >= 2_000_000 && times[0].cpu_ns < times[0].wall_ns, "{times:?}");
        assert!(take_call_times().is_empty());
    }
}
