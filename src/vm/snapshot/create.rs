//! Taking the state of a VM that rests.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::super::Machine;
use super::super::config::VmConfig;
use super::super::vcpu::VcpuShared;
use super::error::CreateError;
use super::format;
use super::layers::{self, Layer};
use super::state::{MachineState, MemoryPlace, PortState};
use crate::kvm::features::Features;
use crate::kvm::{StateError, VcpuState};
use crate::legacy::GuestRequest;
use crate::memory::changes::{self, Run};
use crate::memory::{self, Ram, file::Id};
use crate::sandbox::keeper::{Keeper, Saving};
use crate::snapshot_files::{Place, Writing};

/// What vCPUs are asked for while they rest.
#[derive(Default)]
pub struct Errand {
    wanted: Mutex<Option<Arc<Wanted>>>,
}

struct Wanted {
    msr_indices: Vec<u32>,
    xsave_bytes: usize,
    states: Mutex<Vec<(u32, Result<VcpuState, StateError>)>>,
}

impl Errand {
    /// Does the part of one vCPU, on its own thread.
    pub fn carry_out(&self, vcpu: &mut crate::kvm::Vcpu) {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(wanted) = wanted else { return };
        let state = vcpu.state(&wanted.msr_indices, wanted.xsave_bytes);
        wanted.states.lock().unwrap_or_else(PoisonError::into_inner).push((vcpu.index(), state));
    }
}

/// The VM that is saved.
pub struct Source<'a> {
    /// Its vCPUs and memory.
    pub shared: &'a VcpuShared,
    /// Its devices, which rest.
    pub machine: &'a Machine,
    /// Its configuration as it is now.
    pub config: &'a VmConfig,
    /// What makes files for it, if it may not.
    pub keeper: Option<&'a Arc<Keeper>>,
    /// What it may build upon, if only what has changed since is to be written.
    pub base: Option<&'a [Layer]>,
}

/// The new files.
enum Files {
    Own(Writing),
    Keepers(Saving),
}

impl Files {
    fn begin(keeper: Option<&Arc<Keeper>>, place: &Place, id: &Id) -> Result<Files, CreateError> {
        match keeper {
            Some(keeper) => keeper.begin_to_save(place, id).map(Files::Keepers).map_err(CreateError::Keeper),
            None => Ok(Files::Own(Writing::begin(place, id)?)),
        }
    }

    fn memory(&self) -> &File {
        match self {
            Files::Own(writing) => writing.memory(),
            Files::Keepers(saving) => saving.memory(),
        }
    }

    fn state(&self) -> &File {
        match self {
            Files::Own(writing) => writing.state(),
            Files::Keepers(saving) => saving.state(),
        }
    }

    fn finish(self, keep: Vec<String>) -> Result<(), CreateError> {
        match self {
            Files::Own(writing) => Ok(writing.finish_keeping(&keep)?),
            Files::Keepers(saving) => saving.finish(keep).map_err(CreateError::Keeper),
        }
    }
}

/// A snapshot that is written and not in its place yet. What is left does not need the VM.
pub struct Unfinished {
    files: Files,
    layers: Vec<Layer>,
    /// Files beside the state file that it needs.
    keep: Vec<String>,
}

impl Unfinished {
    /// Makes it durable, and puts it in its place. Tells what its memory consists of.
    pub fn finish(self) -> Result<Vec<Layer>, CreateError> {
        let start = Instant::now();
        self.files.finish(self.keep)?;
        tracing::debug!("snapshot durable within {:?}", start.elapsed());
        Ok(self.layers)
    }
}

