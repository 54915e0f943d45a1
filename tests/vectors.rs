//! What a guest's processes may rely on: vector registers, system calls, and an entry that user code cannot abuse.
//! The programs are `tests/guest/*.c`.

use std::time::Duration;

use crate::support::guest::linux_for_tests;
use crate::support::{Script, has_fast_kvm};

const PROGRAMS: &str = "/usr/lib/rvmm/tests";

/// What the programs need on top of a boot, where KVM emulates the guest's kernel.
const WORK: Duration = Duration::from_secs(300);

#[test]
fn vector_registers_and_system_calls_hold() {
    let Some(linux) = linux_for_tests() else { return };
    let script = Script::new(&format!(
        "cd {PROGRAMS}
        ./vector-state 10; report vectors $?
        ./syscall-semantics; report semantics $?
        ./syscall-entry; report entry $?
        exit 11"
    ));
    let outcome = script.run_long(linux.monitor(), WORK);
    outcome.exits(11).reports("vectors", "0").reports("semantics", "0").reports("entry", "0");
}

#[test]
fn they_hold_with_several_processors() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let script = Script::new(&format!(
        "cd {PROGRAMS}
        ./vector-state 10 & first=$!
        ./vector-state 10 & second=$!
        wait $first; report first $?
        wait $second; report second $?
        ./syscall-semantics; report semantics $?
        ./syscall-entry; report entry $?"
    ));
    let outcome = script.run_long(linux.monitor().args(["--cpus", "2"]), WORK);
    outcome.exits(0).reports("first", "0").reports("second", "0");
    outcome.reports("semantics", "0").reports("entry", "0");
}
