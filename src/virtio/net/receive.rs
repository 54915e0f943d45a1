//! From the tap into the guest: packets are read straight into the buffers that the driver has made available.

use std::collections::VecDeque;
use std::io;

use super::spec::{HEADER_FLAGS, HEADER_NUM_BUFFERS};
use super::{MAX_PACKET_BYTES, push_pieces};
use crate::memory::Ram;
use crate::tap::{HEADER_BYTES, Piece, Tap};
use crate::virtio::chain::TooShort;
use crate::virtio::{Chain, Completion, Completions};

/// Chains that are held, unless a packet may need more: what one batch uses up, so that the driver need not notify.
const HELD_MAX: usize = 128;
/// Pieces that the host takes in one call, without the one that shows that a packet was cut.
const PIECES_MAX: usize = libc::UIO_MAXIOV as usize - 1;

/// What a driver may be given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// A packet may be spread over several chains.
    pub(super) mergeable: bool,
    /// It knows checksums that are left to it.
    pub(super) checksums: bool,
    /// Bytes that the largest packet has, with its header.
    pub(super) largest: usize,
}

/// The receiving half of a pair of queues.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// Chains that were taken from the queue and are empty, oldest first, each with its number of pieces.
    held: VecDeque<(Chain, usize)>,
    /// The writable bytes of all of them.
    pieces: VecDeque<Piece>,
    room: usize,
    /// The tap may have packets.
    pub(super) readable: bool,
    /// Those pieces that a packet is read into.
    target: Vec<Piece>,
}

/// What came of an attempt to receive a packet.
pub(super) enum Received {
    /// So many bytes, without the header.
    Packet(u64),
    /// A packet that the driver has no room for; it is lost.
    Lost,
    /// The tap has none.
    Empty,
    /// The driver must make more buffers available.
    NoRoom,
}

impl Receiver {
    /// One that does not know yet whether the tap has packets.
    pub(super) fn new() -> Self {
        Self { readable: true, ..Self::default() }
    }

    /// Whether enough chains are held.
    pub(super) fn is_full(&self, shape: Shape) -> bool {
        let enough = if shape.mergeable { self.room >= shape.largest } else { !self.held.is_empty() };
        enough && self.held.len() >= HELD_MAX
    }

    /// Keeps a chain for packets to come; gives it back if it has no room for a header and is the first.
    pub(super) fn hold(&mut self, ram: &Ram, chain: Chain) -> Result<(), Chain> {
        if is_short(&chain) {
            if self.held.is_empty() {
                return Err(chain);
            }
            // Chains go back in the order in which they came.
            self.held.push_back((chain, 0));
            return Ok(());
        }
        let before = self.pieces.len();
        let writer = chain.writer(ram);
        if writer
            .for_each_slice(|slice| push_pieces(&mut |piece| self.pieces.push_back(piece), &slice))
            .is_err()
        {
            self.pieces.truncate(before);
            return Err(chain);
        }
        self.room += chain.writable_len() as usize;
        self.held.push_back((chain, self.pieces.len() - before));
        Ok(())
    }

