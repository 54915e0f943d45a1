//! What is added to a guest's command line on PVM hosts.

use crate::kvm::CmdlineAddition;

/// Processor features to be hidden, by the kernel's numbers of them (`word * 32 + bit`, see
/// `arch/x86/include/asm/cpufeatures.h`): the guest's CPUID instruction shows the host's own leaves on PVM hosts, so
/// only the guest kernel itself can be asked not to use them.
///
/// - 59 RDTSCP: the kernel reads its clock with it, at the price of an exit each time; RDTSC is emulated by KVM
/// - 141 CX16, 151 POPCNT, 308 SMAP, 534 RDPID: used throughout the kernel, absent from KVM's emulator
/// - 145 PCID, 298 INVPCID: the same, for flushing the TLB
/// - 288 FSGSBASE, 295 SMEP: CR4 bits that only add work to every entry
/// - 297 ERMS, 580 FSRM: make the kernel copy with REP MOVSB, which KVM emulates byte by byte; REP MOVSQ is 7 times
///   faster
/// - 320 XSAVEOPT, 321 XSAVEC, 322 XGETBV1, 323 XSAVES: XSAVE saves the same, and is what a kernel executes that does
///   not patch its own code, as rvmm's does not on PVM hosts
const HIDDEN_FEATURES: &str = "clearcpuid=59,141,145,151,288,295,297,298,308,320,321,322,323,534,580";

/// The parameters that rvmm adds on PVM hosts.
pub fn cmdline_additions() -> &'static [CmdlineAddition] {
    &[
        CmdlineAddition {
            parameter: "pvm_syscall_fixup",
            reason: "lets the PVM kernel mend SYSCALL, which arrives with the privileges of user code",
        },
        CmdlineAddition {
            parameter: "pvm_host",
            reason: "the guest kernel leaves out what is slow, or impossible, where its code is emulated",
        },
        CmdlineAddition {
            parameter: "rvmm_ports",
            reason: "without ACPI, the guest kernel powers off and tells of a panic by rvmm's ports",
        },
        CmdlineAddition { parameter: "tsc=reliable", reason: "a watchdog over the clock only costs time" },
        CmdlineAddition {
            parameter: HIDDEN_FEATURES,
            reason: "instructions of these features are missing from KVM's emulator, or slow in it",
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_added_once() {
        let mut names: Vec<_> =
            cmdline_additions().iter().map(|addition| addition.parameter.split('=').next()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cmdline_additions().len());
    }

    #[test]
    fn additions_are_single_words() {
        for addition in cmdline_additions() {
            assert!(!addition.parameter.contains(char::is_whitespace), "{addition:?}");
        }
    }
}
