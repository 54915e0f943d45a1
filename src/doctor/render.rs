//! A report as text and as JSON.

use std::fmt::Write;

use super::{Report, State};

/// Columns that titles take.
const TITLE_WIDTH: usize = 18;

/// The report for people: one line for each check, and below it what mends it.
pub fn text(report: &Report, colour: bool) -> String {
    let mut out = String::new();
    for check in &report.checks {
        let (word, code) = match check.state {
            State::Ok => ("ok", 32),
            State::Warn => ("warn", 33),
            State::Fail => ("FAIL", 31),
        };
        let mark = if colour { format!("\x1b[{code}m{word:<4}\x1b[0m") } else { format!("{word:<4}") };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{mark}  {:<TITLE_WIDTH$}  {}", check.title, check.seen);
        if let Some(fix) = &check.fix {
            let _ = writeln!(out, "{:6}{:<TITLE_WIDTH$}  -> {fix}", "", "");
        }
    }
    let verdict = if report.can_run_vms {
        "This host can run VMs."
    } else {
        "This host cannot run VMs; what says FAIL has to be mended."
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}

/// The report for programs; the form is described in `docs/doctor.md`.
pub fn json(report: &Report) -> serde_json::Result<String> {
    serde_json::to_string_pretty(report).map(|text| text + "\n")
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    fn report() -> Report {
        let broken =
            Check::fail("kvm-device", "KVM device", "/dev/kvm does not exist").with_fix("modprobe kvm");
        Report::new(None, vec![Check::ok("memory", "memory", "lots"), broken])
    }

    #[test]
    fn text_lists_checks_and_fixes() {
        let expected = "ok    memory              lots\n\
                        FAIL  KVM device          /dev/kvm does not exist\n                          -> modprobe kvm\n\n\
                        This host cannot run VMs; what says FAIL has to be mended.\n";
        assert_eq!(text(&report(), false), expected);
    }

    #[test]
    fn colour_is_only_there_when_asked_for() {
        assert!(!text(&report(), false).contains('\x1b'));
        assert!(text(&report(), true).contains("\x1b[31mFAIL\x1b[0m"));
    }

    #[test]
    fn json_has_the_documented_fields() {
        let value: serde_json::Value = serde_json::from_str(&json(&report()).unwrap()).unwrap();
        assert_eq!(value["schema"], 1);
        assert_eq!(value["can_run_vms"], false);
        assert_eq!(value["kvm_kind"], serde_json::Value::Null);
        assert_eq!(value["version"], env!("CARGO_PKG_VERSION"));
        let check = &value["checks"][1];
        assert_eq!((&check["id"], &check["state"]), (&"kvm-device".into(), &"fail".into()));
        assert_eq!((&check["title"], &check["fix"]), (&"KVM device".into(), &"modprobe kvm".into()));
        assert_eq!(check["seen"], "/dev/kvm does not exist");
    }
}
