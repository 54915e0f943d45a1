//! The messages of host and agent, as two enums of one version.
//!
//! The host calls the agent at [`PORT`]: once or more for frames, and once for each stream of a process. Requests are
//! answered in any order, by their number. Events come in between, to connections that asked for them.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::frame::{bytes, list};
use super::spec::{ContainerSpec, Limits, ProcessSpec, WindowSize};

/// The agent's vsock port.
pub const PORT: u32 = 1024;
/// Version of the messages. Another one is refused at [`Request::Hello`], whose form stays.
pub const VERSION: u32 = 2;
/// Containers of a sandbox at most.
pub const CONTAINERS_MAX: usize = 256;
/// Processes beside the first that a container's records hold at most.
pub const PROCESSES_MAX: usize = 1024;
/// Number of a container's first process.
pub const FIRST_PROCESS: u32 = 0;

/// From host to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the host; the reply has it again.
    pub id: u32,
    /// What is wanted.
    pub request: Request,
}

/// From agent to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The answer to the request with this number.
    Reply(u32, Result<Reply, Failure>),
    /// Something has happened.
    Event(Event),
}

/// What the host wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first one on each connection.
    Hello {
        /// The host's [`VERSION`].
        version: u32,
        /// Whether this connection gets events: first those of processes that have ended already and were not deleted.
        events: bool,
    },
    /// Sets the sandbox up: [`Reply::Done`].
    Configure(Configuration),
    /// Sets the clock, to nanoseconds since 1970: [`Reply::Done`].
    SetClock(u64),
    /// Mounts the sandbox's shared folder, once: [`Reply::Done`].
    MountShare {
        /// Its tag.
        tag: String,
    },
    /// Makes a container, all but its process: [`Reply::Done`].
    CreateContainer(Box<ContainerSpec>),
    /// Starts a container's first process: [`Reply::Started`].
    Start {
        /// The container.
        container: String,
    },
    /// Starts a process in a running container: [`Reply::Started`].
    Exec {
        /// The container.
        container: String,
        /// The process's number, which the host chooses; not 0.
        process: u32,
        /// The process.
        spec: Box<ProcessSpec>,
    },
    /// Sends a signal: [`Reply::Done`].
    Signal {
        /// The container.
        container: String,
        /// To whom.
        target: Target,
        /// The signal's number.
        signal: i32,
    },
    /// Changes the size of a process's terminal: [`Reply::Done`].
    Resize {
        /// The container.
        container: String,
        /// The process.
        process: u32,
        /// The new size.
        size: WindowSize,
    },
    /// Freezes a container: [`Reply::Done`].
    Pause {
        /// The container.
        container: String,
    },
    /// Thaws it: [`Reply::Done`].
    Resume {
        /// The container.
        container: String,
    },
    /// Changes its limits, where a limit is given: [`Reply::Done`].
    Update {
        /// The container.
        container: String,
        /// The new ones.
        limits: Limits,
    },
    /// What it uses: [`Reply::Stats`].
    Stats {
        /// The container.
        container: String,
    },
    /// Its processes: [`Reply::Processes`].
    Processes {
        /// The container.
        container: String,
    },
    /// The sandbox's containers: [`Reply::Containers`].
    Containers,
    /// Forgets a process that has ended, and its streams: [`Reply::Done`].
    DeleteProcess {
        /// The container.
        container: String,
        /// The process.
        process: u32,
    },
    /// Removes a container: [`Reply::Done`] when its processes are gone and its file systems are unmounted.
    Delete {
        /// The container.
        container: String,
        /// Whether its processes are killed; if not, one that runs is an error.
        force: bool,
    },
    /// What a path inside is: [`Reply::File`].
    StatPath {
        /// The container.
        container: String,
        /// An absolute path.
        path: String,
        /// Whether a link at its end is followed.
        follow: bool,
    },
    /// Sends a path as a tar archive, with its last component as the name, over a stream: [`Reply::Done`] at the end.
    ReadArchive {
        /// The container.
        container: String,
        /// An absolute path.
        path: String,
        /// The stream, which the host has to open.
        stream: u64,
    },
    /// Unpacks a tar archive from a stream into a directory: [`Reply::Done`] at the end.
    WriteArchive {
        /// The container.
        container: String,
        /// An absolute path of a directory.
        path: String,
        /// The stream, which the host has to open.
        stream: u64,
    },
    /// Brings everything that was written to the disks: [`Reply::Done`].
    Sync,
    /// Ends all processes and powers the VM off. [`Reply::Done`] comes before that.
    Shutdown {
        /// Milliseconds between asking processes to end and killing them.
        timeout_ms: u32,
    },
    /// Sends what a container has written over its layers as the tar archive of one more layer, over a stream:
    /// [`Reply::Done`] at the end.
    ReadChanges {
        /// The container.
        container: String,
        /// The stream, which the host has to open.
        stream: u64,
    },
    /// Looks at all that will not change, before the VM is saved: what is known then need not be asked for in each VM that goes on
    /// from there. [`Reply::Done`].
    Settle,
}

