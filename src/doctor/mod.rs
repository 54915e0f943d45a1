//! What this host can do for rvmm: plain data first ([`Report`]), words and colours after ([`render`]).

mod containers;
mod kvm;
pub mod render;
mod system;
mod user;

use serde::Serialize;

/// Version of the JSON form, raised when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// VMs run, but something that rvmm can use is missing.
    Warn,
    /// No VM can run.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name, for programs.
    pub id: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub seen: String,
    /// What to run or do to mend it, where something is known.
    pub fix: Option<String>,
}

impl Check {
    fn new(id: &'static str, title: &'static str, state: State, seen: impl Into<String>) -> Check {
        Check { id, title, state, seen: seen.into(), fix: None }
    }

    fn ok(id: &'static str, title: &'static str, seen: impl Into<String>) -> Check {
        Check::new(id, title, State::Ok, seen)
    }

    fn warn(id: &'static str, title: &'static str, seen: impl Into<String>) -> Check {
        Check::new(id, title, State::Warn, seen)
    }

    fn fail(id: &'static str, title: &'static str, seen: impl Into<String>) -> Check {
        Check::new(id, title, State::Fail, seen)
    }

    fn with_fix(self, fix: impl Into<String>) -> Check {
        Check { fix: Some(fix.into()), ..self }
    }
}

/// All checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of rvmm.
    pub version: &'static str,
    /// Whether a VM can run: no check failed.
    pub can_run_vms: bool,
    /// `hardware`, `nested`, `pvm`, `unknown`, or nothing where KVM could not be asked.
    pub kvm_kind: Option<String>,
    /// The checks, in a fixed order.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(kvm_kind: Option<String>, checks: Vec<Check>) -> Report {
        let can_run_vms = checks.iter().all(|check| check.state != State::Fail);
        Report { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), can_run_vms, kvm_kind, checks }
    }
}

/// Looks at this host. Changes nothing.
pub fn examine() -> Report {
    let mut checks = vec![system::processor()];
    let found = kvm::examine(&mut checks);
    checks.push(user::guest_kernel(found.kind));
    checks.push(system::memory());
    checks.push(system::tun());
    checks.push(system::vhost_net());
    checks.push(system::cgroups());
    checks.push(system::io_uring());
    checks.push(system::userfaultfd());
    checks.push(system::seccomp());
    checks.push(system::user_namespaces());
    checks.push(user::tools());
    checks.push(containers::tools());
    checks.push(containers::sub_users());
    checks.push(containers::delegation());
    Report::new(found.kind.map(|kind| kind.to_string()), checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_means_that_no_vm_can_run() {
        let warned = || Check::warn("b", "B", "half");
        assert!(Report::new(None, vec![Check::ok("a", "A", "fine"), warned()]).can_run_vms);
        assert!(!Report::new(None, vec![Check::fail("a", "A", "bad"), warned()]).can_run_vms);
    }

    #[test]
    fn this_host_can_be_examined() {
        let report = examine();
        let mut ids: Vec<_> = report.checks.iter().map(|check| check.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), report.checks.len(), "ids are unique");
        for check in &report.checks {
            assert!(!check.seen.is_empty() && !check.seen.contains('\n'), "{check:?}");
        }
    }
}
