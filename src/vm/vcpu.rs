//! A vCPU's thread: run the guest, answer its exits, until the machine ends.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::pause::Gate;
use super::snapshot::Errand;
use crate::bus::Bus;
use crate::kvm::pvm::Emulator;
use crate::kvm::{Exit, Kick, Vcpu};
use crate::legacy::GuestRequests;
use crate::memory::{self, Ram};
use crate::{metrics, sandbox};

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The guest triple-faulted.
    #[error("the guest triple-faulted")]
    TripleFault,
    /// KVM failed, or asks for something that rvmm does not know.
    #[error("{0}")]
    Stuck(String),
}

/// A vCPU thread's stack. Decoding an instruction takes more than 128 KiB of it in a build without optimisation; pages
/// that are not touched cost nothing.
const STACK_BYTES: usize = 1 << 20;

/// How the guest asked KVM itself to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Again,
    Stop,
}

/// What all vCPU threads of a VM share.
pub struct VcpuShared {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Guest memory.
    pub ram: Ram,
    /// What the guest asks of the machine.
    pub requests: Arc<GuestRequests>,
    /// Set when all vCPUs are to stop.
    pub stop: AtomicBool,
    /// Where vCPUs rest while the VM is paused.
    pub gate: Gate,
    /// What they are asked for while they rest.
    pub errand: Errand,
    /// The first failure of a vCPU.
    pub failure: Mutex<Option<Failure>>,
    /// Signalled when a failure was left.
    pub failed: EventFd,
}

impl VcpuShared {
    fn fail(&self, failure: Failure) {
        let mut first = self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        first.get_or_insert(failure);
        let _ = self.failed.write(1);
    }

    fn is_ram(&self, addr: u64) -> bool {
        self.ram.address_in_range(GuestAddress(addr))
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire) || self.requests.stops()
    }
}

/// A vCPU's thread.
#[derive(Debug)]
pub struct VcpuThread {
    thread: JoinHandle<()>,
    over: Arc<AtomicBool>,
}

impl VcpuThread {
    /// Whether it will not touch the machine any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Interrupts the vCPU.
    pub fn kick(&self) {
        self.thread.kick();
    }
}

/// Says that a vCPU's thread is over, however it ends.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Starts the thread of a vCPU. It is over when the machine stops, or after it has left a failure.
pub fn spawn(
    mut vcpu: Vcpu,
    mut emulator: Option<Emulator>,
    shared: Arc<VcpuShared>,
) -> std::io::Result<VcpuThread> {
    let name = format!("vcpu{}", vcpu.index());
    let over = Arc::new(AtomicBool::new(false));
    let its_over = Over(Arc::clone(&over));
    let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| {
            sandbox::enter(sandbox::Kind::Vcpu)
                .map_err(|error| Failure::Stuck(crate::error_chain(&error)))?;
            run(&mut vcpu, emulator.as_mut(), &shared)
        }));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => shared.fail(failure),
            Err(_) => shared.fail(Failure::Stuck("the vCPU thread panicked; this is a bug in rvmm".into())),
        }
        drop(its_over);
        // The end of a thread takes system calls that a vCPU has no other use for, so it waits for the process's.
        while sandbox::is_on() {
            std::thread::park();
        }
    })?;
    Ok(VcpuThread { thread, over })
}

fn run(vcpu: &mut Vcpu, mut emulator: Option<&mut Emulator>, shared: &VcpuShared) -> Result<(), Failure> {
    let mut bound = vcpu.bind_to_thread();
    if shared.gate.is_closed() {
        rest(bound.vcpu(), shared);
    }
    while !shared.stops() {
        let exit = bound.run().map_err(|error| Failure::Stuck(crate::error_chain(&error)))?;
        if let Some(counter) = metrics::EXITS.get(reason(&exit)) {
            counter.add(1);
        }
        if let Exit::EmulationFailure { instruction, len } = exit {
            let bytes = instruction.get(..len).unwrap_or_default();
            carry_out(bound.vcpu(), emulator.as_deref_mut(), shared, bytes)?;
            continue;
        }
        let interrupted = matches!(exit, Exit::Interrupted);
        if handle(exit, shared)? == Turn::Stop {
            break;
        }
        if interrupted {
            // In this order: a kick that comes from here on makes the next run return at once.
            bound.clear_kick();
            if shared.gate.is_closed() {
                // What the guest's last access was owed, KVM has taken: the interrupted run completed it.
                bound.vcpu().tell_paused();
                rest(bound.vcpu(), shared);
            }
        }
    }
    Ok(())
}

