//! The virtio-mmio transport, version 2: registers, status, and who owns the device (virtio 1.2 §4.2).
//!
//! Registers are 32 bits wide and aligned; an access of another kind is ignored and reads as all ones. Only the
//! configuration space takes any width.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::{QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, Device};
use super::queue::Queue;
use super::spec::{self, QUEUE_SIZE_MAX, feature, register, status};
use super::state::{QueuePosition, RestoreError, SaveError, TransportState};
use super::worker::{self, Config, Handle, Parts, Pausing, Shared, lock};
use crate::bus::BusDevice;
use crate::memory::Ram;
use crate::metrics;

/// How long a vCPU waits for a device that it resets. A device with nothing in flight needs a fraction of it; one that
/// waits for its host goes on stopping while the guest runs, and shows a status other than 0 until it has stopped.
const RESET_WAIT: Duration = Duration::from_millis(10);

/// Vendor number: `RVMM`.
const VENDOR_ID: u32 = 0x4d4d_5652;

/// Why a transport cannot be made or paused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no event descriptor for a queue.
    #[error("cannot create an event descriptor for a virtio queue")]
    EventFd(#[source] io::Error),
    /// A queue's size is no power of two, or too large.
    #[error("a virtio queue cannot have {0} entries")]
    QueueSize(u16),
    /// The device waits for its host.
    #[error("virtio device {id} did not come to rest within {limit:?}")]
    Busy {
        /// Device number.
        id: u32,
        /// How long it was given.
        limit: Duration,
    },
}

/// One virtio-mmio window with the device behind it.
pub struct Transport {
    id: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    ram: Ram,
    kicks: Arc<[EventFd]>,
    /// Wakes the worker up, one after the other.
    wake: Arc<EventFd>,
    shared: Arc<Shared>,
    state: Mutex<State>,
}

struct State {
    registers: Registers,
    owner: Owner,
    /// A restored device's queues, which it goes on with when the VM does.
    restored: Option<Vec<Option<QueuePosition>>>,
}

/// Who has the device.
enum Owner {
    /// The transport.
    Idle(Box<dyn Device>),
    /// Its worker.
    Running(Handle),
    /// Its worker, which was told to stop for a reset.
    Stopping(Handle),
    /// Nobody: its worker panicked.
    Lost,
}

/// A device that was told to rest.
pub struct ComingToRest {
    id: u32,
    /// `None` if it rests already.
    pausing: Option<Pausing>,
    limit: Duration,
}

impl ComingToRest {
    /// Waits until it rests.
    pub fn wait(self) -> Result<(), Error> {
        let rests = self.pausing.is_none_or(|pausing| pausing.wait(self.limit));
        if rests { Ok(()) } else { Err(Error::Busy { id: self.id, limit: self.limit }) }
    }
}

/// What the driver has written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// The same for one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

const ACKNOWLEDGED: u32 = status::ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGED | status::DRIVER;
const FEATURES_OK: u32 = DRIVER | status::FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | status::DRIVER_OK;

/// The moves of the device status that a driver may make (virtio 1.2 §3.1.1), besides a reset and giving up.
const MOVES: [(u32, u32); 4] =
    [(0, ACKNOWLEDGED), (ACKNOWLEDGED, DRIVER), (DRIVER, FEATURES_OK), (FEATURES_OK, DRIVER_OK)];

impl Transport {
    /// A window for `device`, which interrupts its driver through `irq`.
    pub fn new(ram: Ram, device: Box<dyn Device>, irq: EventFd) -> Result<Self, Error> {
        let queue_sizes = device.queue_sizes().to_vec();
        if let Some(bad) = queue_sizes.iter().find(|size| !size.is_power_of_two() || **size > QUEUE_SIZE_MAX)
        {
            return Err(Error::QueueSize(*bad));
        }
        let kicks: Result<Arc<[EventFd]>, _> =
            queue_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let counters = device.metrics();
        metrics::register(Arc::clone(&counters));
        Ok(Self {
            id: device.id(),
            features: device.features() | feature::COMMON,
            ram,
            kicks: kicks.map_err(Error::EventFd)?,
            wake: Arc::new(EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?),
            shared: Arc::new(Shared::new(irq, device.config(), counters)),
            state: Mutex::new(State {
                registers: Registers::new(&queue_sizes),
                owner: Owner::Idle(device),
                restored: None,
            }),
            queue_sizes,
        })
    }

    /// One descriptor per queue; a write of the queue's number to [`register::QUEUE_NOTIFY`] must signal it.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Brings the device to rest: nothing is in flight and guest memory is not touched until [`Self::resume`]. For the
    /// thread that controls the VM, while no vCPU runs.
    pub fn pause(&self, limit: Duration) -> Result<(), Error> {
        self.begin_pause(limit)?.wait()
    }

