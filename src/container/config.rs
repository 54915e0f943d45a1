//! What a container is made of: inert data, from flags or the API, kept as `config.json` in the container's directory.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The wall around a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Namespaces, cgroups and filters of the host's kernel.
    #[default]
    Native,
    /// A virtual machine with a kernel of its own, and in it the same as natively.
    Microvm,
}

/// Whether a microVM goes on from a template, a snapshot of a booted guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateUse {
    /// If one can be had; otherwise the guest boots, and the log says why.
    #[default]
    Auto,
    /// The guest boots in any case.
    Never,
    /// From a template, or not at all.
    Require,
}

/// A container as it was asked for. Nothing here is opened, looked up or resolved, but the image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ContainerConfig {
    /// 64 hexadecimal digits, as Docker has them.
    pub id: String,
    /// The name that the user gave, or one that was made up.
    pub name: String,
    /// Creation time in nanoseconds since 1970.
    pub created_ns: u64,
    /// The wall.
    pub isolation: Isolation,
    /// The image as the user named it.
    pub image: String,
    /// Digest of the image's configuration (`sha256:…`): the image's id.
    pub image_id: String,
    /// The process.
    pub process: Process,
    /// Host name inside; `None` for the first 12 digits of the id.
    pub hostname: Option<String>,
    /// What the container may use.
    pub limits: Limits,
    /// Mounts beside those that every container has, in the order in which they are made.
    pub mounts: Vec<Mount>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Devices of the host.
    pub devices: Vec<Device>,
    /// What the process may do.
    pub security: Security,
    /// Networks, ports and names.
    pub network: Network,
    /// Kernel parameters of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// What happens when the process ends.
    pub restart: Restart,
    /// Whether the container is removed when it ends.
    pub auto_remove: bool,
    /// The signal of `stop`: a name or a number, as image and user write it.
    pub stop_signal: String,
    /// How long `stop` waits before it kills.
    pub stop_timeout: Duration,
    /// How health is found out; `None` for not at all.
    pub health: Option<Health>,
    /// Labels of image and user.
    pub labels: BTreeMap<String, String>,
    /// Secrets: mounted under `/run/secrets`, never shown.
    pub secrets: Vec<Secret>,
    /// How its microVM starts.
    #[serde(default)]
    pub template: TemplateUse,
}

/// What is run. Image and user have been merged already.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Process {
    /// Entrypoint and command.
    pub args: Vec<String>,
    /// `NAME=VALUE`, without those that come from files of secrets.
    pub env: Vec<String>,
    /// Working directory, made if it is not there.
    pub cwd: String,
    /// `USER[:GROUP]`, by names or numbers; empty for root.
    pub user: String,
    /// Further groups, by names or numbers.
    pub groups: Vec<String>,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Whether standard input is open.
    pub stdin: bool,
    /// Whether a small init is process 1 and reaps.
    pub init: bool,
    /// Resource limits: name without `RLIMIT_`, in capitals.
    pub rlimits: Vec<Rlimit>,
}

/// A resource limit of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `NOFILE`, `NPROC`, …
    pub name: String,
    /// Soft limit; `u64::MAX` for none.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// What a container may use of the host; `None` for no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Bytes of memory and swap together.
    pub memory_swap_bytes: Option<u64>,
    /// Bytes that reclaim leaves alone.
    pub memory_reservation_bytes: Option<u64>,
    /// Processor time, in thousandths of a processor.
    pub cpu_millis: Option<u64>,
    /// Relative weight of processor time, 2 to 262144; 1024 is what others have.
    pub cpu_shares: Option<u64>,
    /// Processors, as `0-2,4`.
    pub cpuset: Option<String>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Relative weight of disk time, 10 to 1000.
    pub io_weight: Option<u16>,
    /// Limits of block devices.
    pub io: Vec<IoLimit>,
    /// Size of `/dev/shm` in bytes; `None` for 64 MiB.
    pub shm_bytes: Option<u64>,
    /// Bytes of the writable layer; `None` for the default of the isolation.
    pub disk_bytes: Option<u64>,
}

