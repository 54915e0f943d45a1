//! Reading a snapshot, and what of it is another on this host.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::Cap;
use vm_memory::{Bytes, GuestAddress};

use super::super::Machine;
use super::super::config::{DiskPart, SerialConfig, Size, VmConfig};
use super::error::{FormatError, LoadError};
use super::files;
use super::format;
use super::layers::{self, Layer};
use super::state::MachineState;
use crate::disk::Image;
use crate::kvm::features::Features;
use crate::kvm::kind::Kind;
use crate::kvm::{self, Kvm, Vcpu};
use crate::legacy::{GuestRequest, GuestRequests};
use crate::memory::{Ram, dirty};
use crate::platform::VMGENID_GSI;
use crate::snapshot_files::Place;
use crate::virtio::block::BlockState;
use crate::virtio::mmio::Transport;
use crate::virtio::state::DeviceState;

/// What a restored VM has other than it had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Images of disks.
    pub disks: Vec<DiskOverride>,
    /// Taps.
    pub nets: Vec<NetOverride>,
    /// Folders that are shared. Each that the VM had must be here: a snapshot does not choose what of its host a guest sees.
    pub shares: Vec<ShareOverride>,
    /// The socket of the vsock device.
    pub vsock: Option<PathBuf>,
    /// Where the serial port leads.
    pub serial: Option<SerialConfig>,
    /// Where the virtio console leads, if there is one.
    pub console: Option<SerialConfig>,
    /// The balloon's size.
    pub balloon: Option<Size>,
    /// Whether it is noted which pages change, for differential snapshots.
    pub track_dirty_pages: bool,
}

impl Overrides {
    /// These, and where they say nothing, those.
    pub fn or(mut self, other: &Overrides) -> Overrides {
        let more = other.disks.iter().filter(|disk| self.disks.iter().all(|own| own.id != disk.id)).cloned();
        let disks: Vec<_> = more.collect();
        self.disks.extend(disks);
        let more = other.nets.iter().filter(|net| self.nets.iter().all(|own| own.id != net.id)).cloned();
        let nets: Vec<_> = more.collect();
        self.nets.extend(nets);
        let more = other.shares.iter().filter(|share| self.shares.iter().all(|own| own.tag != share.tag));
        let shares: Vec<_> = more.cloned().collect();
        self.shares.extend(shares);
        Overrides {
            vsock: self.vsock.or_else(|| other.vsock.clone()),
            serial: self.serial.or_else(|| other.serial.clone()),
            console: self.console.or_else(|| other.console.clone()),
            balloon: self.balloon.or(other.balloon),
            track_dirty_pages: self.track_dirty_pages || other.track_dirty_pages,
            ..self
        }
    }
}

/// Another image for a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskOverride {
    /// The disk.
    pub id: String,
    /// Its image, or nothing if it has parts.
    pub path: PathBuf,
    /// Files that are its partitions.
    pub parts: Vec<DiskPart>,
    /// A file with a list of them.
    pub parts_file: Option<PathBuf>,
}

/// Another tap for a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetOverride {
    /// The device.
    pub id: String,
    /// The tap.
    pub tap: String,
    /// The network namespace that it is in; `None` for this one.
    pub netns: Option<PathBuf>,
    /// A bridge that it joins.
    pub bridge: Option<String>,
}

/// The folder that is shared under a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShareOverride {
    /// What the guest calls it.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
}

/// A snapshot that was read and is whole. Nothing of it runs yet.
pub struct Snapshot {
    pub(in crate::vm) state: MachineState,
    config: VmConfig,
    /// What its memory consists of, each over the one before, and the files.
    layers: Vec<Layer>,
    files: Vec<File>,
    /// Disks that were given another image, whose size may be another one too.
    replaced: Vec<String>,
}