    /// Tells the device to come to rest, so that others can be told before this one is waited for.
    pub fn begin_pause(&self, limit: Duration) -> Result<ComingToRest, Error> {
        let mut state = lock(&self.state);
        self.settle_reset(&mut state, limit);
        let pausing = match &state.owner {
            Owner::Running(handle) => Some(handle.pause()),
            Owner::Stopping(_) => return Err(Error::Busy { id: self.id, limit }),
            Owner::Idle(_) | Owner::Lost => None,
        };
        Ok(ComingToRest { id: self.id, pausing, limit })
    }

    /// Has the device take over what was changed through its handle, and tells the driver if it can see it.
    pub fn reconfigure(&self) {
        match &mut lock(&self.state).owner {
            Owner::Idle(device) => {
                // No chain is in flight in an idle device.
                device.reconfigure(&mut Vec::new());
                self.shared.publish_and_tell(device.config());
            }
            Owner::Running(handle) => handle.reconfigure(),
            Owner::Stopping(_) | Owner::Lost => {}
        }
    }

    /// Lets a paused device go on, or a restored one.
    pub fn resume(&self) {
        let mut state = lock(&self.state);
        if let Some(positions) = state.restored.take() {
            self.go_on(&mut state, &positions);
        } else if let Owner::Running(handle) = &state.owner {
            handle.resume();
        }
    }

    /// The state of a device that was paused.
    pub fn save(&self) -> Result<TransportState, SaveError> {
        let state = lock(&self.state);
        let (device, positions) = match &state.owner {
            Owner::Idle(device) => (device.save(), state.restored.clone()),
            Owner::Running(handle) => {
                let saved = handle.saved().ok_or(SaveError::AtWork(self.id))?;
                (saved.device, Some(saved.positions))
            }
            Owner::Stopping(_) => return Err(SaveError::AtWork(self.id)),
            Owner::Lost => return Err(SaveError::Failed(self.id)),
        };
        let Config { bytes: config, generation } = self.shared.config().clone();
        Ok(TransportState {
            id: self.id,
            registers: state.registers.clone(),
            interrupt_status: self.shared.interrupt_status(),
            device_status: self.shared.device_status(),
            config,
            generation,
            positions,
            device: device.ok_or(SaveError::Unsupported(self.id))?,
        })
    }

    /// Takes over a state. The device goes on with [`Self::resume`]; what differs from then is told to the driver.
    pub fn restore(&mut self, saved: TransportState) -> Result<(), RestoreError> {
        let id = self.id;
        if saved.id != id {
            return Err(RestoreError::Kind { saved: saved.id, device: id });
        }
        let queues = saved.registers.queues.len();
        if queues != self.queue_sizes.len() {
            return Err(RestoreError::Queues { id, saved: queues, device: self.queue_sizes.len() });
        }
        if saved.positions.as_ref().is_some_and(|positions| positions.len() != queues) {
            return Err(RestoreError::Nonsense(id));
        }
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Owner::Idle(device) = &mut state.owner else { return Err(RestoreError::Nonsense(id)) };
        device.restore(saved.device)?;
        self.features = device.features() | feature::COMMON;
        let missing = saved.registers.driver_features & !self.features;
        if saved.registers.status & status::FEATURES_OK != 0 && missing != 0 {
            let hint = if id == super::net::spec::ID { "; its host's taps could do more" } else { "" };
            return Err(RestoreError::Features { id, missing, hint });
        }
        // A device that was broken waits for its reset, and so does one that never was at work.
        let works = saved.registers.status & DRIVER_OK == DRIVER_OK && saved.device_status == 0;
        state.restored = saved.positions.filter(|_| works);
        state.registers = saved.registers;
        let config = Config { bytes: saved.config, generation: saved.generation };
        self.shared.restore(saved.interrupt_status, saved.device_status, config);
        Ok(())
    }

    /// Starts a restored device where it stood.
    fn go_on(&self, state: &mut State, positions: &[Option<QueuePosition>]) {
        self.activate(state, Some(positions));
        if let Owner::Running(handle) = &state.owner {
            handle.reconfigure();
        }
        // An interrupt may have been on its way.
        if self.shared.interrupt_status() != 0 {
            self.shared.interrupt(0);
        }
    }

