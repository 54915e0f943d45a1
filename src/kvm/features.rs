//! Which features of the processor a guest relies on, and whether another host has them.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::kind::Kind;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Words of feature bits, and in each the bits that say nothing of the processor: those that KVM provides itself
/// (x2APIC, TSC deadline), that follow the guest's CR4 (OSXSAVE, OSPKE), and that describe the topology.
const WORDS: [(u32, u32, Register, u32); 12] = [
    (1, 0, Register::Ecx, 1 << 3 | 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    (1, 0, Register::Edx, 1 << 28),
    (7, 0, Register::Ebx, 0),
    (7, 0, Register::Ecx, 1 << 4),
    (7, 0, Register::Edx, 0),
    (7, 1, Register::Eax, 0),
    (0xd, 0, Register::Eax, 0),
    (0xd, 1, Register::Eax, 0),
    (0x4000_0001, 0, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
];

/// KVM's own leaves, which have nothing to do with the host's processor.
const KVM_LEAVES: u32 = 0x4000_0000;

/// Names of features that hosts of one make differ in, for people.
const NAMES: [(u32, u32, Register, u32, &str); 18] = [
    (1, 0, Register::Ecx, 12, "fma"),
    (1, 0, Register::Ecx, 26, "xsave"),
    (1, 0, Register::Ecx, 28, "avx"),
    (1, 0, Register::Ecx, 30, "rdrand"),
    (7, 0, Register::Ebx, 0, "fsgsbase"),
    (7, 0, Register::Ebx, 5, "avx2"),
    (7, 0, Register::Ebx, 10, "invpcid"),
    (7, 0, Register::Ebx, 16, "avx512f"),
    (7, 0, Register::Ebx, 18, "rdseed"),
    (7, 0, Register::Ebx, 20, "smap"),
    (7, 0, Register::Ebx, 29, "sha_ni"),
    (7, 0, Register::Ecx, 3, "pku"),
    (7, 0, Register::Ecx, 9, "vaes"),
    (7, 0, Register::Ecx, 16, "la57"),
    (7, 0, Register::Edx, 24, "amx_tile"),
    (7, 1, Register::Eax, 5, "avx512_bf16"),
    (0xd, 0, Register::Eax, 9, "pku state"),
    (0xd, 1, Register::Eax, 3, "xsaves"),
];

/// What a guest may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// EBX, ECX and EDX of leaf 0.
    vendor: [u32; 3],
    words: Vec<Word>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    leaf: u32,
    subleaf: u32,
    register: Register,
    bits: u32,
}

/// Why a guest cannot go on here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Another maker's processor, whose registers mean other things.
    #[error("it was made on a processor of {saved:?}, and this one is of {host:?}")]
    Vendor {
        /// There.
        saved: String,
        /// Here.
        host: String,
    },
    /// Features.
    #[error("it needs features that this host's processor, or its KVM, lacks: {0}")]
    Features(String),
}

impl Features {
    /// What a guest relies on that sees `cpuid`, on this host.
    pub fn needed(kind: Kind, cpuid: &[kvm_cpuid_entry2]) -> Features {
        Features::collect(kind, cpuid)
    }

    /// What this host can give a guest, `supported` being what its KVM says.
    pub fn of_host(kind: Kind, supported: &[kvm_cpuid_entry2]) -> Features {
        Features::collect(kind, supported)
    }

