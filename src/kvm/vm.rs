//! One virtual machine: memory slots, interrupt controllers, event descriptors.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::calls::call;
use super::{Error, Vcpu};
use crate::memory::Ram;
use crate::platform::{KVM_IDENTITY_MAP_ADDR, KVM_TSS_ADDR};

/// `KVM_CAP_EXIT_ON_EMULATION_FAILURE`, which kvm-ioctls does not name.
const CAP_EXIT_ON_EMULATION_FAILURE: u32 = 204;

/// A range of guest memory as KVM knows it.
#[derive(Clone, Copy, Debug)]
pub struct MemorySlot {
    /// KVM's number of the slot.
    pub slot: u32,
    /// Guest physical address.
    pub addr: u64,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// A virtual machine.
pub struct Vm {
    fd: VmFd,
    /// The memory that KVM was given, kept mapped as long as the VM is there.
    ram: Option<Ram>,
}

impl Vm {
    pub(super) fn new(fd: VmFd) -> Vm {
        Vm { fd, ram: None }
    }

    /// The handle of kvm-ioctls.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Gives the VM its memory, one slot for each region. `log` says whether it is noted which pages the guest writes.
    ///
    /// To be called before [`Vm::create_interrupt_controllers`]: with them in place, PVM hosts take 5 to 10 ms for
    /// each slot instead of 0.1 ms.
    pub fn set_memory(&mut self, ram: &Ram, log: bool) -> Result<Vec<MemorySlot>, Error> {
        let mut slots = Vec::new();
        for (slot, region) in (0..).zip(ram.iter()) {
            let region_info = kvm_userspace_memory_region {
                slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one mapping of `ram`, which this VM keeps a share of until it is dropped, and
            // regions of one `Ram` do not overlap.
            call("KVM_SET_USER_MEMORY_REGION", || unsafe { self.fd.set_user_memory_region(region_info) })?;
            slots.push(MemorySlot { slot, addr: region.start_addr().0, size_bytes: region.len() });
        }
        self.ram = Some(ram.clone());
        Ok(slots)
    }

    /// The pages that the guest has written to since the last call, or since it was given its memory: a bit each, by region.
    pub fn take_dirty_pages(&self) -> Result<Vec<Vec<u64>>, Error> {
        let regions = self.ram.iter().flat_map(|ram| ram.iter());
        let read = |(slot, len)| call("KVM_GET_DIRTY_LOG", || self.fd.get_dirty_log(slot, len));
        (0..).zip(regions.map(|region| region.len() as usize)).map(read).collect()
    }

    /// Makes the interrupt controllers (PIC, IOAPIC with 24 pins, LAPICs) and the timer (PIT) in the kernel, and
    /// sets aside the pages that KVM needs for itself on Intel hosts.
    pub fn create_interrupt_controllers(&self) -> Result<(), Error> {
        call("KVM_SET_IDENTITY_MAP_ADDR", || self.fd.set_identity_map_address(KVM_IDENTITY_MAP_ADDR))?;
        call("KVM_SET_TSS_ADDR", || self.fd.set_tss_address(KVM_TSS_ADDR as usize))?;
        call("KVM_CREATE_IRQCHIP", || self.fd.create_irq_chip())?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        call("KVM_CREATE_PIT2", || self.fd.create_pit2(pit))
    }

    /// Asks for an exit with the instruction's bytes where KVM cannot emulate one. Returns whether this KVM can.
    pub fn exit_on_emulation_failure(&self) -> Result<bool, Error> {
        if self.fd.check_extension_raw(CAP_EXIT_ON_EMULATION_FAILURE.into()) <= 0 {
            return Ok(false);
        }
        let cap =
            kvm_enable_cap { cap: CAP_EXIT_ON_EMULATION_FAILURE, args: [1, 0, 0, 0], ..Default::default() };
        call("KVM_ENABLE_CAP", || self.fd.enable_cap(&cap))?;
        Ok(true)
    }

    /// Raises interrupt line `gsi` as an edge whenever `event` is written.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        call("KVM_IRQFD", || self.fd.register_irqfd(event, gsi))
    }

    /// Raises interrupt line `gsi` once, as an edge.
    pub fn pulse(&self, gsi: u32) -> Result<(), Error> {
        for level in [true, false] {
            call("KVM_IRQ_LINE", || self.fd.set_irq_line(gsi, level))?;
        }
        Ok(())
    }

    /// Signals `event`, without an exit to rvmm, when the guest writes the 32-bit `value` at `addr`.
    pub fn register_ioeventfd(&self, event: &EventFd, addr: u64, value: u32) -> Result<(), Error> {
        call("KVM_IOEVENTFD", || self.fd.register_ioevent(event, &IoEventAddress::Mmio(addr), value))
    }

    /// Makes vCPU number `index`.
    pub fn create_vcpu(&self, index: u32) -> Result<Vcpu, Error> {
        let fd = call("KVM_CREATE_VCPU", || self.fd.create_vcpu(index.into()))?;
        Ok(Vcpu::new(index, fd))
    }
}
