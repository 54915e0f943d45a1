//! What a device is to transport and worker.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Chain;
use super::state::{DeviceState, RestoreError};
use crate::memory::Ram;
use crate::{metrics, sandbox};

/// A virtio device: its description, and what it does with a chain.
///
/// A device has one owner at a time: the transport while it is idle, its worker thread while it runs. It knows
/// neither registers nor rings nor interrupts.
pub trait Device: Send {
    /// Device number (virtio 1.2 §5).
    fn id(&self) -> u32;

    /// The device's own feature bits; those of transport and queues are not its business.
    fn features(&self) -> u64;

    /// Largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space as it is now.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready. Called on the worker thread, before any chain. What the device opens here it closes in
    /// [`Self::stop`].
    fn start(&mut self, activation: Activation) -> io::Result<()>;

    /// Its counters.
    fn metrics(&self) -> Arc<metrics::Device> {
        let kind = match self.id() {
            1 => "net",
            2 => "block",
            3 => "console",
            4 => "rng",
            5 => "balloon",
            19 => "vsock",
            26 => "fs",
            _ => "other",
        };
        metrics::Device::new(kind, "", metrics::Own::Nothing)
    }

    /// What its thread may do once the device is started.
    fn walls(&self) -> sandbox::Kind;

    /// Whether a driver that has just become ready is told to read the configuration.
    fn announces_config(&self) -> bool {
        false
    }

    /// Descriptors whose events the started device wants to hear of.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Has the host's kernel serve queues, where it can; the result is how many of the first ones it does. Called after
    /// [`Self::start`], and after a rest.
    fn hand_over(&mut self, queues: &[Handover<'_>]) -> u16 {
        let _ = queues;
        0
    }

    /// Serves those queues itself again: returns when the host's kernel does not touch guest memory any more, with the
    /// number of the next chain of each queue that was handed over.
    fn take_back(&mut self) -> Vec<Option<u16>> {
        Vec::new()
    }

    /// Whether queues that were handed over are to be taken back.
    fn wants_back(&self) -> bool {
        false
    }

    /// Whether the host's kernel has completed chains since this was last asked, and the driver is to be interrupted.
    fn has_interrupt(&mut self) -> bool {
        false
    }

    /// Takes a chain from a queue.
    fn handle(&mut self, queue: u16, chain: Chain) -> Handled;

    /// A batch of chains has been handled: starts what was put off, and hands in deferred chains that are done.
    fn flush(&mut self, done: &mut Completions) {
        let _ = done;
    }

    /// A [`Source`] has an event. Followed by [`Self::flush`], and by [`Self::handle`] for the queues that were told to
    /// wait.
    fn event(&mut self, token: u32) {
        let _ = token;
    }

    /// Who holds the device's handle has changed something: takes it over. What then differs in [`Self::config`] is
    /// told to the driver.
    fn reconfigure(&mut self, done: &mut Completions) {
        let _ = done;
    }

    /// Waits until no deferred chain is in flight, and hands in all that were used.
    fn drain(&mut self, done: &mut Completions) {
        let _ = done;
    }

    /// Hands over chains that it deferred and has not touched, those of a queue in the order in which they came: they
    /// were never taken. Called when the device comes to rest, after [`Self::drain`].
    fn give_back(&mut self, untouched: &mut Vec<(u16, Chain)>) {
        let _ = untouched;
    }

    /// Its own state, for a snapshot: while it rests, or is idle. `None` if it cannot be saved.
    fn save(&self) -> Option<DeviceState> {
        None
    }

    /// Takes over a state that [`Self::save`] gave, before it is started.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let _ = state;
        Err(RestoreError::Nonsense(self.id()))
    }

    /// The driver has reset the device: lets go of guest memory, of chains in flight and of what [`Self::start`]
    /// opened. Returns when nothing touches guest memory any more.
    fn stop(&mut self);
}

/// What a device gets when its driver is ready.
#[derive(Clone, Debug)]
pub struct Activation {
    /// Guest memory.
    pub ram: Ram,
    /// Features that the driver has accepted, those of transport and queues included.
    pub features: u64,
}

/// A queue that may be handed over to the host's kernel.
#[derive(Clone, Copy, Debug)]
pub struct Handover<'a> {
    /// Its number.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table, in guest memory.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Number of the next chain.
    pub next_avail: u16,
    /// Signalled by the driver's notifications.
    pub kick: &'a EventFd,
}

/// What became of a chain.
#[must_use]
#[derive(Debug)]
pub enum Handled {
    /// It is done; so many bytes were written to it.
    Done(Chain, u32),
    /// The device keeps it and hands it in later.
    Deferred,
    /// The device cannot take it now: offer it again after the next event or completion.
    Wait(Chain),
}

/// A deferred chain that is done.
#[derive(Debug)]
pub struct Completion {
    /// The queue that it came from.
    pub queue: u16,
    /// The chain.
    pub chain: Chain,
    /// Bytes that were written to it.
    pub written: u32,
}

/// Deferred chains that are done, in the order in which they go back.
pub type Completions = Vec<Completion>;

/// A descriptor that a device waits on.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The descriptor, open as long as the device is started.
    pub fd: RawFd,
    /// What [`Device::event`] is called with.
    pub token: u32,
    /// Events to wait for.
    pub events: EventSet,
}
