//! A descriptor chain, validated once as a whole, and the bytes in it.
//!
//! A malformed chain is an error, never a shorter chain. Devices see byte streams, not descriptors, since a driver may
//! cut a message into descriptors as it likes (virtio 1.2 §2.7.4.1).

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::spec::descriptor;
use crate::memory::{Ram, dirty};

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A descriptor's number is not below the size of its table.
    #[error("descriptor {index} is outside its table of {size}")]
    Index {
        /// The number.
        index: u16,
        /// Size of the table.
        size: u32,
    },
    /// There are more descriptors than the queue has: a loop, or a chain that §2.7.5.3.1 forbids.
    #[error("the chain is longer than its queue, or loops")]
    TooLong,
    /// A buffer or table is not in guest memory.
    #[error("{addr:#x}+{len:#x} is not in guest memory")]
    Outside {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A readable buffer follows a writable one (§2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// The buffers have more than 2^32 - 1 bytes together (§2.7.5.2).
    #[error("the chain has more than 2^32 - 1 bytes")]
    TooManyBytes,
    /// An indirect table although that was not negotiated, inside another one, or with a successor (§2.7.5.3.1).
    #[error("an indirect table stands where none may")]
    Indirect,
    /// An indirect table's length is not a positive multiple of a descriptor's.
    #[error("an indirect table has {len} bytes")]
    IndirectLength {
        /// The length.
        len: u32,
    },
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addr: GuestAddress,
    pub(super) len: u32,
}

/// A descriptor chain that was taken from a queue and must go back into it, once.
#[must_use = "a chain must be completed, or the driver waits for ever"]
#[derive(Debug)]
pub struct Chain {
    head: u16,
    /// Readable ones first; none is empty.
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

/// What a queue knows that its chains must obey.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) table: GuestAddress,
    pub(super) size: u16,
    pub(super) indirect: bool,
}

impl Chain {
    /// Reads and validates the chain that starts at descriptor `head`; `segments` is empty room for it.
    pub(super) fn parse(ram: &Ram, rules: Rules, head: u16, segments: Vec<Segment>) -> Result<Self, Error> {
        debug_assert!(segments.is_empty());
        let mut chain = Self { head, segments, readable: 0, readable_len: 0, writable_len: 0 };
        let (mut table, mut table_size) = (rules.table, u32::from(rules.size));
        let mut inside_indirect = false;
        let mut index = head;
        // One more step than there are descriptors: the one that leads to an indirect table is not part of the chain.
        for _ in 0..=rules.size {
            if u32::from(index) >= table_size {
                return Err(Error::Index { index, size: table_size });
            }
            let entry = read_descriptor(ram, table, index)?;
            if entry.flags & descriptor::INDIRECT != 0 {
                if !rules.indirect || inside_indirect || entry.flags & descriptor::NEXT != 0 {
                    return Err(Error::Indirect);
                }
                if entry.len == 0 || entry.len % descriptor::BYTES != 0 {
                    return Err(Error::IndirectLength { len: entry.len });
                }
                check_range(ram, entry.addr, entry.len)?;
                (table, table_size) = (GuestAddress(entry.addr), entry.len / descriptor::BYTES);
                (inside_indirect, index) = (true, 0);
                continue;
            }
            chain.push(ram, &entry, rules.size)?;
            if entry.flags & descriptor::NEXT == 0 {
                return Ok(chain);
            }
            index = entry.next;
        }
        Err(Error::TooLong)
    }

    fn push(&mut self, ram: &Ram, entry: &Descriptor, limit: u16) -> Result<(), Error> {
        let writable = entry.flags & descriptor::WRITE != 0;
        if !writable && self.writable_len > 0 {
            return Err(Error::Order);
        }
        if self.segments.len() >= usize::from(limit) {
            return Err(Error::TooLong);
        }
        if entry.len == 0 {
            return Ok(());
        }
        check_range(ram, entry.addr, entry.len)?;
        let total = self.readable_len.checked_add(self.writable_len);
        total.and_then(|total| total.checked_add(entry.len)).ok_or(Error::TooManyBytes)?;
        self.segments.push(Segment { addr: GuestAddress(entry.addr), len: entry.len });
        if writable {
            self.writable_len += entry.len;
        } else {
            self.readable += 1;
            self.readable_len += entry.len;
        }
        Ok(())
    }

    /// Number of the first descriptor, by which the driver knows the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The pieces of guest memory that the device may write, for a device to which they matter as such.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (GuestAddress, u32)> {
        self.segments.iter().skip(self.readable).map(|segment| (segment.addr, segment.len))
    }

    /// The readable bytes.
    pub fn reader<'a>(&'a self, ram: &'a Ram) -> Reader<'a> {
        let segments = self.segments.get(..self.readable).unwrap_or_default();
        Reader(Cursor { ram, segments, skip: 0, left: self.readable_len })
    }

    /// The writable bytes.
    pub fn writer<'a>(&'a self, ram: &'a Ram) -> Writer<'a> {
        let segments = self.segments.get(self.readable..).unwrap_or_default();
        Writer { cursor: Cursor { ram, segments, skip: 0, left: self.writable_len }, written: 0 }
    }

    pub(super) fn into_segments(self) -> Vec<Segment> {
        self.segments
    }
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn read_descriptor(ram: &Ram, table: GuestAddress, index: u16) -> Result<Descriptor, Error> {
    let outside = Error::Outside { addr: table.0, len: descriptor::BYTES };
    let addr = table.0.checked_add(u64::from(index) * u64::from(descriptor::BYTES)).ok_or(outside)?;
    let mut raw = [0; descriptor::BYTES as usize];
    ram.read_slice(&mut raw, GuestAddress(addr)).map_err(|_| outside)?;
    let number = u128::from_le_bytes(raw);
    Ok(Descriptor {
        addr: number as u64,
        len: (number >> 64) as u32,
        flags: (number >> 96) as u16,
        next: (number >> 112) as u16,
    })
}

fn check_range(ram: &Ram, addr: u64, len: u32) -> Result<(), Error> {
    let inside = GuestMemoryBackend::check_range(ram, GuestAddress(addr), len as usize);
    let wraps = addr.checked_add(len.into()).is_none();
    if inside && !wraps { Ok(()) } else { Err(Error::Outside { addr, len }) }
}

/// Fewer bytes are left in a chain than were asked for, or guest memory could not be reached.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the chain has too few bytes")]
pub struct TooShort;

/// A place in a list of segments.
#[derive(Clone)]
struct Cursor<'a> {
    ram: &'a Ram,
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind.
    skip: u32,
    left: u32,
}

