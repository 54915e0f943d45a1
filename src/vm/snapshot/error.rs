//! Why a VM cannot be saved or restored.

use std::io;
use std::path::PathBuf;

use crate::kvm::features::Missing;
use crate::kvm::kind::Kind;
use crate::kvm::{self, StateError};
use crate::memory;
use crate::snapshot_files;
use crate::virtio::state::{RestoreError, SaveError};

/// Why a VM could not be saved. An earlier snapshot is as before then.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A vCPU's state.
    #[error("cannot read the state of vCPU {index}")]
    Vcpu {
        /// Its number.
        index: u32,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// Not all vCPUs answered.
    #[error("{found} of {expected} vCPUs rest; the VM is about to end, or its host is stuck")]
    VcpusMissing {
        /// Those that rest.
        found: usize,
        /// Those that there are.
        expected: usize,
    },
    /// KVM's own devices.
    #[error("cannot read the state of KVM's interrupt controllers")]
    Chips(#[source] kvm::Error),
    /// Which pages have changed.
    #[error("cannot ask KVM which pages have changed")]
    Dirty(#[source] kvm::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] SaveError),
    /// A file that guest memory is mapped from has lost pages.
    #[error("a file that guest memory is mapped from was truncated, so that memory cannot be saved")]
    PagesLost,
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::file::Error),
    /// The state cannot be written down.
    #[error("cannot write down the state: {0}")]
    Encode(String),
    /// Random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] getrandom::Error),
    /// A file.
    #[error(transparent)]
    Files(#[from] snapshot_files::Error),
    /// The state file.
    #[error("cannot write the state file")]
    State(#[source] io::Error),
    /// What the keeper says of the files.
    #[error("{0}")]
    Keeper(String),
}

/// Why a snapshot cannot be restored here.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is none.
    #[error("there is no snapshot at {0:?}")]
    Missing(PathBuf),
    /// A file cannot be read.
    #[error("cannot {what} {path:?}")]
    File {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{0:?} is no snapshot of rvmm")]
    Foreign(PathBuf),
    /// Its contents.
    #[error("the snapshot {path:?} cannot be used")]
    State {
        /// The state file.
        path: PathBuf,
        /// Why.
        #[source]
        source: FormatError,
    },
    /// The memory file.
    #[error("the memory of the snapshot, {path:?}, cannot be used")]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: memory::file::Error,
    },
    /// The kind of KVM.
    #[error(
        "the snapshot was made on {saved} KVM, and this host has {host}: what one saves the other does not take"
    )]
    Kind {
        /// There.
        saved: Kind,
        /// Here.
        host: Kind,
    },
    /// The processor.
    #[error("the snapshot cannot go on here")]
    Features(#[source] Missing),
    /// Nothing has that name.
    #[error("the snapshot has no {what} {id:?}; it has {has}")]
    NoSuchDevice {
        /// Disk or network interface.
        what: &'static str,
        /// What was asked for.
        id: String,
        /// What there is.
        has: String,
    },
    /// What is to be shared was not said.
    #[error("the VM had a shared folder with the tag {0:?}: name the folder in the restore")]
    Share(String),
    /// A disk is not the one that it was.
    #[error(
        "disk {id:?} had {saved} bytes when the snapshot was made, and its image {path:?} has {found}; \
         if it is meant to be another one, name it in the restore"
    )]
    DiskSize {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
        /// Bytes then.
        saved: u64,
        /// Bytes now.
        found: u64,
    },
    /// A device's state.
    #[error("cannot restore device {index}")]
    Device {
        /// Its place.
        index: usize,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// A vCPU's state.
    #[error("cannot set the state of vCPU {index}")]
    Vcpu {
        /// Its number.
        index: u32,
        /// Why.
        #[source]
        source: StateError,
    },
    /// KVM's own devices.
    #[error("cannot set the state of KVM's interrupt controllers")]
    Chips(#[source] kvm::Error),
    /// A new generation's number.
    #[error("cannot give the guest a new generation ID")]
    Generation(#[source] io::Error),
}

/// Why the bytes of a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It does not begin as one.
    #[error("it is no snapshot of rvmm")]
    Magic,
    /// Another format.
    #[error(
        "it has format {found}, and this rvmm knows format {known}: restore it with the rvmm that made it"
    )]
    Version {
        /// In the file.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Bytes are missing, or too many.
    #[error("it has {found} bytes and must have {expected}: it was cut off, or something was added")]
    Length {
        /// What there is.
        found: u64,
        /// What there must be.
        expected: u64,
    },
    /// No VM has such a state.
    #[error("it has {0} bytes, more than any VM's state")]
    TooLong(u64),
    /// The contents are not what was written.
    #[error("its checksum is wrong: it was altered")]
    Checksum,
    /// The contents are not those of a state.
    #[error("its contents make no sense: {0}")]
    Contents(String),
}
