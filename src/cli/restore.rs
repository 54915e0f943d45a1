//! `rvmm restore`: let a VM go on that was saved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;

use super::boot::{Built, TimelineFormat, finish};
use super::logging::{LogFormat, LogLevel};
use super::outputs::{MetadataArguments, Outputs};
use super::walls::Walls;
use crate::api::{self, Setup};
use crate::mmds::Store;
use crate::sandbox::jail::Jail;
use crate::sandbox::keeper::{Keeper, Side};
use crate::vm::config::{SerialConfig, Size, VmConfig};
use crate::vm::control::Load;
use crate::vm::snapshot::{DiskOverride, NetOverride, Overrides, Place, ShareOverride, Snapshot};
use crate::vm::{self, Timeline, Vm};

/// Lets a VM go on that `rvmm snapshot` saved.
#[derive(Args, Debug)]
pub struct RestoreArguments {
    /// Directory with the snapshot; without it, one is waited for at the API socket (`PUT /snapshot/load`)
    #[arg(value_name = "DIR", required_unless_present = "api_socket")]
    directory: Option<PathBuf>,
    /// Another image for a disk, which may have another size; may be repeated
    ///
    /// ID=PATH, or ID=parts=LIST for a disk that is made of files
    #[arg(long, value_name = "ID=PATH")]
    disk: Vec<DiskOverride>,
    /// Another tap for a network device; may be repeated
    ///
    /// ID=TAP[,netns=PATH][,bridge=NAME]
    #[arg(long, value_name = "ID=TAP[,…]")]
    net: Vec<NetOverride>,
    /// The folder that is shared under a tag, for each that the VM had; may be repeated
    #[arg(long, value_name = "TAG=PATH")]
    share: Vec<ShareOverride>,
    /// Another path for the socket of the vsock device
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// Where the first serial port leads: stdio, file=PATH or none [default: as before]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// Where the virtio console leads, if there is one
    #[arg(long, value_name = "WHERE")]
    console: Option<SerialConfig>,
    /// How much memory the balloon asks the guest for
    #[arg(long, value_name = "SIZE")]
    balloon: Option<Size>,
    /// Note which pages of memory change, so that `rvmm snapshot --diff` saves no others
    #[arg(long)]
    track_dirty_pages: bool,
    /// Do not let the VM go on until it is told to, at the API socket
    #[arg(long, requires = "api_socket")]
    paused: bool,
    /// Control the VM through a unix socket at PATH, by HTTP
    #[arg(long, value_name = "PATH", visible_alias = "api-sock")]
    api_socket: Option<PathBuf>,
    /// Run without filters for system calls and with all privileges
    #[arg(long, visible_alias = "no-seccomp", conflicts_with = "jail")]
    no_sandbox: bool,
    /// Shut the running VM into a directory and a user of its own, as when it boots; takes root
    ///
    /// DIR[,uid=N][,gid=N][,netns=PATH][,cgroup=PATH]. Paths of snapshot, disks and sockets are the host's; those that a
    /// client of the control socket names later lead into DIR.
    #[arg(long, value_name = "DIR[,…]")]
    jail: Option<Jail>,
    /// What the control socket calls the VM
    #[arg(long, value_name = "ID", default_value = "anonymous-instance")]
    id: String,
    /// Print where the time of the restore went, to standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "table", require_equals = true)]
    timeline: Option<TimelineFormat>,
    #[command(flatten)]
    metadata: MetadataArguments,
    /// How much to log to standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,
}

impl RestoreArguments {
    fn overrides(&self) -> Overrides {
        Overrides {
            disks: self.disk.clone(),
            nets: self.net.clone(),
            shares: self.share.clone(),
            vsock: self.vsock.clone(),
            serial: self.serial.clone(),
            console: self.console.clone(),
            balloon: self.balloon,
            track_dirty_pages: self.track_dirty_pages,
        }
    }
}

impl FromStr for DiskOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskOverride, String> {
        let (id, place) = text
            .split_once('=')
            .filter(|(id, place)| !id.is_empty() && !place.is_empty())
            .ok_or_else(|| format!("{text:?}: another image for a disk is ID=PATH"))?;
        let id = id.to_owned();
        Ok(match place.strip_prefix("parts=") {
            Some("") => return Err("the path of the list of disk parts is missing".into()),
            Some(list) => DiskOverride { id, parts_file: Some(list.into()), ..DiskOverride::default() },
            None => DiskOverride { id, path: place.into(), ..DiskOverride::default() },
        })
    }
}

