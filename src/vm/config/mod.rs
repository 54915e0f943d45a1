//! What a VM is made of: inert data, from flags, a file or the API. Nothing here opens anything.

mod balloon;
mod cpu;
mod disk;
mod limits;
mod mmds;
mod net;
mod serial;
mod share;
mod size;
mod vsock;

pub use balloon::Balloon;
pub use cpu::{Bitmap, Cpu, CpuTemplate, CpuidModifier, MsrModifier, Register};
pub use disk::{Disk, MAX_DISK_QUEUES};
pub use mmds::{Mmds, MmdsError};
pub use net::{MAX_NET_QUEUES, Mac, Net, NetError, VhostUse};
pub use serial::SerialConfig;
pub use share::{MAX_TAG_BYTES, Share};
pub use size::Size;
pub use vsock::Vsock;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::disk::{Cache as DiskCache, Io as DiskIo, Part as DiskPart};

use crate::boot::BootProtocol;
use crate::memory;
use crate::platform::VIRTIO_GSIS;
use crate::virtio::rate::Limits;
use crate::virtio::vsock::unix::PATH_BYTES_MAX;

/// The most vCPUs of a VM.
pub const MAX_CPUS: u32 = 32;
/// Why a configuration cannot become a VM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// Too little memory.
    #[error("{0} of memory: a VM needs at least {min}", min = Size(memory::MIN_SIZE))]
    TooLittleMemory(Size),
    /// Memory is not made of whole pages.
    #[error("{0} of memory: the size must be a multiple of 4K")]
    OddMemory(Size),
    /// More memory than the host has.
    #[error("{wanted} of memory: the host has {host}")]
    TooMuchMemory {
        /// What was asked for.
        wanted: Size,
        /// Memory and swap of the host.
        host: Size,
    },
    /// KVM's interrupt controller has no line left.
    #[error("{0} devices: KVM's interrupt controller has lines for {max} virtio devices", max = VIRTIO_GSIS.len())]
    TooManyDevices(usize),
    /// Queue count out of range.
    #[error("{queues} queues for disk {path:?}: a disk has 1 to {MAX_DISK_QUEUES}")]
    DiskQueues {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        queues: u16,
    },
    /// A disk's serial number does not fit.
    #[error("id {id:?} of disk {path:?}: at most 20 bytes of printable ASCII")]
    DiskId {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        id: String,
    },
    /// A disk that is nowhere, or in several places.
    #[error("disk {0}: give it either a path, or parts, or a parts-file")]
    DiskPlace(String),
    /// Files that make no disk.
    #[error("{0}")]
    DiskParts(String),
    /// Two disks have one id.
    #[error("two disks have the id {0:?}")]
    DuplicateDiskId(String),
    /// More memory in the balloon than in the guest.
    #[error("a balloon of {wanted}: the guest has {memory} of memory")]
    BalloonTooLarge {
        /// What was asked for.
        wanted: Size,
        /// What the guest has.
        memory: Size,
    },
    /// A rate limit lets nothing through.
    #[error("{0}: size and refill-time of a rate limit must be at least 1")]
    Limits(String),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The metadata service.
    #[error(transparent)]
    Mmds(#[from] MmdsError),
    /// The host's kernel moves packets itself, and does not tell where to.
    #[error(
        "tap {0}: with vhost=on it cannot be known which pages of memory change; leave out one or the other"
    )]
    TrackedVhost(String),
    /// A shared folder's tag does not fit.
    #[error("tag {0:?}: a shared folder's tag has 1 to {MAX_TAG_BYTES} bytes of printable ASCII")]
    ShareTag(String),
    /// Two shared folders have one tag.
    #[error("two shared folders have the tag {0:?}")]
    DuplicateShareTag(String),
    /// An address that no guest can have.
    #[error("{0} as the guest's vsock address: it may be 3 to 4294967294")]
    VsockCid(u32),
    /// A path too long for a unix socket and a port's number behind it.
    #[error("vsock socket {path:?}: {len} bytes, and the path may have 1 to {max}", max = PATH_BYTES_MAX)]
    VsockPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
}

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct VmConfig {
    /// The guest kernel; `None` for the one that suits the kind of KVM.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// What the guest kernel is told, beside what rvmm adds.
    pub cmdline: Option<String>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What the guest sees of the processor.
    pub cpu: Cpu,
    /// Size of the guest's memory.
    pub memory: Size,
    /// Whether it is noted which pages change, for differential snapshots.
    pub track_dirty_pages: bool,
    /// The disk that holds the root file system; the guest's first.
    pub rootfs: Option<Disk>,
    /// Further disks.
    pub disks: Vec<Disk>,
    /// Sockets between guest and host.
    pub vsock: Option<Vsock>,
    /// Whether the guest gets random numbers from the host.
    pub rng: bool,
    /// Limits on these.
    #[serde(skip_serializing_if = "Limits::is_none")]
    pub rng_limits: Limits,
    /// Network devices.
    pub nets: Vec<Net>,
    /// The metadata service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmds: Option<Mmds>,
    /// The memory balloon.
    pub balloon: Option<Balloon>,
    /// Shared folders.
    pub shares: Vec<Share>,
    /// The first serial port.
    pub serial: SerialConfig,
    /// The virtio console.
    pub console: SerialConfig,
    /// Whether rvmm helps the guest over what this kind of KVM cannot do.
    pub host_quirks: bool,
    /// Seconds that a guest has to shut down after SIGTERM.
    pub shutdown_timeout: u64,
}

