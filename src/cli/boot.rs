//! `rvmm --kernel … --rootfs …`: boot a VM on this terminal.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};

use super::logging::{LogFormat, LogLevel};
use super::outputs::{MetadataArguments, Outputs};
use super::restore;
use super::walls::Walls;
use crate::api::{self, Setup};
use crate::boot::BootProtocol;
use crate::sandbox::jail::Jail;
use crate::sandbox::keeper::Side;
use crate::vm::config::{self, Balloon, Cpu, Disk, Mmds, Net, SerialConfig, Share, Size, VmConfig, Vsock};
use crate::vm::{self, Timeline};

/// Shown after the long help.
pub const EXAMPLES: &str = "\
Examples:
  rvmm --rootfs disk.img
      boot the kernel that suits this host, with a shell on this terminal
  rvmm --kernel vmlinuz --initrd initrd.img --rootfs disk.img --cpus 2 --memory 1G
      boot a distribution's kernel
  rvmm --rootfs disk.img,readonly --cmdline 'rvmm.exec=\"uname -a\"'
      run a command in the demo root file system, and exit with its status
  rvmm --config vm.toml
      take everything from a file

Keys:
  Ctrl-A x  end the VM          Ctrl-A a  send Ctrl-A to the guest          Ctrl-A h  help

Exit codes:
  0      the guest powered off (or the status that it reported, 0 to 255)
  120    the guest's kernel panicked and said so through pvpanic
  121    the guest triple-faulted
  122    the guest reset the machine; a panic that only resets looks the same
  123    KVM or the host could not go on
  124    the sandbox ended the VM: the monitor made a system call that it may not
  125    rvmm failed before or beside the guest
  128+N  ended by signal N because the guest did not power off in time
  2      the command line is wrong";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Protocol {
    Auto,
    Linux64,
    Pvh,
}

