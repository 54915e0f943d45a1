//! What only PVM hosts need.
//!
//! On a PVM host (KVM without hardware virtualization) guest kernel code is emulated by KVM, whose emulator lacks
//! some instructions. Meeting one, it leaves the guest with the instruction's bytes; [`Emulator::carry_out`] does what
//! the processor would have done. Nothing here is entered on other hosts.

mod access;
mod cmdline;
mod decode;
mod execute;
mod walk;
mod xstate;

pub use cmdline::cmdline_additions;

use std::io;
use std::sync::OnceLock;

use kvm_bindings::{kvm_regs, kvm_sync_regs};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::memory::Ram;
use access::Failure;
use execute::{Machine, Step};
use walk::{Access, Paging};
use xstate::Layout;

/// Longest instruction in bytes (SDM volume 2, §2.3.11).
const MAX_INSTRUCTION_BYTES: usize = 15;

const INVALID_OPCODE: u8 = 6;

/// EBX, ECX, EDX of CPUID leaf 0 for guests on PVM hosts: "GenuineIntel", whatever the processor is.
///
/// KVM's emulator carries out SYSCALL from 32-bit user code only for processors of AMD, and gets it wrong: it enters
/// kernel mode at the low half of the entry's address, where user code can put what it likes. For others it raises #UD.
pub const VENDOR: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// `KVM_VCPUEVENT_VALID_*`: what of the events is taken over when they are set. The exception always is.
const ONLY_EXCEPTION: u32 = 0;

/// Why an instruction could not be carried out. The VM cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM cannot emulate the instruction, nor can rvmm.
    #[error("the guest kernel runs an instruction at {rip:#x} that this host cannot carry out: {bytes}")]
    Unsupported {
        /// Address of the instruction.
        rip: u64,
        /// The instruction's bytes, in hexadecimal.
        bytes: String,
    },
    /// The instruction's operand, or a page table on the way to it, is not in memory.
    #[error(
        "the instruction {bytes} at {rip:#x} reaches guest physical address {physical:#x}, which is no memory"
    )]
    NotMemory {
        /// Address of the instruction.
        rip: u64,
        /// The instruction's bytes, in hexadecimal.
        bytes: String,
        /// The address that was reached.
        physical: u64,
    },
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was carried out, and the vCPU stands behind it.
    Done,
    /// It raised this exception, which the guest will handle.
    Raised(u8),
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    vector: u8,
    error_code: Option<u32>,
    /// New value of CR2.
    address: Option<u64>,
}

impl Event {
    fn plain(vector: u8) -> Event {
        Event { vector, error_code: None, address: None }
    }

    fn with_code(vector: u8, code: u32) -> Event {
        Event { vector, error_code: Some(code), address: None }
    }

    fn general_protection() -> Event {
        Event::with_code(13, 0)
    }

    fn page_fault(code: u32, address: u64) -> Event {
        Event { vector: 14, error_code: Some(code), address: Some(address) }
    }
}

/// What the emulator knows about the processor; the same for all vCPUs.
struct Processor {
    layout: Layout,
    physical_bits: u32,
}

fn processor() -> &'static Processor {
    static PROCESSOR: OnceLock<Processor> = OnceLock::new();
    PROCESSOR.get_or_init(|| Processor {
        layout: Layout::host(),
        physical_bits: std::arch::x86_64::__cpuid(0x8000_0008).eax & 0xff,
    })
}

/// Carries out instructions for one vCPU.
#[derive(Debug, Default)]
pub struct Emulator {
    carried_out: u64,
    /// KVM leaves the registers in the memory that it shares with the monitor, and takes them from there.
    shares_registers: bool,
}

impl Emulator {
    /// An emulator for one vCPU.
    pub fn new() -> Emulator {
        Emulator::default()
    }

    /// How many instructions were carried out so far.
    pub fn carried_out(&self) -> u64 {
        self.carried_out
    }

    /// Has KVM share the registers, which spares a handful of calls for every instruction, each of which costs as much
    /// as an exit on PVM hosts. The first time, they are fetched.
    fn share_registers(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        if self.shares_registers {
            return Ok(());
        }
        let regs = call("KVM_GET_REGS", vcpu.get_regs())?;
        let sregs = call("KVM_GET_SREGS", vcpu.get_sregs())?;
        let events = call("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?;
        *vcpu.sync_regs_mut() = kvm_sync_regs { regs, sregs, events };
        for set in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            vcpu.set_sync_valid_reg(set);
        }
        self.shares_registers = true;
        Ok(())
    }

