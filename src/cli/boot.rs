//! `rvmm --kernel … --rootfs …`: boot a VM on this terminal.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::logging::{self, LogLevel};
use crate::api;
use crate::boot::BootProtocol;
use crate::vm::config::{self, Balloon, Disk, Net, SerialConfig, Share, Size, VmConfig, Vsock};
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
    /// Print where the time of the boot went, to standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "table", require_equals = true)]
    timeline: Option<TimelineFormat>,
    /// How much to log to standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,
}

impl BootArguments {
    /// The configuration that file and flags make together.
    fn configuration(&self) -> anyhow::Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => config::read_file(path)?,
            None => VmConfig::default(),
        };
        config.kernel = self.kernel.clone().or(config.kernel);
        config.initrd = self.initrd.clone().or(config.initrd);
        config.cmdline = self.cmdline.clone().or(config.cmdline);
        config.rootfs = self.rootfs.clone().or(config.rootfs);
        config.disks.extend(self.disk.iter().cloned());
        config.nets.extend(self.net.iter().cloned());
        config.shares.extend(self.share.iter().cloned());
        config.cpus = self.cpus.unwrap_or(config.cpus);
        config.memory = self.memory.unwrap_or(config.memory);
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

/// Boots a VM and runs it to its end.
pub fn run(arguments: BootArguments, mut timeline: Timeline) -> anyhow::Result<ExitCode> {
    logging::start(arguments.log_level);
    let config = arguments.configuration()?;
    timeline.mark("configured");
    // Before the VM is built, since a socket that is in use ends it all.
    let socket = arguments.api_socket.as_deref().map(api::Socket::bind).transpose()?;
    let vm = vm::build(&config, &mut timeline)?;
    let _api = socket.map(|socket| api::serve(socket, vm.control())).transpose()?;
    let ended = vm::run(vm, &mut timeline)?;
    finish(&ended, &timeline, arguments.timeline)
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
