//! The block device (virtio 1.2 §5.2): requests of a guest become operations on a disk image.
//!
//! One thread serves all queues of a disk. It only submits and collects: with io_uring the waiting happens in the
//! host's kernel, so a thread per queue would add stacks and wake-ups, not throughput.
#![allow(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use super::chain::TooShort;
use super::device::{Activation, Completion, Completions, Device, Handled, Source};
use super::rate::{LimitHandle, Limiter, Limits};
use super::spec::block::{self, feature, request, status};
use super::state::{DeviceState, RestoreError};
use super::worker::lock;
use super::{Chain, Reader, Writer};
use crate::disk::{Buffers, Durability, Engine, Image, Operation, SECTOR_BYTES};
use crate::memory::Ram;
use crate::{metrics, sandbox};

/// Largest range of one discard or write-zeroes request, in sectors: 256 MiB, so that none takes long.
const RANGE_SECTORS_MAX: u32 = (256 << 20) / SECTOR_BYTES as u32;
/// Ranges in one such request.
const RANGES_MAX: u32 = 1;
/// Length of a range of a discard or write-zeroes request.
const RANGE_BYTES: u32 = 16;
/// Host file systems and disks work in blocks of 4 KiB: as a power of two of sectors, and as sectors.
const PHYSICAL_BLOCK_EXP: u8 = 3;
const PHYSICAL_BLOCK_SECTORS: u32 = 1 << PHYSICAL_BLOCK_EXP;

/// Event tokens.
const ENGINE: u32 = 0;
const LIMITER: u32 = 1;

/// How a block device looks to its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// What the guest sees as the disk's serial number; the first 20 bytes count.
    pub serial: String,
    /// Number of queues; one per vCPU is best.
    pub queues: u16,
    /// Size of each, a power of two.
    pub queue_size: u16,
    /// Limits on what the guest reads and writes.
    pub limits: Limits,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { serial: String::new(), queues: 1, queue_size: 256, limits: Limits::default() }
    }
}

/// What a snapshot keeps of a disk: its requests are done, and the image is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size of the image.
    pub size_bytes: u64,
    /// The guest may only read.
    pub read_only: bool,
}

/// Changes the image of a block device from outside.
#[derive(Clone, Debug)]
pub struct BlockHandle(Arc<Mutex<Images>>);

#[derive(Debug)]
struct Images {
    current: Arc<Image>,
    /// To be used when the device is reconfigured.
    next: Option<Arc<Image>>,
}

impl BlockHandle {
    /// The image that the device has, or gets.
    pub fn image(&self) -> Arc<Image> {
        let images = lock(&self.0);
        Arc::clone(images.next.as_ref().unwrap_or(&images.current))
    }

    /// Gives the device another image when it is reconfigured. It must be opened with the same options.
    pub fn set_image(&self, image: Image) {
        lock(&self.0).next = Some(Arc::new(image));
    }
}

/// A block device on an image.
pub struct Block {
    image: Arc<Image>,
    images: BlockHandle,
    serial: [u8; block::ID_BYTES],
    queue_sizes: Vec<u16>,
    limiter: Limiter,
    /// Made with the device, since a ring cannot be made behind the walls. `None` if the host has none, and one was
    /// demanded.
    engine: Option<Engine<Pending>>,
    counters: Arc<metrics::Device>,
    /// While the driver is ready.
    active: Option<Active>,
}

struct Active {
    activation: Activation,
    error_logged: bool,
}

/// A request whose operation is in flight.
struct Pending {
    queue: u16,
    chain: Chain,
    /// Bytes written to the chain if the operation succeeds, without the status.
    data_len: u32,
    /// Place of its kind in [`metrics::BLOCK_KINDS`].
    kind: usize,
    bytes: u64,
    start: Instant,
}

/// What a request comes to.
enum Outcome {
    /// Wait for this operation, which writes so many bytes to the chain.
    Start(Operation, u32),
    /// The status, after so many bytes written to the chain.
    Reply(u8, u32),
}

