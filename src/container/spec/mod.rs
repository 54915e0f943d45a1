//! From a container's configuration to an OCI runtime `Spec`: the container that Docker would make of it.
//!
//! Both isolations are made from the same `Spec`. Besides the configuration it takes what the engine has found out or made
//! for this container ([`Inputs`]); of the host itself only devices, a user's filter and the kernel's version are read.

mod capabilities;
mod devices;
mod filter;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod users;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccomp, Root, Spec,
    SpecBuilder,
};

use super::config::{self, ContainerConfig, NetworkMode};

pub use capabilities::CapabilitySet;
pub use filter::{FilterError, compile_seccomp, compile_seccomp_cached, load_flags};
pub use process::ProcessInputs;
pub use seccomp::{Profile, ProfileError, version_of};
pub use users::{Identity, Users, read_in_layers};

/// Version of the specification that a `Spec` is of.
const OCI_VERSION: &str = "1.0.2";
/// Longest host name (sethostname(2)).
const HOSTNAME_BYTES_MAX: usize = 64;
/// What is hidden of the kernel's file systems.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// What is only to be read of them.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Why there is no `Spec` for a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capability has no such name.
    #[error("there is no capability {name:?}")]
    Capability {
        /// As the user wrote it.
        name: String,
    },
    /// A capability that is asked for is not to be had.
    #[error("the capability {name} cannot be given, since rvmm does not have it itself")]
    CapabilityMissing {
        /// With `CAP_`.
        name: String,
    },
    /// The users of the image cannot be read.
    #[error("cannot read /{path} of the image")]
    Users {
        /// Without the first slash.
        path: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The user is not there.
    #[error("there is no user {name:?} in the image's /etc/passwd")]
    NoUser {
        /// As image or user wrote it.
        name: String,
    },
    /// The group is not there.
    #[error("there is no group {name:?} in the image's /etc/group")]
    NoGroup {
        /// As image or user wrote it.
        name: String,
    },
    /// A number is too large for a user or group.
    #[error("{id} is too large for the number of a user or group")]
    IdTooLarge {
        /// The number.
        id: u32,
    },
    /// There is nothing to run.
    #[error("no command is given, by the image or by the user")]
    NoCommand,
    /// A string cannot be handed to the kernel.
    #[error("an argument or a variable has a zero byte in it")]
    Nul,
    /// The working directory is relative.
    #[error("the working directory {path:?} is not absolute")]
    WorkingDirectory {
        /// As image or user wrote it.
        path: PathBuf,
    },
    /// The host name is none.
    #[error("{name:?} cannot be a host name")]
    Hostname {
        /// As the user wrote it.
        name: String,
    },
    /// A resource limit has no such name.
    #[error("there is no resource limit {name:?}")]
    Rlimit {
        /// As the user wrote it.
        name: String,
    },
    /// A soft limit is above its hard one.
    #[error("the soft limit {soft} of {name} is above its hard limit {hard}")]
    RlimitOrder {
        /// As the user wrote it.
        name: String,
        /// Soft limit.
        soft: u64,
        /// Hard limit.
        hard: u64,
    },
    /// A limit cannot be what it is.
    #[error("limit of {limit}: {why}")]
    Limit {
        /// What is limited.
        limit: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A kernel parameter cannot be set for one container.
    #[error("cannot set the kernel parameter {name}: {why}")]
    Sysctl {
        /// As the user wrote it.
        name: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A mount cannot be at its place.
    #[error("cannot mount at {path:?}: {why}")]
    Target {
        /// As the user wrote it.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// What is to be mounted is not absolute.
    #[error("cannot mount {path:?}: it is not absolute")]
    SourceRelative {
        /// As the user wrote it.
        path: PathBuf,
    },
    /// A mount's propagation has no such name.
    #[error("there is no propagation {name:?} of mounts")]
    Propagation {
        /// As the user wrote it.
        name: String,
    },
    /// The engine has not said where a volume is.
    #[error("the volume {name:?} is nowhere")]
    NoVolume {
        /// Its name.
        name: String,
    },
    /// A secret cannot be a file's name.
    #[error("{name:?} cannot be a secret's name")]
    SecretName {
        /// Its name.
        name: String,
    },
    /// The engine has not said where secrets are.
    #[error("there is no directory for the container's secrets")]
    NoSecretsDirectory,
    /// A device cannot be looked at.
    #[error("cannot look at the device {path:?}")]
    Device {
        /// On the host.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// There is no device.
    #[error("{path:?} is no device, and no directory of devices")]
    NoDevice {
        /// On the host.
        path: PathBuf,
    },
    /// Only block devices can be limited.
    #[error("{path:?} is no block device")]
    NotBlockDevice {
        /// On the host.
        path: PathBuf,
    },
    /// A device is to be outside of `/dev`.
    #[error("{path:?} is no place for a device: it is not in /dev")]
    DevicePlace {
        /// In the container.
        path: PathBuf,
    },
    /// Access to a device is something else than letters of `rwm`.
    #[error("{access:?} is no access to a device; it is made of r, w and m")]
    DeviceAccess {
        /// As the user wrote it.
        access: String,
    },
    /// A user's filter cannot be read.
    #[error("cannot read the filter {path:?}")]
    ReadProfile {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// A filter is not one.
    #[error("cannot use the filter {path:?}")]
    Profile {
        /// The file, or `default`.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ProfileError,
    },
    /// oci-spec does not take a value.
    #[error("cannot write the container's specification")]
    Oci(#[source] oci_spec::OciSpecError),
}

/// Where the container's network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// In a namespace that is made with the container and has only a loopback device.
    New,
    /// On the host.
    Host,
    /// In this namespace: a file to be given to setns(2).
    Path(PathBuf),
}

/// What a `Spec` is made from.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// What was asked for.
    pub config: &'a ContainerConfig,
    /// Users of the image.
    pub users: &'a Users,
    /// Where the root file system will be.
    pub rootfs: &'a Path,
    /// Where the network is.
    pub network: NetworkNamespace,
    /// The file that is to be `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// The file that is to be `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// The file that is to be `/etc/hostname`.
    pub hostname_file: Option<PathBuf>,
    /// Directories of named volumes.
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// The directory that is to be `/run/secrets`; the backend fills it.
    pub secrets: Option<PathBuf>,
    /// The control group, from the root of each hierarchy: `/rvmm/ID`.
    pub cgroup: PathBuf,
    /// Capabilities that can be given: [`available_capabilities`] natively, all in a microVM.
    pub available: CapabilitySet,
    /// Version of the kernel that the container will run on.
    pub kernel: (u32, u32),
}

/// The `Spec`.
pub fn build(inputs: &Inputs) -> Result<Spec, Error> {
    let config = inputs.config;
    let hostname = hostname(config)?;
    let capabilities = capabilities::of_container(&config.security, inputs.available)?;
    let process = process::build(&ProcessInputs {
        process: &config.process,
        capabilities,
        no_new_privileges: config.security.no_new_privileges,
        hostname: &hostname,
        users: inputs.users,
    })?;

    let (nodes, rules) = devices::of_container(&config.devices, &config.security, config.isolation)?;
    let mut resources = resources::of_container(&config.limits)?;
    resources.set_devices(Some(rules));
    let masks = if config.security.privileged || config.security.unmask {
        (vec![], vec![])
    } else {
        (MASKED.map(str::to_owned).to_vec(), READ_ONLY.map(str::to_owned).to_vec())
    };
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces(&inputs.network)?)
        .devices(nodes)
        .resources(resources)
        .cgroups_path(inputs.cgroup.clone())
        .sysctl(resources::sysctls(inputs)?)
        .masked_paths(masks.0)
        .readonly_paths(masks.1)
        .build()
        .map_err(Error::Oci)?;
    linux.set_seccomp(seccomp(config, capabilities, inputs.kernel)?);

    let mut root = Root::default();
    root.set_path(inputs.rootfs.into());
    root.set_readonly(Some(config.read_only));
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(root)
        .hostname(hostname)
        .mounts(mounts::of_container(inputs)?)
        .process(process)
        .linux(linux)
        .build()
        .map_err(Error::Oci)?;
    spec.set_annotations(None);
    Ok(spec)
}

/// A process that `exec` adds to a container: in its environment, with its capabilities and as its user, where
/// `process` says nothing else.
pub fn exec_process(
    config: &ContainerConfig,
    process: &config::Process,
    privileged: bool,
    users: &Users,
    available: CapabilitySet,
) -> Result<oci_spec::runtime::Process, Error> {
    let mut merged = process.clone();
    merged.env = [config.process.env.as_slice(), process.env.as_slice()].concat();
    if merged.user.is_empty() {
        merged.user = config.process.user.clone();
        merged.groups = [config.process.groups.as_slice(), process.groups.as_slice()].concat();
    }
    if merged.cwd.is_empty() {
        merged.cwd = config.process.cwd.clone();
    }
    if merged.rlimits.is_empty() {
        merged.rlimits = config.process.rlimits.clone();
    }
    let mut security = config.security.clone();
    security.privileged |= privileged;
    process::build(&ProcessInputs {
        process: &merged,
        capabilities: capabilities::of_container(&security, available)?,
        no_new_privileges: security.no_new_privileges,
        hostname: &hostname(config)?,
        users,
    })
}

/// The container's host name: the user's, the host's own with its network, or the id's first 12 digits.
pub fn hostname(config: &ContainerConfig) -> Result<String, Error> {
    let name = match (&config.hostname, &config.network.mode) {
        (Some(name), _) => name.clone(),
        (None, NetworkMode::Host) => {
            let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            own.trim().to_owned()
        }
        (None, _) => config.id.chars().take(12).collect(),
    };
    let good = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if name.is_empty() || name.len() > HOSTNAME_BYTES_MAX || !name.chars().all(good) {
        return Err(Error::Hostname { name });
    }
    Ok(name)
}

fn namespaces(network: &NetworkNamespace) -> Result<Vec<LinuxNamespace>, Error> {
    let own = [
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Cgroup,
    ];
    let mut builders: Vec<_> = own.map(|kind| LinuxNamespaceBuilder::default().typ(kind)).into();
    let of_network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    match network {
        NetworkNamespace::New => builders.push(of_network),
        NetworkNamespace::Path(path) => builders.push(of_network.path(path.clone())),
        NetworkNamespace::Host => {}
    }
    builders.into_iter().map(|builder| builder.build().map_err(Error::Oci)).collect()
}

fn seccomp(
    config: &ContainerConfig,
    capabilities: CapabilitySet,
    kernel: (u32, u32),
) -> Result<Option<LinuxSeccomp>, Error> {
    let (path, profile) = match &config.security.seccomp {
        _ if config.security.privileged => return Ok(None),
        config::Seccomp::Unconfined => return Ok(None),
        config::Seccomp::Default => (Path::new("default"), Profile::default_of_docker()),
        config::Seccomp::File(path) => {
            let bytes = read_bounded(path, seccomp::BYTES_MAX);
            let bytes = bytes.map_err(|source| Error::ReadProfile { path: path.clone(), source })?;
            (path.as_path(), Profile::parse(&bytes))
        }
    };
    let seccomp = profile.and_then(|profile| profile.apply(capabilities, kernel));
    seccomp.map(Some).map_err(|source| Error::Profile { path: path.into(), source })
}

fn read_bounded(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = vec![];
    std::fs::File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(std::io::Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Capabilities that this process can give away: those that it may have itself.
pub fn available_capabilities() -> CapabilitySet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let both = set("CapBnd:").unwrap_or(0) & set("CapPrm:").unwrap_or(0);
    CapabilitySet(both & CapabilitySet::all().0)
}

/// Version of this host's kernel.
pub fn kernel_version() -> (u32, u32) {
    version_of(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

#[cfg(test)]
mod tests;
