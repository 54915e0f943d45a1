//! Counters of all that a VM does, and their two forms: Firecracker's lines of JSON, and Prometheus' text.
//!
//! A counter is an atomic that its thread adds to without order; who reads gets each for itself, as it is then.

mod json;
mod prometheus;

pub use json::line;
pub use prometheus::text;

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter {
    value: AtomicU64,
    /// What the last line of JSON has told.
    told: AtomicU64,
}

impl Counter {
    /// One at 0.
    pub const fn new() -> Self {
        Self { value: AtomicU64::new(0), told: AtomicU64::new(0) }
    }

    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.value.fetch_add(count, Ordering::Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    /// What was added since this was last asked.
    fn since_told(&self) -> u64 {
        let now = self.get();
        now.saturating_sub(self.told.swap(now, Ordering::Relaxed))
    }
}

/// Buckets of a histogram: up to 2^0, 2^1, … microseconds, and more.
pub const BUCKETS: usize = 24;

/// How long things took.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// Adds one.
    pub fn add(&self, time: Duration) {
        let ns = time.as_nanos() as u64;
        let us = ns.div_ceil(1000);
        let bucket = us.next_power_of_two().trailing_zeros() as usize;
        if let Some(bucket) = self.buckets.get(bucket.min(BUCKETS - 1)) {
            bucket.add(1);
        }
        self.sum_ns.add(ns);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Counter::get).sum()
    }
}

/// What a disk does beside what all devices do.
#[derive(Debug, Default)]
pub struct Block {
    /// Requests by kind: reads, writes, flushes, discards and zeroes.
    pub operations: [Counter; 4],
    /// Bytes that the guest has read.
    pub read_bytes: Counter,
    /// Bytes that it has written.
    pub written_bytes: Counter,
    /// Requests that the host failed.
    pub errors: Counter,
    /// How long requests took, by the same kinds.
    pub latency: [Histogram; 4],
}

/// The kinds of a disk's requests.
pub const BLOCK_KINDS: [&str; 4] = ["read", "write", "flush", "discard"];

/// What a network device does, as long as rvmm moves its packets.
#[derive(Debug, Default)]
pub struct Net {
    /// Packets to the guest.
    pub received_packets: Counter,
    /// Their bytes.
    pub received_bytes: Counter,
    /// Packets that the guest had no room for.
    pub lost_packets: Counter,
    /// Packets from the guest.
    pub sent_packets: Counter,
    /// Their bytes.
    pub sent_bytes: Counter,
    /// Packets that the host refused.
    pub refused_packets: Counter,
}

/// What only one kind of device has.
#[derive(Debug, Default)]
pub enum Own {
    /// Nothing.
    #[default]
    Nothing,
    /// A disk's.
    Block(Box<Block>),
    /// A network device's.
    Net(Box<Net>),
}

/// A device's counters.
#[derive(Debug, Default)]
pub struct Device {
    /// Its kind, as in `virtio-KIND`.
    pub kind: &'static str,
    /// Its name; empty if it needs none.
    pub id: String,
    /// Times that its thread was told of new chains.
    pub notifications: Counter,
    /// Times that its driver was interrupted.
    pub interrupts: Counter,
    /// Chains that went back to the driver.
    pub chains: Counter,
    /// Bytes that were written into them.
    pub written_bytes: Counter,
    /// Times that it could not go on.
    pub failures: Counter,
    /// Times that a rate limit made it wait.
    pub limiter_waits: Counter,
    /// Its own.
    pub own: Own,
}

impl Device {
    /// Counters of a device.
    pub fn new(kind: &'static str, id: impl Into<String>, own: Own) -> Arc<Device> {
        Arc::new(Device { kind, id: id.into(), own, ..Device::default() })
    }

    /// Those of a disk, if it is one.
    pub fn block(&self) -> Option<&Block> {
        if let Own::Block(block) = &self.own { Some(block) } else { None }
    }

    /// Those of a network device, if it is one.
    pub fn net(&self) -> Option<&Net> {
        if let Own::Net(net) = &self.own { Some(net) } else { None }
    }
}

/// Why vCPUs came back from the guest.
pub const EXIT_REASONS: [&str; 8] =
    ["port_read", "port_write", "mmio_read", "mmio_write", "interrupted", "emulation", "shutdown", "other"];

/// Exits by [`EXIT_REASONS`].
pub static EXITS: [Counter; 8] = [const { Counter::new() }; 8];

/// Methods of the control socket.
pub const API_METHODS: [&str; 4] = ["GET", "PUT", "PATCH", "other"];

/// Requests to the control socket by [`API_METHODS`], and those of them that were refused.
pub static API_REQUESTS: [Counter; 4] = [const { Counter::new() }; 4];
/// See [`API_REQUESTS`].
pub static API_FAULTS: [Counter; 4] = [const { Counter::new() }; 4];

