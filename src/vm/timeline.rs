//! Where the time of a start goes: moments, each with wall-clock and processor time.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::kvm::CallTime;

/// A moment that was passed.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// What had happened.
    pub name: String,
    /// Wall-clock time since the start of the process's own code, in microseconds.
    pub wall_us: u64,
    /// Processor time of the whole process, user and system, in microseconds.
    pub cpu_us: Option<u64>,
}

/// Moments in the order in which they came.
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    /// The host's CLOCK_MONOTONIC at the start of the process's own code, in nanoseconds.
    pub start_monotonic_ns: u64,
    #[serde(skip)]
    start: Option<Instant>,
    /// The moments.
    pub moments: Vec<Moment>,
    /// Time spent in KVM's set-up calls before the first KVM_RUN.
    pub kvm_calls: Vec<CallTime>,
}

impl Timeline {
    /// Starts the clock. To be called first of all.
    pub fn start() -> Timeline {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        Timeline {
            start_monotonic_ns: now.as_nanos() as u64,
            start: Some(Instant::now()),
            moments: Vec::with_capacity(16),
            kvm_calls: Vec::new(),
        }
    }

    /// Notes that something has happened just now.
    pub fn mark(&mut self, name: &str) {
        let cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok().map(Duration::from);
        self.mark_at(name, Instant::now(), cpu);
    }

    /// Notes that something happened at `at`, when the process had used the processor time `cpu`.
    pub fn mark_at(&mut self, name: &str, at: Instant, cpu: Option<Duration>) {
        let wall = self.start.map_or(Duration::ZERO, |start| at.saturating_duration_since(start));
        let cpu_us = cpu.map(|cpu| cpu.as_micros() as u64);
        self.moments.push(Moment { name: name.to_owned(), wall_us: wall.as_micros() as u64, cpu_us });
    }

    /// The timeline as a table for people.
    pub fn table(&self) -> String {
        let mut text = String::from("boot timeline          wall ms      cpu ms\n");
        for moment in &self.moments {
            let cpu = moment.cpu_us.map_or("-".into(), |us| format!("{:.3}", us as f64 / 1e3));
            text.push_str(&format!(
                "  {:<18} {:>9.3} {:>11}\n",
                moment.name,
                moment.wall_us as f64 / 1e3,
                cpu
            ));
        }
        let sum = |part: fn(&CallTime) -> u64| self.kvm_calls.iter().map(part).sum::<u64>() as f64 / 1e6;
        let (wall, cpu) = (sum(|call| call.wall_ns), sum(|call| call.cpu_ns));
        text.push_str(&format!("  {:<18} {wall:>9.3} {cpu:>11.3}\n", "of it in KVM's calls"));
        text
    }
}
