//! A container and a process as the agent gets them: numbers and bytes that it applies without knowing their meaning.

use serde::{Deserialize, Serialize};

use super::frame::{bytes, list};

/// A container of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Letters, digits, `_`, `.` and `-`; at most [`ContainerSpec::ID_BYTES_MAX`].
    pub id: String,
    /// The root file system.
    pub root: Root,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Propagation of the root's mount as `MS_*` flags; 0 for private.
    pub propagation: u64,
    /// Mounts in the order in which they are made.
    #[serde(deserialize_with = "list::<_, _, 1024>")]
    pub mounts: Vec<Mount>,
    /// Device files, made after the mounts.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub devices: Vec<Device>,
    /// Symbolic links, made after the devices: path and target.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub links: Vec<(String, String)>,
    /// Which devices the container may open and make: what [`super::devices::device_filter`] makes; empty for all.
    #[serde(with = "bytes")]
    pub device_filter: Vec<u8>,
    /// The container's first process.
    pub process: ProcessSpec,
    /// Which namespaces are its own.
    pub namespaces: Namespaces,
    /// Its host name, where the namespace for that is its own.
    pub hostname: Option<String>,
    /// Its NIS domain name, likewise.
    pub domainname: Option<String>,
    /// Paths that show nothing.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub masked_paths: Vec<String>,
    /// Paths below which nothing can be changed.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub read_only_paths: Vec<String>,
    /// Kernel parameters of its namespaces, with dots.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub sysctls: Vec<(String, String)>,
    /// What it may use.
    pub limits: Limits,
    /// Whether a small init is its process 1, which passes signals on and reaps.
    pub reaper: bool,
}

impl ContainerSpec {
    /// Bytes of an id at most.
    pub const ID_BYTES_MAX: usize = 128;
}

/// A root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// Read-only layers with a writable one over them.
    Layers {
        /// The lowest first.
        #[serde(deserialize_with = "list::<_, _, 500>")]
        lower: Vec<Volume>,
        /// What is written to.
        upper: Upper,
    },
    /// A directory of the sandbox's shared folder.
    Share {
        /// Its path there.
        path: String,
    },
}

impl Default for Root {
    fn default() -> Self {
        Self::Layers { lower: Vec::new(), upper: Upper::None }
    }
}

/// What lies over the layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Upper {
    /// Nothing: the root cannot be written to, whatever else is said.
    None,
    /// Memory, with these options of tmpfs.
    Memory(String),
    /// A file system.
    Volume(Volume),
}

/// A file system on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The disk's serial number (`--disk …,id=SERIAL`).
    pub disk: String,
    /// The partition's number, from 1; 0 for the whole disk.
    pub partition: u32,
    /// Its type: `erofs`, `ext4`, ….
    pub kind: String,
    /// Mount options of that type.
    pub data: String,
}

/// A mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is mounted.
    pub source: Source,
    /// Where: an absolute path inside, which is made if it is not there.
    pub target: String,
    /// `MS_*` flags. On what is bound, `MS_REC` takes what is mounted below with it.
    pub flags: u64,
    /// Propagation as `MS_*` flags; 0 for private.
    pub propagation: u64,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A new file system of the container's namespaces: `proc`, `sysfs`, `tmpfs`, `devpts`, `mqueue`, `cgroup2`.
    New {
        /// Its type.
        kind: String,
        /// Its options.
        data: String,
    },
    /// A path in the sandbox's shared folder, bound.
    Share {
        /// The path there.
        path: String,
    },
    /// A path inside the container, bound.
    Inside {
        /// The path.
        path: String,
    },
    /// A file with these contents, in memory.
    File {
        /// The contents.
        #[serde(with = "bytes")]
        contents: Vec<u8>,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Memory that containers of the sandbox share by this name; made by whoever is first.
    Memory {
        /// The name, of the same letters as a container's id.
        name: String,
        /// Options of tmpfs.
        data: String,
    },
    /// A file system on a disk.
    Volume(Volume),
}

/// A device file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// An absolute path inside.
    pub path: String,
    /// File type and permission bits, as `st_mode` has them: `S_IFCHR`, `S_IFBLK` or `S_IFIFO`.
    pub mode: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Where a namespace comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Namespace {
    /// A new one.
    #[default]
    Own,
    /// The sandbox's.
    Sandbox,
    /// That of another container, which runs.
    Container(String),
}

/// The namespaces of a container. That of mounts is always its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Process ids.
    pub pid: Namespace,
    /// Host name.
    pub uts: Namespace,
    /// System V IPC and message queues.
    pub ipc: Namespace,
    /// Network; an own one has a loopback device only.
    pub network: Namespace,
    /// Control groups.
    pub cgroup: Namespace,
}

/// Limits of a container; `None` for none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Bytes of swap beside it.
    pub swap_bytes: Option<u64>,
    /// Bytes that reclaim leaves alone.
    pub memory_low_bytes: Option<u64>,
    /// Processor time: microseconds in each period, and the period's microseconds.
    pub cpu_quota: Option<(u64, u64)>,
    /// Weight of processor time, 1 to 10000; 100 is what others have.
    pub cpu_weight: Option<u64>,
    /// Processors, as `0-2,4`.
    pub cpuset: Option<String>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Weight of disk time, 1 to 10000.
    pub io_weight: Option<u64>,
    /// Limits of disks.
    #[serde(deserialize_with = "list::<_, _, 64>")]
    pub io: Vec<IoLimit>,
    /// Further files of control group v2 and what is written to them.
    #[serde(deserialize_with = "list::<_, _, 64>")]
    pub files: Vec<(String, String)>,
}