    /// Carries out the instruction that `vcpu` has just left the guest with. `bytes` starts with it, as far as KVM
    /// knew; if it is empty, the instruction is fetched from guest memory.
    ///
    /// The vCPU can be run again afterwards, unless this is an error. As with port and MMIO reads, it is the next
    /// `KVM_RUN` that brings its registers up to date, with an immediate exit if need be.
    pub fn carry_out(&mut self, vcpu: &mut VcpuFd, ram: &Ram, bytes: &[u8]) -> Result<Outcome, Error> {
        self.share_registers(vcpu)?;
        let kvm_sync_regs { mut regs, sregs, .. } = vcpu.sync_regs();
        let rip = regs.rip;
        let user = sregs.ss.dpl == 3;
        let paging = Paging::new(&regs, &sregs, user, processor().physical_bits);
        let mut fetched = [0; MAX_INSTRUCTION_BYTES];
        let bytes = if bytes.is_empty() { fetch(&paging, ram, rip, &mut fetched) } else { bytes };
        let step = {
            let mut machine = Machine::new(vcpu, ram, &mut regs, &sregs, paging, processor());
            match machine.run(bytes)? {
                // To user code, what the emulator lacks does not exist; the VM must not end by it.
                Step::Unsupported if user => Step::Raise(Event::plain(INVALID_OPCODE)),
                step => step,
            }
        };
        self.carried_out += 1;
        match step {
            Step::Advance(next) => {
                regs.rip = next;
                set_registers(vcpu, &regs);
                Ok(Outcome::Done)
            }
            Step::Trap { next, event } => {
                regs.rip = next;
                set_registers(vcpu, &regs);
                Ok(inject(vcpu, event))
            }
            Step::Raise(event) => Ok(inject(vcpu, event)),
            Step::Unsupported => Err(Error::Unsupported { rip, bytes: hex(bytes) }),
            Step::NotMemory(physical) => Err(Error::NotMemory { rip, bytes: hex(bytes), physical }),
        }
    }
}

fn set_registers(vcpu: &mut VcpuFd, regs: &kvm_regs) {
    vcpu.sync_regs_mut().regs = *regs;
    vcpu.set_sync_dirty_reg(SyncReg::Register);
}

fn inject(vcpu: &mut VcpuFd, event: Event) -> Outcome {
    if let Some(address) = event.address {
        vcpu.sync_regs_mut().sregs.cr2 = address;
        vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
    }
    let events = &mut vcpu.sync_regs_mut().events;
    events.flags = ONLY_EXCEPTION;
    events.exception.injected = 1;
    events.exception.pending = 0;
    events.exception.nr = event.vector;
    events.exception.has_error_code = event.error_code.is_some().into();
    events.exception.error_code = event.error_code.unwrap_or(0);
    vcpu.set_sync_dirty_reg(SyncReg::VcpuEvents);
    Outcome::Raised(event.vector)
}

/// Reads the instruction at `rip`, as much of it as is in memory.
fn fetch<'a>(paging: &Paging, ram: &Ram, rip: u64, buffer: &'a mut [u8; MAX_INSTRUCTION_BYTES]) -> &'a [u8] {
    // Up to the end of the page, then over it: an instruction near the end of the last page must still be found.
    let in_page = (crate::memory::PAGE_SIZE - rip % crate::memory::PAGE_SIZE) as usize;
    for len in [MAX_INSTRUCTION_BYTES, in_page.min(MAX_INSTRUCTION_BYTES)] {
        let Some(part) = buffer.get_mut(..len) else { continue };
        let read = access::check(paging, ram, rip, len, Access::Read, false)
            .and_then(|range| range.read(ram, 0, part));
        if read.is_ok() {
            return buffer.get(..len).unwrap_or_default();
        }
    }
    &[]
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    if bytes.is_empty() { "(unknown)".to_owned() } else { bytes.join(" ") }
}

fn call<T>(name: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Error> {
    result.map_err(|error| Error::Call { call: name, source: error.into() })
}

impl From<Failure> for Step {
    fn from(failure: Failure) -> Step {
        match failure {
            Failure::Event(event) => Step::Raise(event),
            Failure::NotMemory(physical) => Step::NotMemory(physical),
            Failure::UnsupportedMode => Step::Unsupported,
        }
    }
}

#[cfg(test)]
mod guest_tests;