impl Default for VmConfig {
    fn default() -> VmConfig {
        VmConfig {
            kernel: None,
            initrd: None,
            cmdline: None,
            boot_protocol: BootProtocol::default(),
            cpus: 1,
            cpu: Cpu::Host,
            memory: Size(256 << 20),
            track_dirty_pages: false,
            rootfs: None,
            disks: vec![],
            vsock: None,
            rng: false,
            rng_limits: Limits::default(),
            balloon: None,
            nets: vec![],
            mmds: None,
            shares: vec![],
            serial: SerialConfig::default(),
            console: SerialConfig::None,
            host_quirks: true,
            shutdown_timeout: 30,
        }
    }
}

impl VmConfig {
    /// All disks in the order in which the guest finds them, the root file system first.
    pub fn all_disks(&self) -> impl Iterator<Item = &Disk> {
        self.rootfs.iter().chain(&self.disks)
    }

    /// The same, to change them.
    pub fn all_disks_mut(&mut self) -> impl Iterator<Item = &mut Disk> {
        self.rootfs.iter_mut().chain(&mut self.disks)
    }

    /// Where the serial port leads. Standard input and output have room for one, and a virtio console there comes first.
    pub fn serial_place(&self) -> &SerialConfig {
        match (&self.console, &self.serial) {
            (SerialConfig::Stdio, SerialConfig::Stdio) => &SerialConfig::None,
            (_, serial) => serial,
        }
    }

    /// How many virtio devices the VM has.
    pub fn device_count(&self) -> usize {
        self.all_disks().count()
            + self.nets.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.rng)
            + self.shares.len()
            + usize::from(self.balloon.is_some())
            + usize::from(self.console != SerialConfig::None)
    }

    /// The id of the disk at `index`, named or not.
    pub fn disk_id(index: usize, disk: &Disk) -> String {
        disk.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }

    /// Checks all that can be known without opening anything but `host_memory_bytes`.
    pub fn validate(&self, host_memory_bytes: u64) -> Result<(), Error> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(Error::Cpus(self.cpus));
        }
        let bytes = self.memory.bytes();
        if bytes < memory::MIN_SIZE {
            return Err(Error::TooLittleMemory(self.memory));
        }
        if !bytes.is_multiple_of(memory::PAGE_SIZE) {
            return Err(Error::OddMemory(self.memory));
        }
        if bytes > host_memory_bytes {
            return Err(Error::TooMuchMemory { wanted: self.memory, host: Size(host_memory_bytes) });
        }
        let devices = self.device_count();
        if devices > VIRTIO_GSIS.len() {
            return Err(Error::TooManyDevices(devices));
        }
        if let Some(balloon) = &self.balloon {
            balloon.check(self.memory)?;
        }
        let mut ids = std::collections::BTreeSet::new();
        for (index, disk) in self.all_disks().enumerate() {
            disk.check()?;
            let id = Self::disk_id(index, disk);
            if !ids.insert(id.clone()) {
                return Err(Error::DuplicateDiskId(id));
            }
        }
        net::check(&self.nets)?;
        if !self.rng_limits.is_valid() {
            return Err(Error::Limits("rng-limits".into()));
        }
        self.mmds.as_ref().map_or(Ok(()), |mmds| mmds.check(&self.nets))?;
        let by_host = self.nets.iter().find(|net| net.vhost == VhostUse::On);
        if let Some(net) = by_host.filter(|_| self.track_dirty_pages) {
            return Err(Error::TrackedVhost(net.tap.clone()));
        }
        let mut tags = std::collections::BTreeSet::new();
        for share in &self.shares {
            share.check()?;
            if !tags.insert(&share.tag) {
                return Err(Error::DuplicateShareTag(share.tag.clone()));
            }
        }
        self.vsock.as_ref().map_or(Ok(()), Vsock::check)
    }
}

