//! What a VM is made of: inert data, from flags, a file or the API. Nothing here opens anything.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::boot::BootProtocol;
use crate::disk::{Cache, Io};
use crate::memory;
use crate::platform::VIRTIO_GSIS;

/// The most vCPUs of a VM.
pub const MAX_CPUS: u32 = 32;
/// The most request queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 16;

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
    /// Two disks have one id.
    #[error("two disks have the id {0:?}")]
    DuplicateDiskId(String),
}

/// A size in bytes, written with a unit: `512M`, `2GiB`, `65536K`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let help = "a size is a whole number with a unit, such as 512M, 2G or 65536K";
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "" if !digits.is_empty() => return Err(format!("{text:?} has no unit: {help}")),
            _ => return Err(format!("{text:?} is not a size: {help}")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size: {help}"))?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))?;
        Ok(Size(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            // Exact where the unit allows it, else to a tenth of a unit that leaves two digits before the point.
            if self.0 >= 1 << shift && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            } else if self.0 >= 10 << shift {
                return write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}K", self.0 >> 10))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A virtio-block disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// The image: a raw file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// The serial number that the guest sees; `None` for `diskN`.
    #[serde(default)]
    pub id: Option<String>,
    /// Request queues; `None` for one per vCPU, at most 4.
    #[serde(default)]
    pub queues: Option<u16>,
    /// How requests reach the host's kernel.
    #[serde(default)]
    pub io: Io,
    /// What a flush does.
    #[serde(default)]
    pub cache: Cache,
}

impl Disk {
    /// A read-write disk with all defaults.
    pub fn new(path: impl Into<PathBuf>) -> Disk {
        Disk {
            path: path.into(),
            readonly: false,
            id: None,
            queues: None,
            io: Io::default(),
            cache: Cache::default(),
        }
    }
}

/// `PATH[,readonly][,id=ID][,queues=N][,io=auto|uring|sync][,cache=writeback|unsafe]`.
impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let mut parts = text.split(',');
        let path =
            parts.next().filter(|path| !path.is_empty()).ok_or("the path of the disk image is missing")?;
        let mut disk = Disk::new(path);
        for part in parts {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            let bad = |allowed: &str| format!("disk option {part:?}: {key} is {allowed}");
            match (key, value) {
                ("readonly" | "ro", None) => disk.readonly = true,
                ("id", Some(id)) => disk.id = Some(id.to_owned()),
                ("queues", Some(n)) => disk.queues = Some(n.parse().map_err(|_| bad("a number"))?),
                ("io", Some("auto")) => disk.io = Io::Auto,
                ("io", Some("uring")) => disk.io = Io::Uring,
                ("io", Some("sync")) => disk.io = Io::Sync,
                ("io", _) => return Err(bad("one of auto, uring, sync")),
                ("cache", Some("writeback")) => disk.cache = Cache::Writeback,
                ("cache", Some("unsafe")) => disk.cache = Cache::Unsafe,
                ("cache", _) => return Err(bad("one of writeback, unsafe")),
                _ => {
                    return Err(format!(
                        "unknown disk option {part:?}: there are readonly, id=ID, queues=N, io=auto|uring|sync and \
                         cache=writeback|unsafe"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// Where the guest's first serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// To standard input and output.
    #[default]
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<SerialConfig, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(SerialConfig::Stdio),
            ("none", _) => Ok(SerialConfig::None),
            (_, Some(path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
            _ => Err(format!("{text:?}: a serial port is stdio, file=PATH or none")),
        }
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialConfig::Stdio => f.write_str("stdio"),
            SerialConfig::File(path) => write!(f, "file={}", path.display()),
            SerialConfig::None => f.write_str("none"),
        }
    }
}

impl Serialize for SerialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SerialConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SerialConfig, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
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
    /// Size of the guest's memory.
    pub memory: Size,
    /// The disk that holds the root file system; the guest's first.
    pub rootfs: Option<Disk>,
    /// Further disks.
    pub disks: Vec<Disk>,
    /// The console.
    pub serial: SerialConfig,
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
            memory: Size(256 << 20),
            rootfs: None,
            disks: vec![],
            serial: SerialConfig::default(),
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
        let devices = self.all_disks().count();
        if devices > VIRTIO_GSIS.len() {
            return Err(Error::TooManyDevices(devices));
        }
        let mut ids = std::collections::BTreeSet::new();
        for (index, disk) in self.all_disks().enumerate() {
            check_disk(disk)?;
            let id = Self::disk_id(index, disk);
            if !ids.insert(id.clone()) {
                return Err(Error::DuplicateDiskId(id));
            }
        }
        Ok(())
    }
}

fn check_disk(disk: &Disk) -> Result<(), Error> {
    if let Some(queues) = disk.queues.filter(|queues| !(1..=MAX_DISK_QUEUES).contains(queues)) {
        return Err(Error::DiskQueues { path: disk.path.clone(), queues });
    }
    match &disk.id {
        Some(id) if id.is_empty() || id.len() > 20 || !id.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(Error::DiskId { path: disk.path.clone(), id: id.clone() })
        }
        _ => Ok(()),
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
    fn sizes_need_a_unit() {
        for (text, bytes) in [("16M", 16 << 20), ("1GiB", 1 << 30), ("4096k", 4 << 20), ("1t", 1 << 40)] {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes);
        }
        assert!("512".parse::<Size>().unwrap_err().contains("no unit"));
        for text in ["", "M", "1.5G", "-1M", "1X", "99999999999999999999M", "18446744073709551615T", "1 M"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(
            [Size(16 << 20), Size((16 << 20) + 1), Size(5)].map(|s| s.to_string()),
            ["16 MiB", "16.0 MiB", "5 bytes"]
        );
    }

    #[test]
    fn disk_options_are_read() {
        let disk: Disk = "/a b.img,readonly,id=root,queues=2,io=sync,cache=unsafe".parse().unwrap();
        let expected = Disk {
            path: "/a b.img".into(),
            readonly: true,
            id: Some("root".into()),
            queues: Some(2),
            io: Io::Sync,
            cache: Cache::Unsafe,
        };
        assert_eq!(disk, expected);
        assert!("x,writable".parse::<Disk>().unwrap_err().contains("unknown disk option \"writable\""));
        for text in ["", ",readonly", "x,queues=many", "x,io=fast", "x,readonly=maybe", "x,cache"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }

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
        std::fs::write(&toml, "memory = '1G'\ncpus = 2\n[[disks]]\npath = 'a'\nreadonly = true\n").unwrap();
        let read = read_file(&toml).unwrap();
        assert_eq!((read.memory, read.cpus, read.disks.len()), (Size(1 << 30), 2, 1));
        std::fs::write(&toml, "memroy = '1G'").unwrap();
        assert!(matches!(read_file(&toml), Err(FileError::Toml { .. })));
    }
}