impl Snapshot {
    /// Reads the snapshot at `place`.
    pub fn open(place: &Place) -> Result<Snapshot, LoadError> {
        let parse = |bytes: &[u8]| {
            let wrong = |source| match source {
                FormatError::Magic => LoadError::Foreign(place.state.clone()),
                source => LoadError::State { path: place.state.clone(), source },
            };
            let state = format::decode(bytes).map_err(wrong)?;
            let mut config = state.configuration().map_err(wrong)?;
            // Whoever restores it says so.
            config.track_dirty_pages = false;
            let name = state.memory.name.clone();
            Ok(((state, config), name))
        };
        let ((state, config), path, file) = files::open(place, parse)?;
        let mut layers = Vec::new();
        let mut files = Vec::new();
        for base in &state.memory.bases {
            let layer = layers::found(base, place);
            files.push(files::open_memory(&layer.path)?);
            layers.push(layer);
        }
        layers.push(Layer { id: state.memory.id, path });
        files.push(file);
        layers::check(&layers, &files, state.memory.size_bytes)?;
        tracing::debug!("snapshot by rvmm {} at {} ns", state.made_by, state.made_at_ns);
        Ok(Snapshot { state, config, layers, files, replaced: Vec::new() })
    }

    /// The configuration that the restored VM has.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Puts this host's files and interfaces in the place of those that the VM had.
    pub fn replace(&mut self, overrides: &Overrides) -> Result<(), LoadError> {
        self.config.track_dirty_pages |= overrides.track_dirty_pages;
        let list = |ids: &[String]| if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
        for wanted in &overrides.disks {
            let ids: Vec<String> = self
                .config
                .all_disks()
                .enumerate()
                .map(|(index, disk)| VmConfig::disk_id(index, disk))
                .collect();
            let index = ids.iter().position(|id| *id == wanted.id);
            let disk = index.and_then(|index| self.config.all_disks_mut().nth(index));
            let disk = disk.ok_or_else(|| LoadError::NoSuchDevice {
                what: "disk",
                id: wanted.id.clone(),
                has: list(&ids),
            })?;
            disk.set_path(wanted.path.clone());
            disk.may_be_empty = false;
            (disk.parts, disk.parts_file) = (wanted.parts.clone(), wanted.parts_file.clone());
            // Its own id may have come from its place, and stays.
            self.replaced.push(wanted.id.clone());
        }
        for wanted in &overrides.nets {
            let ids: Vec<String> =
                self.config.nets.iter().enumerate().map(|(index, net)| net.id(index)).collect();
            let index = ids.iter().position(|id| *id == wanted.id);
            let net = index.and_then(|index| self.config.nets.get_mut(index));
            let net = net.ok_or_else(|| LoadError::NoSuchDevice {
                what: "network interface",
                id: wanted.id.clone(),
                has: list(&ids),
            })?;
            net.tap = wanted.tap.clone();
            (net.netns, net.bridge) = (wanted.netns.clone(), wanted.bridge.clone());
        }
        self.replace_shares(&overrides.shares)?;
        if let Some(socket) = &overrides.vsock {
            let none = || LoadError::NoSuchDevice { what: "device", id: "vsock".into(), has: "none".into() };
            self.config.vsock.as_mut().ok_or_else(none)?.socket = socket.clone();
        }
        if let Some(size) = overrides.balloon {
            let none =
                || LoadError::NoSuchDevice { what: "device", id: "balloon".into(), has: "none".into() };
            self.config.balloon.as_mut().ok_or_else(none)?.size = size;
        }
        if let Some(serial) = &overrides.serial {
            self.config.serial = serial.clone();
        }
        if let Some(console) = &overrides.console {
            if (self.config.console == SerialConfig::None) != (*console == SerialConfig::None) {
                let has = if self.config.console == SerialConfig::None { "none" } else { "one" };
                return Err(LoadError::NoSuchDevice {
                    what: "device",
                    id: format!("console={console}"),
                    has: has.into(),
                });
            }
            self.config.console = console.clone();
        }
        Ok(())
    }

    fn replace_shares(&mut self, wanted: &[ShareOverride]) -> Result<(), LoadError> {
        let tags: Vec<_> = self.config.shares.iter().map(|share| share.tag.clone()).collect();
        if let Some(unknown) = wanted.iter().find(|wanted| !tags.contains(&wanted.tag)) {
            let has = if tags.is_empty() { "none".to_owned() } else { tags.join(", ") };
            return Err(LoadError::NoSuchDevice { what: "shared folder", id: unknown.tag.clone(), has });
        }
        for share in &mut self.config.shares {
            let named = wanted.iter().find(|wanted| wanted.tag == share.tag);
            share.path = named.ok_or_else(|| LoadError::Share(share.tag.clone()))?.path.clone();
        }
        Ok(())
    }