/// How a timeline is printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TimelineFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The flags that describe and run a VM.
#[derive(Args)]
pub struct BootArguments {
    /// Guest kernel: an ELF vmlinux or a bzImage [default: the one that suits this host's KVM]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Disk image with the root file system; the guest's first disk
    ///
    /// PATH[,readonly][,id=ID][,queues=N][,io=auto|uring|sync][,cache=writeback|unsafe][,bw=SIZE][,bw-burst=SIZE]
    /// [,ops=N][,ops-burst=N], the last four being limits for a second
    #[arg(long, value_name = "PATH[,…]")]
    rootfs: Option<Disk>,
    /// A further disk, with the same options as --rootfs; may be repeated
    ///
    /// parts=LIST[,…] makes a read-only disk whose partitions are files: LIST is JSON, {"parts": [{"path": FILE, "name":
    /// NAME}, …]}
    #[arg(long, value_name = "PATH[,…]")]
    disk: Vec<Disk>,
    /// A network device on a tap, which is made if it does not exist; may be repeated
    ///
    /// tap=NAME[,mac=MAC][,queues=N][,netns=PATH][,bridge=NAME][,mtu=N][,vhost=auto|on|off][,id=ID] and, as limits for a second and each
    /// direction, [,bw=SIZE][,bw-burst=SIZE][,ops=N][,ops-burst=N]; rx-bw=… or tx-bw=… for one direction
    #[arg(long, value_name = "tap=NAME[,…]")]
    net: Vec<Net>,
    /// Share a folder with the guest: tag=NAME,path=DIR[,readonly][,devices][,cache=auto|always]; may be repeated.
    /// The guest mounts it with `mount -t virtiofs NAME DIRECTORY`
    #[arg(long, value_name = "tag=NAME,path=DIR[,…]")]
    share: Vec<Share>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line; what rvmm adds (console=, root=, …) is left out where this sets it
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Size of the guest's memory, with a unit: 512M, 2G [default: 256M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Note which pages of memory change, so that `rvmm snapshot --diff` saves no others
    #[arg(long)]
    track_dirty_pages: bool,
    /// Connections between guest and host (virtio-vsock), through a unix socket that rvmm makes
    ///
    /// cid=N,socket=PATH. A program on the host connects to PATH, sends "CONNECT PORT\n" and gets "OK HOSTPORT\n" when
    /// the guest has accepted. A guest that connects to port P of CID 2 reaches the listener at PATH_P.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    vsock: Option<Vsock>,
    /// Give the guest random numbers from the host (virtio-rng)
    #[arg(long)]
    rng: bool,
    /// A memory balloon, by which the guest gives memory back
    ///
    /// [size=SIZE][,deflate-on-oom][,free-page-reporting][,stats-interval=SECONDS]
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "")]
    balloon: Option<Balloon>,
    /// Control the VM through a unix socket at PATH, by HTTP
    #[arg(long, value_name = "PATH", visible_alias = "api-sock")]
    api_socket: Option<PathBuf>,
    /// The first serial port: stdio, file=PATH or none [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// A virtio console (hvc0): stdio, file=PATH or none; with stdio there is no serial port there [default: none]
    #[arg(long, value_name = "WHERE")]
    console: Option<SerialConfig>,
    /// How the kernel is entered [default: auto]
    #[arg(long, value_name = "PROTOCOL")]
    boot_protocol: Option<Protocol>,
    /// Do not help the guest over what this host's kind of KVM cannot do, or gets wrong
    #[arg(long)]
    no_host_quirks: bool,
    /// Seconds that the guest has to power off after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS")]
    shutdown_timeout: Option<u64>,
    /// Read the VM from a TOML or JSON file; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run without filters for system calls and with all privileges
    #[arg(long, visible_alias = "no-seccomp", conflicts_with = "jail")]
    no_sandbox: bool,
    /// Shut the running VM into a directory and a user of its own; takes root
    ///
    /// DIR[,uid=N][,gid=N][,netns=PATH][,cgroup=PATH]. Paths of kernel, disks and sockets are the host's; those that a
    /// client of the control socket names later lead into DIR.
    #[arg(long, value_name = "DIR[,…]")]
    jail: Option<Jail>,
    /// Print where the time of the boot went, to standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "table", require_equals = true)]
    timeline: Option<TimelineFormat>,
    /// How much to log
    #[arg(long, value_name = "LEVEL", default_value = "warn", visible_alias = "level", ignore_case = true)]
    log_level: LogLevel,
    /// What the log looks like
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// Log to a file instead of standard error
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// What the guest sees of the processor: host, baseline, or a file with a template [default: host]
    #[arg(long, value_name = "host|baseline|FILE")]
    cpu: Option<String>,
    /// Write metrics to a file as a page for Prometheus, every 10 seconds and at the end
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Append metrics to a file as lines of JSON, every minute and at the end
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// What the control socket calls the VM
    #[arg(long, value_name = "ID", default_value = "anonymous-instance")]
    id: String,
    /// Tell the guest metadata, by HTTP at 169.254.169.254 on the network of a device
    ///
    /// net=ID[,net=ID]…[,version=V1|V2][,address=ADDRESS][,imds-compat]
    #[arg(long, value_name = "net=ID[,…]")]
    mmds: Option<Mmds>,
    #[command(flatten)]
    metadata: MetadataArguments,
    /// Read the VM from Firecracker's configuration file
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    config_file: Option<PathBuf>,
    /// Make no control socket
    #[arg(long, conflicts_with = "api_socket")]
    no_api: bool,
    /// As --timeline; the guest's boot is timed by its own marks
    #[arg(long)]
    boot_timer: bool,
    // What Firecracker's jailer and clients pass, and nothing here needs.
    #[arg(long, hide = true)]
    start_time_us: Option<u64>,
    #[arg(long, hide = true)]
    start_time_cpu_us: Option<u64>,
    #[arg(long, hide = true)]
    parent_cpu_time_us: Option<u64>,
    #[arg(long, hide = true)]
    show_level: bool,
    #[arg(long, hide = true)]
    show_log_origin: bool,
    #[arg(long, hide = true)]
    module: Option<String>,
    #[arg(long, hide = true)]
    http_api_max_payload_size: Option<usize>,
}

