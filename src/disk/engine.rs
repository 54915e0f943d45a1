//! Carries out operations on an image, by io_uring or by system calls that wait, behind one interface.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::task::Task;
use super::uring::Ring;
use super::{Cache, Image, Io, Operation, sync};

/// When a write must be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When a later flush has completed.
    OnFlush,
    /// When it has completed itself: for a driver that does not know of flushes.
    Always,
}

/// Operations that are carried out by waiting before the first of them is reaped: the driver waits for that one.
const SYNC_BATCH: usize = 16;

/// Operations in flight on one image, each with a payload that comes back with its result.
///
/// Dropping an engine cancels what is in flight and waits until the host has let go of the buffers.
pub struct Engine<T> {
    backend: Backend<T>,
    image: Arc<Image>,
    durable: bool,
    flush_is_nothing: bool,
    finished: VecDeque<(T, io::Result<()>)>,
}

enum Backend<T> {
    Sync(Vec<RawFd>),
    Uring(Box<Ring<T>>),
}

impl<T> Engine<T> {
    /// An engine for at most `depth` operations at once. Fails only if io_uring is demanded and not to be had.
    pub fn new(image: Arc<Image>, depth: u16, durability: Durability) -> io::Result<Self> {
        let options = image.options();
        let backend = match options.io {
            Io::Sync => Backend::Sync(image.descriptors()),
            Io::Uring => Backend::Uring(Box::new(Ring::new(image.descriptors(), depth)?)),
            Io::Auto => match Ring::new(image.descriptors(), depth) {
                Ok(ring) => Backend::Uring(Box::new(ring)),
                Err(error) => {
                    tracing::debug!(%error, "no io_uring on this host, using system calls that wait");
                    Backend::Sync(image.descriptors())
                }
            },
        };
        let keeps_promises = options.cache == Cache::Writeback;
        Ok(Self {
            backend,
            image,
            durable: keeps_promises && durability == Durability::Always,
            flush_is_nothing: !keeps_promises || options.read_only,
            finished: VecDeque::new(),
        })
    }

    /// Starts anew, for another driver.
    pub fn begin(&mut self, durability: Durability) {
        let options = self.image.options();
        self.durable = options.cache == Cache::Writeback && durability == Durability::Always;
    }

    /// Cancels what is in flight and waits until the host has let go of the buffers.
    pub fn settle(&mut self) {
        if let Backend::Uring(ring) = &mut self.backend {
            ring.settle();
        }
        self.finished.clear();
    }

    /// Goes on with another image, opened with the same options, when nothing is in flight. If that fails it keeps the
    /// one that it has.
    pub fn reopen(&mut self, image: Arc<Image>) -> io::Result<()> {
        match &mut self.backend {
            Backend::Sync(fds) => *fds = image.descriptors(),
            Backend::Uring(ring) => ring.reopen(image.descriptors())?,
        }
        self.image = image;
        Ok(())
    }

    /// Whether io_uring carries the operations out.
    pub fn is_uring(&self) -> bool {
        matches!(self.backend, Backend::Uring(_))
    }

    /// Becomes readable when there may be something to [`Self::reap`] after [`Self::commit`].
    pub fn fd(&self) -> Option<RawFd> {
        match &self.backend {
            Backend::Sync(_) => None,
            Backend::Uring(ring) => Some(ring.fd()),
        }
    }

    /// Whether another operation may be started.
    pub fn has_room(&self) -> bool {
        match &self.backend {
            Backend::Sync(_) => self.finished.len() < SYNC_BATCH,
            Backend::Uring(ring) => ring.has_room(),
        }
    }

    /// Operations that were started and not reaped.
    pub fn in_flight(&self) -> usize {
        self.finished.len()
            + match &self.backend {
                Backend::Sync(_) => 0,
                Backend::Uring(ring) => ring.in_flight(),
            }
    }

    /// Starts an operation inside the image; [`Self::has_room`] was true. The host may hear of it as late as
    /// [`Self::commit`].
    pub fn start(&mut self, operation: Operation, payload: T) {
        if self.flush_is_nothing && matches!(operation, Operation::Flush) {
            self.finished.push_back((payload, Ok(())));
            return;
        }
        let mut task = Task::new(operation, self.durable, self.image.target());
        match &mut self.backend {
            Backend::Sync(fds) => {
                let result = sync::run(fds, &mut task);
                self.finished.push_back((payload, result));
            }
            Backend::Uring(ring) => ring.start(task, payload, &mut self.finished),
        }
    }

    /// Hands everything that was started to the host.
    pub fn commit(&mut self) {
        if let Backend::Uring(ring) = &mut self.backend {
            ring.commit();
        }
    }

    /// An operation that is over.
    pub fn reap(&mut self) -> Option<(T, io::Result<()>)> {
        if self.finished.is_empty()
            && let Backend::Uring(ring) = &mut self.backend
        {
            ring.collect(&mut self.finished);
        }
        self.finished.pop_front()
    }

    /// Waits until everything that was started can be reaped.
    pub fn wait(&mut self) {
        if let Backend::Uring(ring) = &mut self.backend {
            ring.wait(&mut self.finished);
        }
    }
}
