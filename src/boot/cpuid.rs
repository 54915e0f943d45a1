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
