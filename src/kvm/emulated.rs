//! What only hosts need that are machines emulated by QEMU's TCG, with nested SVM.
//!
//! TCG forgets the interrupt shadow of a guest when it enters it (`VMRUN` does not load `int_state` in
//! `target/i386/tcg/sysemu/svm_helper.c`). An interrupt that comes between `STI` and `HLT` of an idle processor is then
//! taken before the `HLT`, which sleeps on although a process is ready: until the next interrupt, and that may be half a
//! minute away where idle processors have no tick.

use super::CmdlineAddition;

/// What CPUID leaf 0x40000000 says of TCG: "TCGTCGTCGTCG" in EBX, ECX, EDX.
const TCG: [u32; 3] =
    [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")];

/// Whether this host's processor is emulated by TCG.
pub fn host_is_emulated() -> bool {
    let under_hypervisor = std::arch::x86_64::__cpuid(1).ecx & 1 << 31 != 0;
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    under_hypervisor && [leaf.ebx, leaf.ecx, leaf.edx] == TCG
}

/// The parameters that rvmm adds on such hosts.
pub fn cmdline_additions() -> &'static [CmdlineAddition] {
    &[CmdlineAddition {
        parameter: "nohz=off",
        reason: "a tick wakes idle processors whose interrupt came before their HLT",
    }]
}
