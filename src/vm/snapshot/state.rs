//! What a state file holds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::super::config::VmConfig;
use super::error::FormatError;
use super::layers::LAYERS_MAX;
use crate::kvm::features::Features;
use crate::kvm::kind::Kind;
use crate::kvm::{ChipState, VcpuState};
use crate::legacy::{I8042State, SerialState};
use crate::memory::file::Id;
use crate::platform::VIRTIO_GSIS;
use crate::virtio::state::TransportState;

/// A whole machine, but for its memory.
#[derive(Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// The rvmm that made it, for people.
    pub(super) made_by: String,
    /// Nanoseconds since 1970 on the host's clock.
    pub(super) made_at_ns: u64,
    pub(super) kind: Kind,
    pub(super) features: Features,
    pub(super) memory: MemoryPlace,
    /// The configuration as JSON, which says by itself what a field is.
    pub(super) config: String,
    pub(in crate::vm) generation_id_addr: u64,
    pub(in crate::vm) vcpus: Vec<VcpuState>,
    pub(in crate::vm) chips: ChipState,
    pub(in crate::vm) ports: PortState,
    pub(in crate::vm) devices: Vec<TransportState>,
}

/// Where the memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemoryPlace {
    pub(super) id: Id,
    pub(super) size_bytes: u64,
    /// Name of the file beside the state file; `None` if whoever restores says where it is.
    pub(super) name: Option<String>,
    /// What the file lies over, if it has only what has changed: the first one has all memory.
    pub(super) bases: Vec<BasePlace>,
}

/// Memory of an earlier snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BasePlace {
    pub(super) id: Id,
    /// Name of a file beside the state file, or a path.
    pub(super) path: PathBuf,
}

/// Devices at I/O ports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(in crate::vm) struct PortState {
    pub(in crate::vm) serial: SerialState,
    pub(in crate::vm) i8042: I8042State,
    pub(in crate::vm) power: u8,
    pub(in crate::vm) panicked: bool,
    pub(in crate::vm) exit_status: Option<u8>,
}

impl MachineState {
    /// A state to be filled with the rest.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        kind: Kind,
        features: Features,
        memory: MemoryPlace,
        config: &VmConfig,
        generation_id_addr: u64,
        vcpus: Vec<VcpuState>,
        chips: ChipState,
        ports: PortState,
        devices: Vec<TransportState>,
    ) -> Result<MachineState, serde_json::Error> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(MachineState {
            made_by: env!("CARGO_PKG_VERSION").to_owned(),
            made_at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            kind,
            features,
            memory,
            config: serde_json::to_string(config)?,
            generation_id_addr,
            vcpus,
            chips,
            ports,
            devices,
        })
    }

    /// The devices' states, in the order of their places.
    pub fn devices(&self) -> &[TransportState] {
        &self.devices
    }

    /// The configuration that the VM had, if it agrees with the rest.
    pub fn configuration(&self) -> Result<VmConfig, FormatError> {
        let wrong = |why: &str| FormatError::Contents(why.to_owned());
        let config: VmConfig =
            serde_json::from_str(&self.config).map_err(|error| FormatError::Contents(error.to_string()))?;
        config.validate(u64::MAX).map_err(|error| FormatError::Contents(error.to_string()))?;
        if config.memory.bytes() != self.memory.size_bytes {
            return Err(wrong("two sizes of memory"));
        }
        if self.memory.bases.len() > LAYERS_MAX {
            return Err(wrong("too many differences between snapshots"));
        }
        if config.cpus as usize != self.vcpus.len() {
            return Err(wrong("vCPUs are missing"));
        }
        if config.device_count() != self.devices.len() || self.devices.len() > VIRTIO_GSIS.len() {
            return Err(wrong("devices are missing"));
        }
        Ok(config)
    }
}