/// A moment of the start: its name, wall-clock and processor time in microseconds.
pub type Moment = (String, u64, Option<u64>);

/// What the metadata service does.
pub mod mmds {
    use super::Counter;

    /// Frames from guests.
    pub static RECEIVED: Counter = Counter::new();
    /// Frames to guests.
    pub static SENT: Counter = Counter::new();
    /// Frames that there was no room for, or that made no sense.
    pub static LOST: Counter = Counter::new();
    /// Connections that are over.
    pub static CONNECTIONS: Counter = Counter::new();
    /// Requests.
    pub static REQUESTS: Counter = Counter::new();
    /// Requests that got an error.
    pub static REFUSED: Counter = Counter::new();
    /// Tokens that were given out.
    pub static TOKENS: Counter = Counter::new();
    /// Requests with a token that does not hold.
    pub static INVALID_TOKENS: Counter = Counter::new();
    /// Requests for metadata without a token.
    pub static NO_TOKENS: Counter = Counter::new();

    /// All, with their names and what they count.
    pub const ALL: [(&str, &str, &Counter); 9] = [
        ("frames_received", "Frames from guests to the metadata service.", &RECEIVED),
        ("frames_sent", "Frames from the metadata service to guests.", &SENT),
        ("frames_lost", "Frames that the metadata service had no room for.", &LOST),
        ("connections", "Connections to the metadata service that are over.", &CONNECTIONS),
        ("requests", "Requests to the metadata service.", &REQUESTS),
        ("refused", "Requests to the metadata service that got an error.", &REFUSED),
        ("tokens", "Tokens that the metadata service gave out.", &TOKENS),
        ("invalid_tokens", "Requests for metadata with a token that does not hold.", &INVALID_TOKENS),
        ("no_tokens", "Requests for metadata without a token.", &NO_TOKENS),
    ];
}

#[derive(Default)]
struct Registry {
    devices: Vec<Arc<Device>>,
    timeline: Vec<Moment>,
    output: Option<File>,
    lines_failed: u64,
}

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { devices: Vec::new(), timeline: Vec::new(), output: None, lines_failed: 0 });

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a device's counters told of.
pub fn register(device: Arc<Device>) {
    registry().devices.push(device);
}

/// Has the boot's timeline told of.
pub fn set_timeline(timeline: Vec<Moment>) {
    registry().timeline = timeline;
}

/// Has [`flush`] write lines of JSON to a file.
pub fn set_output(file: File) {
    registry().output = Some(file);
}

/// Writes a line of JSON, if there is a file for it.
pub fn flush() -> io::Result<()> {
    let mut registry = registry();
    let Some(mut output) = registry.output.take() else { return Ok(()) };
    let line = json::line_of(&registry.devices, &registry.timeline, registry.lines_failed);
    let written = output.write_all(line.as_bytes());
    registry.lines_failed += u64::from(written.is_err());
    registry.output = Some(output);
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let histogram = Histogram::default();
        for (us, bucket) in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (1000, 10), (u64::MAX / 2000, 23)] {
            let before = histogram.buckets[bucket].get();
            histogram.add(Duration::from_micros(us));
            assert_eq!(histogram.buckets[bucket].get(), before + 1, "{us}");
        }
        assert_eq!(histogram.count(), 7);
    }

    #[test]
    fn lines_tell_what_was_added_and_text_tells_all() {
        let device = Device::new("block", "disk\"0", Own::Block(Box::default()));
        let block = device.block().unwrap();
        block.operations[0].add(3);
        block.read_bytes.add(4096);
        block.latency[0].add(Duration::from_micros(100));
        device.interrupts.add(2);
        let devices = [device];
        let line: serde_json::Value = serde_json::from_str(&json::line_of(&devices, &[], 0)).unwrap();
        assert_eq!(line.pointer("/block_disk\"0/read_count").unwrap(), 3);
        assert_eq!(line.pointer("/block/read_bytes").unwrap(), 4096);
        let again: serde_json::Value = serde_json::from_str(&json::line_of(&devices, &[], 0)).unwrap();
        assert_eq!(again.pointer("/block_disk\"0/read_count").unwrap(), 0);
        let timeline = [("first KVM_RUN".to_owned(), 2200, Some(1300))];
        let text = prometheus::text_of(&devices, &timeline);
        assert!(text.contains("rvmm_block_operations_total{id=\"disk\\\"0\",kind=\"read\"} 3\n"), "{text}");
        assert!(
            text.contains(
                "rvmm_block_latency_seconds_bucket{id=\"disk\\\"0\",kind=\"read\",le=\"+Inf\"} 1\n"
            )
        );
        assert!(text.contains("rvmm_boot_seconds{moment=\"first KVM_RUN\"} 0.0022\n"));
        // Each family is announced once, before its samples.
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = line.split(' ').next().unwrap();
            assert_eq!(text.matches(&format!("# TYPE {name} ")).count(), 1, "{name}");
        }
    }
}