/// To whom a signal goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// A process by its number.
    Process(u32),
    /// All of the container.
    All,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// To [`Request::Hello`].
    Hello(AgentInfo),
    /// The process runs, and has this number among the sandbox's processes.
    Started(u32),
    /// To [`Request::Stats`].
    Stats(Box<Stats>),
    /// To [`Request::Processes`].
    Processes(#[serde(deserialize_with = "list::<_, _, 4096>")] Vec<ProcessInfo>),
    /// To [`Request::Containers`].
    Containers(#[serde(deserialize_with = "list::<_, _, 256>")] Vec<ContainerInfo>),
    /// To [`Request::StatPath`].
    File(FileInfo),
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A process has ended, and what it had written before has been handed to those of its streams that the host has
    /// opened.
    Exited {
        /// The container.
        container: String,
        /// The process.
        process: u32,
        /// How.
        status: ExitStatus,
        /// Whether the kernel has killed something in the container for lack of memory, since it was made.
        out_of_memory: bool,
    },
    /// The kernel has killed something in a container for lack of memory.
    OutOfMemory {
        /// The container.
        container: String,
    },
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(u8),
    /// By a signal.
    Signal(u8),
}

impl ExitStatus {
    /// As a shell has it: a signal's number and 128.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// What the sandbox is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The sandbox's host name.
    pub hostname: Option<String>,
    /// Nanoseconds since 1970.
    pub clock_ns: Option<u64>,
    /// Random bytes for the kernel's pool. All that it gives afterwards comes from them, too.
    #[serde(with = "bytes")]
    pub entropy: Vec<u8>,
    /// Network devices. Others stay as they are, but the loopback device, which is brought up.
    #[serde(deserialize_with = "list::<_, _, 64>")]
    pub interfaces: Vec<Interface>,
    /// Kernel parameters, with dots.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub sysctls: Vec<(String, String)>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The hardware address by which it is found, if it is to get another one; `None` for `mac`.
    pub found_by: Option<[u8; 6]>,
    /// The name that it gets.
    pub name: String,
    /// Bytes of a packet at most.
    pub mtu: Option<u32>,
    /// Addresses, each with the length of its prefix.
    #[serde(deserialize_with = "list::<_, _, 64>")]
    pub addresses: Vec<(IpAddr, u8)>,
    /// Routes.
    #[serde(deserialize_with = "list::<_, _, 256>")]
    pub routes: Vec<Route>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads; with a prefix of length 0 everywhere.
    pub destination: (IpAddr, u8),
    /// Over whom; `None` for the link itself.
    pub gateway: Option<IpAddr>,
    /// Its metric.
    pub metric: Option<u32>,
}

/// What the agent says of itself and its kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// The agent's [`VERSION`].
    pub version: u32,
    /// The kernel's release.
    pub kernel: String,
    /// Processors.
    pub processors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Controllers of control group v2 that the kernel has.
    pub controllers: String,
}

/// A container of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerInfo {
    /// Its id.
    pub id: String,
    /// What it does.
    pub state: State,
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It was made.
    Created,
    /// Its first process runs.
    Running,
    /// It is frozen.
    Paused,
    /// Its first process has ended.
    Stopped(ExitStatus),
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Created => "created and not started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "not running",
        })
    }
}

