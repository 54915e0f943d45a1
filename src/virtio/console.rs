//! The console (virtio 1.2 §5.3): one port, `hvc0` in a Linux guest, with the size of the terminal.
//!
//! Output goes to a [`ConsoleSink`] as long as it has room, and waits in the queue otherwise; input waits here until the
//! driver has a buffer for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Chain;
use super::device::{Activation, Completions, Device, Handled, Source};
use super::spec::console::{self, RECEIVE, TRANSMIT, feature};
use super::state::{DeviceState, RestoreError};
use super::worker::lock;
use crate::memory::Ram;
use crate::sandbox;

const QUEUE_SIZE: u16 = 64;
/// Input that waits at most.
const INPUT_MAX: usize = 4096;
/// Output that is copied at once.
const PIECE: usize = 4096;
/// So many pieces of a chain, which may have 4 GiB, before the thread looks for other work.
const PIECES_AT_ONCE: usize = 64;

/// Where a console's output goes.
pub trait ConsoleSink: Send + Sync {
    /// Takes bytes from the front; returns how many. When not all, [`ConsoleHandle::sink_drained`] follows. Must not
    /// block.
    fn put(&self, bytes: &[u8]) -> usize;
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

#[derive(Debug)]
struct Shared {
    input: Mutex<Input>,
    /// Input has come, or the sink has room again.
    event: EventFd,
    /// The feeder that was turned away may try again.
    room: EventFd,
    size: Mutex<Size>,
}

#[derive(Debug, Default)]
struct Input {
    bytes: VecDeque<u8>,
    /// There is a driver to take them.
    listens: bool,
    feeder_waits: bool,
}

/// The host's end of a console.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// Gives the guest input; returns how many bytes were taken. When not all were, the room event follows.
    ///
    /// Nothing is taken before there is a driver, so that what waits in a pipe is not lost with a reset.
    pub fn feed(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.0.input);
        let room = if input.listens { INPUT_MAX.saturating_sub(input.bytes.len()) } else { 0 };
        let taken = bytes.len().min(room);
        input.bytes.extend(bytes.iter().take(taken));
        input.feeder_waits = taken < bytes.len();
        drop(input);
        if taken > 0 {
            self.0.wake();
        }
        taken
    }

    /// Tells that the sink has room again after it had none.
    pub fn sink_drained(&self) {
        self.0.wake();
    }

    /// Sets the terminal's size; it takes effect when the device is reconfigured.
    pub fn set_size(&self, size: Size) {
        *lock(&self.0.size) = size;
    }
}

impl Shared {
    fn wake(&self) {
        // The counter can only be full of calls that are still to be heard.
        let _ = self.event.write(1);
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        lock(&self.input)
    }

    /// Lets a feeder that was turned away try again.
    fn call_feeder(&self, input: &mut Input) {
        if std::mem::take(&mut input.feeder_waits) {
            let _ = self.room.write(1);
        }
    }
}

/// What a snapshot keeps of a console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    size: Size,
    sent: u32,
    /// Input that the driver has not fetched.
    input: Vec<u8>,
}

/// The device.
pub struct Console {
    shared: Arc<Shared>,
    sink: Arc<dyn ConsoleSink>,
    /// As the driver sees it.
    size: Size,
    ram: Option<Ram>,
    /// Bytes of the first chain in the transmit queue that the sink has already.
    sent: u32,
}

