//! The flags of `run` and `create`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::values::{Bytes, Cpus, DeviceRate, EnvVariable, HealthDuration, Pair};
use crate::container::config::{Device, Isolation, Mount, Port, Restart, Rlimit, Secret, TemplateUse};

/// The wall, as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IsolationFlag {
    /// Namespaces and cgroups of the host's kernel
    Native,
    /// A virtual machine with a kernel of its own
    Microvm,
}

impl From<IsolationFlag> for Isolation {
    fn from(flag: IsolationFlag) -> Isolation {
        match flag {
            IsolationFlag::Native => Isolation::Native,
            IsolationFlag::Microvm => Isolation::Microvm,
        }
    }
}

/// Whether a microVM goes on from a template, as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TemplateFlag {
    /// If one can be had; one that is not there yet is made
    Auto,
    /// No: the guest boots
    Never,
    /// In any case; if that cannot be, the container does not start
    Require,
}

impl From<TemplateFlag> for TemplateUse {
    fn from(flag: TemplateFlag) -> TemplateUse {
        match flag {
            TemplateFlag::Auto => TemplateUse::Auto,
            TemplateFlag::Never => TemplateUse::Never,
            TemplateFlag::Require => TemplateUse::Require,
        }
    }
}

/// When an image is fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If it is not there
    #[default]
    Missing,
    /// In any case
    Always,
    /// Not at all
    Never,
}

