//! Which kind of KVM a host has: see `docs/hosts.md`.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::probe::{self, Finding};

/// A kind of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// On VMX or SVM.
    Hardware,
    /// On VMX or SVM of a host that is a guest itself.
    Nested,
    /// On page tables alone: guest kernel code is emulated.
    Pvm,
    /// Neither names nor the probe VM tell.
    Unknown,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Kind::Hardware => "hardware",
            Kind::Nested => "nested",
            Kind::Pvm => "pvm",
            Kind::Unknown => "unknown",
        })
    }
}

/// The names that tell kinds apart, as this host shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The module kvm_intel or kvm_amd is there.
    pub hardware_module: bool,
    /// The module kvm_pvm is there.
    pub pvm_module: bool,
    /// The processor has VMX or SVM.
    pub virtualization: bool,
    /// This host runs under a hypervisor.
    pub hypervisor: bool,
}

impl Names {
    /// Looks at this host.
    pub fn of_host() -> Names {
        let module = |name: &str| Path::new("/sys/module").join(name).exists();
        let basic = std::arch::x86_64::__cpuid(1);
        let has_extended = std::arch::x86_64::__cpuid(0x8000_0000).eax > 0x8000_0000;
        // VMX: leaf 1 ECX bit 5; SVM: leaf 0x80000001 ECX bit 2; hypervisor: leaf 1 ECX bit 31.
        let svm = has_extended && std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 << 2 != 0;
        Names {
            hardware_module: module("kvm_intel") || module("kvm_amd"),
            pvm_module: module("kvm_pvm"),
            virtualization: basic.ecx & 1 << 5 != 0 || svm,
            hypervisor: basic.ecx & 1 << 31 != 0,
        }
    }

    /// The kind that the names stand for.
    ///
    /// A module that is built in shows up only if it has parameters, as all three have. Two modules at once say
    /// nothing about which of them `/dev/kvm` is.
    pub fn kind(self) -> Kind {
        let on_hardware = if self.hypervisor { Kind::Nested } else { Kind::Hardware };
        match (self.hardware_module, self.pvm_module) {
            (true, true) => Kind::Unknown,
            (false, true) => Kind::Pvm,
            (true, false) => on_hardware,
            (false, false) if self.virtualization => on_hardware,
            (false, false) => Kind::Unknown,
        }
    }

    /// The kind, given also what a probe VM found.
    pub fn kind_with(self, finding: Finding) -> Kind {
        match (finding, self.kind()) {
            (Finding::Emulated, _) => Kind::Pvm,
            (Finding::Native, _) if self.hypervisor => Kind::Nested,
            (Finding::Native, _) => Kind::Hardware,
            (Finding::Inconclusive, by_name) => by_name,
        }
    }
}

/// Tells the kind of this host's KVM: from names, which takes microseconds, and from a probe VM where names do not
/// tell.
pub fn detect(kvm: &kvm_ioctls::Kvm) -> Kind {
    let names = Names::of_host();
    match names.kind() {
        Kind::Unknown => names.kind_with(probe::run(kvm).unwrap_or(Finding::Inconclusive)),
        kind => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Names =
        Names { hardware_module: false, pvm_module: false, virtualization: false, hypervisor: false };
    const HARDWARE: Names = Names { hardware_module: true, virtualization: true, ..NONE };
    const PVM: Names = Names { pvm_module: true, hypervisor: true, ..NONE };

    #[test]
    fn names_tell_the_kind() {
        assert_eq!(HARDWARE.kind(), Kind::Hardware);
        assert_eq!(Names { hypervisor: true, ..HARDWARE }.kind(), Kind::Nested);
        assert_eq!(PVM.kind(), Kind::Pvm);
        assert_eq!(Names { virtualization: true, ..NONE }.kind(), Kind::Hardware);
        assert_eq!(NONE.kind(), Kind::Unknown);
        assert_eq!(Names { pvm_module: true, ..HARDWARE }.kind(), Kind::Unknown);
    }

    #[test]
    fn probe_overrules_names() {
        assert_eq!(HARDWARE.kind_with(Finding::Emulated), Kind::Pvm);
        assert_eq!(PVM.kind_with(Finding::Native), Kind::Nested);
        assert_eq!(NONE.kind_with(Finding::Native), Kind::Hardware);
        assert_eq!(PVM.kind_with(Finding::Inconclusive), Kind::Pvm);
        assert_eq!(NONE.kind_with(Finding::Inconclusive), Kind::Unknown);
    }
}