    /// Stops the device for good, as a reset does, at the end of the VM.
    pub fn stop(&self, limit: Duration) -> Result<(), Error> {
        let mut state = lock(&self.state);
        self.reset(&mut state, limit);
        match state.owner {
            Owner::Running(_) | Owner::Stopping(_) => Err(Error::Busy { id: self.id, limit }),
            Owner::Idle(_) | Owner::Lost => Ok(()),
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let mut state = lock(&self.state);
        let State { registers, .. } = &mut *state;
        let queue_size = || registers.selected(&self.queue_sizes).map(|size| u32::from(*size));
        match offset {
            register::MAGIC_VALUE => spec::MAGIC,
            register::VERSION => spec::VERSION,
            register::DEVICE_ID => self.id,
            register::VENDOR_ID => VENDOR_ID,
            register::DEVICE_FEATURES => half(self.features, registers.device_features_sel),
            register::QUEUE_NUM_MAX => queue_size().unwrap_or(0),
            register::QUEUE_READY => {
                registers.selected(&registers.queues).map_or(0, |queue| u32::from(queue.ready))
            }
            register::INTERRUPT_STATUS => self.shared.interrupt_status(),
            register::STATUS => {
                self.settle_reset(&mut state, Duration::ZERO);
                state.registers.status | self.shared.device_status()
            }
            register::CONFIG_GENERATION => self.shared.config().generation,
            // §4.2.2: a region that does not exist has length and address of all ones.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == register::QUEUE_NOTIFY {
            // Usually the host kernel signals the descriptor itself, and this is never reached.
            if let Some(kick) = self.kicks.get(value as usize) {
                let _ = kick.write(1);
            }
            return;
        }
        if offset == register::INTERRUPT_ACK {
            return self.shared.acknowledge(value);
        }
        let mut state = lock(&self.state);
        self.settle_reset(&mut state, Duration::ZERO);
        let registers = &mut state.registers;
        match offset {
            register::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            register::DRIVER_FEATURES => registers.accept_features(value),
            register::QUEUE_SEL => registers.queue_sel = value,
            register::STATUS => self.write_status(&mut state, value),
            register::QUEUE_READY => self.write_queue_ready(registers, value),
            _ => registers.write_queue(offset, value),
        }
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) {
        if registers.status != FEATURES_OK {
            return;
        }
        let maximum = registers.selected(&self.queue_sizes).copied();
        let (Some(maximum), Some(queue)) = (maximum, registers.selected_queue()) else { return };
        queue.ready = value == 1 && queue.build(maximum, &self.ram).is_some();
        if value == 1 && !queue.ready {
            tracing::debug!(device = self.id, ?queue, "the driver set up a queue that cannot be");
        }
    }

    fn write_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            return self.reset(state, RESET_WAIT);
        }
        if !matches!(state.owner, Owner::Idle(_) | Owner::Running(_)) {
            return;
        }
        let before = state.registers.status;
        let value = value & !status::DEVICE_NEEDS_RESET;
        if value == before | status::FAILED {
            state.registers.status = value;
            return;
        }
        if !MOVES.contains(&(before, value)) {
            return;
        }
        let accepted = state.registers.driver_features;
        match value {
            FEATURES_OK if accepted & !self.features != 0 || accepted & feature::VERSION_1 == 0 => {
                tracing::debug!(device = self.id, accepted, "the driver wants features that are not offered");
            }
            DRIVER_OK => {
                state.registers.status = value;
                self.activate(state, None);
            }
            _ => state.registers.status = value,
        }
    }

    /// Moves the device into a worker of its own, which goes on at these places of its queues or begins anew.
    fn activate(&self, state: &mut State, positions: Option<&[Option<QueuePosition>]>) {
        let device = match std::mem::replace(&mut state.owner, Owner::Lost) {
            Owner::Idle(device) => device,
            other => return state.owner = other,
        };
        let features = state.registers.driver_features;
        let at = |index| match positions {
            Some(positions) => positions.get(index).copied().flatten(),
            None => Some(QueuePosition::default()),
        };
        let queues = state.registers.queues.iter().zip(&self.queue_sizes).enumerate().map(
            |(index, (queue, maximum))| {
                let mut queue = Some(queue).filter(|queue| queue.ready)?.build(*maximum, &self.ram)?;
                let QueuePosition { next_avail, next_used } = at(index)?;
                queue.set_next_avail(next_avail);
                queue.set_next_used(next_used);
                Some(Queue::new(queue, self.ram.clone(), features))
            },
        );
        let parts = Parts {
            device,
            activation: Activation { ram: self.ram.clone(), features },
            queues: queues.collect(),
            kicks: Arc::clone(&self.kicks),
            wake: Arc::clone(&self.wake),
            shared: Arc::clone(&self.shared),
        };
        state.owner = match worker::spawn(parts) {
            Ok(handle) => Owner::Running(handle),
            Err((device, error)) => {
                tracing::warn!(device = self.id, %error, "no thread for a virtio device");
                self.shared.needs_reset();
                Owner::Idle(device)
            }
        };
    }

    fn reset(&self, state: &mut State, limit: Duration) {
        state.owner = match std::mem::replace(&mut state.owner, Owner::Lost) {
            Owner::Running(handle) => {
                handle.stop();
                Owner::Stopping(handle)
            }
            other => other,
        };
        self.settle_reset(state, limit);
        if matches!(state.owner, Owner::Idle(_)) {
            self.clear(&mut state.registers);
        }
    }

    /// Completes a reset whose worker has stopped, waiting for it at most `limit`.
    fn settle_reset(&self, state: &mut State, limit: Duration) {
        state.owner = match std::mem::replace(&mut state.owner, Owner::Lost) {
            Owner::Stopping(handle) if handle.wait_ended(limit) => match handle.finish() {
                Some(device) => {
                    self.shared.publish(device.config());
                    self.clear(&mut state.registers);
                    Owner::Idle(device)
                }
                None => {
                    self.shared.needs_reset();
                    Owner::Lost
                }
            },
            other => other,
        };
    }

    fn clear(&self, registers: &mut Registers) {
        *registers = Registers::new(&self.queue_sizes);
        self.shared.reset();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.shared.config();
        for (at, byte) in (offset..).zip(data) {
            let found = usize::try_from(at).ok().and_then(|at| config.bytes.get(at));
            *byte = found.copied().unwrap_or(0);
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        match &mut lock(&self.state).owner {
            Owner::Idle(device) => {
                device.write_config(offset, data);
                self.shared.publish(device.config());
            }
            Owner::Running(handle) => handle.write_config(offset, data),
            Owner::Stopping(_) | Owner::Lost => {}
        }
    }
}

