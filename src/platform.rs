//! Where everything lies on the machine that a guest sees: memory, MMIO windows, I/O ports, interrupt lines.
//!
//! Constants only. Firmware tables, devices and the build all take their addresses from here, so that a number is
//! written down once.

/// First address of the 32-bit MMIO hole; RAM below 4 GiB ends here at the latest.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First address after the 32-bit MMIO hole; RAM that does not fit below the hole continues here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Distance between two virtio-mmio windows, and the size that is reported for each, in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// The IOAPIC that KVM emulates.
pub const IOAPIC_ADDR: u64 = 0xfec0_0000;
/// The local APIC of every vCPU.
pub const LAPIC_ADDR: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts for the task state segment (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS_ADDR: u64 = 0xfffb_d000;
/// One page that KVM needs on Intel hosts for an identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;

/// An inclusive-start, exclusive-end block of I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// First port.
    pub start: u16,
    /// Number of ports.
    pub len: u16,
}

/// 16550 UART.
pub const COM1: Ports = Ports { start: 0x3f8, len: 8 };
/// Keyboard controller: data port 0x60, status and command port 0x64.
pub const I8042: Ports = Ports { start: 0x60, len: 5 };
/// pvpanic (QEMU's `docs/specs/pvpanic.rst`).
pub const PVPANIC: Ports = Ports { start: 0x505, len: 1 };
/// Guest-event port: +0 boot mark, +1 exit status.
pub const GUEST_EVENT: Ports = Ports { start: 0x5f0, len: 2 };
/// Power block: the ACPI sleep and reset registers and the event register of the generic event device.
pub const POWER: Ports = Ports { start: 0x600, len: 8 };
/// ACPI SLEEP_CONTROL_REG, one byte (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL: u16 = POWER.start;
/// ACPI SLEEP_STATUS_REG, one byte (ACPI 6.5 §4.8.3.7).
pub const SLEEP_STATUS: u16 = POWER.start + 1;
/// ACPI RESET_REG, one byte; writing [`RESET_VALUE`] resets the machine (ACPI 6.5 §4.8.3.6).
pub const RESET: u16 = POWER.start + 2;
/// The value that [`RESET`] acts on.
pub const RESET_VALUE: u8 = 1;
/// Pending power events, one byte, cleared by reading; bit 0 is the power button.
pub const POWER_EVENTS: u16 = POWER.start + 4;
/// The sleep type of S5 (soft off) as the DSDT's `_S5` names it.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Interrupt line of the keyboard controller.
pub const I8042_GSI: u32 = 1;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;
/// Interrupt line by which the generic event device announces a new VM generation.
pub const VMGENID_GSI: u32 = 8;
/// Interrupt line by which the generic event device announces a power event.
pub const POWER_GSI: u32 = 9;

/// Interrupt lines that virtio-mmio devices get, in order. KVM's IOAPIC has 24 pins; what the legacy devices above,
/// the timer (0) and the cascade (2) take is left out.
pub const VIRTIO_GSIS: [u32; 18] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 3];

/// A virtio-mmio device's place on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of the register window.
    pub addr: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// The place of the `index`-th virtio-mmio device, or `None` when the interrupt lines are used up.
pub fn mmio_slot(index: usize) -> Option<MmioSlot> {
    let gsi = *VIRTIO_GSIS.get(index)?;
    Some(MmioSlot { addr: VIRTIO_MMIO_START + index as u64 * VIRTIO_MMIO_SIZE, gsi })
}
