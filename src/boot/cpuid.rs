//! What the CPUID instruction tells the guest: what KVM supports, with the guest's own topology instead of the host's.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What decides about a vCPU's leaves besides what KVM supports.
#[derive(Clone, Copy, Debug)]
pub struct Vcpu {
    /// Index of the vCPU, which is its APIC ID.
    pub index: u8,
    /// Number of vCPUs.
    pub count: u8,
    /// Whether KVM has the TSC deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`).
    pub tsc_deadline: bool,
    /// Frequency of the guest's TSC, where KVM tells it (`KVM_GET_TSC_KHZ`).
    pub tsc_khz: Option<u32>,
}

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A change to one register of one leaf, applied last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidPatch {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf; `None` for every subleaf.
    pub subleaf: Option<u32>,
    /// Register.
    pub register: Register,
    /// Bits to clear.
    pub clear: u32,
    /// Bits to set.
    pub set: u32,
}

/// Leaf 1 ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package holds more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX (AMD): several cores; counters of the performance monitor.
const CMP_LEGACY: u32 = 1 << 1;
const PERF_COUNTERS: u32 = (1 << 23) | (1 << 24) | (1 << 28);
/// Extended topology, Intel and AMD.
const TOPOLOGY: u32 = 0xb;
/// First and feature leaf of KVM's own, and the one that tells frequencies, as VMware once defined it.
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const APIC_KHZ: u32 = 1_000_000;

/// The CPUID table of one vCPU, made from `KVM_GET_SUPPORTED_CPUID`'s.
pub fn build(supported: &[kvm_cpuid_entry2], vcpu: Vcpu, patches: &[CpuidPatch]) -> Vec<kvm_cpuid_entry2> {
    let dropped = |leaf: u32| matches!(leaf, TOPOLOGY | 0x1f | KVM_TIMING | 0x8000_0022 | 0x8000_0026);
    let mut table: Vec<_> = supported.iter().filter(|entry| !dropped(entry.function)).copied().collect();
    let amd = table.iter().any(|entry| entry.function == 0 && is_amd(entry));
    for entry in &mut table {
        adapt(entry, vcpu, amd);
    }
    table.extend(topology(vcpu));
    let timing = timing(&mut table, vcpu);
    table.extend(timing);
    for patch in patches {
        let chosen = |entry: &&mut kvm_cpuid_entry2| {
            entry.function == patch.leaf && patch.subleaf.is_none_or(|index| index == entry.index)
        };
        for entry in table.iter_mut().filter(chosen) {
            let register = match patch.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *register = *register & !patch.clear | patch.set;
        }
    }
    table
}

/// Patches that give leaf 0 another vendor, told by EBX, ECX and EDX.
pub fn vendor([ebx, ecx, edx]: [u32; 3]) -> [CpuidPatch; 3] {
    [(Register::Ebx, ebx), (Register::Ecx, ecx), (Register::Edx, edx)].map(|(register, set)| CpuidPatch {
        leaf: 0,
        subleaf: None,
        register,
        clear: !0,
        set,
    })
}

/// The XCR0 that enables every state component that `table` offers, or `None` without XSAVE.
///
/// A guest sets XCR0 itself. On a host that is emulated in software KVM may not see that, and starting the vCPU with
/// the value that the guest is going to set makes KVM and guest agree.
pub fn xcr0(table: &[kvm_cpuid_entry2]) -> Option<u64> {
    let components = table.iter().find(|entry| entry.function == 0xd && entry.index == 0)?;
    let mask = u64::from(components.edx) << 32 | u64::from(components.eax);
    (mask & 1 != 0).then_some(mask)
}