impl Console {
    /// A console that sends to `sink`, and signals `room` when a feeder that was turned away may try again.
    pub fn new(sink: Arc<dyn ConsoleSink>, size: Size, room: EventFd) -> io::Result<(Self, ConsoleHandle)> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { input: Mutex::default(), event, room, size: Mutex::new(size) });
        let device = Self { shared: Arc::clone(&shared), sink, size, ram: None, sent: 0 };
        Ok((device, ConsoleHandle(shared)))
    }

    /// Sends what a chain holds; false if the sink is full before its end, or others are to have their turn.
    fn transmit(&mut self, ram: &Ram, chain: &Chain) -> bool {
        // A chain that has become shorter than what was sent of it has no more to say.
        let Ok((_, mut reader)) = chain.reader(ram).split_at(self.sent) else {
            self.sent = 0;
            return true;
        };
        let mut piece = [0; PIECE];
        for _ in 0..PIECES_AT_ONCE {
            let len = piece.len().min(reader.remaining() as usize);
            let Some(part) = piece.get_mut(..len).filter(|part| !part.is_empty()) else { break };
            if reader.read_exact(part).is_err() {
                break;
            }
            let taken = self.sink.put(part).min(part.len());
            self.sent = self.sent.saturating_add(taken as u32);
            if taken < part.len() {
                return false;
            }
        }
        if reader.remaining() > 0 {
            self.shared.wake();
            return false;
        }
        self.sent = 0;
        true
    }

    /// Fills a chain with input; `None` if there is none.
    fn receive(&self, ram: &Ram, chain: &Chain) -> Option<u32> {
        let mut input = self.shared.input();
        if input.bytes.is_empty() {
            return None;
        }
        let mut writer = chain.writer(ram);
        let len = input.bytes.len().min(writer.remaining() as usize);
        let bytes: Vec<u8> = input.bytes.drain(..len).collect();
        let written = writer.write_all(&bytes).map_or(0, |()| writer.written());
        self.shared.call_feeder(&mut input);
        Some(written)
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        console::ID
    }

    fn features(&self) -> u64 {
        if self.size == Size::default() { 0 } else { feature::SIZE }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// `struct virtio_console_config`, §5.3.4; ports and emergency writes are not offered.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        let fields = self.size.columns.to_le_bytes().into_iter().chain(self.size.rows.to_le_bytes());
        for (to, from) in config.iter_mut().zip(fields) {
            *to = from;
        }
        config
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::ConsoleDevice
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.ram = Some(activation.ram);
        let mut input = self.shared.input();
        input.listens = true;
        self.shared.call_feeder(&mut input);
        Ok(())
    }

    /// Linux reads the terminal's size only when it is told of a change.
    fn announces_config(&self) -> bool {
        self.size != Size::default()
    }

    fn sources(&self) -> Vec<Source> {
        let fd = self.shared.event.as_raw_fd();
        self.ram.iter().map(|_| Source { fd, token: 0, events: EventSet::IN }).collect()
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        let Some(ram) = self.ram.clone() else { return Handled::Done(chain, 0) };
        match queue {
            TRANSMIT if self.transmit(&ram, &chain) => Handled::Done(chain, 0),
            RECEIVE if chain.writable_len() > 0 => match self.receive(&ram, &chain) {
                Some(written) => Handled::Done(chain, written),
                None => Handled::Wait(chain),
            },
            TRANSMIT => Handled::Wait(chain),
            // A buffer without room for anything.
            _ => Handled::Done(chain, 0),
        }
    }

    fn event(&mut self, _token: u32) {
        let _ = self.shared.event.read();
    }

    fn reconfigure(&mut self, _done: &mut Completions) {
        self.size = *lock(&self.shared.size);
    }

    fn save(&self) -> Option<DeviceState> {
        let input = self.shared.input().bytes.iter().copied().collect();
        Some(DeviceState::Console(ConsoleState { size: self.size, sent: self.sent, input }))
    }

    /// The driver goes on with the size that it knows; that of the terminal here is told when the device goes on.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console(state) = state else { return Err(RestoreError::Nonsense(console::ID)) };
        if state.input.len() > INPUT_MAX {
            return Err(RestoreError::Nonsense(console::ID));
        }
        self.size = state.size;
        self.sent = state.sent;
        self.shared.input().bytes = state.input.into();
        let mut here = lock(&self.shared.size);
        if *here == Size::default() || state.size == Size::default() {
            *here = state.size;
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.ram = None;
        self.sent = 0;
        let mut input = self.shared.input();
        input.listens = false;
        input.bytes.clear();
        self.shared.call_feeder(&mut input);
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
