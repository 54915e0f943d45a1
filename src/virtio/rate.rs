//! Limits on what a device moves: token buckets for bytes and for operations, which can be changed while it runs.
//!
//! What is larger than what is left in a bucket still passes, and leaves a debt that is waited for: so the long-term
//! rate holds for any size, and nothing is too large to pass.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

/// Shortest wait, so that a fast bucket with small packets does not cost a wake-up for each of them.
const MIN_WAIT: Duration = Duration::from_millis(1);
const MIN_WAIT_NANOS: u128 = MIN_WAIT.as_nanos();
/// What a rate alone means: this much of a second may pass at once.
const DEFAULT_REFILL_MS: u64 = 100;

/// A token bucket: `size` tokens every `refill_time` milliseconds, and `one_time_burst` more before the first wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Bucket {
    /// Most tokens that are saved up.
    pub size: u64,
    /// Tokens that are there at the start beyond `size`, and are not replaced.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Milliseconds in which an empty bucket becomes full.
    pub refill_time: u64,
}

impl Bucket {
    /// `rate` tokens a second, of which `burst` may pass at once, or a tenth of a second's.
    pub fn per_second(rate: u64, burst: Option<u64>) -> Self {
        let default = u128::from(rate) * u128::from(DEFAULT_REFILL_MS) / 1000;
        let size = burst.unwrap_or(default as u64).max(1);
        let refill = (u128::from(size) * 1000).div_ceil(u128::from(rate.max(1)));
        // A whole number of milliseconds to which a nearly whole number of tokens belongs, so that the rate is right.
        let shortest = u64::try_from(refill).unwrap_or(u64::MAX).max(1);
        let thousandths = |time: u64| u128::from(rate) * u128::from(time);
        let is_right = |time: &u64| thousandths(*time) % 1000 <= thousandths(*time) / 100;
        let refill_time = (shortest..=shortest.saturating_add(1000)).find(is_right).unwrap_or(shortest);
        let exact = thousandths(refill_time) / 1000;
        let size = u64::try_from(exact).unwrap_or(u64::MAX).max(1);
        Self { size, one_time_burst: 0, refill_time }
    }

    /// Whether it lets anything through.
    pub fn is_valid(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}

/// Limits on bytes and on operations; without a bucket there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bucket>,
    /// Packets or requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<Bucket>,
}

impl Limits {
    /// Whether each bucket lets anything through.
    pub fn is_valid(&self) -> bool {
        [self.bandwidth, self.operations].iter().flatten().all(Bucket::is_valid)
    }

    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A change of limits: buckets that are not named stay, and one that lets nothing through takes the limit away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsChange {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Packets or requests.
    pub operations: Option<Bucket>,
}

impl LimitsChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The limits after it.
    pub fn apply(self, to: Limits) -> Limits {
        let change = |new: Option<Bucket>, old| match new {
            Some(bucket) => Some(bucket).filter(Bucket::is_valid),
            None => old,
        };
        Limits {
            bandwidth: change(self.bandwidth, to.bandwidth),
            operations: change(self.operations, to.operations),
        }
    }
}

/// Changes the limits of a device, also while it runs.
#[derive(Clone, Debug)]
pub struct LimitHandle(Arc<Control>);

impl LimitHandle {
    /// The limits that hold.
    pub fn get(&self) -> Limits {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets limits, with full buckets; what waits for the old ones is looked at again.
    pub fn set(&self, limits: Limits) {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.0.version.fetch_add(1, Ordering::SeqCst);
        self.0.arm(Duration::from_nanos(1));
    }
}

#[derive(Debug)]
struct Control {
    limits: Mutex<Limits>,
    version: AtomicU64,
    /// Made when the device starts.
    timer: OnceLock<TimerFd>,
}

impl Control {
    fn arm(&self, after: Duration) {
        if let Some(timer) = self.timer.get() {
            let after = Expiration::OneShot(TimeSpec::from_duration(after));
            if let Err(error) = timer.set(after, TimerSetTimeFlags::empty()) {
                tracing::warn!(%error, "cannot arm the timer of a rate limit");
            }
        }
    }
}

/// The device's side of its limits.
#[derive(Debug)]
pub struct Limiter {
    control: Arc<Control>,
    seen: u64,
    bandwidth: Option<Level>,
    operations: Option<Level>,
}

impl Limiter {
    /// A limiter with full buckets.
    pub fn new(limits: Limits) -> Self {
        let control =
            Control { limits: Mutex::new(limits), version: AtomicU64::new(0), timer: OnceLock::new() };
        let mut limiter = Self { control: Arc::new(control), seen: 0, bandwidth: None, operations: None };
        limiter.fill(Instant::now());
        limiter
    }

