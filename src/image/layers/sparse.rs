//! Files with holes, in the four ways that GNU tar has written them.

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuHeader};

use super::{Error, pax};

/// Pieces of a file at most.
const SEGMENTS_MAX: usize = 1 << 18;
const BLOCK: u64 = 512;

/// A piece of a file that is in the archive; between the pieces are holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// A file's pieces and its whole size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) segments: Vec<Segment>,
    pub(super) size: u64,
}

/// What the records of an extended header say of holes.
#[derive(Default)]
pub(super) struct Records {
    pub(super) name: Option<Vec<u8>>,
    version: (u64, u64),
    size: Option<u64>,
    offset: Option<u64>,
    segments: Vec<Segment>,
    present: bool,
}

impl Records {
    /// Takes a record `GNU.sparse.KEY`.
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let number = || pax::number(value).ok_or(BAD);
        self.present = true;
        match key {
            b"major" => self.version.0 = number()?,
            b"minor" => self.version.1 = number()?,
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"offset" => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or(BAD)?;
                push(&mut self.segments, offset, number()?)?;
            }
            b"map" => {
                self.segments = vec![];
                let mut numbers = value.split(|b| *b == b',').map(|text| pax::number(text).ok_or(BAD));
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().ok_or(BAD)?;
                    push(&mut self.segments, offset?, length?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The map, if there is one. With version 1.0 it stands before the data: `source` is read as far as it reaches, and
    /// `stored`, the bytes of the entry, becomes less by that.
    pub(super) fn map(self, source: &mut impl Read, stored: &mut u64) -> Result<Option<Map>, Error> {
        if !self.present {
            return Ok(None);
        }
        let size = self.size.ok_or(BAD)?;
        let segments = match self.version {
            (1, 0) => read_map(source, stored)?,
            (0, _) => self.segments,
            _ => return Err(Error::Header("this form of sparse files is not known")),
        };
        checked(segments, size, *stored).map(Some)
    }
}

const BAD: Error = Error::Header("a sparse file is malformed");

fn push(segments: &mut Vec<Segment>, offset: u64, length: u64) -> Result<(), Error> {
    if segments.len() >= SEGMENTS_MAX {
        return Err(Error::Limit { what: "pieces of a sparse file", limit: SEGMENTS_MAX as u64 });
    }
    segments.push(Segment { offset, length });
    Ok(())
}

/// Pieces in order, within the file, and as long together as what is stored.
fn checked(segments: Vec<Segment>, size: u64, stored: u64) -> Result<Map, Error> {
    let (mut end, mut sum) = (0, 0u64);
    for segment in &segments {
        if segment.offset < end {
            return Err(BAD);
        }
        end = segment.offset.checked_add(segment.length).filter(|end| *end <= size).ok_or(BAD)?;
        sum = sum.checked_add(segment.length).ok_or(BAD)?;
    }
    if sum == stored { Ok(Map { segments, size }) } else { Err(BAD) }
}

/// Version 1.0: the number of pieces, then offset and length of each, one number a line, filled up to a block.
fn read_map(source: &mut impl Read, stored: &mut u64) -> Result<Vec<Segment>, Error> {
    let mut numbers = NumberReader { source, stored, block: [0; BLOCK as usize], at: BLOCK as usize };
    let count = numbers.next()?;
    let mut segments = vec![];
    for _ in 0..count {
        let offset = numbers.next()?;
        let length = numbers.next()?;
        push(&mut segments, offset, length)?;
    }
    Ok(segments)
}

struct NumberReader<'a, R> {
    source: &'a mut R,
    stored: &'a mut u64,
    block: [u8; BLOCK as usize],
    at: usize,
}

impl<R: Read> NumberReader<'_, R> {
    fn byte(&mut self) -> Result<u8, Error> {
        if self.at >= self.block.len() {
            *self.stored = self.stored.checked_sub(BLOCK).ok_or(BAD)?;
            self.source.read_exact(&mut self.block).map_err(Error::Read)?;
            self.at = 0;
        }
        let byte = self.block.get(self.at).copied().ok_or(BAD)?;
        self.at += 1;
        Ok(byte)
    }

    fn next(&mut self) -> Result<u64, Error> {
        let mut digits = vec![];
        loop {
            match self.byte()? {
                b'\n' => return pax::number(&digits).ok_or(BAD),
                digit if digits.len() < 20 => digits.push(digit),
                _ => return Err(BAD),
            }
        }
    }
}

/// The old form: pieces in the header itself and in blocks behind it.
pub(super) fn old_gnu(header: &GnuHeader, source: &mut impl Read, stored: u64) -> Result<Map, Error> {
    let mut segments = vec![];
    let mut take = |header: &tar::GnuSparseHeader| {
        if header.is_empty() {
            return Ok(());
        }
        let (offset, length) = (header.offset().map_err(|_| BAD)?, header.length().map_err(|_| BAD)?);
        push(&mut segments, offset, length)
    };
    header.sparse.iter().try_for_each(&mut take)?;
    let mut more = header.is_extended();
    while more {
        let mut block = GnuExtSparseHeader::new();
        source.read_exact(block.as_mut_bytes()).map_err(Error::Read)?;
        block.sparse.iter().try_for_each(&mut take)?;
        more = block.is_extended();
    }
    checked(segments, header.real_size().map_err(|_| BAD)?, stored)
}
