//! What a child has to do, prepared down to the last string: it runs in the agent's memory, so it must not allocate.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Gid, Uid};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::thread::ThreadNameSpaceType;
use rvmm::guest::spec::{Capabilities, Rlimit};

use crate::system::Strings;

/// A process to be.
pub struct Plan {
    /// Namespaces to join, each by a process that is in them.
    pub joins: Vec<(OwnedFd, ThreadNameSpaceType)>,
    /// Whether the control group namespace is a new one.
    pub own_cgroup: bool,
    /// Host name and NIS domain name, where the namespace is new.
    pub hostname: Option<CString>,
    /// See there.
    pub domainname: Option<CString>,
    /// A message that brings the loopback device up, where the network namespace is new.
    pub loopback: Option<Vec<u8>>,
    /// The value for `/proc/self/oom_score_adj`.
    pub oom_score_adj: Option<Vec<u8>>,
    /// The file system to be; `None` in a container that has it already.
    pub root: Option<RootPlan>,
    /// Standard streams.
    pub stdio: StdioPlan,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// File mode mask.
    pub umask: u32,
    /// Working directory.
    pub cwd: CString,
    /// Whether the working directory is made.
    pub make_cwd: bool,
    /// User.
    pub uid: Uid,
    /// Group.
    pub gid: Gid,
    /// Further groups.
    pub groups: Vec<Gid>,
    /// Capabilities.
    pub capabilities: Capabilities,
    /// The highest capability that the kernel knows.
    pub last_capability: u32,
    /// Whether set-user-id programs have no effect.
    pub no_new_privileges: bool,
    /// A system call filter: its program and flags.
    pub seccomp: Option<(Vec<u8>, u32)>,
    /// The program's possible places, in the order in which they are tried.
    pub candidates: Vec<CString>,
    /// The reaper's program, if it comes first, with its own arguments for each candidate.
    pub reaper: Option<(OwnedFd, Vec<Strings>)>,
    /// Arguments.
    pub arguments: Strings,
    /// Environment.
    pub environment: Strings,
    /// What became of it.
    pub outcome: Outcome,
}

/// Standard streams of a process.
pub enum StdioPlan {
    /// Three descriptors, each with whether it becomes the user's.
    Files([(OwnedFd, bool); 3]),
    /// A new terminal of the container.
    Terminal {
        /// Its number of lines and columns.
        size: (u16, u16),
        /// Whether it is bound to `/dev/console`.
        console: bool,
    },
}

/// A root file system and what is mounted in it.
pub struct RootPlan {
    /// Where it is mounted in the agent's view.
    pub path: CString,
    /// Mounts, in order.
    pub mounts: Vec<MountPlan>,
    /// Device files.
    pub devices: Vec<DevicePlan>,
    /// Links: path and target.
    pub links: Vec<(CString, CString)>,
    /// Kernel parameters: file and value.
    pub sysctls: Vec<(CString, Vec<u8>)>,
    /// Paths that show nothing.
    pub masked: Vec<CString>,
    /// Paths that cannot be changed.
    pub read_only: Vec<CString>,
    /// Whether the root cannot be written to.
    pub is_read_only: bool,
    /// Propagation of the root; 0 for private.
    pub propagation: u64,
}

/// One mount.
pub struct MountPlan {
    /// What.
    pub what: MountWhat,
    /// Where.
    pub target: CString,
    /// Propagation; 0 for private.
    pub propagation: u64,
}

/// What a mount shows.
pub enum MountWhat {
    /// A new file system: type and options.
    New(CString, MountFlags, CString),
    /// A mount that is made already and has no place yet, and whether it is a directory.
    Tree(OwnedFd, bool),
    /// A path inside, bound: with what is below, and with these `MOUNT_ATTR_*`.
    Inside(CString, bool, u64),
}

/// A device file.
pub struct DevicePlan {
    /// Where.
    pub path: CString,
    /// What kind.
    pub kind: FileType,
    /// Permission bits.
    pub mode: u32,
    /// Number.
    pub number: u64,
    /// Owner and group, if they are not root.
    pub owner: Option<(Uid, Gid)>,
}

/// A step of the way, with which place in its list where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing has happened yet.
    Begin,
    Join,
    CgroupNamespace,
    Session,
    Hostname,
    Loopback,
    OomScore,
    Root,
    Mount(usize),
    Device(usize),
    Link(usize),
    Sysctl(usize),
    Mask(usize),
    ReadOnly(usize),
    ReadOnlyRoot,
    Terminal,
    Console,
    Stdio,
    Rlimit(usize),
    WorkingDirectory,
    Bounding,
    User,
    Capabilities,
    NoNewPrivileges,
    Seccomp,
    /// The program is at none of its places.
    NotFound,
    /// The program is there and cannot be run.
    Exec,
    /// The new program has been loaded, as far as the child can tell.
    Done,
}

/// What a child leaves behind.
pub struct Outcome {
    /// The step that was the last.
    pub step: Step,
    /// What the kernel said.
    pub errno: Errno,
    /// Descriptors of a new terminal, in the agent's table: the agent's end, and the process's, which keeps it open.
    pub terminal: Option<(OwnedFd, OwnedFd)>,
}

impl Default for Outcome {
    fn default() -> Self {
        Self { step: Step::Begin, errno: Errno::IO, terminal: None }
    }
}