/// Writes state and memory of a VM whose vCPUs and devices rest.
pub fn create(source: &Source<'_>, place: &Place) -> Result<Unfinished, CreateError> {
    let start = Instant::now();
    let Source { shared, machine, config, keeper, base } = source;
    // First what may be refused.
    let devices = machine.transports().map(|transport| transport.save()).collect::<Result<Vec<_>, _>>()?;
    let vcpus = vcpus(source)?;
    let chips = machine.kvm_vm.chip_state().map_err(CreateError::Chips)?;
    let ports = PortState {
        serial: machine.serial.save(),
        i8042: machine.i8042.save(),
        power: machine.power.save(),
        panicked: shared.requests.has(GuestRequest::Panicked),
        exit_status: machine.guest_event.exit_status(),
    };
    let taken = start.elapsed();

    let mut id = Id::default();
    getrandom::fill(&mut id).map_err(CreateError::Random)?;
    let files = Files::begin(*keeper, place, &id)?;
    // Asked for in any case, so that the next snapshot knows what has changed since this one.
    let tracked = config.track_dirty_pages.then(|| changed(machine, &shared.ram)).transpose()?;
    let base = base.filter(|base| layers::can_lie_under(base, place));
    let changes = base.and_then(|base| Some((base, tracked.or_else(|| changes::copied(&shared.ram))?)));
    let written = match &changes {
        Some((_, runs)) => changes::write(&shared.ram, files.memory(), &id, runs)?,
        None => memory::file::write(&shared.ram, files.memory(), &id)?,
    };
    if memory::guard::pages_were_lost() {
        return Err(CreateError::PagesLost);
    }
    let cpuid = vcpus.first().map(VcpuState::cpuid).unwrap_or_default();
    let features = Features::needed(machine.kind, cpuid);
    let below = changes.map_or(&[][..], |(base, _)| base);
    let memory = MemoryPlace {
        id,
        size_bytes: config.memory.bytes(),
        name: place.memory_name(&id),
        bases: layers::places(below, place),
    };
    let keep = layers::names_beside(below, place);
    let layers = below.iter().cloned().chain([Layer::new(id, place)]).collect();
    let state = MachineState::new(
        machine.kind,
        features,
        memory,
        config,
        machine.generation_id_addr,
        vcpus,
        chips,
        ports,
        devices,
    );
    let state = state.map_err(|error| CreateError::Encode(error.to_string()))?;
    let state = format::encode(&state).map_err(|error| CreateError::Encode(error.to_string()))?;
    files.state().write_all(&state).map_err(CreateError::State)?;
    tracing::debug!(
        "state of {} bytes taken within {taken:?}, {written} bytes of memory written within {:?}",
        state.len(),
        start.elapsed()
    );
    Ok(Unfinished { files, layers, keep })
}

/// The pages that the guest or its devices have written to since this was asked last.
fn changed(machine: &Machine, ram: &Ram) -> Result<Vec<Run>, CreateError> {
    let by_guest = machine.kvm_vm.take_dirty_pages().map_err(CreateError::Dirty)?;
    Ok(changes::union(ram, &by_guest, &memory::dirty::take()))
}

/// Has the vCPUs tell their states, in the order of their numbers.
fn vcpus(source: &Source<'_>) -> Result<Vec<VcpuState>, CreateError> {
    let Source { shared, machine, config, .. } = source;
    let wanted = Arc::new(Wanted {
        msr_indices: machine.msr_indices.clone(),
        xsave_bytes: machine.kvm_vm.xsave_bytes(),
        states: Mutex::default(),
    });
    let set = |wanted| *shared.errand.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
    set(Some(Arc::clone(&wanted)));
    let found = shared.gate.send_on_errand();
    set(None);
    let mut states = std::mem::take(&mut *wanted.states.lock().unwrap_or_else(PoisonError::into_inner));
    let expected = config.cpus as usize;
    if found != expected || states.len() != expected {
        return Err(CreateError::VcpusMissing { found, expected });
    }
    states.sort_by_key(|(index, _)| *index);
    let each =
        |(index, state): (u32, Result<_, _>)| state.map_err(|source| CreateError::Vcpu { index, source });
    states.into_iter().map(each).collect()
}
