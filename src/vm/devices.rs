//! From what the configuration says of devices to devices: opens their files.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::config::{self, VmConfig};
use crate::disk;
use crate::fileserver;
use crate::socket;
use crate::virtio::Device;
use crate::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions, PAGE_BYTES};
use crate::virtio::block::{Block, BlockHandle, BlockOptions};
use crate::virtio::fs::{Fs, FsOptions};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::unix::UnixHost;

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
    /// The socket of the vsock device.
    #[error("cannot make the vsock device's socket")]
    Vsock(#[source] socket::Error),
}

/// What sees and changes devices while the VM runs.
#[derive(Default)]
pub(super) struct Handles {
    /// The disks, which are the first devices.
    pub(super) disks: Vec<DiskHandle>,
    /// The balloon, and its place among the devices.
    pub(super) balloon: Option<(usize, BalloonHandle)>,
    /// The processes behind shared folders, which get ready meanwhile and end with the VM.
    pub(super) file_servers: Vec<fileserver::Process>,
}

/// A disk while the VM runs.
pub(super) struct DiskHandle {
    pub(super) id: String,
    pub(super) handle: BlockHandle,
}

/// Opens all devices, in the order in which the guest finds them: disks first, so that their names stay.
pub(super) fn open(config: &VmConfig) -> Result<(Vec<Box<dyn Device>>, Handles), Error> {
    let mut devices: Vec<Box<dyn Device>> = Vec::with_capacity(config.device_count());
    let mut handles = Handles::default();
    for (index, disk) in config.all_disks().enumerate() {
        let block = open_disk(config, index, disk)?;
        handles.disks.push(DiskHandle { id: VmConfig::disk_id(index, disk), handle: block.handle() });
        devices.push(Box::new(block));
    }
    if let Some(vsock) = &config.vsock {
        raise_descriptor_limit();
        devices.push(Box::new(Vsock::new(vsock.cid, UnixHost::listen(&vsock.socket).map_err(Error::Vsock)?)));
    }
    if config.rng {
        devices.push(Box::<Rng>::default());
    }
    if let Some(balloon) = &config.balloon {
        let (device, handle) = Balloon::new(&balloon_options(balloon));
        handles.balloon = Some((devices.len(), handle));
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
    let options = disk::Options { read_only: disk.readonly, cache: disk.cache, io: disk.io };
    let image = disk::open(&disk.path, &options)?;
    let queues = disk.queues.unwrap_or(config.cpus.min(DEFAULT_DISK_QUEUES) as u16);
    let serial = VmConfig::disk_id(index, disk);
    Ok(Block::new(image, &BlockOptions { serial, queues, ..BlockOptions::default() }))
}

fn open_share(share: &config::Share) -> Result<(fileserver::Process, Fs), Error> {
    let (process, stream) = fileserver::start(&share.path, &share.options())?;
    let device = Fs::new(stream, &FsOptions { tag: share.tag.clone(), queues: 1 });
    Ok((process, device))
}

/// Each vsock connection has a descriptor, and the usual soft limit is less than there may be connections.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("cannot raise the limit of descriptors: {error}");
    }
}