    /// Checks that this host's KVM and processor can go on with it.
    pub(in crate::vm) fn check_host(&self, kind: Kind, supported: &CpuId) -> Result<(), LoadError> {
        if is_pvm(kind) != is_pvm(self.state.kind)
            || (kind == Kind::Unknown) != (self.state.kind == Kind::Unknown)
        {
            return Err(LoadError::Kind { saved: self.state.kind, host: kind });
        }
        let host = Features::of_host(kind, supported.as_slice());
        host.check(&self.state.features).map_err(LoadError::Features)
    }

    /// Maps its memory.
    pub(in crate::vm) fn map_memory(&self) -> Result<Ram, LoadError> {
        layers::map(&self.layers, &self.files, self.state.memory.size_bytes)
    }

    /// What its memory consists of.
    pub(in crate::vm) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Checks that disks which were not given another image are as large as they were. `disks` are the first devices.
    pub(in crate::vm) fn check_disks<'a>(
        &self,
        disks: impl Iterator<Item = (&'a str, Arc<Image>)>,
    ) -> Result<(), LoadError> {
        for ((id, image), (saved, disk)) in disks.zip(self.state.devices.iter().zip(self.config.all_disks()))
        {
            let DeviceState::Block(BlockState { size_bytes, .. }) = saved.device else { continue };
            let found = image.size_bytes();
            if found != size_bytes && !self.replaced.iter().any(|replaced| replaced == id) {
                let path = disk.file().to_owned();
                return Err(LoadError::DiskSize { id: id.to_owned(), path, saved: size_bytes, found });
            }
        }
        Ok(())
    }

    /// Puts a device's state into its transport.
    pub(in crate::vm) fn restore_device(
        &self,
        index: usize,
        transport: &mut Transport,
    ) -> Result<(), LoadError> {
        let Some(state) = self.state.devices.get(index) else { return Ok(()) };
        transport.restore(state.clone()).map_err(|source| LoadError::Device { index, source })
    }

    /// Puts a vCPU's state into it.
    pub(in crate::vm) fn restore_vcpu(
        &self,
        vcpu: &mut Vcpu,
        kvm: &Kvm,
        vm: &kvm::Vm,
    ) -> Result<(), LoadError> {
        let index = vcpu.index();
        let Some(state) = self.state.vcpus.get(index as usize) else { return Ok(()) };
        let scales_tsc = kvm.fd().check_extension(Cap::TscControl);
        let set = vcpu.set_state(state, vm.xsave_bytes(), scales_tsc);
        set.map_err(|source| LoadError::Vcpu { index, source })?;
        vcpu.tell_paused();
        Ok(())
    }

    /// Puts the states of all other devices into place, when all vCPUs have theirs: interrupts that wait go to them.
    pub(in crate::vm) fn restore_machine(
        &self,
        machine: &Machine,
        requests: &GuestRequests,
        ram: &Ram,
    ) -> Result<(), LoadError> {
        let MachineState { chips, ports, generation_id_addr, .. } = &self.state;
        machine.kvm_vm.set_chip_state(chips).map_err(LoadError::Chips)?;
        machine.serial.restore(ports.serial.clone());
        machine.i8042.restore(ports.i8042.clone());
        machine.power.restore(ports.power);
        machine.guest_event.restore(ports.exit_status);
        if ports.panicked {
            requests.post(GuestRequest::Panicked);
        }
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| LoadError::Generation(std::io::Error::other(error)))?;
        // Where the state is wrong about the place there is no memory, or a guest that does not look there.
        dirty::mark(*generation_id_addr, id.len() as u64);
        if ram.write_slice(&id, GuestAddress(*generation_id_addr)).is_ok() {
            machine.kvm_vm.pulse(VMGENID_GSI).map_err(LoadError::Chips)?;
        }
        Ok(())
    }
}

fn is_pvm(kind: Kind) -> bool {
    kind == Kind::Pvm
}