impl BootArguments {
    /// What file and flags make together.
    fn setup(&self) -> anyhow::Result<Setup> {
        let mut setup = match &self.config_file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the configuration {path:?}"))?;
                Setup::read(&text).map_err(|why| anyhow!("the configuration {path:?} is wrong: {why}"))?
            }
            None => Setup::default(),
        };
        setup.config = self.configuration(std::mem::take(&mut setup.config))?;
        setup.metadata = Arc::new(self.metadata.read()?);
        Ok(setup)
    }

    fn outputs(&self) -> Outputs<'_> {
        Outputs {
            level: self.log_level,
            format: self.log_format,
            log: self.log_path.as_deref(),
            metrics: self.metrics_path.as_deref(),
        }
    }

    fn walls(&self) -> Walls<'_> {
        Walls {
            no_sandbox: self.no_sandbox,
            jail: self.jail.as_ref(),
            api_socket: self.api_socket.as_deref(),
            metrics: self.metrics.as_deref(),
        }
    }

    /// Whether a VM is described at all. Without, clients of the control socket are to put it together.
    fn describes_a_vm(&self) -> bool {
        self.config.is_some()
            || self.config_file.is_some()
            || self.kernel.is_some()
            || self.rootfs.is_some()
            || self.initrd.is_some()
            || !self.disk.is_empty()
    }

    /// Takes what a Firecracker without a socket's path takes.
    pub fn use_firecrackers_defaults(&mut self) {
        if self.api_socket.is_none() && !self.no_api {
            self.api_socket = Some("/run/firecracker.socket".into());
        }
    }

    /// The configuration that file and flags make together.
    fn configuration(&self, default: VmConfig) -> anyhow::Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => config::read_file(path)?,
            None => default,
        };
        if let Some(cpu) = &self.cpu {
            config.cpu = Cpu::read(cpu).map_err(|why| anyhow!(why))?;
        }
        config.kernel = self.kernel.clone().or(config.kernel);
        config.initrd = self.initrd.clone().or(config.initrd);
        config.cmdline = self.cmdline.clone().or(config.cmdline);
        config.rootfs = self.rootfs.clone().or(config.rootfs);
        config.disks.extend(self.disk.iter().cloned());
        config.nets.extend(self.net.iter().cloned());
        config.mmds = self.mmds.clone().or(config.mmds);
        config.shares.extend(self.share.iter().cloned());
        config.cpus = self.cpus.unwrap_or(config.cpus);
        config.memory = self.memory.unwrap_or(config.memory);
        config.track_dirty_pages |= self.track_dirty_pages;
        config.vsock = self.vsock.clone().or(config.vsock);
        config.rng |= self.rng;
        config.balloon = self.balloon.clone().or(config.balloon);
        config.serial = self.serial.clone().unwrap_or(config.serial);
        config.console = self.console.clone().unwrap_or(config.console);
        config.host_quirks &= !self.no_host_quirks;
        config.shutdown_timeout = self.shutdown_timeout.unwrap_or(config.shutdown_timeout);
        if let Some(protocol) = self.boot_protocol {
            config.boot_protocol = match protocol {
                Protocol::Auto => BootProtocol::Auto,
                Protocol::Linux64 => BootProtocol::Linux64,
                Protocol::Pvh => BootProtocol::Pvh,
            };
        }
        Ok(config)
    }
}

/// A VM that is built, and the client that waits for its start.
pub(super) struct Built {
    pub(super) vm: vm::Vm,
    pub(super) config: VmConfig,
    pub(super) start: Option<(api::Waiting, api::Start)>,
}