impl FromStr for ShareOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<ShareOverride, String> {
        let (tag, path) = text
            .split_once('=')
            .filter(|(tag, path)| !tag.is_empty() && !path.is_empty())
            .ok_or_else(|| format!("{text:?}: a shared folder is TAG=PATH"))?;
        Ok(ShareOverride { tag: tag.to_owned(), path: path.into() })
    }
}

impl FromStr for NetOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<NetOverride, String> {
        let mut parts = text.split(',');
        let (id, tap) = parts
            .next()
            .and_then(|first| first.split_once('='))
            .filter(|(id, tap)| !id.is_empty() && !tap.is_empty())
            .ok_or_else(|| format!("{text:?}: another tap is ID=TAP[,netns=PATH][,bridge=NAME]"))?;
        let mut net = NetOverride { id: id.to_owned(), tap: tap.to_owned(), ..NetOverride::default() };
        for part in parts {
            match part.split_once('=') {
                Some(("netns", path)) if !path.is_empty() => net.netns = Some(path.into()),
                Some(("bridge", name)) if !name.is_empty() => net.bridge = Some(name.to_owned()),
                _ => return Err(format!("unknown option {part:?}: there are netns=PATH and bridge=NAME")),
            }
        }
        Ok(net)
    }
}

/// Restores a VM and runs it to its end.
pub fn run(arguments: &RestoreArguments, mut timeline: Timeline) -> anyhow::Result<ExitCode> {
    let outputs = Outputs { level: arguments.log_level, format: LogFormat::Text, log: None, metrics: None };
    let mut setup = Setup::default();
    setup.metadata = Arc::new(arguments.metadata.read()?);
    let metadata = Arc::clone(&setup.metadata);
    if arguments.directory.is_some() {
        outputs.start_log(&setup)?;
    }
    let walls = Walls {
        no_sandbox: arguments.no_sandbox,
        jail: arguments.jail.as_ref(),
        api_socket: arguments.api_socket.as_deref(),
        metrics: None,
    };
    // Without clients and a jail, the snapshot says whether there is a socket to keep.
    let mut opened = match (&arguments.directory, &arguments.api_socket, &arguments.jail) {
        (Some(directory), None, None) => Some(Snapshot::open(&Place::directory(directory))?),
        _ => None,
    };
    let has_vsock = opened.as_ref().is_some_and(|snapshot| snapshot.config().vsock.is_some());
    if has_vsock {
        // The keeper needs no guest's memory.
        opened = None;
    }
    // First of all, while little is open.
    let keeper = match walls.start_keeper(has_vsock)? {
        Some(Side::Keeper(code)) => return Ok(code),
        Some(Side::Monitor(keeper)) => Some(keeper),
        None => None,
    };
    timeline.mark("configured");
    let socket = arguments.api_socket.as_deref().map(api::Socket::bind).transpose()?;
    let overrides = arguments.overrides();
    let (built, socket) = match (&arguments.directory, socket) {
        (Some(directory), socket) => {
            let place = Place::directory(directory);
            let load = Load { place, overrides, resume: !arguments.paused };
            let snapshot = opened.map_or_else(|| Snapshot::open(&load.place), Ok)?;
            let (vm, config) = restore_opened(snapshot, &load, &metadata, keeper.as_ref(), &mut timeline)?;
            (Built { vm, config, start: None }, socket)
        }
        (None, Some(socket)) => {
            let waiting = socket.wait(arguments.id.clone(), setup)?;
            match restore_with_clients(waiting, &outputs, &overrides, keeper.as_ref(), &mut timeline)? {
                Some(built) => (built, None),
                None => return Ok(ExitCode::SUCCESS),
            }
        }
        (None, None) => anyhow::bail!("there is no snapshot to restore: name its directory"),
    };
    let Built { mut vm, config, start } = built;
    walls.put_up(&config, keeper, &mut vm, &mut timeline)?;
    let _api = match (start, socket) {
        (Some((waiting, start)), _) => Some(waiting.serve(start, vm.control())?),
        (None, Some(socket)) => Some(api::serve(socket, arguments.id.clone(), vm.control(), metadata)?),
        (None, None) => None,
    };
    let ended = vm::run(vm, &mut timeline)?;
    finish(&ended, &timeline, arguments.timeline)
}

