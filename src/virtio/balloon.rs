//! The memory balloon (virtio 1.2 §5.5): the guest gives memory back to the host, as much as it is asked for, and what
//! is free anyway.
//!
//! Pages are freed as they come and fault in again when the guest uses them, so nothing must be done when the balloon
//! deflates, and the driver need not tell before it uses a page (`MUST_TELL_HOST` is not offered).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_manager::EventSet;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::chain::TooShort;
use super::device::{Activation, Completion, Completions, Device, Handled, Source};
use super::spec::balloon::{self, feature};
use super::state::{DeviceState, RestoreError};
use super::{Chain, Reader};
use crate::memory::{self, Ram};
use crate::sandbox;

/// Bytes of a page of the balloon.
pub const PAGE_BYTES: u64 = 1 << balloon::PAGE_SHIFT;

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The statistics; without them, the first place where a driver may put its reports.
const STATS: u16 = 2;
/// Where queues are missing, most drivers close up and some keep to §5.5.2; reports then come on queue 2, 3 or 4.
const QUEUES_WITH_REPORTS: usize = 5;

/// Pages that one request gives back at most; what more it names stays. Linux names 256.
const PAGES_MAX: usize = 16384;
/// Bytes that one report gives back at most. Linux reports at most 128 MiB.
const REPORT_BYTES_MAX: u64 = 256 << 20;

/// How a balloon is set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Pages of 4 KiB that the guest is asked for from the start.
    pub target_pages: u32,
    /// The guest may take pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest reports what is free.
    pub free_page_reporting: bool,
    /// How often the guest is asked for statistics; without it there are none.
    pub stats_interval: Option<Duration>,
}

/// Numbers that a guest reports of its memory, by tag (§5.5.6.4). What it does not report is missing.
pub type Statistics = [Option<u64>; balloon::STAT_TAGS];

/// What device and handle share.
#[derive(Debug)]
struct Shared {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    /// Zero for no statistics.
    stats_interval_ms: AtomicU64,
    statistics: Mutex<Statistics>,
    given_back_bytes: AtomicU64,
}

/// Sees and changes a balloon from outside. What is changed takes effect when the device is reconfigured.
#[derive(Clone, Debug)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Pages that the guest is asked for.
    pub fn target_pages(&self) -> u32 {
        self.0.target_pages.load(Ordering::Acquire)
    }

    /// Asks the guest for so many pages.
    pub fn set_target_pages(&self, pages: u32) {
        self.0.target_pages.store(pages, Ordering::Release);
    }

    /// Pages that the guest has given.
    pub fn actual_pages(&self) -> u32 {
        self.0.actual_pages.load(Ordering::Acquire)
    }

    /// How often the guest is asked for statistics; `None` if never.
    pub fn stats_interval(&self) -> Option<Duration> {
        let interval = Duration::from_millis(self.0.stats_interval_ms.load(Ordering::Acquire));
        (!interval.is_zero()).then_some(interval)
    }

    /// Sets how often the guest is asked for statistics, if it has a queue for them.
    pub fn set_stats_interval(&self, interval: Duration) {
        self.0.stats_interval_ms.store(millis(interval), Ordering::Release);
    }

    /// What the guest reported last.
    pub fn statistics(&self) -> Statistics {
        *self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of pages that the guest has given back so far, by the balloon or by reports.
    pub fn given_back_bytes(&self) -> u64 {
        self.0.given_back_bytes.load(Ordering::Relaxed)
    }
}

fn millis(interval: Duration) -> u64 {
    u64::try_from(interval.as_millis()).unwrap_or(u64::MAX)
}

/// What a snapshot keeps of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    target_pages: u32,
    actual_pages: u32,
    poison: u32,
}

/// The device.
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: Vec<u16>,
    /// What the driver sees as target. It follows the handle's when the device is reconfigured, and not before: or the
    /// driver would not be told of the change.
    target_pages: u32,
    /// What free pages contain, as far as the driver says (§5.5.6.6).
    poison: u32,
    active: Option<Active>,
}

/// While the driver is ready.
struct Active {
    ram: Ram,
    features: u64,
    timer: TimerFd,
    /// The driver's buffer for statistics. It has it back when new ones are wanted.
    held: Option<Chain>,
    wanted: bool,
    pfns: Vec<u32>,
    error_logged: bool,
}

