//! From the lists to filters that the kernel runs before every system call.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::Kind;
use super::calls::{self, Arguments, Rule};

/// Makes the filter of a kind of thread: what is not in its lists is trapped.
pub(super) fn compile(kind: Kind) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for rule in calls::lists(kind).iter().copied().flatten() {
        let conditions = conditions(rule)?;
        if conditions.is_empty() {
            unconditional.push(rule.call);
        }
        rules.entry(rule.call).or_default().extend(conditions);
    }
    // The standard library's own check of each descriptor that it closes.
    if cfg!(debug_assertions) && !unconditional.contains(&libc::SYS_fcntl) {
        let questions = &[libc::F_GETFD as u64, libc::F_GETFL as u64];
        let check = Rule { call: libc::SYS_fcntl, arguments: Arguments::OneOf(1, questions) };
        rules.entry(check.call).or_default().extend(conditions(&check)?);
    }
    // Trapped it would not get as far as to be refused.
    unconditional.push(libc::SYS_mremap);
    // Without rules a call is allowed with any arguments.
    for call in unconditional {
        rules.insert(call, Vec::new());
    }
    SeccompFilter::new(rules, otherwise(), SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// What becomes of other calls.
fn otherwise() -> SeccompAction {
    // For measurements: the calls are made, and a trace shows which.
    if cfg!(debug_assertions) && std::env::var_os("RVMM_SANDBOX_LEARN").is_some() {
        return SeccompAction::Log;
    }
    SeccompAction::Trap
}

/// Makes the filter that has some calls fail as on a kernel that does not know them: `mremap`, instead of which the C
/// library copies; and for the launcher `clone3`, instead of which it uses `clone`, whose flags a filter can see.
pub(super) fn refusing(kind: Kind) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::from([(libc::SYS_mremap, Vec::new())]);
    if kind == Kind::Launcher {
        rules.insert(libc::SYS_clone3, Vec::new());
    }
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64)?.try_into()
}

/// Any of these must hold; none is there for a call that needs none.
fn conditions(rule: &Rule) -> Result<Vec<SeccompRule>, BackendError> {
    let one = |place, op, value| -> Result<SeccompRule, BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(place, Len::Dword, op, value)?])
    };
    match rule.arguments {
        Arguments::Any => Ok(Vec::new()),
        Arguments::OneOf(place, numbers) => {
            numbers.iter().map(|number| one(place, Op::Eq, *number)).collect()
        }
        Arguments::Without(place, bits) => Ok(vec![one(place, Op::MaskedEq(bits), 0)?]),
        Arguments::Bits(place, mask, value) => Ok(vec![one(place, Op::MaskedEq(mask), value)?]),
        Arguments::ThisProcess => Ok(vec![one(0, Op::Eq, std::process::id().into())?]),
    }
}
