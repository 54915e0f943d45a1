//! A probe VM: one vCPU that executes one instruction in guest kernel mode.
//!
//! A processor executes POPCNT; KVM's emulator does not know it and gives up. So the answer tells whether guest kernel
//! code runs on the processor, whatever names say.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::{self, PAGE_SIZE};

const CODE: u64 = 0;
const PML4: u64 = PAGE_SIZE;
const PDPT: u64 = 2 * PAGE_SIZE;
const PAGE_DIRECTORY: u64 = 3 * PAGE_SIZE;
const MEMORY_BYTES: u64 = 4 * PAGE_SIZE;

/// `popcnt rbx, rax; hlt`.
const PROGRAM: [u8; 6] = [0xf3, 0x48, 0x0f, 0xb8, 0xd8, 0xf4];
/// Present and writable; the page directory's entry maps 2 MiB.
const TABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x83;

const CR0_PE_ET_NE_WP_PG: u64 = 0x8001_0031;
const CR4_PAE_OSFXSR: u64 = 0x220;
const EFER_LME_LMA: u64 = 0x500;

const OPERAND: u64 = 0xff00;

/// What the probe VM did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The processor executed the instruction.
    Native,
    /// KVM emulates guest kernel code.
    Emulated,
    /// Neither: the VM ended in another way.
    Inconclusive,
}

/// Why the probe VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The program did not fit into its memory.
    #[error("cannot fill the probe VM's memory")]
    Fill(#[from] vm_memory::GuestMemoryError),
    /// A KVM call failed.
    #[error("the probe VM cannot be run")]
    Kvm(#[from] io::Error),
}

/// Runs the probe VM.
pub fn run(kvm: &kvm_ioctls::Kvm) -> Result<Finding, Error> {
    let ram = memory::allocate(MEMORY_BYTES)?;
    ram.write_slice(&PROGRAM, GuestAddress(CODE))?;
    for (at, entry) in [(PML4, PDPT | TABLE), (PDPT, PAGE_DIRECTORY | TABLE), (PAGE_DIRECTORY, LARGE_PAGE)] {
        ram.write_obj(entry, GuestAddress(at))?;
    }
    let vm = kvm.create_vm().map_err(io::Error::from)?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY_BYTES,
        userspace_addr: ram.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: the range is the one mapping of `ram`, which is dropped after the VM (declared before it).
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)?;
    let mut vcpu = vm.create_vcpu(0).map_err(io::Error::from)?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(io::Error::from)?;
    vcpu.set_cpuid2(&cpuid).map_err(io::Error::from)?;
    let mut sregs = vcpu.get_sregs().map_err(io::Error::from)?;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    (sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (code, data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE_ET_NE_WP_PG, PML4, CR4_PAE_OSFXSR, EFER_LME_LMA);
    vcpu.set_sregs(&sregs).map_err(io::Error::from)?;
    let regs = kvm_regs { rip: CODE, rax: OPERAND, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(io::Error::from)?;
    let halted = match vcpu.run().map_err(io::Error::from)? {
        VcpuExit::Hlt => true,
        VcpuExit::InternalError => return Ok(Finding::Emulated),
        _ => false,
    };
    let counted = vcpu.get_regs().map_err(io::Error::from)?.rbx == u64::from(OPERAND.count_ones());
    Ok(if halted && counted { Finding::Native } else { Finding::Inconclusive })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::kind::{Kind, Names};

    #[test]
    fn probe_agrees_with_names() {
        let kvm = match kvm_ioctls::Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: /dev/kvm cannot be opened: {error}");
                return;
            }
        };
        let names = Names::of_host();
        let start = std::time::Instant::now();
        let finding = run(&kvm).unwrap();
        eprintln!("{names:?}: {finding:?} after {:?}", start.elapsed());
        match names.kind() {
            Kind::Pvm => assert_eq!(finding, Finding::Emulated),
            Kind::Hardware | Kind::Nested => assert_eq!(finding, Finding::Native),
            Kind::Unknown => assert_ne!(finding, Finding::Inconclusive),
        }
    }
}