impl Balloon {
    /// A balloon, and the handle to it.
    pub fn new(options: &BalloonOptions) -> (Self, BalloonHandle) {
        let offered = [
            (options.deflate_on_oom, feature::DEFLATE_ON_OOM),
            (options.stats_interval.is_some(), feature::STATS_VQ),
            // A kernel that fills free pages with something reports them only to a device that takes this.
            (options.free_page_reporting, feature::PAGE_REPORTING | feature::PAGE_POISON),
        ];
        let queues = match (options.free_page_reporting, options.stats_interval) {
            (true, _) => QUEUES_WITH_REPORTS,
            (false, Some(_)) => usize::from(STATS) + 1,
            (false, None) => usize::from(DEFLATE) + 1,
        };
        let shared = Arc::new(Shared {
            target_pages: AtomicU32::new(options.target_pages),
            actual_pages: AtomicU32::new(0),
            stats_interval_ms: AtomicU64::new(options.stats_interval.map_or(0, millis)),
            statistics: Mutex::new([None; balloon::STAT_TAGS]),
            given_back_bytes: AtomicU64::new(0),
        });
        let device = Self {
            shared: Arc::clone(&shared),
            features: offered.iter().filter(|(offer, _)| *offer).fold(0, |all, (_, bits)| all | bits),
            queue_sizes: vec![QUEUE_SIZE; queues],
            target_pages: options.target_pages,
            poison: 0,
            active: None,
        };
        (device, BalloonHandle(shared))
    }
}

impl Active {
    /// Whether a queue carries statistics; else it is one for reports.
    fn is_stats(&self, queue: u16) -> bool {
        queue == STATS && self.features & feature::STATS_VQ != 0
    }

    /// Sets the timer to what the handle says.
    fn arm(&self, shared: &Shared) -> io::Result<()> {
        let interval = Duration::from_millis(shared.stats_interval_ms.load(Ordering::Acquire));
        if interval.is_zero() || self.features & feature::STATS_VQ == 0 {
            return self.timer.unset().map_err(Into::into);
        }
        let every = Expiration::Interval(TimeSpec::from_duration(interval));
        self.timer.set(every, TimerSetTimeFlags::empty()).map_err(Into::into)
    }

    /// Frees the pages that a request names, neighbours together.
    fn inflate(&mut self, shared: &Shared, chain: &Chain) {
        self.pfns.clear();
        let mut reader = chain.reader(&self.ram);
        while let Ok(pfn) = reader.read_array::<{ balloon::PFN_BYTES }>() {
            if self.pfns.len() >= PAGES_MAX {
                break;
            }
            self.pfns.push(u32::from_le_bytes(pfn));
        }
        self.pfns.sort_unstable();
        self.pfns.dedup();
        let pfns = std::mem::take(&mut self.pfns);
        for run in pfns.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            if let Some(first) = run.first() {
                let addr = u64::from(*first) << balloon::PAGE_SHIFT;
                self.give_back(shared, GuestAddress(addr), (run.len() as u64) << balloon::PAGE_SHIFT);
            }
        }
        self.pfns = pfns;
    }

    /// Frees what a report names.
    fn report(&mut self, shared: &Shared, chain: &Chain) {
        let mut left = REPORT_BYTES_MAX;
        for (addr, len) in chain.writable_ranges() {
            let len = u64::from(len).min(left);
            left -= len;
            self.give_back(shared, addr, len);
        }
    }

    fn give_back(&mut self, shared: &Shared, addr: GuestAddress, len: u64) {
        match memory::give_back(&self.ram, addr, len) {
            Ok(freed) => {
                shared.given_back_bytes.fetch_add(freed, Ordering::Relaxed);
            }
            // The guest has given the pages up all the same, and does not care. One line is enough.
            Err(error) if !std::mem::replace(&mut self.error_logged, true) => {
                tracing::warn!(%error, "the host cannot take pages of the guest back");
            }
            Err(_) => {}
        }
    }

    /// Takes a driver's statistics; returns the buffer if there is one already, which no driver does.
    fn keep(&mut self, shared: &Shared, chain: Chain) -> Option<Chain> {
        // A statistic that is cut off is none, and those before it hold.
        let mut statistics = [None; balloon::STAT_TAGS];
        let _ = read_statistics(chain.reader(&self.ram), &mut statistics);
        *shared.statistics.lock().unwrap_or_else(PoisonError::into_inner) = statistics;
        match self.held {
            Some(_) => Some(chain),
            None => {
                self.held = Some(chain);
                None
            }
        }
    }

    fn hand_in(&mut self, done: &mut Completions) {
        self.wanted = false;
        let chain = self.held.take();
        done.extend(chain.map(|chain| Completion { queue: STATS, chain, written: 0 }));
    }
}

