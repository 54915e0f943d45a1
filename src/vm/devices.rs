//! From what the configuration says of devices to devices: opens their files.

use super::config::{self, VmConfig};
use crate::disk;
use crate::virtio::Device;
use crate::virtio::block::{Block, BlockOptions};
use crate::virtio::rng::Rng;

/// Queues of a disk that says nothing of them, at most.
const DEFAULT_DISK_QUEUES: u32 = 4;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk image.
    #[error(transparent)]
    Disk(#[from] disk::Error),
}

/// Opens all devices, in the order in which the guest finds them: disks first, so that their names stay.
pub(super) fn open(config: &VmConfig) -> Result<Vec<Box<dyn Device>>, Error> {
    let mut devices: Vec<Box<dyn Device>> = Vec::with_capacity(config.device_count());
    for (index, disk) in config.all_disks().enumerate() {
        devices.push(Box::new(open_disk(config, index, disk)?));
    }
    if config.rng {
        devices.push(Box::<Rng>::default());
    }
    Ok(devices)
}

fn open_disk(config: &VmConfig, index: usize, disk: &config::Disk) -> Result<Block, Error> {
    let options = disk::Options { read_only: disk.readonly, cache: disk.cache, io: disk.io };
    let image = disk::open(&disk.path, &options)?;
    let queues = disk.queues.unwrap_or(config.cpus.min(DEFAULT_DISK_QUEUES) as u16);
    let serial = VmConfig::disk_id(index, disk);
    Ok(Block::new(image, &BlockOptions { serial, queues, ..BlockOptions::default() }))
}