    /// What changes these limits.
    pub fn handle(&self) -> LimitHandle {
        LimitHandle(Arc::clone(&self.control))
    }

    /// Makes the timer, if it is not there yet.
    pub fn start(&self) -> io::Result<()> {
        if self.control.timer.get().is_none() {
            let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
            // Of two that were made at once one is enough.
            let _ = self.control.timer.set(timer);
        }
        Ok(())
    }

    /// Becomes readable when [`Self::ready`] may say yes again.
    pub fn fd(&self) -> Option<RawFd> {
        self.control.timer.get().map(|timer| timer.as_fd().as_raw_fd())
    }

    /// Takes note that the descriptor was readable.
    pub fn fired(&self) {
        if let Some(timer) = self.control.timer.get() {
            let _ = timer.wait();
        }
    }

    /// Whether something may pass now; if not, the timer is armed.
    pub fn ready(&mut self) -> bool {
        let version = self.control.version.load(Ordering::Acquire);
        if version == self.seen && self.bandwidth.is_none() && self.operations.is_none() {
            return true;
        }
        while let Some(wait) = self.ready_at(Instant::now()) {
            self.control.arm(wait);
            // Limits that were set meanwhile have armed the timer before, so nothing would come of that.
            if self.control.version.load(Ordering::SeqCst) == self.seen {
                return false;
            }
        }
        true
    }

    /// How long to wait until something may pass; `None` if it may now.
    fn ready_at(&mut self, now: Instant) -> Option<Duration> {
        let version = self.control.version.load(Ordering::Acquire);
        if version != self.seen {
            self.seen = version;
            self.fill(now);
        }
        let levels = [&mut self.bandwidth, &mut self.operations];
        levels.into_iter().flatten().filter_map(|level| level.wait(now)).max()
    }

    /// Whether anything is limited.
    pub fn has_limits(&self) -> bool {
        !self.handle().get().is_none()
    }

    /// Takes tokens for one operation of so many bytes that has passed.
    pub fn take(&mut self, bytes: u64) {
        if let Some(level) = &mut self.bandwidth {
            level.take(bytes);
        }
        if let Some(level) = &mut self.operations {
            level.take(1);
        }
    }

    fn fill(&mut self, now: Instant) {
        let limits = self.handle().get();
        if limits.is_none() {
            (self.bandwidth, self.operations) = (None, None);
            return;
        }
        let level = |bucket: Bucket| bucket.is_valid().then(|| Level::new(bucket, now));
        self.bandwidth = limits.bandwidth.and_then(level);
        self.operations = limits.operations.and_then(level);
    }
}

/// How full a bucket is.
#[derive(Debug)]
struct Level {
    bucket: Bucket,
    /// Below 0 it is a debt.
    tokens: i128,
    /// Until when tokens were added.
    filled: Instant,
}

impl Level {
    fn new(bucket: Bucket, now: Instant) -> Self {
        let tokens = i128::from(bucket.size) + i128::from(bucket.one_time_burst);
        Self { bucket, tokens, filled: now }
    }

    fn refill_nanos(&self) -> u128 {
        u128::from(self.bucket.refill_time) * 1_000_000
    }

