//! The tables are checked by sums and links here, and by the reference compiler where it is installed.

use std::process::Command;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::{CPUS_MAX, Discovery};
use crate::memory;
use crate::platform::{VIRTIO_GSIS, mmio_slot};

fn tables(cpus: u8, devices: usize) -> Ram {
    let virtio: Vec<_> = (0..devices).map(|index| mmio_slot(index).unwrap()).collect();
    let discovery = Discovery::Acpi;
    let machine = Machine { cpus, virtio, discovery, serial: true, generation_id: 7 };
    let ram = memory::allocate(memory::MIN_SIZE).unwrap();
    write_tables(&ram, &machine, &machine.virtio).unwrap();
    ram
}

fn table(ram: &Ram, addr: u64) -> Vec<u8> {
    let len: u32 = ram.read_obj(GuestAddress(addr + 4)).unwrap();
    let mut bytes = vec![0; len as usize];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
    bytes
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// FADT, MADT and DSDT, found as a kernel finds them.
fn follow(ram: &Ram) -> [Vec<u8>; 3] {
    let mut rsdp = [0; 36];
    ram.read_slice(&mut rsdp, GuestAddress(layout::ACPI)).unwrap();
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    let xsdt = table(ram, number(&rsdp, 24));
    assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
    let fadt = table(ram, number(&xsdt, 36));
    let madt = table(ram, number(&xsdt, 44));
    let dsdt = table(ram, number(&fadt, 140));
    assert_eq!((&fadt[..4], &madt[..4], &dsdt[..4]), (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..]));
    [fadt, madt, dsdt]
}

#[test]
fn tables_are_linked_and_summed_for_every_size() {
    for (cpus, devices) in [(1, 0), (1, 1), (4, 7), (CPUS_MAX, VIRTIO_GSIS.len())] {
        let ram = tables(cpus, devices);
        let [fadt, madt, dsdt] = follow(&ram);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "hardware-reduced, reset register");
        // Local APICs are 8 bytes, the IOAPIC is 12.
        assert_eq!(madt.len(), 44 + usize::from(cpus) * 8 + 12);
        let found = dsdt.windows(8).filter(|bytes| bytes == b"LNRO0005").count();
        assert_eq!(found, devices);
        let id: u128 = ram.read_obj(GuestAddress(layout::GENERATION_ID)).unwrap();
        assert_eq!(id, 7);
    }
}

#[test]
fn reference_compiler_takes_the_tables_apart_and_together() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed (Debian package acpica-tools)");
        return;
    }
    let ram = tables(CPUS_MAX, VIRTIO_GSIS.len());
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in ["facp", "apic", "dsdt"].iter().zip(follow(&ram)) {
        std::fs::write(directory.path().join(format!("{name}.dat")), bytes).unwrap();
    }
    let run = |arguments: &[&str]| {
        let output = Command::new("iasl").args(arguments).current_dir(&directory).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "iasl {arguments:?}: {text}");
        text
    };
    run(&["-d", "dsdt.dat"]);
    run(&["-d", "facp.dat"]);
    run(&["-d", "apic.dat"]);
    let text = run(&["-ve", "dsdt.dsl"]);
    assert!(text.contains("0 Errors"), "{text}");
    let source = std::fs::read_to_string(directory.path().join("dsdt.dsl")).unwrap();
    for part in [
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive",
        "0xD0011000,         // Address Base",
        "OperationRegion (PEVR, SystemIO, 0x0604, One)",
        "Notify (PWRB, 0x80)",
        "Notify (VGEN, 0x80)",
        "\"VM_Gen_Counter\"",
        "Name (_S5, Package (0x04)",
        "EisaId (\"PNP0C0C\")",
    ] {
        assert!(source.contains(part), "{part:?} is not in\n{source}");
    }
    let fadt = std::fs::read_to_string(directory.path().join("facp.dsl")).unwrap();
    assert!(fadt.contains("Hardware Reduced (V5) : 1"), "{fadt}");
}
