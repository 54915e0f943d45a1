//! From what the configuration says of devices to devices: opens their files.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::config::{self, VmConfig};
use crate::mmds::{Service, Stack, Store};
use crate::virtio::Device;
use crate::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions, PAGE_BYTES};
use crate::virtio::block::{Block, BlockHandle, BlockOptions};
use crate::virtio::fs::{Fs, FsOptions};
use crate::virtio::net::{Net, NetOptions, Vhost};
use crate::virtio::rate::LimitHandle;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::unix::UnixHost;
use crate::{disk, fileserver, socket, tap};

/// Queues of a disk that says nothing of them, at most.
const DEFAULT_DISK_QUEUES: u32 = 4;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk image.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A shared folder.
    #[error(transparent)]
    Share(#[from] fileserver::Error),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// The guest's address is the host's own.
    #[error("mac={mac} is the address of tap {tap} itself; give the guest another one")]
    SameMac {
        /// The address.
        mac: config::Mac,
        /// The tap.
        tap: String,
    },
    /// vhost-net was demanded and cannot be had.
    #[error(
        "cannot use /dev/vhost-net for tap {tap}; load its driver with `modprobe vhost_net`, or leave out vhost=on"
    )]
    Vhost {
        /// The tap.
        tap: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] getrandom::Error),
    /// The socket of the vsock device.
    #[error("cannot make the vsock device's socket")]
    Vsock(#[source] socket::Error),
}

/// What sees and changes devices while the VM runs.
#[derive(Default)]
pub(super) struct Handles {
    /// The disks, which are the first devices.
    pub(super) disks: Vec<DiskHandle>,
    /// The network devices.
    pub(super) nets: Vec<NetHandle>,
    /// The balloon, and its place among the devices.
    pub(super) balloon: Option<(usize, BalloonHandle)>,
    /// The processes behind shared folders, which get ready meanwhile and end with the VM.
    pub(super) file_servers: Vec<fileserver::Process>,
}

/// A disk while the VM runs.
pub(super) struct DiskHandle {
    pub(super) id: String,
    pub(super) handle: BlockHandle,
    pub(super) limits: LimitHandle,
}

/// A network device while the VM runs.
pub(super) struct NetHandle {
    pub(super) id: String,
    pub(super) receive_limits: LimitHandle,
    pub(super) transmit_limits: LimitHandle,
}

/// Opens all devices, in the order in which the guest finds them: disks first, so that their names stay.
pub(super) fn open(
    config: &VmConfig,
    metadata: &Arc<Store>,
) -> Result<(Vec<Box<dyn Device>>, Handles), Error> {
    let mut devices: Vec<Box<dyn Device>> = Vec::with_capacity(config.device_count());
    let mut handles = Handles::default();
    for (index, disk) in config.all_disks().enumerate() {
        let block = open_disk(config, index, disk)?;
        let (handle, limits) = (block.handle(), block.limit_handle());
        handles.disks.push(DiskHandle { id: VmConfig::disk_id(index, disk), handle, limits });
        devices.push(Box::new(block));
    }
    if let Some(vsock) = &config.vsock {
        raise_descriptor_limit();
        devices.push(Box::new(Vsock::new(vsock.cid, UnixHost::listen(&vsock.socket).map_err(Error::Vsock)?)));
    }
    if config.rng {
        devices.push(Box::new(Rng::new(config.rng_limits)));
    }
    if let Some(balloon) = &config.balloon {
        let (device, handle) = Balloon::new(&balloon_options(balloon));
        handles.balloon = Some((devices.len(), handle));
        devices.push(Box::new(device));
    }
    let service = match &config.mmds {
        Some(mmds) => {
            let service = Service::new(Arc::clone(metadata), mmds.version, mmds.imds_compat);
            Some((mmds, Arc::new(service.map_err(Error::Random)?)))
        }
        None => None,
    };
    for (index, net) in config.nets.iter().enumerate() {
        let service = service.as_ref().filter(|(mmds, _)| mmds.is_on(net, index));
        // What the host's kernel writes, nobody would know of, and what it reads the service would not see.
        let by_host = service.is_none() && !config.track_dirty_pages;
        let vhost = if by_host { open_vhost(net)? } else { None };
        let mut device = open_net(net, net.id(index), vhost)?;
        if let Some((mmds, service)) = service {
            device.serve_metadata(Stack::new(Arc::clone(service), mmds.address).map_err(Error::Random)?);
        }
        let (receive_limits, transmit_limits) = device.limit_handles();
        handles.nets.push(NetHandle { id: net.id(index), receive_limits, transmit_limits });
        devices.push(Box::new(device));
    }
    for share in &config.shares {
        let (process, device) = open_share(share)?;
        handles.file_servers.push(process);
        devices.push(Box::new(device));
    }
    Ok((devices, handles))
}