    fn refill(&mut self, now: Instant) {
        let size = u128::from(self.bucket.size);
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        // Both factors are below 2^64, or the bucket is long full.
        let added = elapsed.min(u64::MAX.into()) * size / self.refill_nanos();
        if added == 0 {
            return;
        }
        let most = self.tokens.max(size as i128);
        self.tokens = self.tokens.saturating_add(added as i128).min(most);
        if self.tokens == most {
            self.filled = now;
        } else {
            // Not beyond what the tokens stand for, so that no fraction is lost.
            let nanos = added * self.refill_nanos() / size;
            self.filled += Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }

    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        if self.tokens > 0 {
            return None;
        }
        let size = u128::from(self.bucket.size);
        let missing = 1i128.saturating_sub(self.tokens) as u128;
        let nanos = missing.saturating_mul(self.refill_nanos()).div_ceil(size).max(MIN_WAIT_NANOS);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_sub(tokens.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(limits: Limits) -> Limiter {
        Limiter::new(limits)
    }

    /// Bytes that pass within `time` when packets of `packet` bytes are always there.
    fn passed(limiter: &mut Limiter, packet: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let (mut now, mut sum) = (start, 0);
        while now < start + time {
            match limiter.ready_at(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.take(packet);
                    sum += packet;
                }
            }
        }
        sum
    }

    #[test]
    fn rate_holds_for_any_size_of_packet() {
        for packet in [1, 60, 1500, 65_550, 3_000_000] {
            for rate in [10_000, 1_000_000, 100_000_000] {
                let bucket = Bucket::per_second(rate, None);
                let mut limiter = limiter(Limits { bandwidth: Some(bucket), operations: None });
                // Long enough for many refills, or for many packets.
                let time = Duration::from_millis((100_000_000 * packet / rate).min(1_000_000));
                let sum = passed(&mut limiter, packet, time);
                let fair = rate * time.as_millis() as u64 / 1000;
                let slack = bucket.size + packet + fair / 1000;
                assert!(sum.abs_diff(fair) <= slack, "{packet} at {rate}: {sum} of {fair}");
            }
        }
    }

    #[test]
    fn the_tighter_of_two_limits_holds() {
        let limits = Limits {
            bandwidth: Some(Bucket::per_second(1_000_000, None)),
            operations: Some(Bucket::per_second(100, Some(10))),
        };
        let sum = passed(&mut limiter(limits), 1000, Duration::from_secs(10));
        assert!((1_000_000..=1_030_000).contains(&sum), "{sum}");
    }

    #[test]
    fn burst_passes_once() {
        let bucket = Bucket { size: 1000, one_time_burst: 50_000, refill_time: 1000 };
        let mut limiter = limiter(Limits { bandwidth: Some(bucket), operations: None });
        let start = Instant::now();
        let mut sum = 0;
        while limiter.ready_at(start).is_none() {
            limiter.take(100);
            sum += 100;
        }
        assert_eq!(sum, 51_000);
        let later = start + Duration::from_secs(3600);
        assert_eq!(limiter.ready_at(later), None);
        limiter.take(1000);
        assert!(limiter.ready_at(later).is_some());
    }

    #[test]
    fn change_leaves_what_it_does_not_name() {
        let (small, large) = (Bucket::per_second(10, None), Bucket::per_second(1000, None));
        let limits = Limits { bandwidth: Some(small), operations: Some(small) };
        let change = LimitsChange { bandwidth: Some(large), operations: None };
        assert_eq!(change.apply(limits), Limits { bandwidth: Some(large), operations: Some(small) });
        let none = Bucket { size: 0, one_time_burst: 0, refill_time: 0 };
        let change = LimitsChange { bandwidth: None, operations: Some(none) };
        assert_eq!(change.apply(limits), Limits { bandwidth: Some(small), operations: None });
        assert!(LimitsChange::default().is_empty() && !change.is_empty());
    }

    #[test]
    fn changed_limits_hold_at_once() {
        let mut limiter = limiter(Limits::default());
        limiter.start().unwrap();
        assert!(limiter.ready());
        limiter.take(u64::MAX);
        assert!(limiter.ready());
        let handle = limiter.handle();
        let tight = Limits { operations: Some(Bucket::per_second(1, Some(1))), bandwidth: None };
        handle.set(tight);
        assert_eq!(handle.get(), tight);
        assert!(limiter.ready());
        limiter.take(1);
        assert!(!limiter.ready());
        handle.set(Limits::default());
        assert!(limiter.ready());
    }

    #[test]
    fn no_bucket_is_too_odd_to_count_with() {
        for size in [0, 1, u64::MAX] {
            for refill_time in [0, 1, u64::MAX] {
                for one_time_burst in [0, u64::MAX] {
                    let bucket = Bucket { size, one_time_burst, refill_time };
                    let mut limiter = limiter(Limits { bandwidth: Some(bucket), operations: Some(bucket) });
                    let mut now = Instant::now();
                    for _ in 0..10 {
                        limiter.take(u64::MAX);
                        let _ = limiter.ready_at(now);
                        now += Duration::from_secs(1 << 20);
                    }
                }
            }
        }
    }

    #[test]
    fn rates_are_exact() {
        for rate in [1, 7, 999, 1000, 1 << 20, 123_456_789, u64::MAX] {
            for burst in [None, Some(1), Some(64 << 10), Some(u64::MAX)] {
                let bucket = Bucket::per_second(rate, burst);
                assert!(bucket.is_valid());
                let got = bucket.size as f64 * 1000.0 / bucket.refill_time as f64;
                let exact = (got / rate as f64 - 1.0).abs() < 0.02;
                assert!(exact || burst == Some(u64::MAX), "{rate} {burst:?} {bucket:?}");
            }
        }
    }
}