/// What a container uses, since it was made or now. What the kernel does not count is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time, in microseconds.
    pub cpu_us: u64,
    /// Of that in user mode.
    pub cpu_user_us: u64,
    /// Of that in the kernel.
    pub cpu_system_us: u64,
    /// Periods in which it had to wait.
    pub throttled_periods: u64,
    /// Microseconds for which it had to.
    pub throttled_us: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Of that, file cache that can be dropped at once.
    pub memory_inactive_file_bytes: u64,
    /// The limit.
    pub memory_limit_bytes: Option<u64>,
    /// Bytes of swap.
    pub swap_bytes: u64,
    /// Processes that the kernel has killed for lack of memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
    /// The limit.
    pub pids_limit: Option<u64>,
    /// Bytes read from disks.
    pub read_bytes: u64,
    /// Bytes written to them.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// A process of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its number in the sandbox.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its number inside the container.
    pub inner_pid: u32,
    /// Its user.
    pub uid: u32,
    /// `R`, `S`, `D`, … as proc(5) has them.
    pub state: u8,
    /// Its terminal's device number; 0 for none.
    pub terminal: u32,
    /// Seconds since 1970.
    pub started: u64,
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Its command line, or its name in brackets; shortened.
    pub command: String,
}

/// What a path is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// File type and permission bits, as `st_mode` has them.
    pub mode: u32,
    /// Bytes.
    pub len: u64,
    /// Seconds since 1970 of its last change.
    pub modified: i64,
    /// What it points to, if it is a link.
    pub link: Option<String>,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Host and agent do not speak the same version.
    #[error("the agent speaks version {agent}, and version {host} is wanted")]
    Version {
        /// The host's.
        host: u32,
        /// The agent's.
        agent: u32,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no such container.
    #[error("no container {0}")]
    NoContainer(String),
    /// There is one already.
    #[error("container {0} is there already")]
    Exists(String),
    /// There is no such process.
    #[error("no process {process} in container {container}")]
    NoProcess {
        /// The container.
        container: String,
        /// The process.
        process: u32,
    },
    /// The container is in another state.
    #[error("container {container} is {state}")]
    State {
        /// The container.
        container: String,
        /// Its state.
        state: State,
    },
    /// There is no such user in the container.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// There is no such group in the container.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
    /// The program is not there.
    #[error("exec: {program:?}: {}", not_found_text(program))]
    NotFound {
        /// As it was asked for.
        program: String,
    },
    /// The program is there and cannot be run.
    #[error("exec: {program:?}: {}", error_text(*errno))]
    NotExecutable {
        /// As it was asked for.
        program: String,
        /// Why.
        errno: i32,
    },
    /// The working directory cannot be entered.
    #[error("chdir to cwd ({path:?}): {}", error_text(*errno))]
    WorkingDirectory {
        /// As it was asked for.
        path: String,
        /// Why.
        errno: i32,
    },
    /// There is no such disk or partition.
    #[error("no disk {disk:?} with partition {partition}")]
    NoDisk {
        /// Its serial number.
        disk: String,
        /// The partition; 0 for the whole disk.
        partition: u32,
    },
    /// There is no such network device.
    #[error("no network device with the address {}", mac_text(.0))]
    NoInterface([u8; 6]),
    /// Something has its bound.
    #[error("too many {0}")]
    TooMany(String),
    /// The kernel refused something.
    #[error("cannot {doing}: {}", error_text(*errno))]
    System {
        /// What was tried, on what.
        doing: String,
        /// What it said.
        errno: i32,
    },
}

impl Failure {
    /// The exit code that Docker gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            Self::WorkingDirectory { errno, .. } if *errno == libc::ENOENT => 127,
            Self::WorkingDirectory { .. } => 126,
            _ => 125,
        }
    }
}

fn error_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn not_found_text(program: &str) -> String {
    match program.contains('/') {
        true => format!("stat {program}: no such file or directory"),
        false => "executable file not found in $PATH".to_owned(),
    }
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests;