fn balloon_options(balloon: &config::Balloon) -> BalloonOptions {
    let interval = Duration::from_secs(balloon.stats_interval.into());
    BalloonOptions {
        target_pages: u32::try_from(balloon.size.bytes() / PAGE_BYTES).unwrap_or(u32::MAX),
        deflate_on_oom: balloon.deflate_on_oom,
        free_page_reporting: balloon.free_page_reporting,
        stats_interval: Some(interval).filter(|interval| !interval.is_zero()),
    }
}

fn open_disk(config: &VmConfig, index: usize, disk: &config::Disk) -> Result<Block, Error> {
    let (read_only, may_be_empty) = (disk.is_read_only(), disk.may_be_empty);
    let options = disk::Options { read_only, may_be_empty, cache: disk.cache, io: disk.io };
    let image = open_image(disk, &options)?;
    let queues = disk.queues.unwrap_or(config.cpus.min(DEFAULT_DISK_QUEUES) as u16);
    let serial = VmConfig::disk_id(index, disk);
    Ok(Block::new(image, &BlockOptions { serial, queues, limits: disk.limits, ..BlockOptions::default() }))
}

fn open_image(disk: &config::Disk, options: &disk::Options) -> Result<disk::Image, disk::Error> {
    let listed = disk.parts_file.as_deref().map(disk::PartList::read).transpose()?;
    let parts = listed.as_ref().map_or(&disk.parts, |list| &list.parts);
    if disk.parts_file.is_none() && parts.is_empty() {
        return disk::open(&disk.path, options);
    }
    // Each part has a descriptor.
    raise_descriptor_limit();
    disk::open_parts(parts, options)
}

fn open_net(net: &config::Net, id: String, vhost: Option<Vhost>) -> Result<Net, Error> {
    let tap = tap::open(&tap::Options {
        name: net.tap.clone(),
        netns: net.netns.clone(),
        queues: net.queues,
        mtu: net.mtu,
        bridge: net.bridge.clone(),
    })?;
    let mac = match net.mac {
        Some(mac) => mac,
        None => config::Mac::random().map_err(Error::Random)?,
    };
    if let Some(mtu) = net.mtu.filter(|mtu| *mtu != tap.mtu()) {
        let has = tap.mtu();
        tracing::warn!(
            "tap {} has an MTU of {has}, and the guest is told mtu={mtu}: larger packets are lost",
            net.tap
        );
    }
    if mac.0 == tap.mac() {
        return Err(Error::SameMac { mac, tap: net.tap.clone() });
    }
    let (receive_limits, transmit_limits) = (net.rx_limits, net.tx_limits);
    let options = NetOptions { id, mtu: net.mtu, receive_limits, transmit_limits, ..NetOptions::new(mac.0) };
    Ok(Net::new(tap, vhost, &options))
}

fn open_vhost(net: &config::Net) -> Result<Option<Vhost>, Error> {
    if net.vhost == config::VhostUse::Off {
        return Ok(None);
    }
    match (net.vhost, Vhost::open(net.queues.into())) {
        (_, Ok(vhost)) => Ok(Some(vhost)),
        (config::VhostUse::On, Err(source)) => Err(Error::Vhost { tap: net.tap.clone(), source }),
        (_, Err(error)) => {
            tracing::debug!(%error, "no vhost-net on this host, so rvmm moves the packets of tap {}", net.tap);
            Ok(None)
        }
    }
}

fn open_share(share: &config::Share) -> Result<(fileserver::Process, Fs), Error> {
    let (process, stream) = fileserver::start(&share.path, &share.options())?;
    let device = Fs::new(stream, &FsOptions { tag: share.tag.clone(), queues: 1 });
    Ok((process, device))
}

/// Each vsock connection has a descriptor, as each part of a composed disk has, and the usual soft limit is less than
/// there may be.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("cannot raise the limit of descriptors: {error}");
    }
}
