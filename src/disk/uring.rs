//! Tasks carried out through an io_uring with the image's files, mostly one, registered.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::sync;
use super::task::{Call, Next, Task};

/// The first registered file, which is the only one of an image that is written.
const IMAGE: types::Fixed = types::Fixed(0);
/// What a ring may be asked for once it is there; `IORING_REGISTER_FILES` and `IORING_UNREGISTER_FILES` of
/// `linux/io_uring.h`.
const REGISTER_FILES: u8 = 2;
const UNREGISTER_FILES: u8 = 3;
/// `user_data` of a cancellation; a task has its slot's number.
const CANCEL: u64 = u64::MAX;

struct Slot<T> {
    task: Task,
    payload: T,
}

pub(super) struct Ring<T> {
    ring: IoUring,
    fds: Vec<RawFd>,
    /// At most `depth`, and never moved: it has room for all from the start, and gets one more only when none is free,
    /// so that a disk that is asked little touches little memory.
    slots: Vec<Option<Slot<T>>>,
    free: Vec<u16>,
    depth: u16,
}

type Finished<T> = VecDeque<(T, io::Result<()>)>;

impl<T> Ring<T> {
    /// A ring for `depth` tasks on the image that is open as `fds`, which must stay open as long as the ring lives.
    pub(super) fn new(fds: Vec<RawFd>, depth: u16) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring: IoUring = IoUring::builder().setup_r_disabled().build(depth.into())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let wanted =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !wanted.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // What a ring does no filter of system calls sees: this one can do nothing but what disks need.
        let mut restrictions: Vec<Restriction> = wanted.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_op(opcode::AsyncCancel2::CODE));
        restrictions.extend([REGISTER_FILES, UNREGISTER_FILES].map(Restriction::register_op));
        restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()));
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        ring.submitter().register_files(&fds)?;
        Ok(Self { ring, fds, slots: Vec::with_capacity(depth.into()), free: Vec::new(), depth })
    }

    /// Goes on with another image, when no task is in flight.
    pub(super) fn reopen(&mut self, fds: Vec<RawFd>) -> io::Result<()> {
        self.ring.submitter().unregister_files()?;
        let registered = self.ring.submitter().register_files(&fds);
        if registered.is_err() {
            // It was registered before.
            self.ring.submitter().register_files(&self.fds)?;
        } else {
            self.fds = fds;
        }
        registered
    }

    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < self.depth.into()
    }

    /// A slot that no task is in.
    fn vacant(&mut self) -> Option<u16> {
        if self.free.is_empty() && self.has_room() {
            self.free.push(u16::try_from(self.slots.len()).ok()?);
            self.slots.push(None);
        }
        self.free.pop()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn start(&mut self, task: Task, payload: T, finished: &mut Finished<T>) {
        let Some(index) = self.vacant() else {
            return finished.push_back((payload, Err(io::ErrorKind::ResourceBusy.into())));
        };
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Some(Slot { task, payload });
        }
        self.advance(index, finished);
    }

    /// Queues the next call of the task in slot `index`, or makes it here if the ring has no operation for it.
    fn advance(&mut self, index: u16, finished: &mut Finished<T>) {
        loop {
            let Some(slot) = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut) else { return };
            let call = slot.task.call();
            if let Some(entry) = entry(call) {
                self.push(&entry.user_data(index.into()));
                return;
            }
            if let Next::Done(result) = slot.task.finished(sync::call(&self.fds, call)) {
                return self.retire(index, result, finished);
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry's pointers lead into a task that stays in its slot, its iovecs unmoved and unchanged, until
        // the completion is collected, and to memory that stays mapped as `Buffers::push` demands; dropping the ring
        // waits for the completion too.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.commit();
        }
    }

    fn retire(&mut self, index: u16, result: io::Result<()>, finished: &mut Finished<T>) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)).and_then(Option::take) {
            self.free.push(index);
            finished.push_back((slot.payload, result));
        }
    }

    /// Hands the queued entries to the host.
    pub(super) fn commit(&mut self) {
        while !self.ring.submission().is_empty() {
            if self.ring.submit().is_err() {
                // Interrupted, or short of memory, or completions stand in the way: none lasts.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Takes completions off the ring; those that continue are handed to the host again.
    pub(super) fn collect(&mut self, finished: &mut Finished<T>) {
        loop {
            let Some(completion) = self.ring.completion().next() else { break };
            let Ok(index) = u16::try_from(completion.user_data()) else { continue };
            let result = completion.result();
            let result =
                usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()));
            let Some(slot) = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut) else {
                continue;
            };
            match slot.task.finished(result) {
                Next::Continue => self.advance(index, finished),
                Next::Done(result) => self.retire(index, result, finished),
            }
        }
        self.commit();
    }

    /// Waits until no task is in flight.
    pub(super) fn wait(&mut self, finished: &mut Finished<T>) {
        loop {
            self.collect(finished);
            if self.in_flight() == 0 {
                return;
            }
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl<T> Ring<T> {
    /// Cancels what is in flight, and waits until the host has let go of it.
    pub(super) fn settle(&mut self) {
        if self.in_flight() == 0 {
            return;
        }
        // Hosts before 5.19 refuse to cancel everything at once, and what has begun is not cancelled: wait for the rest.
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any().all()).build().user_data(CANCEL);
        self.push(&cancel);
        self.commit();
        self.wait(&mut VecDeque::new());
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.settle();
    }
}

fn entry(call: Call) -> Option<squeue::Entry> {
    Some(match call {
        Call::Read { file, iovecs, count, offset } => {
            opcode::Readv::new(types::Fixed(file), iovecs, count).offset(offset).build()
        }
        Call::Write { iovecs, count, offset, durable } => opcode::Writev::new(IMAGE, iovecs, count)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Call::Sync => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
        Call::Allocate { mode, offset, len } => {
            opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode).build()
        }
        Call::DiscardBlocks { .. } => return None,
    })
}
