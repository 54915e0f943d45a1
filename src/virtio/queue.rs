//! A split virtqueue as its device sees it: pop a chain, complete it, and the two directions of notification.
//!
//! Rings and indices are `virtio-queue`'s; chains are walked here, since its iterator ends a malformed chain silently.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain, Rules, Segment};
use super::device::Handover;
use super::spec;
use super::state::QueuePosition;
use crate::memory::{Ram, dirty};

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
    /// Used elements that the driver does not see yet.
    staged: u16,
    /// The used index when the driver was last asked whether it wants an interrupt.
    asked: u16,
    /// Room for chains, kept from those that were completed.
    spare: Vec<Vec<Segment>>,
}

impl Queue {
    /// Takes over a queue with valid addresses, for a driver that has accepted `features`.
    pub fn new(mut inner: virtio_queue::Queue, ram: Ram, features: u64) -> Self {
        inner.set_event_idx(features & spec::feature::EVENT_IDX != 0);
        let indirect = features & spec::feature::INDIRECT_DESC != 0;
        let asked = inner.next_used();
        Self { inner, ram, indirect, in_flight: 0, staged: 0, asked, spare: Vec::new() }
    }

    /// Chains that were popped and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// How far it has come, when no chain is in flight.
    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.inner.next_avail(), next_used: self.inner.next_used() }
    }

    /// Where it lies, for someone else to serve it.
    pub(super) fn handover<'a>(&self, index: u16, kick: &'a EventFd) -> Handover<'a> {
        Handover {
            index,
            size: self.inner.size(),
            desc: self.inner.desc_table(),
            avail: self.inner.avail_ring(),
            used: self.inner.used_ring(),
            next_avail: self.inner.next_avail(),
            kick,
        }
    }

    /// Goes on where someone else has served it up to chain number `next_avail`.
    pub(super) fn go_on(&mut self, next_avail: u16) -> Result<(), Error> {
        self.inner.set_next_avail(next_avail);
        let used = self.load(self.inner.used_ring(), 2)?;
        self.inner.set_next_used(used);
        self.asked = used;
        Ok(())
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
        self.stage(chain, written)?;
        self.publish()
    }

    /// Gives a chain back that the driver sees with the next [`Self::publish`]: what belongs together must be seen
    /// together (virtio 1.2 §5.1.6.3.2).
    pub fn stage(&mut self, chain: Chain, written: u32) -> Result<(), Error> {
        let head = chain.head();
        // A device may have been told the place long before it wrote there.
        chain.writable_ranges().for_each(|(addr, len)| dirty::mark(addr.0, len.into()));
        self.recycle(chain);
        let slot = self.inner.next_used().wrapping_add(self.staged) % self.inner.size().max(1);
        let element = u64::from(head) | u64::from(written) << 32;
        self.store(self.inner.used_ring(), 4 + 8 * u64::from(slot), &element.to_le_bytes())?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was staged.
    pub fn publish(&mut self) -> Result<(), Error> {
        let index = self.inner.next_used().wrapping_add(std::mem::take(&mut self.staged));
        self.inner.set_next_used(index);
        let at =
            self.inner.used_ring().checked_add(2).ok_or(Error::Ring(virtio_queue::Error::AddressOverflow))?;
        dirty::mark(at, 2);
        let stored = self.ram.store(index.to_le(), GuestAddress(at), Ordering::Release);
        stored.map_err(|error| Error::Ring(virtio_queue::Error::GuestMemory(error)))
    }

    fn store(&self, base: u64, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let at = base.checked_add(offset).ok_or(Error::Ring(virtio_queue::Error::AddressOverflow))?;
        dirty::mark(at, bytes.len() as u64);
        let stored = self.ram.write_slice(bytes, GuestAddress(at));
        stored.map_err(|error| Error::Ring(virtio_queue::Error::GuestMemory(error)))
    }

    fn load(&self, base: u64, offset: u64) -> Result<u16, Error> {
        let at = base.checked_add(offset).ok_or(Error::Ring(virtio_queue::Error::AddressOverflow))?;
        let loaded = self.ram.load(GuestAddress(at), Ordering::Relaxed).map(u16::from_le);
        loaded.map_err(|error| Error::Ring(virtio_queue::Error::GuestMemory(error)))
    }

    fn recycle(&mut self, chain: Chain) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let mut room = chain.into_segments();
        room.clear();
        self.spare.push(room);
    }

    /// Flags before and event index behind the ring are written by somebody else.
    fn mark_used_ring(&self) {
        dirty::mark(self.inner.used_ring(), 6 + 8 * u64::from(self.inner.size()));
    }

    /// Asks the driver not to notify, since the queue is being served.
    pub fn suppress_notifications(&mut self) -> Result<(), Error> {
        self.mark_used_ring();
        self.inner.disable_notification(&self.ram).map_err(Error::Ring)
    }

    /// Asks the driver to notify; true if it has made chains available meanwhile, without notifying.
    pub fn expect_notifications(&mut self) -> Result<bool, Error> {
        self.mark_used_ring();
        self.inner.enable_notification(&self.ram).map_err(Error::Ring)
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked (§2.7.7, §2.7.10).
    pub fn wants_interrupt(&mut self) -> Result<bool, Error> {
        // The driver writes down what it wants, then looks at the index; so here it is the other way round.
        fence(Ordering::SeqCst);
        let new = self.inner.next_used();
        let old = std::mem::replace(&mut self.asked, new);
        if self.inner.event_idx_enabled() {
            let event = self.load(self.inner.avail_ring(), 4 + 2 * u64::from(self.inner.size()))?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(self.load(self.inner.avail_ring(), 0)? & spec::AVAIL_F_NO_INTERRUPT == 0)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
