//! The header of a packet (virtio 1.2 §5.10.6).

use crate::virtio::chain::TooShort;
use crate::virtio::spec::vsock::HEADER_BYTES;
use crate::virtio::{Reader, Writer};

/// A packet's header, in the order in which it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub src_cid: u64,
    /// Address of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// The sender's whole room for data of this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes of this connection that have left that room, since it was opened; wraps.
    pub fwd_cnt: u32,
}

impl Header {
    /// Takes a header from the start of a packet.
    pub fn read(from: &mut Reader<'_>) -> Result<Self, TooShort> {
        let bytes: [u8; HEADER_BYTES as usize] = from.read_array()?;
        let mut rest = bytes.as_slice();
        Ok(Self {
            src_cid: u64::from_le_bytes(take(&mut rest)?),
            dst_cid: u64::from_le_bytes(take(&mut rest)?),
            src_port: u32::from_le_bytes(take(&mut rest)?),
            dst_port: u32::from_le_bytes(take(&mut rest)?),
            len: u32::from_le_bytes(take(&mut rest)?),
            kind: u16::from_le_bytes(take(&mut rest)?),
            op: u16::from_le_bytes(take(&mut rest)?),
            flags: u32::from_le_bytes(take(&mut rest)?),
            buf_alloc: u32::from_le_bytes(take(&mut rest)?),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)?),
        })
    }

    /// Writes it to the start of a packet.
    pub fn write(&self, to: &mut Writer<'_>) -> Result<(), TooShort> {
        to.write_all(&self.bytes())
    }

    /// The header as it lies in memory.
    pub fn bytes(&self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TooShort> {
    let (first, after) = rest.split_first_chunk().ok_or(TooShort)?;
    *rest = after;
    Ok(*first)
}