/// Why a configuration file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML of this form.
    #[error("the configuration {path:?} is wrong")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The file is not JSON of this form.
    #[error("the configuration {path:?} is wrong")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: serde_json::Error,
    },
}

/// Reads a configuration: JSON when the name ends in `.json`, else TOML.
pub fn read_file(path: &Path) -> Result<VmConfig, FileError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.into(), source })?;
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        serde_json::from_str(&text).map_err(|source| FileError::Json { path: path.into(), source })
    } else {
        toml::from_str(&text)
            .map_err(|source| FileError::Toml { path: path.into(), source: Box::new(source) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 8 << 30;

    #[test]
    fn impossible_machines_are_refused() {
        let config = |change: fn(&mut VmConfig)| {
            let mut config = VmConfig::default();
            change(&mut config);
            config.validate(HOST)
        };
        assert_eq!(config(|_| {}), Ok(()));
        assert_eq!(config(|c| c.cpus = 0), Err(Error::Cpus(0)));
        assert_eq!(config(|c| c.cpus = 33), Err(Error::Cpus(33)));
        assert_eq!(config(|c| c.memory = Size(8 << 20)), Err(Error::TooLittleMemory(Size(8 << 20))));
        assert!(matches!(config(|c| c.memory = Size(64 << 30)), Err(Error::TooMuchMemory { .. })));
        assert!(matches!(config(|c| c.memory = Size((64 << 20) + 512)), Err(Error::OddMemory(_))));
        assert_eq!(config(|c| c.disks = vec![Disk::new("x"); 19]), Err(Error::TooManyDevices(19)));
        assert!(matches!(
            config(|c| c.disks = vec![Disk { id: Some("a\n".into()), ..Disk::new("x") }]),
            Err(Error::DiskId { .. })
        ));
        assert!(matches!(
            config(|c| c.disks = vec![Disk { queues: Some(0), ..Disk::new("x") }]),
            Err(Error::DiskQueues { .. })
        ));
        assert_eq!(
            config(|c| c.disks = vec![Disk { id: Some("disk1".into()), ..Disk::new("x") }, Disk::new("y")]),
            Err(Error::DuplicateDiskId("disk1".into()))
        );
        assert_eq!(config(|c| c.shares = vec![Share::new("", "x")]), Err(Error::ShareTag("".into())));
        assert_eq!(
            config(|c| c.shares = vec![Share::new("a", "x"), Share::new("a", "y")]),
            Err(Error::DuplicateShareTag("a".into()))
        );
        assert_eq!(config(|c| c.shares = vec![Share::new("a", "x"); 19]), Err(Error::TooManyDevices(19)));
    }

    #[test]
    fn file_round_trips_and_unknown_keys_are_refused() {
        let config = VmConfig {
            kernel: Some("vmlinux".into()),
            rootfs: Some(Disk::new("disk.img")),
            serial: SerialConfig::File("log".into()),
            ..VmConfig::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let json = directory.path().join("vm.json");
        std::fs::write(&json, serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(read_file(&json).unwrap(), config);
        let toml = directory.path().join("vm.toml");
        std::fs::write(
            &toml,
            "memory = '1G'\ncpus = 2\n[[disks]]\npath = 'a'\nreadonly = true\n\
             [[shares]]\ntag = 't'\npath = 'd'\n",
        )
        .unwrap();
        let read = read_file(&toml).unwrap();
        assert_eq!((read.memory, read.cpus, read.disks.len()), (Size(1 << 30), 2, 1));
        assert_eq!(read.shares, [Share::new("t", "d")]);
        std::fs::write(&toml, "memroy = '1G'").unwrap();
        assert!(matches!(read_file(&toml), Err(FileError::Toml { .. })));
    }
}