    /// On PVM a guest sees the processor's own leaves, whatever KVM is told.
    fn collect(kind: Kind, entries: &[kvm_cpuid_entry2]) -> Features {
        let max = [0, 0x8000_0000].map(|leaf| std::arch::x86_64::__cpuid(leaf).eax);
        let read = |leaf: u32, subleaf: u32| -> Option<[u32; 4]> {
            if kind == Kind::Pvm && leaf & KVM_LEAVES == 0 {
                let known = max.iter().any(|max| leaf <= *max && leaf >> 31 == max >> 31);
                let found = std::arch::x86_64::__cpuid_count(leaf, subleaf);
                return known.then_some([found.eax, found.ebx, found.ecx, found.edx]);
            }
            let found = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf))?;
            Some([found.eax, found.ebx, found.ecx, found.edx])
        };
        let words = WORDS.into_iter().filter_map(|(leaf, subleaf, register, ignored)| {
            let [eax, ebx, ecx, edx] = read(leaf, subleaf)?;
            let value = match register {
                Register::Eax => eax,
                Register::Ebx => ebx,
                Register::Ecx => ecx,
                Register::Edx => edx,
            };
            Some(Word { leaf, subleaf, register, bits: value & !ignored })
        });
        let vendor = std::arch::x86_64::__cpuid(0);
        Features { vendor: [vendor.ebx, vendor.edx, vendor.ecx], words: words.collect() }
    }

    /// Checks that a host with `self` can run a guest that relies on `needed`.
    pub fn check(&self, needed: &Features) -> Result<(), Missing> {
        if self.vendor != needed.vendor {
            return Err(Missing::Vendor { saved: name(needed.vendor), host: name(self.vendor) });
        }
        let mut missing = Vec::new();
        for word in &needed.words {
            let same = |other: &&Word| {
                (other.leaf, other.subleaf, other.register) == (word.leaf, word.subleaf, word.register)
            };
            let have = self.words.iter().find(same).map_or(0, |found| found.bits);
            let lacking = word.bits & !have;
            missing.extend((0..32).filter(|bit| lacking >> bit & 1 != 0).map(|bit| word.describe(bit)));
        }
        if missing.is_empty() { Ok(()) } else { Err(Missing::Features(missing.join(", "))) }
    }
}

impl Word {
    fn describe(&self, bit: u32) -> String {
        let is_it = |known: &&(u32, u32, Register, u32, &str)| {
            (known.0, known.1, known.2, known.3) == (self.leaf, self.subleaf, self.register, bit)
        };
        NAMES.iter().find(is_it).map_or_else(
            || format!("bit {bit} of {:?} in CPUID leaf {:#x}.{}", self.register, self.leaf, self.subleaf),
            |known| known.4.to_owned(),
        )
    }
}

fn name(vendor: [u32; 3]) -> String {
    let bytes: Vec<u8> = vendor.into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx, ecx, ..Default::default() }
    }

    #[test]
    fn host_must_have_what_the_guest_sees_and_may_have_more() {
        let host = Features::of_host(Kind::Hardware, &[leaf(1, 0, 0, 1 << 28), leaf(7, 0, 1 << 5, 0)]);
        let guest = |cpuid: &[kvm_cpuid_entry2]| Features::needed(Kind::Hardware, cpuid);
        assert_eq!(host.check(&guest(&[leaf(7, 0, 1 << 5, 0)])), Ok(()));
        assert_eq!(host.check(&guest(&[])), Ok(()));
        // KVM's own, and what follows from the guest's CR4.
        assert_eq!(host.check(&guest(&[leaf(1, 0, 0, 1 << 24 | 1 << 27 | 1 << 31)])), Ok(()));
        let missing = host.check(&guest(&[leaf(7, 0, 1 << 5 | 1 << 16, 1 << 30)])).unwrap_err();
        assert_eq!(missing, Missing::Features("avx512f, bit 30 of Ecx in CPUID leaf 0x7.0".into()));
        let other = Features { vendor: [1, 2, 3], ..guest(&[]) };
        assert!(matches!(host.check(&other), Err(Missing::Vendor { .. })));
    }

    #[test]
    fn guest_on_pvm_relies_on_the_processor_itself() {
        let here = Features::of_host(Kind::Pvm, &[]);
        assert_eq!(here.check(&Features::needed(Kind::Pvm, &[])), Ok(()));
        assert!(here.words.iter().any(|word| word.leaf == 1 && word.bits != 0));
    }
}
