//! Requests taken apart and replies put together, with nothing trusted.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::fuse::IN_HEADER_BYTES;

/// What becomes of a request: the reply's body has been written, or an error number goes back.
pub(super) type Outcome = Result<(), Errno>;

/// The fields of a request in order. Where bytes are missing the request is wrong.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*array)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn skip(&mut self, len: usize) -> Outcome {
        self.take(len).map(|_| ())
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(front)
    }

    /// A string up to its NUL.
    pub(super) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(string.count_bytes() + 1)?;
        Ok(string)
    }

    /// The name of an entry of a directory: one path component, and neither the directory nor its parent.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Header {
    /// Splits a whole request into header and body.
    pub(super) fn parse(request: &[u8]) -> Result<(Self, Fields<'_>), Errno> {
        let (header, body) = request.split_at_checked(IN_HEADER_BYTES).ok_or(Errno::INVAL)?;
        let mut fields = Fields(header);
        let _len = fields.u32()?;
        let (opcode, unique, node) = (fields.u32()?, fields.u64()?, fields.u64()?);
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        Ok((Self { opcode, unique, node, uid, gid }, Fields(body)))
    }
}

/// Appends numbers to a reply.
pub(super) trait Put {
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}