/// What a container is made of.
#[derive(Args, Debug)]
pub struct ContainerOptions {
    /// The wall around the container
    #[arg(
        long,
        value_name = "WALL",
        default_value = "native",
        env = "RVMM_ISOLATION",
        help_heading = "Isolation"
    )]
    pub isolation: IsolationFlag,
    /// Start a microVM from a snapshot of a booted guest
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        env = "RVMM_TEMPLATE",
        help_heading = "Isolation"
    )]
    pub template: TemplateFlag,
    /// Give all capabilities and devices, and mask nothing
    #[arg(long, help_heading = "Isolation")]
    pub privileged: bool,
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAP", value_delimiter = ',', help_heading = "Isolation")]
    pub cap_add: Vec<String>,
    /// Take a capability, or ALL
    #[arg(long, value_name = "CAP", value_delimiter = ',', help_heading = "Isolation")]
    pub cap_drop: Vec<String>,
    /// seccomp=unconfined, seccomp=FILE, no-new-privileges, systempaths=unconfined
    #[arg(long, value_name = "OPTION", help_heading = "Isolation")]
    pub security_opt: Vec<String>,
    /// Make the root file system read-only
    #[arg(long, help_heading = "Isolation")]
    pub read_only: bool,
    /// A kernel parameter of the container's namespaces
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Isolation")]
    pub sysctl: Vec<Pair>,

    /// A name for the container
    #[arg(long)]
    pub name: Option<String>,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Start the container again when it ends: no, on-failure[:N], always, unless-stopped
    #[arg(long, value_name = "WHEN", value_parser = super::values::restart, default_value = "no")]
    pub restart: Restart,
    /// Fetch the image: missing, always, never
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub pull: Pull,
    /// A label
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Write the container's id into a file, which must not be there
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// The signal of `stop`
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// How many seconds `stop` waits before it kills
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout: Option<u64>,

    /// Keep standard input open
    #[arg(short, long, help_heading = "Process")]
    pub interactive: bool,
    /// Give the process a terminal
    #[arg(short, long, help_heading = "Process")]
    pub tty: bool,
    /// Set an environment variable; without a value, to the one that it has here
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Process")]
    pub env: Vec<EnvVariable>,
    /// Environment variables from a file, one a line
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub env_file: Vec<PathBuf>,
    /// The program instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM", help_heading = "Process")]
    pub entrypoint: Option<String>,
    /// The user: NAME[:GROUP] or numbers
    #[arg(short, long, help_heading = "Process")]
    pub user: Option<String>,
    /// A further group
    #[arg(long, value_name = "GROUP", help_heading = "Process")]
    pub group_add: Vec<String>,
    /// The working directory
    #[arg(short, long, value_name = "DIR", help_heading = "Process")]
    pub workdir: Option<String>,
    /// Run a small init as process 1, which passes signals on and reaps
    #[arg(long, help_heading = "Process")]
    pub init: bool,
    /// A resource limit: NAME=SOFT[:HARD]
    #[arg(long, value_name = "LIMIT", value_parser = super::values::rlimit, help_heading = "Process")]
    pub ulimit: Vec<Rlimit>,
    /// A file of the host as a secret: [id=NAME,]src=FILE[,uid=N][,gid=N][,mode=M], under /run/secrets
    #[arg(long, value_name = "SECRET", value_parser = super::values::secret, help_heading = "Process")]
    pub secret: Vec<Secret>,

    /// Memory: 64M, 2G
    #[arg(short, long, value_name = "SIZE", help_heading = "Limits")]
    pub memory: Option<Bytes>,
    /// Memory and swap together; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "Limits")]
    pub memory_swap: Option<Bytes>,
    /// Memory that is not taken away
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory_reservation: Option<Bytes>,
    /// Processors: 0.5, 2
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub cpus: Option<Cpus>,
    /// Relative weight of processor time
    #[arg(short, long, value_name = "N", help_heading = "Limits")]
    pub cpu_shares: Option<u64>,
    /// Which processors: 0-2,4
    #[arg(long, value_name = "LIST", help_heading = "Limits")]
    pub cpuset_cpus: Option<String>,
    /// Processes and threads; -1 for no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Limits")]
    pub pids_limit: Option<i64>,
    /// Relative weight of disk time, 10 to 1000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(10..=1000), help_heading = "Limits")]
    pub blkio_weight: Option<u16>,
    /// Bytes a second read from a device: DEVICE:SIZE
    #[arg(long, value_name = "RATE", help_heading = "Limits")]
    pub device_read_bps: Vec<DeviceRate>,
    /// Bytes a second written to a device
    #[arg(long, value_name = "RATE", help_heading = "Limits")]
    pub device_write_bps: Vec<DeviceRate>,
    /// Reads a second from a device
    #[arg(long, value_name = "RATE", help_heading = "Limits")]
    pub device_read_iops: Vec<DeviceRate>,
    /// Writes a second to a device
    #[arg(long, value_name = "RATE", help_heading = "Limits")]
    pub device_write_iops: Vec<DeviceRate>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub shm_size: Option<Bytes>,
    /// Size of the writable layer: size=SIZE
    #[arg(long, value_name = "OPTION", help_heading = "Limits")]
    pub storage_opt: Vec<Pair>,

    /// A bind mount or volume: [SOURCE:]TARGET[:ro]
    #[arg(short, long, value_name = "VOLUME", value_parser = super::values::volume, help_heading = "Files")]
    pub volume: Vec<Mount>,
    /// A mount: type=bind|volume|tmpfs,source=…,target=…[,readonly][,…]
    #[arg(long, value_name = "MOUNT", value_parser = super::values::mount, help_heading = "Files")]
    pub mount: Vec<Mount>,
    /// Memory as a file system: TARGET[:OPTIONS]
    #[arg(long, value_name = "TMPFS", value_parser = super::values::tmpfs, help_heading = "Files")]
    pub tmpfs: Vec<Mount>,
    /// A device of the host: HOST[:CONTAINER[:rwm]]
    #[arg(long, value_name = "DEVICE", value_parser = super::values::device, help_heading = "Files")]
    pub device: Vec<Device>,

    /// Networks: bridge, none, host, container:NAME, or a network's name; may be repeated
    #[arg(long, value_name = "NETWORK", visible_alias = "net", help_heading = "Network")]
    pub network: Vec<String>,
    /// A further name on the network
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub network_alias: Vec<String>,
    /// A fixed address on the network
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub ip: Option<std::net::Ipv4Addr>,
    /// A fixed hardware address
    #[arg(long, value_name = "MAC", help_heading = "Network")]
    pub mac_address: Option<String>,
    /// Publish a port: [[IP:]HOST:]CONTAINER[/tcp|udp|sctp], ranges too
    #[arg(short, long, value_name = "PORT", value_parser = super::values::ports, help_heading = "Network")]
    pub publish: Vec<super::values::Ports>,
    /// Publish all ports that the image exposes
    #[arg(short = 'P', long, help_heading = "Network")]
    pub publish_all: bool,
    /// A name server
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub dns: Vec<std::net::IpAddr>,
    /// A search domain
    #[arg(long, value_name = "DOMAIN", help_heading = "Network")]
    pub dns_search: Vec<String>,
    /// A resolver option
    #[arg(long, value_name = "OPTION", help_heading = "Network")]
    pub dns_option: Vec<String>,
    /// A line of /etc/hosts: NAME:ADDRESS
    #[arg(long, value_name = "LINE", value_parser = super::values::host, help_heading = "Network")]
    pub add_host: Vec<(String, String)>,
    /// The host name inside
    #[arg(short = 'h', long, value_name = "NAME", help_heading = "Network")]
    pub hostname: Option<String>,

    /// A command that finds out whether the container is healthy, run by a shell
    #[arg(long, value_name = "COMMAND", help_heading = "Health")]
    pub health_cmd: Option<String>,
    /// Between checks [default: 30s]
    #[arg(long, value_name = "TIME", help_heading = "Health")]
    pub health_interval: Option<HealthDuration>,
    /// For one check [default: 30s]
    #[arg(long, value_name = "TIME", help_heading = "Health")]
    pub health_timeout: Option<HealthDuration>,
    /// In which failures do not count [default: 0s]
    #[arg(long, value_name = "TIME", help_heading = "Health")]
    pub health_start_period: Option<HealthDuration>,
    /// Failures in a row that make it unhealthy [default: 3]
    #[arg(long, value_name = "N", help_heading = "Health")]
    pub health_retries: Option<u32>,
    /// Do not use the image's health check
    #[arg(long, help_heading = "Health")]
    pub no_healthcheck: bool,

    /// The image, and what is run instead of its command: all that comes after the image, also what looks like an option
    #[arg(trailing_var_arg = true, required = true, value_names = ["IMAGE", "COMMAND"])]
    pub image_and_command: Vec<String>,
}

impl ContainerOptions {
    /// The image.
    pub fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// What is run instead of the image's command, if there is anything.
    pub fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }

    /// All published ports, ranges taken apart.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.publish.iter().flat_map(|ports| &ports.0)
    }
}
