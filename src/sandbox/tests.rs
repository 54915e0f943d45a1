use std::collections::BTreeSet;

use super::calls::{Arguments, lists};
use super::*;

fn calls_of(kind: Kind) -> BTreeSet<i64> {
    lists(kind).iter().copied().flatten().map(|rule| rule.call).collect()
}

#[test]
fn lists_are_as_short_as_promised() {
    assert!(calls_of(Kind::Vcpu).len() <= 12);
    for kind in Kind::ALL.into_iter().skip(6) {
        assert!(calls_of(kind).len() <= 25, "{kind:?}: {}", calls_of(kind).len());
    }
}

#[test]
fn launcher_may_what_the_threads_may_that_it_starts() {
    let launcher = calls_of(Kind::Launcher);
    for kind in Kind::ALL.into_iter().skip(6) {
        assert!(calls_of(kind).is_subset(&launcher), "{kind:?}");
    }
}

#[test]
fn nothing_opens_runs_or_leads_out() {
    let never = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_io_uring_setup,
        libc::SYS_mount,
        libc::SYS_ptrace,
        libc::SYS_setns,
        libc::SYS_unshare,
    ];
    for kind in Kind::ALL {
        let calls = calls_of(kind);
        assert!(!never.iter().any(|call| calls.contains(call)), "{kind:?}");
        assert_eq!(calls.contains(&libc::SYS_openat), kind == Kind::Keeper, "{kind:?}");
        assert!(filter::compile(kind).is_ok(), "{kind:?}");
    }
}

/// Name, arguments and reason of each call as the source has them, for the list that starts with `name`.
fn of_the_source(name: &str) -> Vec<(String, String)> {
    let source = include_str!("calls.rs");
    let start = source.find(&format!("const {name}: &[Rule]")).unwrap_or_else(|| panic!("no list {name}"));
    let list = source[start..].split("];").next().unwrap();
    list.lines()
        .filter_map(|line| {
            let (_, call) = line.split_once("libc::SYS_")?;
            let name = call.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()?;
            let why = line.rsplit_once("// ").map(|(_, why)| why.trim());
            Some((name.to_owned(), why.unwrap_or_else(|| panic!("no reason: {line}")).to_owned()))
        })
        .collect()
}

/// The same as the documentation has it, under a heading.
fn of_the_documentation(heading: &str) -> Vec<(String, String)> {
    let text = include_str!("../../docs/security.md");
    let start =
        text.find(&format!("### Calls: {heading}\n")).unwrap_or_else(|| panic!("no heading {heading}"));
    let section = text[start..].split("\n#").next().unwrap();
    section
        .lines()
        .filter_map(|line| {
            let (name, why) = line.strip_prefix("| `")?.split_once("` | ")?;
            Some((name.to_owned(), why.trim_end_matches('|').trim().to_owned()))
        })
        .collect()
}

#[test]
fn documentation_lists_the_calls_that_the_code_allows() {
    for (list, heading) in [
        ("MAIN", "main"),
        ("VCPU", "vCPU"),
        ("LAUNCHER", "launcher"),
        ("CONSOLE", "console"),
        ("API", "api"),
        ("KEEPER", "keeper"),
        ("DEVICE", "every device"),
        ("RNG", "virtio-rng"),
        ("BALLOON", "virtio-balloon"),
        ("BLOCK_URING", "virtio-block (io_uring)"),
        ("BLOCK_SYNC", "virtio-block (sync)"),
        ("NET", "virtio-net"),
        ("VSOCK", "virtio-vsock"),
        ("FS", "virtio-fs"),
    ] {
        assert_eq!(of_the_source(list), of_the_documentation(heading), "{list}");
    }
}

#[test]
fn rows_without_arguments_are_whole() {
    for kind in Kind::ALL {
        for rule in lists(kind).iter().copied().flatten() {
            if let Arguments::OneOf(place, numbers) = rule.arguments {
                assert!(place < 6 && !numbers.is_empty(), "{}", name(rule.call).unwrap_or_default());
            }
        }
    }
}