/// Has clients put a VM together, or name a snapshot, until one can be built; `None` when a signal ends the wait.
fn build_with_clients(
    arguments: &BootArguments,
    mut waiting: api::Waiting,
    timeline: &mut Timeline,
) -> anyhow::Result<Option<Built>> {
    let mut has_log = false;
    while let Some(mut start) = waiting.wait()? {
        let setup = start.take_setup();
        let load = start.load.take();
        let mut attempt = || -> anyhow::Result<(vm::Vm, VmConfig)> {
            if !std::mem::replace(&mut has_log, true) {
                arguments.outputs().start_log(&setup)?;
            }
            arguments.outputs().open_metrics(&setup)?;
            timeline.mark("configured");
            match &load {
                Some(load) => restore::restore(load, &setup.metadata, timeline),
                None => Ok((vm::build(&setup.config, &setup.metadata, timeline)?, setup.config.clone())),
            }
        };
        match attempt() {
            Ok((mut vm, config)) => {
                if setup.metrics.is_some() {
                    vm.write_metrics(arguments.metrics.clone());
                }
                return Ok(Some(Built { vm, config, start: Some((waiting, start)) }));
            }
            Err(error) => start.refuse(format!("{error:#}")),
        }
    }
    Ok(None)
}

/// Boots a VM and runs it to its end.
pub fn run(arguments: BootArguments, mut timeline: Timeline) -> anyhow::Result<ExitCode> {
    let setup = arguments.setup()?;
    let waits = arguments.api_socket.is_some() && !arguments.describes_a_vm();
    if !waits {
        arguments.outputs().start_log(&setup)?;
        arguments.outputs().open_metrics(&setup)?;
    }
    // First of all, while little is open.
    let plan = arguments.walls();
    let keeper = match plan.start_keeper(setup.config.vsock.is_some())? {
        Some(Side::Keeper(code)) => return Ok(code),
        Some(Side::Monitor(keeper)) => Some(keeper),
        None => None,
    };
    // Before the VM is built, since a socket that is in use ends it all.
    let mut socket = arguments.api_socket.as_deref().map(api::Socket::bind).transpose()?;
    let waiting = match socket.take_if(|_| waits) {
        Some(socket) => Some(socket.wait(arguments.id.clone(), setup.clone())?),
        None => None,
    };
    let Built { mut vm, config, start } = match waiting {
        Some(waiting) => match build_with_clients(&arguments, waiting, &mut timeline)? {
            Some(built) => built,
            None => return Ok(ExitCode::SUCCESS),
        },
        None => {
            setup.check().map_err(|why| anyhow!(why))?;
            timeline.mark("configured");
            let mut vm = vm::build(&setup.config, &setup.metadata, &mut timeline)?;
            if setup.metrics.is_some() {
                vm.write_metrics(None);
            }
            Built { vm, config: setup.config, start: None }
        }
    };
    if arguments.metrics.is_some() || arguments.metrics_path.is_some() {
        vm.write_metrics(arguments.metrics.clone());
    }
    plan.put_up(&config, keeper, &mut vm, &mut timeline)?;
    let _api = match (start, socket) {
        (Some((waiting, start)), _) => Some(waiting.serve(start, vm.control())?),
        (None, Some(socket)) => Some(api::serve(socket, arguments.id.clone(), vm.control(), setup.metadata)?),
        (None, None) => None,
    };
    let ended = vm::run(vm, &mut timeline)?;
    let format = arguments.timeline.or(arguments.boot_timer.then_some(TimelineFormat::Table));
    finish(&ended, &timeline, format)
}

/// Tells how a VM ended.
pub(super) fn finish(
    ended: &vm::Ended,
    timeline: &Timeline,
    format: Option<TimelineFormat>,
) -> anyhow::Result<ExitCode> {
    if ended.end == vm::End::Quit {
        // The guest's cursor is anywhere in a line.
        eprintln!();
    }
    match format {
        Some(TimelineFormat::Table) => eprint!("{}", timeline.table()),
        Some(TimelineFormat::Json) => eprintln!("{}", serde_json::to_string(timeline)?),
        None => {}
    }
    match &ended.end {
        vm::End::Stuck(_) => eprintln!("rvmm: {ended}"),
        vm::End::PowerOff | vm::End::Quit => tracing::info!("{ended}"),
        _ => tracing::warn!("{ended}"),
    }
    Ok(ExitCode::from(ended.exit_code()))
}
