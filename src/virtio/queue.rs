//! A split virtqueue as its device sees it: pop a chain, complete it, and the two directions of notification.
//!
//! Rings and indices are `virtio-queue`'s; chains are walked here, since its iterator ends a malformed chain silently.

use std::sync::atomic::Ordering;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{self, Chain, Rules, Segment};
use super::spec;
use crate::memory::Ram;

/// Why a queue cannot be used any further.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rings are not in guest memory, or the driver's index makes no sense.
    #[error("the rings are broken")]
    Ring(#[source] virtio_queue::Error),
    /// A chain is malformed.
    #[error("the chain at descriptor {head} is malformed")]
    Chain {
        /// Its first descriptor.
        head: u16,
        /// What is wrong.
        #[source]
        source: chain::Error,
    },
    /// More chains are available than the queue has descriptors.
    #[error("more chains are in flight than the queue has descriptors")]
    TooMany,
}

/// A queue that its driver has set up.
#[derive(Debug)]
pub struct Queue {
    inner: virtio_queue::Queue,
    ram: Ram,
    indirect: bool,
    in_flight: u16,
    /// Room for chains, kept from those that were completed.
    spare: Vec<Vec<Segment>>,
}

impl Queue {
    /// Takes over a queue with valid addresses, for a driver that has accepted `features`.
    pub fn new(mut inner: virtio_queue::Queue, ram: Ram, features: u64) -> Self {
        inner.set_event_idx(features & spec::feature::EVENT_IDX != 0);
        let indirect = features & spec::feature::INDIRECT_DESC != 0;
        Self { inner, ram, indirect, in_flight: 0, spare: Vec::new() }
    }

    /// Chains that were popped and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Takes the next chain; `None` if the driver has made no more available.
    pub fn pop(&mut self) -> Result<Option<Chain>, Error> {
        let size = self.inner.size();
        let rules = Rules { table: GuestAddress(self.inner.desc_table()), size, indirect: self.indirect };
        let before = self.inner.next_avail();
        let Some(found) = self.inner.iter(&self.ram).map_err(Error::Ring)?.next() else {
            return Ok(None);
        };
        debug_assert_eq!(self.inner.next_avail(), before.wrapping_add(1));
        if self.in_flight >= size {
            return Err(Error::TooMany);
        }
        let head = found.head_index();
        let room = self.spare.pop().unwrap_or_default();
        let chain =
            Chain::parse(&self.ram, rules, head, room).map_err(|source| Error::Chain { head, source })?;
        self.in_flight += 1;
        Ok(Some(chain))
    }

    /// Makes the chain that was popped last the next one again.
    pub fn put_back(&mut self, chain: Chain) {
        self.inner.go_to_previous_position();
        self.recycle(chain);
    }

    /// Gives a chain back to the driver, with the number of bytes that were written to it.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), Error> {
        let head = chain.head();
        self.recycle(chain);
        self.inner.add_used(&self.ram, head, written).map_err(Error::Ring)
    }

    fn recycle(&mut self, chain: Chain) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let mut room = chain.into_segments();
        room.clear();
        self.spare.push(room);
    }

    /// Asks the driver not to notify, since the queue is being served.
    pub fn suppress_notifications(&mut self) -> Result<(), Error> {
        self.inner.disable_notification(&self.ram).map_err(Error::Ring)
    }

    /// Asks the driver to notify; true if it has made chains available meanwhile, without notifying.
    pub fn expect_notifications(&mut self) -> Result<bool, Error> {
        self.inner.enable_notification(&self.ram).map_err(Error::Ring)
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked.
    pub fn wants_interrupt(&mut self) -> Result<bool, Error> {
        let wanted = self.inner.needs_notification(&self.ram).map_err(Error::Ring)?;
        if !wanted || self.inner.event_idx_enabled() {
            return Ok(wanted);
        }
        // `virtio-queue` does not look at the flag.
        let flags: u16 = self
            .ram
            .load(GuestAddress(self.inner.avail_ring()), Ordering::Relaxed)
            .map_err(|error| Error::Ring(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u16::from_le(flags) & spec::AVAIL_F_NO_INTERRUPT == 0)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
