//! Saving a VM to files, and making one from them. `docs/snapshots.md` has format, order and limits.
//!
//! A snapshot is a state file, which [`format`] reads and writes, and a memory file, which is [`crate::memory::file`]'s.
//! [`files`] puts both in their places so that an earlier snapshot stays whole until the new one is. [`create`] takes the
//! state of a VM that rests; [`load`] reads a snapshot and checks that it can go on here, before anything is opened.

mod create;
mod error;
mod files;
mod format;
mod layers;
mod load;
mod state;

pub use error::{CreateError, FormatError, LoadError};
pub use format::{FORMAT_VERSION, decode, decode_body};
pub use layers::Layer;
pub use load::{DiskOverride, NetOverride, Overrides, ShareOverride, Snapshot};
pub use state::MachineState;

pub use crate::snapshot_files::Place;

pub(super) use create::{Errand, Source, create};

#[cfg(test)]
mod tests;