/// Limits of one block device, for a second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IoLimit {
    /// The device's file.
    pub device: PathBuf,
    /// Bytes read.
    pub read_bps: Option<u64>,
    /// Bytes written.
    pub write_bps: Option<u64>,
    /// Reads.
    pub read_iops: Option<u64>,
    /// Writes.
    pub write_iops: Option<u64>,
}

/// A mount that the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Mount {
    /// What is mounted.
    pub source: MountSource,
    /// Where: an absolute path inside.
    pub target: PathBuf,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum MountSource {
    /// A file or directory of the host.
    Bind {
        /// Absolute.
        path: PathBuf,
        /// `private`, `rprivate`, `shared`, `rshared`, `slave` or `rslave`; `None` for `rprivate`.
        propagation: Option<String>,
    },
    /// A named volume, which is made if it is not there.
    Volume {
        /// Its name.
        name: String,
        /// Whether a new, empty volume takes what the image has at the target.
        copy: bool,
    },
    /// Memory.
    Tmpfs {
        /// Bytes; `None` for half of the memory.
        size_bytes: Option<u64>,
        /// Permission bits; `None` for 01777.
        mode: Option<u32>,
        /// Further options of mount(8).
        options: Vec<String>,
    },
}

/// A device of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Device {
    /// On the host.
    pub host: PathBuf,
    /// Inside.
    pub container: PathBuf,
    /// Of `rwm`.
    pub access: String,
}

/// What the process may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Security {
    /// All capabilities, all devices, no filter, nothing masked.
    pub privileged: bool,
    /// Added to the default set: names with or without `CAP_`, or `ALL`.
    pub cap_add: Vec<String>,
    /// Taken from it.
    pub cap_drop: Vec<String>,
    /// The system call filter.
    pub seccomp: Seccomp,
    /// Whether set-user-id programs have no effect.
    pub no_new_privileges: bool,
    /// Whether paths of `/proc` and `/sys` stay unmasked.
    pub unmask: bool,
}

/// A system call filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// Docker's.
    #[default]
    Default,
    /// None.
    Unconfined,
    /// A file in Docker's form.
    File(PathBuf),
}

/// Where a container's network comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// Only a loopback device.
    None,
    /// The host's own.
    Host,
    /// That of another container, by id: both share a sandbox.
    Container(String),
    /// Networks by name, `bridge` among them; the first gives the default route.
    Networks(Vec<NetworkJoin>),
}

/// A network that a container is on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct NetworkJoin {
    /// The network's name.
    pub network: String,
    /// A fixed address.
    pub ip: Option<Ipv4Addr>,
    /// A fixed hardware address, `02:…`.
    pub mac: Option<String>,
    /// Further names there.
    pub aliases: Vec<String>,
}

/// Networks, ports and names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Network {
    /// Where it comes from.
    pub mode: NetworkMode,
    /// Published ports.
    pub ports: Vec<Port>,
    /// Name servers instead of the network's own.
    pub dns: Vec<IpAddr>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Resolver options.
    pub dns_options: Vec<String>,
    /// Lines of `/etc/hosts`: name and address; the address `host-gateway` is the host's.
    pub hosts: Vec<(String, String)>,
}

/// A port of the host that leads into the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Port {
    /// Address on the host; `None` for all.
    pub host_ip: Option<IpAddr>,
    /// Port on the host; 0 for any that is free.
    pub host: u16,
    /// Port inside.
    pub container: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
}

/// What happens when the process ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It stays ended.
    #[default]
    No,
    /// It is started again if it failed, at most so often; 0 for without end.
    OnFailure(u32),
    /// It is started again.
    Always,
    /// It is started again unless the user stopped it.
    UnlessStopped,
}

/// How a container's health is found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Health {
    /// The command: `["CMD", …]` or `["CMD-SHELL", LINE]`.
    pub test: Vec<String>,
    /// Between checks.
    pub interval: Duration,
    /// For one check.
    pub timeout: Duration,
    /// In which failures do not count.
    pub start_period: Duration,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
}

/// A secret: a file of the host, copied into memory inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Secret {
    /// Its name, and so the file's under `/run/secrets`.
    pub name: String,
    /// The host's file.
    pub source: PathBuf,
    /// Owner inside.
    pub uid: u32,
    /// Group inside.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}