/// Place of an exit's reason in [`metrics::EXIT_REASONS`].
fn reason(exit: &Exit<'_>) -> usize {
    match exit {
        Exit::PortRead { .. } => 0,
        Exit::PortWrite { .. } => 1,
        Exit::MmioRead { .. } => 2,
        Exit::MmioWrite { .. } => 3,
        Exit::Interrupted => 4,
        Exit::EmulationFailure { .. } => 5,
        Exit::TripleFault | Exit::Reset | Exit::PowerOff | Exit::Crash => 6,
        _ => 7,
    }
}

fn rest(vcpu: &mut Vcpu, shared: &VcpuShared) {
    shared.gate.rest(&shared.stop, || shared.errand.carry_out(vcpu));
}

/// Answers one exit. The only place that knows what each kind of exit means.
fn handle(exit: Exit<'_>, shared: &VcpuShared) -> Result<Turn, Failure> {
    use crate::legacy::GuestRequest;
    match exit {
        Exit::PortRead { port, width, data } => {
            data.chunks_mut(width).for_each(|chunk| shared.ports.read(port.into(), chunk));
        }
        Exit::PortWrite { port, width, data } => {
            data.chunks(width).for_each(|chunk| shared.ports.write(port.into(), chunk));
        }
        // KVM's emulator takes memory that the host cannot provide for a device's.
        Exit::MmioRead { addr, .. } | Exit::MmioWrite { addr, .. } if shared.is_ram(addr) => {
            return Err(memory_fault(Some(addr)));
        }
        Exit::MmioRead { addr, data } => shared.mmio.read(addr, data),
        Exit::MmioWrite { addr, data } => shared.mmio.write(addr, data),
        Exit::Interrupted => {}
        Exit::TripleFault => return Err(Failure::TripleFault),
        Exit::Reset => shared.requests.post(GuestRequest::Reset),
        Exit::PowerOff => shared.requests.post(GuestRequest::PowerOff),
        Exit::Crash => {
            shared.requests.post(GuestRequest::Panicked);
            shared.requests.post(GuestRequest::Reset);
        }
        Exit::EmulationFailure { .. } => {
            return Err(Failure::Stuck("KVM cannot emulate an instruction".into()));
        }
        Exit::InternalError { suberror } => {
            return Err(Failure::Stuck(format!("KVM gave up with internal error {suberror}")));
        }
        Exit::FailEntry { reason } => {
            return Err(Failure::Stuck(format!(
                "the processor refuses the guest's state (reason {reason:#x})"
            )));
        }
        Exit::MemoryFault { addr } => return Err(memory_fault(addr)),
        Exit::Unexpected(name) => return Err(Failure::Stuck(format!("KVM returned with {name}"))),
    }
    if memory::guard::pages_were_lost() {
        return Err(memory_fault(None));
    }
    Ok(if shared.stops() { Turn::Stop } else { Turn::Again })
}

fn memory_fault(addr: Option<u64>) -> Failure {
    let place = addr.map_or(String::new(), |addr| format!(" at {addr:#x}"));
    Failure::Stuck(format!(
        "the host cannot provide guest memory{place}: the kernel or initrd file was truncated while the VM ran, or \
         the host's memory is exhausted"
    ))
}

/// Carries out an instruction that KVM's emulator does not know, where this kind of KVM needs it.
fn carry_out(
    vcpu: &mut Vcpu,
    emulator: Option<&mut Emulator>,
    shared: &VcpuShared,
    instruction: &[u8],
) -> Result<(), Failure> {
    let why = match emulator {
        Some(emulator) => match emulator.carry_out(vcpu.fd(), &shared.ram, instruction) {
            Ok(_) => return Ok(()),
            Err(error) => format!(": {}", crate::error_chain(&error)),
        },
        None => String::new(),
    };
    let rip = vcpu.fd().get_regs().map_or(0, |regs| regs.rip);
    Err(Failure::Stuck(format!("KVM cannot emulate the instruction {instruction:02x?} at {rip:#x}{why}")))
}
