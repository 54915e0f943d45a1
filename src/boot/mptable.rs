//! MP table (Intel MultiProcessor Specification 1.4, chapter 4) for kernels without ACPI.

use crate::platform::{IOAPIC_ADDR, LAPIC_ADDR};

/// Pins of the IOAPIC that KVM emulates.
const IOAPIC_PINS: u8 = 24;
/// Version register of KVM's local APICs.
const LAPIC_VERSION: u8 = 0x14;
/// Version register of KVM's IOAPIC.
const IOAPIC_VERSION: u8 = 0x11;
/// §4.3.1: processor enabled, and the one that boots.
const CPU_ENABLED: u8 = 1 << 0;
const CPU_BOOT: u8 = 1 << 1;
/// §4.3.4: interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// The only bus.
const ISA_BUS: u8 = 0;
const HEADER_LEN: usize = 44;

/// The floating pointer structure and the configuration table that it points to, for placement at `addr`.
pub fn build(addr: u64, cpus: u8) -> Vec<u8> {
    let ioapic_id = ioapic_id(cpus);
    let mut entries = Vec::with_capacity(1024);
    let mut count = 0_u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..cpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        // Family 6 with an APIC and an FPU; kernels read CPUID instead.
        let (signature, features) = (0x600_u32.to_le_bytes(), 0x201_u32.to_le_bytes());
        let mut bytes = [0; 20];
        bytes[..4].copy_from_slice(&[0, id, LAPIC_VERSION, flags]);
        bytes[4..8].copy_from_slice(&signature);
        bytes[8..12].copy_from_slice(&features);
        entry(&bytes);
    }
    entry(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = (IOAPIC_ADDR as u32).to_le_bytes();
    entry(&[2, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    // Flags of zero: polarity and trigger as the bus has them, which on ISA is high and edge.
    for pin in 0..IOAPIC_PINS {
        entry(&[3, INT, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    entry(&[4, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[4, NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut pointer = *b"_MP_\0\0\0\0\x01\x04\0\0\0\0\0\0";
    pointer[4..8].copy_from_slice(&(addr as u32 + 16).to_le_bytes());
    pointer[10] = checksum(&pointer);

    let mut table = Vec::with_capacity(HEADER_LEN + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"RVMM    ");
    table.extend_from_slice(b"MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&(LAPIC_ADDR as u32).to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut bytes = pointer.to_vec();
    bytes.extend_from_slice(&table);
    bytes
}

/// APIC ID of the IOAPIC: the first that no vCPU has.
pub fn ioapic_id(cpus: u8) -> u8 {
    cpus
}

/// The byte that makes all bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{CPUS_MAX, layout};

    #[test]
    fn table_is_whole_and_fits_for_every_number_of_cpus() {
        for cpus in 1..=CPUS_MAX {
            let bytes = build(layout::EBDA, cpus);
            assert!(bytes.len() <= 1024, "{cpus} vCPUs take {} bytes", bytes.len());
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(pointer[4..8], (layout::EBDA as u32 + 16).to_le_bytes());
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());

            let mut rest = &table[HEADER_LEN..];
            let mut kinds = Vec::new();
            while let Some(kind) = rest.first() {
                kinds.push(*kind);
                rest = &rest[if *kind == 0 { 20 } else { 8 }..];
            }
            let count = |wanted: u8| kinds.iter().filter(|kind| **kind == wanted).count();
            assert_eq!(kinds.len(), usize::from(u16::from_le_bytes([table[34], table[35]])));
            assert_eq!([0, 1, 2, 3, 4].map(count), [cpus.into(), 1, 1, 24, 2]);
        }
    }
}