fn adapt(entry: &mut kvm_cpuid_entry2, vcpu: Vcpu, amd: bool) {
    let Vcpu { index, count, .. } = vcpu;
    let (id, count) = (u32::from(index), u32::from(count));
    match entry.function {
        0 => entry.eax = entry.eax.max(TOPOLOGY),
        1 => {
            entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
            // KVM sets OSXSAVE as the guest sets CR4, and leaves the deadline timer to the monitor.
            entry.ecx = entry.ecx & !(OSXSAVE | TSC_DEADLINE) | HYPERVISOR;
            if vcpu.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        4 => entry.eax = cache_sharing(entry.eax, count, true),
        // Performance monitor: not part of a guest.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // TSC and core crystal clock, base frequency: kept only where it is the guest's own frequency.
        0x15 if !tells(entry, vcpu.tsc_khz) => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        0x16 => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        0x8000_0001 if amd => {
            entry.ecx &= !(PERF_COUNTERS | CMP_LEGACY);
            if count > 1 {
                entry.ecx |= CMP_LEGACY;
            }
        }
        0x8000_0008 if amd => entry.ecx = id_bits(vcpu) << 12 | (count - 1),
        0x8000_001d => entry.eax = cache_sharing(entry.eax, count, false),
        // APIC ID; core ID, one thread per core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

fn is_amd(leaf_0: &kvm_cpuid_entry2) -> bool {
    let name = [leaf_0.ebx, leaf_0.edx, leaf_0.ecx].map(u32::to_le_bytes);
    matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

/// EAX of a cache leaf: the last level is shared by all vCPUs, the others by none.
fn cache_sharing(eax: u32, count: u32, intel: bool) -> u32 {
    if eax & 0x1f == 0 {
        return eax;
    }
    let sharing = if (eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
    // Bits 31..26, Intel only: APIC IDs that the package reserves for cores, less one.
    let cores = if intel { (count.next_power_of_two() - 1).min(0x3f) } else { eax >> 26 };
    eax & 0x3fff | sharing << 14 | cores << 26
}

/// Whether leaf 0x15 gives the frequency that the guest's TSC has.
fn tells(leaf_0x15: &kvm_cpuid_entry2, tsc_khz: Option<u32>) -> bool {
    let kvm_cpuid_entry2 { eax, ebx, ecx, .. } = *leaf_0x15;
    let Some(khz) = tsc_khz.map(u64::from) else { return false };
    let Some(hz) = (u64::from(ecx) * u64::from(ebx)).checked_div(eax.into()) else { return false };
    (hz / 1000).abs_diff(khz) <= khz / 1000
}

/// Bits of an APIC ID that tell vCPUs apart.
fn id_bits(vcpu: Vcpu) -> u32 {
    u32::from(vcpu.count).next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: one package of cores with one thread each.
fn topology(vcpu: Vcpu) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: vcpu.index.into(),
        ..Default::default()
    };
    [level(0, 0, 1, THREAD), level(1, id_bits(vcpu), vcpu.count.into(), CORE), level(2, 0, 0, 0)]
}

/// Leaf 0x4000_0010, if KVM's own leaves are there and the frequency is known.
fn timing(table: &mut [kvm_cpuid_entry2], vcpu: Vcpu) -> Option<kvm_cpuid_entry2> {
    let khz = vcpu.tsc_khz?;
    let signature = table.iter_mut().find(|entry| entry.function == KVM_SIGNATURE)?;
    if signature.ebx.to_le_bytes() != *b"KVMK" {
        return None;
    }
    // Zero stands for 0x4000_0001 there.
    signature.eax = signature.eax.max(KVM_TIMING);
    Some(kvm_cpuid_entry2 { function: KVM_TIMING, eax: khz, ebx: APIC_KHZ, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host with 48 cores of two threads, APIC ID 0x55, performance counters, TSC at 2 GHz.
    fn host([ebx, ecx, edx]: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let all = u32::MAX;
        vec![
            entry(0, 0, [0x1f, ebx, ecx, edx]),
            entry(1, 0, [0xa0f11, 0x5560_0800, all & !TSC_DEADLINE, all]),
            entry(4, 0, [0xfc00_4121, 1, 2, 3]),
            entry(4, 1, [0xfc00_4143, 1, 2, 3]),
            entry(4, 2, [0xfc1f_c163, 1, 2, 3]),
            entry(4, 3, [0, 0, 0, 0]),
            entry(0xa, 0, [0x0808_3005, 1, 2, 3]),
            entry(0xb, 0, [1, 2, 0x100, 0x55]),
            entry(0xb, 1, [7, 96, 0x201, 0x55]),
            entry(0x15, 0, [2, 160, 25_000_000, 0]),
            entry(0x16, 0, [2000, 3000, 100, 0]),
            entry(0x1f, 0, [1, 2, 0x100, 0x55]),
            entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, all, all]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x705f, 0]),
            entry(0x8000_001d, 0, [0x0400_4121, 1, 2, 3]),
            entry(0x8000_001d, 3, [0x043f_c163, 1, 2, 3]),
            entry(0x8000_001e, 0, [0x55, 0x12a, 0x305, 0]),
            entry(0x8000_0026, 0, [1, 2, 0x100, 0x55]),
        ]
    }

    fn guest(vendor: [u32; 3], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let vcpu = Vcpu { index, count, tsc_deadline: true, tsc_khz: Some(2_000_000) };
        build(&host(vendor), vcpu, &[])
    }

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let mut found = table.iter().filter(|entry| entry.function == function && entry.index == index);
        let entry = found.next().unwrap_or_else(|| panic!("no leaf {function:#x}/{index}"));
        assert!(found.next().is_none(), "two of leaf {function:#x}/{index}");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn identity_and_topology_are_the_guests_own() {
        for (index, count, bits) in [(0, 1, 0), (3, 4, 2), (4, 5, 3), (31, 32, 5)] {
            for vendor in [INTEL, AMD] {
                let table = guest(vendor, index, count);
                let (id, count) = (u32::from(index), u32::from(count));
                let [_, ebx, ecx, edx] = leaf(&table, 1, 0);
                assert_eq!((ebx >> 24, ebx >> 16 & 0xff, ebx & 0xffff), (id, count, 0x0800));
                assert_eq!(edx & HTT != 0, count > 1);
                assert_eq!(ecx & (HYPERVISOR | TSC_DEADLINE | OSXSAVE), HYPERVISOR | TSC_DEADLINE);
                assert_eq!(leaf(&table, 0xb, 0), [0, 1, 0x100, id]);
                assert_eq!(leaf(&table, 0xb, 1), [bits, count, 0x201, id]);
                assert_eq!(leaf(&table, 0xb, 2), [0, 0, 2, id]);
                assert!(table.iter().all(|entry| !matches!(entry.function, 0x1f | 0x8000_0026)));
                assert_eq!(leaf(&table, 0xa, 0), [0; 4]);
            }
            let amd = guest(AMD, index, count);
            let [eax, ebx, ecx, _] = leaf(&amd, 0x8000_001e, 0);
            assert_eq!((eax, ebx, ecx), (index.into(), index.into(), 0));
            assert_eq!(leaf(&amd, 0x8000_0008, 0)[2], bits << 12 | (u32::from(count) - 1));
            assert_eq!(leaf(&guest(INTEL, index, count), 0x8000_0008, 0)[2], 0x705f);
        }
    }

    #[test]
    fn caches_are_shared_within_the_guest_only() {
        let table = guest(INTEL, 0, 6);
        // Bits 25..14 threads that share it less one, 31..26 cores of the package less one.
        let sharing = |eax: u32| (eax >> 14 & 0xfff, eax >> 26);
        assert_eq!(sharing(leaf(&table, 4, 0)[0]), (0, 7));
        assert_eq!(sharing(leaf(&table, 4, 1)[0]), (0, 7));
        assert_eq!(sharing(leaf(&table, 4, 2)[0]), (5, 7));
        assert_eq!(leaf(&table, 4, 2)[0] & 0x3fff, 0xfc1f_c163 & 0x3fff);
        assert_eq!(leaf(&table, 4, 3), [0; 4]);
        let table = guest(AMD, 0, 6);
        assert_eq!(leaf(&table, 0x8000_001d, 0)[0] >> 14 & 0xfff, 0);
        assert_eq!(leaf(&table, 0x8000_001d, 3)[0] >> 14 & 0xfff, 5);
    }

    #[test]
    fn frequencies_are_told_only_where_they_are_true() {
        let with =
            |tsc_khz| build(&host(INTEL), Vcpu { index: 0, count: 1, tsc_deadline: false, tsc_khz }, &[]);
        let table = with(Some(2_000_000));
        assert_eq!(leaf(&table, 0x15, 0), [2, 160, 25_000_000, 0]);
        assert_eq!(leaf(&table, 0x16, 0), [0; 4]);
        assert_eq!(leaf(&table, 0x4000_0010, 0), [2_000_000, 1_000_000, 0, 0]);
        assert_eq!(leaf(&table, 0x4000_0000, 0)[0], 0x4000_0010);
        assert_eq!(leaf(&table, 1, 0)[2] & TSC_DEADLINE, 0);
        // Scaled by KVM: the host's crystal no longer tells the guest's frequency.
        assert_eq!(leaf(&with(Some(2_500_000)), 0x15, 0), [0; 4]);
        let table = with(None);
        assert_eq!(leaf(&table, 0x15, 0), [0; 4]);
        assert!(table.iter().all(|entry| entry.function != 0x4000_0010));
        assert_eq!(leaf(&table, 0x4000_0000, 0)[0], 0x4000_0001);
    }

    #[test]
    fn xcr0_has_every_component_that_is_offered() {
        assert_eq!(xcr0(&[entry(0xd, 1, [0xf, 0, 0, 0])]), None);
        assert_eq!(xcr0(&[entry(0xd, 0, [0, 0, 0, 0])]), None);
        assert_eq!(xcr0(&[entry(0xd, 0, [0x207, 0, 0, 1])]), Some(0x1_0000_0207));
    }

    #[test]
    fn another_vendor_changes_leaf_0_alone() {
        let vcpu = Vcpu { index: 0, count: 1, tsc_deadline: false, tsc_khz: None };
        let as_amd = build(&host(AMD), vcpu, &[]);
        let as_intel = build(&host(AMD), vcpu, &vendor(INTEL));
        let [_, ebx, ecx, edx] = leaf(&as_intel, 0, 0);
        assert_eq!([ebx, ecx, edx], INTEL);
        let rest = |table: &[kvm_cpuid_entry2]| {
            table.iter().filter(|e| e.function != 0).copied().collect::<Vec<_>>()
        };
        assert_eq!(rest(&as_amd), rest(&as_intel));
    }

    #[test]
    fn patches_come_last() {
        let patch = |leaf, subleaf, register, clear, set| CpuidPatch { leaf, subleaf, register, clear, set };
        let patches = [
            patch(0x4000_0001, None, Register::Eax, 1 << 24 | 1 << 5, 0),
            patch(1, None, Register::Ecx, 1 << 31, 0),
            patch(4, Some(1), Register::Edx, 0, 0x8000_0000),
            patch(0x1234, None, Register::Ebx, 0, 1),
        ];
        let vcpu = Vcpu { index: 0, count: 1, tsc_deadline: true, tsc_khz: None };
        let table = build(&host(AMD), vcpu, &patches);
        assert_eq!(leaf(&table, 0x4000_0001, 0)[0], 0x0000_7edb);
        assert_eq!(leaf(&table, 1, 0)[2] >> 31, 0);
        assert_eq!(leaf(&table, 4, 0)[3], 3);
        assert_eq!(leaf(&table, 4, 1)[3], 0x8000_0003);
        assert!(table.iter().all(|entry| entry.function != 0x1234));
    }
}
