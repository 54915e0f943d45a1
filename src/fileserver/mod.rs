//! The file server of shared folders: a process of its own, since it needs rights that the monitor must not have.
//!
//! [`start`] runs this program again, as a child that is told of one folder and has one socket. The child shuts itself
//! in (`sandbox`): a mount namespace with the folder as its root, the capabilities that keeping owners needs, a
//! system call filter. Then it answers FUSE messages (`server`) until the socket closes, which happens when the monitor
//! ends, however it does.
//!
//! A guest's bytes are hostile here as everywhere, and so are the folder's contents, which the guest writes.

mod attributes;
mod child;
mod files;
mod message;
mod nodes;
mod process;
mod sandbox;
mod server;
#[doc(hidden)]
pub mod testing;

use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use child::run;
pub use process::{Error, Process, start};
pub use server::FileServer;

/// How much a guest may rely on what it has seen of a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// For a second; a file's data until it changes.
    #[default]
    Auto,
    /// For good: nobody else writes to the folder.
    Always,
}

impl FromStr for Cache {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err("one of auto, always"),
        }
    }
}

/// How a folder is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The guest may only read.
    pub readonly: bool,
    /// The guest may make device files.
    pub devices: bool,
    /// What the guest may rely on.
    pub cache: Cache,
}

/// The hidden subcommand that [`start`] runs.
pub const SUBCOMMAND: &str = "file-server";

#[cfg(test)]
mod tests;
