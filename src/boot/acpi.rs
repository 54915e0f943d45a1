//! ACPI tables: hardware-reduced ACPI 6.5, made new for every guest from its devices.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::error::Error;
use super::params::write;
use super::{Machine, layout, mptable};
use crate::memory::Ram;
use crate::platform::{self, MmioSlot, Ports};

const OEM_ID: [u8; 6] = *b"RVMM  ";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// IA-PC boot architecture flags (§5.2.9.3): no VGA, no MSI, no CMOS RTC; and, by what is not set, no keyboard
/// controller and no other legacy devices, so that a kernel does not spend time on looking for them.
const BOOT_ARCHITECTURE: u16 = (1 << 2) | (1 << 3) | (1 << 5);
/// Notification value of a pressed button (§4.8.2.2.1.2) and of a new generation ID.
const NOTIFY_CHANGED: u8 = 0x80;
/// Pending events of [`platform::POWER_EVENTS`].
const POWER_BUTTON: u8 = 1;

/// Writes the tables for `machine`; `virtio` are the devices that the DSDT names.
pub(super) fn write_tables(ram: &Ram, machine: &Machine, virtio: &[MmioSlot]) -> Result<(), Error> {
    // Tables follow each other from `ACPI_TABLES` on; each is told the address of an earlier one.
    let mut tables = Vec::with_capacity(4096);
    let mut add = |table: &[u8]| {
        tables.resize(tables.len().next_multiple_of(16), 0);
        let addr = layout::ACPI_TABLES + tables.len() as u64;
        tables.extend_from_slice(table);
        addr
    };
    let dsdt = add(&dsdt(machine, virtio));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(machine.cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&bytes_of(&xsdt));
    let max = layout::ACPI_END - layout::ACPI_TABLES;
    if tables.len() as u64 > max {
        return Err(Error::AcpiSize { len: tables.len() as u64, max });
    }
    write(ram, "the ACPI tables", layout::ACPI_TABLES, &tables)?;
    write(ram, "the RSDP", layout::ACPI, &bytes_of(&Rsdp::new(OEM_ID, xsdt)))?;
    write(ram, "the generation ID", layout::GENERATION_ID, &machine.generation_id.to_le_bytes())
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        // Power and sleep buttons are no fixed hardware: the DSDT has what there is.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(platform::RESET);
    fadt.reset_value = platform::RESET_VALUE;
    fadt.sleep_control_reg = port(platform::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(platform::SLEEP_STATUS);
    bytes_of(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(platform::LAPIC_ADDR as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(mptable::ioapic_id(cpus), platform::IOAPIC_ADDR as u32, 0));
    bytes_of(&madt)
}

fn dsdt(machine: &Machine, virtio: &[MmioSlot]) -> Vec<u8> {
    let mut devices = Vec::with_capacity(2048);
    if machine.serial {
        let (io, irq) = (ports(platform::COM1), interrupt(platform::COM1_GSI));
        device(&mut devices, "COM1", &aml::EISAName::new("PNP0501"), 0, &[&io, &irq], &[]);
    }
    let io = ports(platform::PVPANIC);
    device(&mut devices, "PEVT", &"QEMU0001", 0, &[&io], &[]);
    for (index, slot) in virtio.iter().enumerate() {
        let window = aml::Memory32Fixed::new(true, slot.addr as u32, platform::VIRTIO_MMIO_SIZE as u32);
        let (name, irq) = (format!("VR{index:02X}"), interrupt(slot.gsi));
        // DMA is coherent, which a device's driver may rely on.
        let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
        device(&mut devices, &name, &"LNRO0005", index as u8, &[&window, &irq], &[&coherent]);
    }
    power_button(&mut devices);
    generation_id(&mut devices);
    event_device(&mut devices);

    let mut body = aml::Scope::raw("\\_SB_".into(), devices);
    // Sleep type of S5, for SLEEP_CONTROL (§7.4.2.6).
    let sleep_type = aml::Package::new(vec![&platform::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &sleep_type).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

/// Adds a device with its hardware ID, unique ID, resources and whatever else.
fn device(out: &mut Vec<u8>, name: &str, hid: &dyn Aml, uid: u8, crs: &[&dyn Aml], more: &[&dyn Aml]) {
    let hid = aml::Name::new("_HID".into(), hid);
    let uid = aml::Name::new("_UID".into(), &uid);
    let crs =
        (!crs.is_empty()).then(|| aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(crs.to_vec())));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    children.extend(crs.as_ref().map(|crs| crs as &dyn Aml));
    children.extend(more);
    aml::Device::new(name.into(), children).to_aml_bytes(out);
}

fn power_button(out: &mut Vec<u8>) {
    device(out, "PWRB", &aml::EISAName::new("PNP0C0C"), 0, &[], &[]);
}

/// The VM generation ID ("Virtual Machine Generation ID", Microsoft, 2012): drivers know it by its compatible ID.
fn generation_id(out: &mut Vec<u8>) {
    let compatible = aml::Name::new("_CID".into(), &"VM_Gen_Counter");
    let description = aml::Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    let addr = aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high]));
    device(out, "VGEN", &"RVMM0001", 0, &[], &[&compatible, &description, &addr]);
}

/// The generic event device (§5.6.9): its interrupts run a method, which tells the devices.
fn event_device(out: &mut Vec<u8>) {
    use aml::{Arg, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local};
    use aml::{MethodCall, Notify, OpRegion, OpRegionSpace, Path, Store};
    let region = OpRegion::new("PEVR".into(), OpRegionSpace::SystemIO, &platform::POWER_EVENTS, &aml::ONE);
    let field = Field::new(
        "PEVR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"PEVF", 8)],
    );
    let (power_irq, generation_irq) = (interrupt(platform::POWER_GSI), interrupt(platform::VMGENID_GSI));

    // If (Arg0 == POWER_GSI) { Local0 = PEVF; If (Local0 & POWER_BUTTON) { Notify (PWRB, 0x80) } }
    let (power_button, generation_id): (Path, Path) = ("PWRB".into(), "VGEN".into());
    let pending = MethodCall::new("PEVF".into(), vec![]);
    let read = Store::new(&Local(0), &pending);
    let pressed = aml::And::new(&Local(1), &Local(0), &POWER_BUTTON);
    let notify_button = Notify::new(&power_button, &NOTIFY_CHANGED);
    let if_pressed = If::new(&Local(1), vec![&notify_button]);
    let is_power = Equal::new(&Arg(0), &platform::POWER_GSI);
    let if_power = If::new(&is_power, vec![&read, &pressed, &if_pressed]);
    // If (Arg0 == VMGENID_GSI) { Notify (VGEN, 0x80) }
    let notify_generation = Notify::new(&generation_id, &NOTIFY_CHANGED);
    let is_generation = Equal::new(&Arg(0), &platform::VMGENID_GSI);
    let if_generation = If::new(&is_generation, vec![&notify_generation]);
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&if_power, &if_generation]);
    device(out, "GED0", &"ACPI0013", 0, &[&power_irq, &generation_irq], &[&region, &field, &method]);
}

fn ports(ports: Ports) -> aml::IO {
    aml::IO::new(ports.start, ports.start, 1, ports.len as u8)
}

/// An interrupt as an irqfd raises it: an edge, active high, not shared.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests;
