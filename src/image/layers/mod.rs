//! Layers: from a tar stream to a directory in the form that overlayfs wants, and back.
//!
//! [`unpack`] writes one layer into a directory of its own; the layers below are only looked at. Deleted files become
//! whiteouts, replaced directories opaque ones. Whoever made the layer may be hostile: `stream` bounds what is read,
//! `tree` walks by descriptors so that no name and no link leads out of the layer.

mod attributes;
mod compression;
mod limits;
mod links;
mod pack;
mod pax;
mod rights;
mod sparse;
mod stream;
#[doc(hidden)]
pub mod testing;
mod tree;
mod unpack;

pub use compression::{Compression, decompress, detect};
pub use limits::Limits;
pub use pack::{CopyOwner, Packed, pack, pack_directory, pack_file};
pub use rights::Rights;
pub use stream::{Entry, Kind, TarReader, Xattrs};
pub use tree::remove_tree;
pub use unpack::{CopyTo, Options, Unpacked, unpack, unpack_copy};

use std::io;

use rustix::io::Errno;

/// Why a layer cannot be unpacked or packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream breaks off, or is no tar stream, or cannot be decompressed.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// An entry that is wrong or that nobody has a use for.
    #[error("entry {name:?}: {why}")]
    Entry {
        /// The entry's name.
        name: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A header that is wrong.
    #[error("a header of the archive: {0}")]
    Header(&'static str),
    /// It has more than this of something.
    #[error("it has more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
    /// The host refuses something.
    #[error("entry {name:?}: cannot {doing}")]
    File {
        /// The entry's name.
        name: String,
        /// What was being done.
        doing: &'static str,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn entry(name: &[u8], why: &'static str) -> Self {
        Self::Entry { name: shown(name), why }
    }

    fn file(name: &[u8], doing: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::File { name: shown(name), doing, source: errno.into() }
    }

    fn io(name: &[u8], doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::File { name: shown(name), doing, source }
    }
}

/// A name for people: not longer than a line or two.
fn shown(name: &[u8]) -> String {
    const MAX: usize = 200;
    let text = String::from_utf8_lossy(name);
    if text.chars().count() <= MAX {
        text.into_owned()
    } else {
        text.chars().take(MAX).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests;
