//! What of a device goes into a snapshot: plain data, apart from files, sockets and taps.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::block::BlockState;
use super::console::ConsoleState;
use super::fs::FsState;
use super::mmio::Registers;
use super::net::NetState;
use super::vsock::VsockState;

/// A device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// A network device.
    Net(NetState),
    /// A socket device.
    Vsock(VsockState),
    /// An entropy device, which remembers nothing.
    Rng,
    /// A balloon.
    Balloon(BalloonState),
    /// A console.
    Console(ConsoleState),
    /// A file system device that its guest has not mounted.
    Fs(FsState),
}

/// How far a queue has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Number of the next chain in the available ring.
    pub next_avail: u16,
    /// Number of the next element in the used ring.
    pub next_used: u16,
}

/// A device with its registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device number.
    pub(super) id: u32,
    pub(super) registers: Registers,
    pub(super) interrupt_status: u32,
    pub(super) device_status: u32,
    /// The configuration space as the driver saw it, and its generation.
    pub(super) config: Vec<u8>,
    pub(super) generation: u32,
    /// Where its worker stood in each queue that the driver had set up; `None` without a worker.
    pub(super) positions: Option<Vec<Option<QueuePosition>>>,
    /// The device's own.
    pub device: DeviceState,
}

/// Why a device cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its state is not all here.
    #[error("{} keep state outside of the monitor, so a VM with them cannot be saved", kind(*.0))]
    Unsupported(u32),
    /// Its worker is gone.
    #[error("virtio device {0} has failed")]
    Failed(u32),
    /// It does not rest.
    #[error("virtio device {0} is at work")]
    AtWork(u32),
}

fn kind(id: u32) -> String {
    match id {
        super::spec::fs::ID => "shared folders (virtio-fs) that were mounted".to_owned(),
        id => format!("virtio devices of kind {id}"),
    }
}

/// Why a state does not fit a device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is another kind of device's.
    #[error("the state is of virtio device {saved}, and the device is {device}")]
    Kind {
        /// In the state.
        saved: u32,
        /// Here.
        device: u32,
    },
    /// The driver uses what the device cannot do here.
    #[error("the driver of virtio device {id} uses features {missing:#x} that it does not have here{hint}")]
    Features {
        /// Device number.
        id: u32,
        /// The features' bits.
        missing: u64,
        /// What that may be due to.
        hint: &'static str,
    },
    /// It has other queues.
    #[error("virtio device {id} had {saved} queues and has {device} here")]
    Queues {
        /// Device number.
        id: u32,
        /// In the state.
        saved: usize,
        /// Here.
        device: usize,
    },
    /// The numbers contradict each other.
    #[error("the state of virtio device {0} makes no sense")]
    Nonsense(u32),
}
