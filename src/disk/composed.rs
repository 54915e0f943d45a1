//! Several files that are only read, as the partitions of one disk.
//!
//! The partition table exists only in the monitor's memory: in a memory file, so that the host's kernel fills a guest's
//! buffers from it as from the parts' own files, and no byte passes through the monitor.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::{Deserialize, Serialize};

use super::gpt::{self, ALIGN_BYTES, NAME_UNITS, Partition};
use super::task::Target;
use super::{Error, Image, Options, open_locked};

/// The most parts of a disk: Linux gives a disk 256 minor numbers, and the first is the disk's own.
pub const MAX_PARTS: usize = 255;

/// A file that becomes a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Part {
    /// The file: a raw image or a block device, of any length but 0. Zeroes pad it to a multiple of 4 KiB.
    pub path: PathBuf,
    /// The partition's name, at most 36 UTF-16 units; may be empty.
    #[serde(default)]
    pub name: String,
}

/// What a file of parts holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PartList {
    /// The parts in the order of the partitions.
    pub parts: Vec<Part>,
}

/// Why parts do not make a disk.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// None, or more than partitions can be had.
    #[error("a disk of {0} parts: it has 1 to {MAX_PARTS}")]
    Count(usize),
    /// A name does not fit into a partition table.
    #[error(
        "name {name:?} of the disk part {path}: at most {NAME_UNITS} characters, and no control characters"
    )]
    Name {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
    },
    /// The parts together are larger than a disk can be.
    #[error("the disk parts up to {path} are larger than any disk")]
    TooLarge {
        /// The first file that is too much.
        path: PathBuf,
    },
    /// The list of parts cannot be read.
    #[error("cannot read the list of disk parts {path}")]
    Read {
        /// The list.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The list of parts is not of its form.
    #[error("the list of disk parts {path} is not {{\"parts\": [{{\"path\": …, \"name\": …}}, …]}}")]
    Form {
        /// The list.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: serde_json::Error,
    },
    /// The host has no memory file for the partition table.
    #[error("cannot make a partition table in memory")]
    Table(#[source] io::Error),
}

impl PartList {
    /// Reads a list from a file; relative paths in it are relative to the file's directory.
    pub fn read(path: &Path) -> Result<PartList, PartError> {
        let text =
            std::fs::read(path).map_err(|source| PartError::Read { path: path.to_path_buf(), source })?;
        let mut list: PartList = serde_json::from_slice(&text)
            .map_err(|source| PartError::Form { path: path.to_path_buf(), source })?;
        let directory = path.parent().unwrap_or(Path::new(""));
        list.parts.iter_mut().for_each(|part| part.path = directory.join(&part.path));
        Ok(list)
    }
}

/// Checks what can be known without opening the files.
pub(crate) fn check(parts: &[Part]) -> Result<(), PartError> {
    if !(1..=MAX_PARTS).contains(&parts.len()) {
        return Err(PartError::Count(parts.len()));
    }
    let fits = |name: &str| name.encode_utf16().count() <= NAME_UNITS && !name.chars().any(char::is_control);
    match parts.iter().find(|part| !fits(&part.name)) {
        Some(part) => Err(PartError::Name { path: part.path.clone(), name: part.name.clone() }),
        None => Ok(()),
    }
}

/// A stretch of a disk: `len` bytes from `offset` in `file` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index among the image's files.
    pub(super) file: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Which file is where on a disk.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// The pieces in order, none empty, each with the place behind its end.
    pieces: Vec<(u64, Piece)>,
}

impl Layout {
    fn end(&self) -> u64 {
        self.pieces.last().map_or(0, |(end, _)| *end)
    }

    /// Puts a piece behind the others; `None` if the disk would be larger than a file can be.
    fn push(&mut self, piece: Piece) -> Option<()> {
        let end = self.end().checked_add(piece.len).filter(|end| i64::try_from(*end).is_ok())?;
        if piece.len > 0 {
            self.pieces.push((end, piece));
        }
        Some(())
    }

    /// Everything from `offset` on that is in one file; an empty piece behind the disk's end.
    pub(super) fn piece(&self, offset: u64) -> Piece {
        let index = self.pieces.partition_point(|(end, _)| *end <= offset);
        let Some((end, piece)) = self.pieces.get(index) else { return Piece::default() };
        let len = end - offset;
        Piece { file: piece.file, offset: piece.offset + (piece.len - len), len }
    }
}

/// Opens the parts, read-only and locked as other readers' images are, and puts a partition table around them.
pub fn open_parts(parts: &[Part], options: &Options) -> Result<Image, Error> {
    check(parts)?;
    let (front_len, back_len) = gpt::table_bytes(parts.len());
    // The memory file, which is the image's first: what is in front, what is behind, and zeroes for padding.
    let table = |offset, len| Piece { file: 0, offset, len };
    let (behind, zeroes) = (front_len, front_len + back_len);

    let mut layout = Layout::default();
    let mut files = Vec::with_capacity(parts.len() + 1);
    let mut partitions = Vec::with_capacity(parts.len());
    let first = layout.push(table(0, front_len));
    let mut placed = first.is_some();
    for (part, file) in parts.iter().zip(1u32..) {
        let opened = open_locked(&part.path, true, false)?;
        let start = layout.end();
        let len = opened.size_bytes;
        let padding = len.wrapping_neg() % ALIGN_BYTES;
        placed = placed
            && layout.push(Piece { file, offset: 0, len }).is_some()
            && layout.push(table(zeroes, padding)).is_some()
            // Room for the table behind the last part, whichever that is.
            && layout.end().checked_add(back_len).is_some_and(|end| i64::try_from(end).is_ok());
        if !placed {
            return Err(PartError::TooLarge { path: part.path.clone() }.into());
        }
        partitions.push(Partition { name: &part.name, start, len: layout.end() - start });
        files.push(opened.file);
    }
    layout.push(table(behind, back_len));
    let (front, back) = gpt::table(&partitions, layout.end());
    files.insert(0, memory_file(&[&front, &back]).map_err(PartError::Table)?);
    Ok(Image {
        files,
        size_bytes: layout.end().into(),
        target: Target::Composed(layout.into()),
        options: Options { read_only: true, ..*options },
    })
}

/// A memory file with these bytes and a block of zeroes that never changes again.
fn memory_file(contents: &[&[u8]]) -> io::Result<File> {
    let descriptor = memfd_create("rvmm-partitions", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(descriptor);
    for bytes in contents {
        file.write_all(bytes)?;
    }
    let len: usize = contents.iter().map(|bytes| bytes.len()).sum();
    file.set_len(len as u64 + ALIGN_BYTES)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
#[path = "composed_tests.rs"]
mod tests;