impl Block {
    /// A device on `image`; `options.queues` of 0 count as 1.
    pub fn new(image: Image, options: &BlockOptions) -> Self {
        let mut serial = [0; block::ID_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let queues = usize::from(options.queues.max(1));
        let image = Arc::new(image);
        let images = Images { current: Arc::clone(&image), next: None };
        let engine = Engine::new(Arc::clone(&image), options.queue_size, Durability::OnFlush).ok();
        Self {
            image,
            images: BlockHandle(Arc::new(Mutex::new(images))),
            serial,
            queue_sizes: vec![options.queue_size; queues],
            limiter: Limiter::new(options.limits),
            engine,
            counters: metrics::Device::new("block", &*options.serial, metrics::Own::Block(Box::default())),
            active: None,
        }
    }

    /// What changes the limits on what the guest reads and writes.
    pub fn limit_handle(&self) -> LimitHandle {
        self.limiter.handle()
    }

    /// The handle to this device.
    pub fn handle(&self) -> BlockHandle {
        self.images.clone()
    }

    fn sectors(&self) -> u64 {
        self.image.size_bytes() / SECTOR_BYTES
    }

    fn read_only(&self) -> bool {
        self.image.options().read_only
    }

    /// Decodes a request, §5.2.6. Short or misdirected buffers are errors of the request, not of the queue.
    fn decode(&self, ram: &Ram, chain: &Chain) -> Outcome {
        self.try_decode(ram, chain).unwrap_or(Outcome::Reply(status::IOERR, 0))
    }

    fn try_decode(&self, ram: &Ram, chain: &Chain) -> Result<Outcome, TooShort> {
        let mut reader = chain.reader(ram);
        let kind = u32::from_le_bytes(reader.read_array()?);
        let _reserved: [u8; 4] = reader.read_array()?;
        let sector = u64::from_le_bytes(reader.read_array()?);
        // The last writable byte is the status, whatever comes before it.
        let data_len = chain.writable_len().checked_sub(1).ok_or(TooShort)?;
        let (mut data, _) = chain.writer(ram).split_at(data_len)?;
        match kind {
            request::IN => self.read(sector, data),
            request::OUT => self.write(sector, reader),
            request::FLUSH => Ok(Outcome::Start(Operation::Flush, 0)),
            request::GET_ID => {
                data.write_all(&self.serial)?;
                Ok(Outcome::Reply(status::OK, data.written()))
            }
            request::DISCARD | request::WRITE_ZEROES => self.range(kind, reader),
            _ => Ok(Outcome::Reply(status::UNSUPP, 0)),
        }
    }

    fn read(&self, sector: u64, data: Writer<'_>) -> Result<Outcome, TooShort> {
        let len = data.remaining();
        let Some(offset) = self.offset(sector, len) else { return Ok(Outcome::Reply(status::IOERR, 0)) };
        let mut buffers = Buffers::default();
        data.for_each_slice(|slice| push(&mut buffers, &slice))?;
        Ok(if len == 0 {
            Outcome::Reply(status::OK, 0)
        } else {
            Outcome::Start(Operation::Read { offset, buffers }, len)
        })
    }

    fn write(&self, sector: u64, data: Reader<'_>) -> Result<Outcome, TooShort> {
        let len = data.remaining();
        let Some(offset) = self.offset(sector, len).filter(|_| !self.read_only()) else {
            return Ok(Outcome::Reply(status::IOERR, 0));
        };
        let mut buffers = Buffers::default();
        data.for_each_slice(|slice| push(&mut buffers, &slice))?;
        Ok(if len == 0 {
            Outcome::Reply(status::OK, 0)
        } else {
            Outcome::Start(Operation::Write { offset, buffers }, 0)
        })
    }

    /// Discard and write zeroes, §5.2.6.2.
    fn range(&self, kind: u32, mut ranges: Reader<'_>) -> Result<Outcome, TooShort> {
        if self.read_only() || ranges.remaining() != RANGES_MAX * RANGE_BYTES {
            return Ok(Outcome::Reply(status::IOERR, 0));
        }
        let sector = u64::from_le_bytes(ranges.read_array()?);
        let sectors = u32::from_le_bytes(ranges.read_array()?);
        let flags = u32::from_le_bytes(ranges.read_array()?);
        let known = if kind == request::WRITE_ZEROES { block::WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Ok(Outcome::Reply(status::UNSUPP, 0));
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        let Some(offset) = self.byte_offset(sector, len).filter(|_| sectors <= RANGE_SECTORS_MAX) else {
            return Ok(Outcome::Reply(status::IOERR, 0));
        };
        Ok(match kind {
            _ if sectors == 0 => Outcome::Reply(status::OK, 0),
            request::DISCARD => Outcome::Start(Operation::Discard { offset, len }, 0),
            _ => Outcome::Start(Operation::WriteZeroes { offset, len, unmap: flags != 0 }, 0),
        })
    }

    /// The place of `len` bytes from `sector` on, if they are whole sectors inside the image.
    fn offset(&self, sector: u64, len: u32) -> Option<u64> {
        let whole = u64::from(len).is_multiple_of(SECTOR_BYTES);
        self.byte_offset(sector, len.into()).filter(|_| whole)
    }

    fn byte_offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset.checked_add(len)?;
        (end <= self.image.size_bytes()).then_some(offset)
    }
}

/// Bytes of data that a request moves, one way or the other.
fn data_bytes(chain: &Chain) -> u64 {
    let written = chain.readable_len().saturating_sub(block::HEADER_BYTES);
    u64::from(written) + u64::from(chain.writable_len().saturating_sub(1))
}

fn push(buffers: &mut Buffers, slice: &VolatileSlice<'_>) {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the slice lies in guest memory, which the activation keeps mapped until after the engine is gone, and to
    // which nothing in this program holds references.
    unsafe { buffers.push(guard.as_ptr(), slice.len()) };
}

/// Ends a request: writes its status behind the data. The result is the number of bytes written to the chain from its
/// start, so the status counts only if all before it was written too (§2.7.8.2).
fn reply(ram: &Ram, chain: &Chain, code: u8, data_len: u32) -> u32 {
    let Some(at) = chain.writable_len().checked_sub(1) else { return 0 };
    let written = chain.writer(ram).split_at(at).and_then(|(_, mut last)| last.write_all(&[code]));
    match written {
        Ok(()) => data_len.min(at) + 1,
        Err(TooShort) => 0,
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        block::ID
    }

    fn features(&self) -> u64 {
        let both = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::FLUSH;
        let queues = if self.queue_sizes.len() > 1 { feature::MQ } else { 0 };
        let access = if self.read_only() { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
        both | queues | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_blk_config`, §5.2.4.
    fn config(&self) -> Vec<u8> {
        let queue_size = self.queue_sizes.first().copied().unwrap_or(1);
        let mut config = Vec::with_capacity(60);
        config.extend(self.sectors().to_le_bytes());
        config.extend(0u32.to_le_bytes()); // size_max: not offered
        // seg_max: a chain of the queue's length, without header and status
        config.extend(u32::from(queue_size.saturating_sub(2).max(1)).to_le_bytes());
        config.extend([0; 4]); // geometry: not offered
        config.extend((SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        config.extend([PHYSICAL_BLOCK_EXP, 0]); // physical_block_exp, alignment_offset
        config.extend((PHYSICAL_BLOCK_SECTORS as u16).to_le_bytes()); // min_io_size
        config.extend(0u32.to_le_bytes()); // opt_io_size: none
        config.extend([0, 0]); // writeback: not offered; unused
        config.extend((self.queue_sizes.len() as u16).to_le_bytes()); // num_queues
        config.extend(RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
        config.extend(RANGES_MAX.to_le_bytes()); // max_discard_seg
        config.extend(PHYSICAL_BLOCK_SECTORS.to_le_bytes()); // discard_sector_alignment
        config.extend(RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(RANGES_MAX.to_le_bytes()); // max_write_zeroes_seg
        config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap; unused
        config
    }

    fn metrics(&self) -> Arc<metrics::Device> {
        Arc::clone(&self.counters)
    }

    fn walls(&self) -> sandbox::Kind {
        match self.engine.as_ref().is_none_or(Engine::is_uring) {
            true => sandbox::Kind::BlockUring,
            false => sandbox::Kind::BlockSync,
        }
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.limiter.start()?;
        let engine = self.engine.as_mut().ok_or(io::ErrorKind::Unsupported)?;
        // §5.2.6.2: for a driver that does not know of flushes, a write is stable when it completes.
        engine.begin(match activation.features & feature::FLUSH {
            0 => Durability::Always,
            _ => Durability::OnFlush,
        });
        self.active = Some(Active { activation, error_logged: false });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let engine = self.engine.as_ref().and_then(Engine::fd).map(|fd| (fd, ENGINE));
        let limiter = self.limiter.fd().map(|fd| (fd, LIMITER));
        let source = |(fd, token)| Source { fd, token, events: EventSet::IN };
        engine.into_iter().chain(limiter).map(source).collect()
    }

    fn event(&mut self, token: u32) {
        if token == LIMITER {
            self.limiter.fired();
        }
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        let Some(active) = &self.active else { return Handled::Done(chain, 0) };
        let has_room = self.engine.as_ref().is_some_and(Engine::has_room);
        if !has_room {
            return Handled::Wait(chain);
        }
        if !self.limiter.ready() {
            self.counters.limiter_waits.add(1);
            return Handled::Wait(chain);
        }
        match self.decode(&active.activation.ram, &chain) {
            Outcome::Reply(code, data_len) => {
                let written = reply(&active.activation.ram, &chain, code, data_len);
                Handled::Done(chain, written)
            }
            Outcome::Start(operation, data_len) => {
                let bytes = data_bytes(&chain);
                self.limiter.take(bytes);
                let kind = match &operation {
                    Operation::Read { .. } => 0,
                    Operation::Write { .. } => 1,
                    Operation::Flush => 2,
                    Operation::Discard { .. } | Operation::WriteZeroes { .. } => 3,
                };
                let start = Instant::now();
                if let Some(engine) = &mut self.engine {
                    engine.start(operation, Pending { queue, chain, data_len, kind, bytes, start });
                }
                Handled::Deferred
            }
        }
    }

    fn flush(&mut self, done: &mut Completions) {
        if let (Some(active), Some(engine)) = (&mut self.active, &mut self.engine) {
            engine.commit();
            active.collect(engine, &self.counters, done);
        }
    }

    fn reconfigure(&mut self, done: &mut Completions) {
        let Some(image) = lock(&self.images.0).next.take() else { return };
        self.drain(done);
        match self.engine.as_mut().map_or(Ok(()), |engine| engine.reopen(Arc::clone(&image))) {
            Ok(()) => {
                lock(&self.images.0).current = Arc::clone(&image);
                self.image = image;
            }
            Err(error) => tracing::warn!(%error, "a disk keeps its image: the new one cannot be used"),
        }
    }

    fn drain(&mut self, done: &mut Completions) {
        if let (Some(active), Some(engine)) = (&mut self.active, &mut self.engine) {
            engine.wait();
            active.collect(engine, &self.counters, done);
        }
    }

    fn save(&self) -> Option<DeviceState> {
        let (size_bytes, read_only) = (self.image.size_bytes(), self.read_only());
        Some(DeviceState::Block(BlockState { size_bytes, read_only }))
    }

    /// Whether another size is all right is for whoever chose the image to know.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Block(_) => Ok(()),
            _ => Err(RestoreError::Nonsense(block::ID)),
        }
    }

    fn stop(&mut self) {
        // Before the memory goes that its operations point into.
        if let Some(engine) = &mut self.engine {
            engine.settle();
        }
        self.active = None;
    }
}

/// Counts a request that is over.
fn count(counters: &metrics::Block, pending: &Pending, succeeded: bool) {
    if let Some(operations) = counters.operations.get(pending.kind) {
        operations.add(1);
    }
    if let Some(latency) = counters.latency.get(pending.kind) {
        latency.add(pending.start.elapsed());
    }
    match pending.kind {
        _ if !succeeded => counters.errors.add(1),
        0 => counters.read_bytes.add(pending.bytes),
        1 => counters.written_bytes.add(pending.bytes),
        _ => {}
    }
}

impl Active {
    /// Hands in the requests whose operations are over.
    fn collect(&mut self, engine: &mut Engine<Pending>, counters: &metrics::Device, done: &mut Completions) {
        while let Some((pending, result)) = engine.reap() {
            if let Some(block) = counters.block() {
                count(block, &pending, result.is_ok());
            }
            let code = match result {
                Ok(()) => status::OK,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => status::UNSUPP,
                Err(error) => {
                    self.log(&error);
                    status::IOERR
                }
            };
            let data_len = if code == status::OK { pending.data_len } else { 0 };
            let written = reply(&self.activation.ram, &pending.chain, code, data_len);
            done.push(Completion { queue: pending.queue, chain: pending.chain, written });
        }
    }

    /// A failing host is worth one line, not one for each of the guest's requests.
    fn log(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.error_logged, true) {
            tracing::warn!(%error, "the host failed a disk request; the guest sees an I/O error");
        }
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