/// Builds the VM that a snapshot is of.
pub(super) fn restore(
    load: &Load,
    metadata: &Arc<Store>,
    timeline: &mut Timeline,
) -> anyhow::Result<(Vm, VmConfig)> {
    restore_opened(Snapshot::open(&load.place)?, load, metadata, None, timeline)
}

fn restore_opened(
    mut snapshot: Snapshot,
    load: &Load,
    metadata: &Arc<Store>,
    keeper: Option<&Keeper>,
    timeline: &mut Timeline,
) -> anyhow::Result<(Vm, VmConfig)> {
    snapshot.replace(&load.overrides)?;
    if let (Some(keeper), Some(vsock)) = (keeper, &snapshot.config().vsock)
        && let Err(error) = keeper.expect(&vsock.socket)
    {
        tracing::debug!(%error, "a kill from here on may leave {:?}", vsock.socket);
    }
    timeline.mark("snapshot read");
    let mut vm = vm::restore(&snapshot, metadata, timeline)?;
    if !load.resume {
        vm.start_paused();
    }
    Ok((vm, snapshot.config().clone()))
}

/// Waits until a client has a snapshot loaded, and it could be; `None` when a signal ends the wait.
fn restore_with_clients(
    mut waiting: api::Waiting,
    outputs: &Outputs<'_>,
    overrides: &Overrides,
    keeper: Option<&Keeper>,
    timeline: &mut Timeline,
) -> anyhow::Result<Option<Built>> {
    let mut has_log = false;
    while let Some(mut start) = waiting.wait()? {
        let setup = start.take_setup();
        let Some(mut load) = start.load.take() else {
            start.refuse("this rvmm waits for a snapshot to load".into());
            continue;
        };
        load.overrides = load.overrides.or(overrides);
        timeline.mark("load asked for");
        let mut attempt = || -> anyhow::Result<(Vm, VmConfig)> {
            if !std::mem::replace(&mut has_log, true) {
                outputs.start_log(&setup)?;
            }
            outputs.open_metrics(&setup)?;
            let snapshot = Snapshot::open(&load.place)?;
            let (mut vm, config) = restore_opened(snapshot, &load, &setup.metadata, keeper, timeline)?;
            if setup.metrics.is_some() {
                vm.write_metrics(None);
            }
            Ok((vm, config))
        };
        match attempt() {
            Ok((vm, config)) => return Ok(Some(Built { vm, config, start: Some((waiting, start)) })),
            Err(error) => start.refuse(format!("cannot load the snapshot: {error:#}")),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_read() {
        let disk: DiskOverride = "disk0=/a=b".parse().unwrap();
        assert_eq!((disk.id.as_str(), disk.path), ("disk0", PathBuf::from("/a=b")));
        let parts: DiskOverride = "layers=parts=/x.json".parse().unwrap();
        assert_eq!(parts.parts_file, Some("/x.json".into()));
        let net: NetOverride = "net0=tap3,netns=/run/netns/a,bridge=br0".parse().unwrap();
        assert_eq!((net.id.as_str(), net.tap.as_str()), ("net0", "tap3"));
        assert_eq!((net.netns, net.bridge.as_deref()), (Some("/run/netns/a".into()), Some("br0")));
        let share: ShareOverride = "files=/a=b".parse().unwrap();
        assert_eq!((share.tag.as_str(), share.path), ("files", PathBuf::from("/a=b")));
        for text in ["", "x", "=x", "x="] {
            assert!(text.parse::<ShareOverride>().is_err(), "{text}");
        }
        for text in ["", "x", "=x", "x=", "a=parts="] {
            assert!(text.parse::<DiskOverride>().is_err(), "{text}");
        }
        for text in ["", "net0", "net0=", "net0=t,x", "net0=t,netns="] {
            assert!(text.parse::<NetOverride>().is_err(), "{text}");
        }
    }
}