fn read_statistics(mut reader: Reader<'_>, to: &mut Statistics) -> Result<(), TooShort> {
    // No driver has more; a longer list says some twice.
    for _ in 0..2 * balloon::STAT_TAGS {
        let _: [u8; balloon::STAT_BYTES] = reader.clone().read_array()?;
        let tag = u16::from_le_bytes(reader.read_array()?);
        let value = u64::from_le_bytes(reader.read_array()?);
        if let Some(place) = to.get_mut(usize::from(tag)) {
            *place = Some(value);
        }
    }
    Ok(())
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        balloon::ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_balloon_config`, §5.5.4.
    fn config(&self) -> Vec<u8> {
        let actual = self.shared.actual_pages.load(Ordering::Acquire);
        // The third is for free page hinting, which is not offered.
        [self.target_pages, actual, 0, self.poison].iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let mut config = self.config();
        for (to, from) in config.iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
        let mut fields = config.chunks_exact(4).map(|field| field.try_into().map_or(0, u32::from_le_bytes));
        let (_target, actual, _hint, poison) = (fields.next(), fields.next(), fields.next(), fields.next());
        self.shared.actual_pages.store(actual.unwrap_or(0), Ordering::Release);
        self.poison = poison.unwrap_or(0);
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::Balloon
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let active = Active {
            ram: activation.ram,
            features: activation.features,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            held: None,
            wanted: false,
            pfns: Vec::new(),
            error_logged: false,
        };
        active.arm(&self.shared)?;
        self.active = Some(active);
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let timer = self.active.as_ref().filter(|active| active.features & feature::STATS_VQ != 0);
        let source =
            |active: &Active| Source { fd: active.timer.as_fd().as_raw_fd(), token: 0, events: EventSet::IN };
        timer.map(source).into_iter().collect()
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        let Some(active) = &mut self.active else { return Handled::Done(chain, 0) };
        match queue {
            INFLATE => active.inflate(&self.shared, &chain),
            DEFLATE => {}
            _ if active.is_stats(queue) => {
                return match active.keep(&self.shared, chain) {
                    Some(chain) => Handled::Done(chain, 0),
                    None => Handled::Deferred,
                };
            }
            // A page that was freed reads as zeroes; one that must contain something else is left alone.
            _ if self.poison == 0 || active.features & feature::PAGE_POISON == 0 => {
                active.report(&self.shared, &chain);
            }
            _ => {}
        }
        Handled::Done(chain, 0)
    }

    fn flush(&mut self, done: &mut Completions) {
        if let Some(active) = self.active.as_mut().filter(|active| active.wanted) {
            active.hand_in(done);
        }
    }

    fn event(&mut self, _token: u32) {
        if let Some(active) = &mut self.active {
            // Fails when the timer was set anew meanwhile.
            active.wanted = active.timer.wait().is_ok() && active.held.is_some();
        }
    }

    fn reconfigure(&mut self, _done: &mut Completions) {
        self.target_pages = self.shared.target_pages.load(Ordering::Acquire);
        if let Some(Err(error)) = self.active.as_ref().map(|active| active.arm(&self.shared)) {
            tracing::warn!(%error, "cannot set the timer of the balloon's statistics");
        }
    }

    fn drain(&mut self, done: &mut Completions) {
        if let Some(active) = &mut self.active {
            active.hand_in(done);
        }
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Balloon(BalloonState {
            target_pages: self.target_pages,
            actual_pages: self.shared.actual_pages.load(Ordering::Acquire),
            poison: self.poison,
        }))
    }

    /// The target becomes what the driver saw; one that was set for the new VM is told when the device goes on.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else { return Err(RestoreError::Nonsense(balloon::ID)) };
        self.target_pages = state.target_pages;
        self.poison = state.poison;
        self.shared.actual_pages.store(state.actual_pages, Ordering::Release);
        Ok(())
    }

    fn stop(&mut self) {
        self.active = None;
        self.poison = 0;
        self.shared.actual_pages.store(0, Ordering::Release);
        *self.shared.statistics.lock().unwrap_or_else(PoisonError::into_inner) = [None; balloon::STAT_TAGS];
    }
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
mod tests;