    /// Reads one packet.
    pub(super) fn receive(
        &mut self,
        ram: &Ram,
        tap: &Tap,
        pair: usize,
        shape: Shape,
        done: &mut Completions,
    ) -> io::Result<Received> {
        self.shed_short(pair, done);
        let Some((first, count)) = self.held.front() else { return Ok(Received::NoRoom) };
        self.target.clear();
        let mut room = 0;
        if shape.mergeable {
            if self.room < shape.largest {
                return Ok(Received::NoRoom);
            }
            for piece in self.pieces.iter().take(PIECES_MAX) {
                self.target.push(*piece);
                room += piece.len();
                if room >= shape.largest {
                    break;
                }
            }
        } else {
            self.target.extend(self.pieces.iter().take((*count).min(PIECES_MAX)));
            room = if *count <= PIECES_MAX {
                first.writable_len() as usize
            } else {
                self.target.iter().map(Piece::len).sum()
            };
        }
        // One byte more shows a packet that does not fit, which the host cuts without a word.
        let mut rest = [0u8; 1];
        // SAFETY: the byte outlives the call that the piece is used in, after which the piece is taken away, and nothing
        // else refers to the byte meanwhile.
        self.target.push(unsafe { Piece::new(rest.as_mut_ptr(), rest.len()) });
        let result = tap.read(pair, &self.target);
        self.target.clear();
        let len = match result {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(Received::Empty);
            }
            Err(error) => {
                self.readable = false;
                return Err(error);
            }
        };
        if len > room || len < HEADER_BYTES {
            return Ok(Received::Lost);
        }
        self.complete(ram, pair, shape, len, done);
        Ok(Received::Packet((len - HEADER_BYTES) as u64))
    }

    /// Writes a packet, with its header, that does not come from the tap.
    pub(super) fn put(
        &mut self,
        ram: &Ram,
        packet: &[u8],
        pair: usize,
        shape: Shape,
        done: &mut Completions,
    ) -> Received {
        self.shed_short(pair, done);
        let Some((first, _)) = self.held.front() else { return Received::NoRoom };
        if shape.mergeable && self.room < packet.len() {
            return Received::NoRoom;
        }
        if !shape.mergeable && packet.len() > first.writable_len() as usize {
            return Received::Lost;
        }
        let mut rest = packet;
        for (chain, _) in self.held.iter().filter(|(chain, _)| !is_short(chain)) {
            let len = rest.len().min(chain.writable_len() as usize);
            let Some((part, behind)) = rest.split_at_checked(len) else { break };
            if chain.writer(ram).write_all(part).is_err() {
                return Received::Lost;
            }
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        self.complete(ram, pair, shape, packet.len(), done);
        Received::Packet((packet.len().saturating_sub(HEADER_BYTES)) as u64)
    }

    /// Hands in chains at the front that nothing can be written to.
    fn shed_short(&mut self, pair: usize, done: &mut Completions) {
        while let Some((chain, _)) = self.held.pop_front_if(|(chain, _)| is_short(chain)) {
            done.push(Completion { queue: (pair * 2) as u16, chain, written: 0 });
        }
    }

    /// Hands in the chains that a packet of `len` bytes has filled.
    fn complete(&mut self, ram: &Ram, pair: usize, shape: Shape, len: usize, done: &mut Completions) {
        let start = done.len();
        let mut left = len;
        while left > 0 {
            let Some((chain, count)) = self.held.pop_front() else { break };
            let room = if is_short(&chain) { 0 } else { chain.writable_len() as usize };
            let written = left.min(room);
            left -= written;
            self.room -= room;
            self.pieces.drain(..count.min(self.pieces.len()));
            done.push(Completion { queue: (pair * 2) as u16, chain, written: written as u32 });
        }
        let buffers = (done.len() - start) as u16;
        if let Some(first) = done.get(start) {
            let set = |at: u32, bytes: &[u8]| {
                let header = first.chain.writer(ram).split_at(at);
                header.and_then(|(_, mut rest)| rest.write_all(bytes))
            };
            let mut written = set(HEADER_NUM_BUFFERS, &buffers.to_le_bytes());
            if !shape.checksums {
                // §5.1.6.4.1; the host may say that it has seen a checksum to be right.
                written = written.and(set(HEADER_FLAGS, &[0]));
            }
            debug_assert!(matches!(written, Ok(()) | Err(TooShort)));
        }
    }

    /// Gives all chains back, oldest first.
    pub(super) fn give_back(&mut self, pair: usize, untouched: &mut Vec<(u16, Chain)>) {
        untouched.extend(self.held.drain(..).map(|(chain, _)| ((pair * 2) as u16, chain)));
        self.pieces.clear();
        self.room = 0;
    }
}

/// Whether a chain has no room for a header.
fn is_short(chain: &Chain) -> bool {
    (chain.writable_len() as usize) < HEADER_BYTES
}

/// Bytes of the largest packet that comes to a driver that takes large ones or not, with its header.
pub(super) fn largest(takes_large: bool, mtu: u16) -> usize {
    // Ethernet's header with a VLAN tag.
    let small = HEADER_BYTES + 18 + usize::from(mtu).max(1500);
    if takes_large { MAX_PACKET_BYTES } else { small }
}