/// Limits of one disk, for a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimit {
    /// The disk's serial number.
    pub disk: String,
    /// Bytes read.
    pub read_bps: Option<u64>,
    /// Bytes written.
    pub write_bps: Option<u64>,
    /// Reads.
    pub read_iops: Option<u64>,
    /// Writes.
    pub write_iops: Option<u64>,
}

/// A process of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// The program and its arguments. A name without a slash is looked for in the environment's `PATH`.
    #[serde(deserialize_with = "list::<_, _, 65536>")]
    pub args: Vec<String>,
    /// `NAME=VALUE`. `HOME` is added where it is missing.
    #[serde(deserialize_with = "list::<_, _, 65536>")]
    pub env: Vec<String>,
    /// Working directory. A container's first process has it made.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// File mode mask; `None` for 022.
    pub umask: Option<u32>,
    /// Where its standard streams lead.
    pub stdio: Stdio,
    /// Resource limits.
    #[serde(deserialize_with = "list::<_, _, 32>")]
    pub rlimits: Vec<Rlimit>,
    /// What it may do.
    pub capabilities: Capabilities,
    /// Whether set-user-id programs have no effect.
    pub no_new_privileges: bool,
    /// Its system call filter.
    pub seccomp: Option<Seccomp>,
    /// How likely it is to be killed when memory is short, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
}

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    /// By the container's own `/etc/passwd` and `/etc/group`.
    Named {
        /// `USER[:GROUP]`, names or numbers; empty for root.
        user: String,
        /// Further groups, names or numbers.
        #[serde(deserialize_with = "list::<_, _, 1024>")]
        groups: Vec<String>,
    },
    /// By numbers.
    Ids {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
        /// Further groups.
        #[serde(deserialize_with = "list::<_, _, 65536>")]
        groups: Vec<u32>,
    },
}

impl Default for User {
    fn default() -> Self {
        Self::Named { user: String::new(), groups: Vec::new() }
    }
}

/// Where standard streams lead. Numbers of streams are the host's choice; each is used once in a VM's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// To a terminal of the container, which is one stream both ways.
    Terminal {
        /// The stream.
        stream: u64,
        /// Its first size.
        size: WindowSize,
    },
    /// Each to a stream of its own, or to nothing.
    Streams {
        /// Standard input.
        stdin: Option<u64>,
        /// Standard output.
        stdout: Option<u64>,
        /// Standard error.
        stderr: Option<u64>,
    },
}

impl Default for Stdio {
    fn default() -> Self {
        Self::Streams { stdin: None, stdout: None, stderr: None }
    }
}

impl Stdio {
    /// The numbers of the streams.
    pub fn streams(&self) -> Vec<u64> {
        match *self {
            Self::Terminal { stream, .. } => vec![stream],
            Self::Streams { stdin, stdout, stderr } => {
                [stdin, stdout, stderr].into_iter().flatten().collect()
            }
        }
    }
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A resource limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Soft limit; `u64::MAX` for none.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Capabilities, bit N for number N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What the process and its children can ever get.
    pub bounding: u64,
    /// What counts.
    pub effective: u64,
    /// What programs with file capabilities inherit.
    pub inheritable: u64,
    /// What can be made to count.
    pub permitted: u64,
    /// What any program inherits.
    pub ambient: u64,
}

impl Capabilities {
    /// These, in all sets but the ambient and the inheritable one: what Docker gives.
    pub fn of(mask: u64) -> Self {
        Self { bounding: mask, effective: mask, permitted: mask, inheritable: 0, ambient: 0 }
    }
}

/// A system call filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// `struct sock_filter`s, eight bytes each.
    #[serde(with = "bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// The device files that every container has: path, permission bits, major and minor number.
const DEVICES: [(&str, u32, u32, u32); 6] = [
    ("/dev/null", 0o666, 1, 3),
    ("/dev/zero", 0o666, 1, 5),
    ("/dev/full", 0o666, 1, 7),
    ("/dev/random", 0o666, 1, 8),
    ("/dev/urandom", 0o666, 1, 9),
    ("/dev/tty", 0o666, 5, 0),
];

/// The links that every container has.
const LINKS: [(&str, &str); 5] = [
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// The device files that the OCI runtime specification wants in every Linux container.
pub fn default_devices() -> Vec<Device> {
    let device = |(path, mode, major, minor): (&str, u32, u32, u32)| Device {
        path: path.to_owned(),
        mode: libc::S_IFCHR | mode,
        major,
        minor,
        uid: 0,
        gid: 0,
    };
    DEVICES.map(device).into()
}

/// The links in `/dev` that it wants.
pub fn default_links() -> Vec<(String, String)> {
    LINKS.map(|(path, target)| (path.to_owned(), target.to_owned())).into()
}