impl<'a> Cursor<'a> {
    /// Takes at most `max` bytes that lie in one segment; `None` if that are none.
    fn take(&mut self, max: usize) -> Option<(GuestAddress, usize)> {
        let (first, rest) = self.segments.split_first()?;
        let here = first.len.saturating_sub(self.skip).min(self.left);
        let len = here.min(u32::try_from(max).unwrap_or(u32::MAX));
        if len == 0 {
            return None;
        }
        let addr = GuestAddress(first.addr.0.checked_add(self.skip.into())?);
        self.left -= len;
        self.skip += len;
        if self.skip == first.len {
            (self.segments, self.skip) = (rest, 0);
        }
        Some((addr, len as usize))
    }

    fn skip(&mut self, len: u32) -> Result<(), TooShort> {
        let mut rest = len as usize;
        while rest > 0 {
            rest -= self.take(rest).ok_or(TooShort)?.1;
        }
        Ok(())
    }

    fn split_at(&self, at: u32) -> Result<(Self, Self), TooShort> {
        let (mut front, mut back) = (self.clone(), self.clone());
        back.skip(at)?;
        front.left = at;
        Ok((front, back))
    }

    /// Passes all bytes that are left to `each`, as pieces of host memory.
    fn for_each_slice(mut self, mut each: impl FnMut(VolatileSlice<'a>)) -> Result<(), TooShort> {
        while let Some((addr, len)) = self.take(usize::MAX) {
            for slice in self.ram.get_slices(addr, len) {
                each(slice.map_err(|_| TooShort)?);
            }
        }
        Ok(())
    }
}

/// Reads a chain's readable bytes in order.
#[derive(Clone)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Bytes that are left.
    pub fn remaining(&self) -> u32 {
        self.0.left
    }

    /// Copies the next bytes out.
    pub fn read_exact(&mut self, mut to: &mut [u8]) -> Result<(), TooShort> {
        if to.len() > self.0.left as usize {
            return Err(TooShort);
        }
        while !to.is_empty() {
            let (addr, len) = self.0.take(to.len()).ok_or(TooShort)?;
            let (part, rest) = to.split_at_mut_checked(len).ok_or(TooShort)?;
            self.0.ram.read_slice(part, addr).map_err(|_| TooShort)?;
            to = rest;
        }
        Ok(())
    }

    /// Copies the next `N` bytes out.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], TooShort> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Two readers, for the first `at` of the bytes that are left and for those after them.
    pub fn split_at(&self, at: u32) -> Result<(Reader<'a>, Reader<'a>), TooShort> {
        let (front, back) = self.0.split_at(at)?;
        Ok((Reader(front), Reader(back)))
    }

    /// Passes all bytes that are left to `each`, as pieces of host memory that must not be turned into references.
    pub fn for_each_slice(self, each: impl FnMut(VolatileSlice<'a>)) -> Result<(), TooShort> {
        self.0.for_each_slice(each)
    }
}

/// Writes a chain's writable bytes in order.
pub struct Writer<'a> {
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> Writer<'a> {
    /// Bytes that are left.
    pub fn remaining(&self) -> u32 {
        self.cursor.left
    }

    /// Bytes that were written.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Copies bytes in.
    pub fn write_all(&mut self, mut from: &[u8]) -> Result<(), TooShort> {
        if from.len() > self.cursor.left as usize {
            return Err(TooShort);
        }
        while !from.is_empty() {
            let (addr, len) = self.cursor.take(from.len()).ok_or(TooShort)?;
            let (part, rest) = from.split_at_checked(len).ok_or(TooShort)?;
            dirty::mark(addr.0, len as u64);
            self.cursor.ram.write_slice(part, addr).map_err(|_| TooShort)?;
            self.written += len as u32;
            from = rest;
        }
        Ok(())
    }

    /// Two writers, for the first `at` of the bytes that are left and for those after them.
    pub fn split_at(&self, at: u32) -> Result<(Writer<'a>, Writer<'a>), TooShort> {
        let (front, back) = self.cursor.split_at(at)?;
        Ok((Writer { cursor: front, written: 0 }, Writer { cursor: back, written: 0 }))
    }

    /// Passes all bytes that are left to `each`, as pieces of host memory that must not be turned into references.
    pub fn for_each_slice(self, each: impl FnMut(VolatileSlice<'a>)) -> Result<(), TooShort> {
        let mut cursor = self.cursor.clone();
        while let Some((addr, len)) = cursor.take(usize::MAX) {
            dirty::mark(addr.0, len as u64);
        }
        self.cursor.for_each_slice(each)
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