impl BusDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) => self.read_config(offset, data),
            None => match data.as_mut_array::<4>().filter(|_| offset.is_multiple_of(4)) {
                Some(data) => *data = self.read_register(offset).to_le_bytes(),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) => self.write_config(offset, data),
            None => {
                if let Ok(data) = data.try_into()
                    && offset.is_multiple_of(4)
                {
                    self.write_register(offset, u32::from_le_bytes(data));
                }
            }
        }
    }
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        let queue = |size: &u16| QueueRegisters { size: u32::from(*size), ..QueueRegisters::default() };
        Self { queues: queue_sizes.iter().map(queue).collect(), ..Self::default() }
    }

    /// What `all` has for the selected queue.
    fn selected<'a, T>(&self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.queue_sel as usize)
    }

    fn selected_queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(self.queue_sel as usize)
    }

    /// §3.1.1: features are written between DRIVER and FEATURES_OK.
    fn accept_features(&mut self, value: u32) {
        if self.status != DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => set_half(&mut self.driver_features, value, false),
            1 => set_half(&mut self.driver_features, value, true),
            // Bits that nobody offers; to accept one is an error, which FEATURES_OK finds.
            _ if value != 0 => self.driver_features |= 1 << 63,
            _ => {}
        }
    }

    /// §4.2.3.2: a queue is set up after FEATURES_OK, before DRIVER_OK, and while it is not ready.
    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status != FEATURES_OK {
            return;
        }
        let Some(queue) = self.selected_queue().filter(|queue| !queue.ready) else { return };
        match offset {
            register::QUEUE_NUM => queue.size = value,
            register::QUEUE_DESC_LOW => set_half(&mut queue.desc, value, false),
            register::QUEUE_DESC_HIGH => set_half(&mut queue.desc, value, true),
            register::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, value, false),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, value, true),
            register::QUEUE_DEVICE_LOW => set_half(&mut queue.device, value, false),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, value, true),
            _ => {}
        }
    }
}

impl QueueRegisters {
    /// The queue, if its size is legal and its parts are aligned and in guest memory (virtio 1.2 §2.7).
    fn build(&self, maximum: u16, ram: &Ram) -> Option<virtio_queue::Queue> {
        let state = QueueState {
            max_size: maximum,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size: u16::try_from(self.size).ok()?,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.driver,
            used_ring: self.device,
        };
        // `virtio-queue` takes a ring at address 0 for one that was not set up.
        virtio_queue::Queue::try_from(state).ok().filter(|queue| self.driver != 0 && queue.is_valid(ram))
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, half: u32, high: bool) {
    *value = if high {
        (*value & 0xffff_ffff) | u64::from(half) << 32
    } else {
        (*value & !0xffff_ffff) | u64::from(half)
    };
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
