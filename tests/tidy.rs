//! Rules of the source tree: which module may use which, where `unsafe` may stand, how large a file may be.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of a source file at most: what one reads in a sitting.
const MAX_FILE_BYTES: u64 = 32 << 10;

/// What each top-level module may use of the others. `platform` and `program` are for all.
const MAY_USE: [(&str, &[&str]); 27] = [
    ("bench", &[]),
    (
        "cli",
        &[
            "api",
            "bench",
            "boot",
            "container",
            "doctor",
            "fileserver",
            "image",
            "kvm",
            "metrics",
            "mmds",
            "sandbox",
            "terminal",
            "vm",
        ],
    ),
    ("container", &["api", "guest", "image", "kvm", "tap", "vm"]),
    ("image", &[]),
    ("guest", &[]),
    ("api", &["metrics", "mmds", "sandbox", "socket", "vm"]),
    ("doctor", &["container", "kvm", "vm"]),
    (
        "vm",
        &[
            "boot",
            "bus",
            "disk",
            "fileserver",
            "kvm",
            "legacy",
            "memory",
            "metrics",
            "mmds",
            "sandbox",
            "snapshot_files",
            "socket",
            "tap",
            "terminal",
            "virtio",
        ],
    ),
    ("virtio", &["bus", "disk", "fuse", "memory", "metrics", "mmds", "sandbox", "socket", "tap"]),
    ("fileserver", &["fuse", "sandbox"]),
    ("fuse", &[]),
    ("guest", &[]),
    ("legacy", &["bus"]),
    ("kvm", &["memory"]),
    ("boot", &["memory"]),
    ("memory", &["terminal"]),
    ("bus", &[]),
    ("disk", &[]),
    ("platform", &[]),
    ("program", &[]),
    ("metrics", &[]),
    ("mmds", &["metrics"]),
    ("sandbox", &["disk", "snapshot_files", "terminal"]),
    ("snapshot_files", &[]),
    ("socket", &["sandbox"]),
    ("tap", &[]),
    ("terminal", &[]),
];

/// Where `unsafe` may stand: the places that talk to the kernel behind Rust's back.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/bin/rvmm-init/system.rs",
    "src/bin/rvmm-probe/system.rs",
    "src/container/fork.rs",
    "src/container/native/sys.rs",
    "src/disk/",
    "src/doctor/",
    "src/fileserver/sandbox.rs",
    "src/kvm/",
    "src/memory/",
    "src/sandbox/escape.rs",
    "src/sandbox/fork.rs",
    "src/sandbox/violation.rs",
    "src/tap.rs",
    "src/terminal.rs",
    "src/virtio/block.rs",
    "src/virtio/net/",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below a directory of the project, with their path from the root.
fn rust_files(directory: &str) -> Vec<(String, String)> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = vec![];
    walk(&root().join(directory), &mut found);
    assert!(!found.is_empty(), "no Rust file below {directory}");
    let relative = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    found.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

/// The part of a file that is not its tests.
fn product(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

/// Names of top-level modules that a text refers to by `crate::NAME`.
fn used_modules(text: &str) -> BTreeSet<String> {
    let code =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut used = BTreeSet::new();
    for part in code.split("crate::").skip(1) {
        let names = part.strip_prefix('{').map_or(part, |list| list.split("};").next().unwrap_or(list));
        let first_of = |item: &str| -> String {
            item.trim().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
        };
        if part.starts_with('{') {
            used.extend(names.split(',').map(first_of));
        } else {
            used.insert(first_of(names));
        }
    }
    used
}

#[test]
fn modules_use_only_what_lies_below_them() {
    let modules: BTreeSet<&str> = MAY_USE.iter().map(|(name, _)| *name).collect();
    let mut wrong = vec![];
    for (path, text) in rust_files("src") {
        let inner = path.strip_prefix("src/").unwrap();
        let module = inner.split('/').next().unwrap().trim_end_matches(".rs");
        if ["lib", "main", "bin"].contains(&module) {
            continue;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{path}: module {module} has no rule"));
            continue;
        };
        for used in used_modules(product(&text)) {
            let known = modules.contains(used.as_str());
            if known
                && used != module
                && !["platform", "program"].contains(&used.as_str())
                && !allowed.contains(&used.as_str())
            {
                wrong.push(format!("{path}: {module} uses {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn rule_finds_what_it_is_for() {
    let used = used_modules(
        "use crate::kvm::Vm;\n// crate::comment\nuse crate::{bus, vm::{self, X}};\ncrate::disk::f()",
    );
    assert_eq!(
        used.into_iter().filter(|u| MAY_USE.iter().any(|(n, _)| n == u)).collect::<Vec<_>>(),
        ["bus", "disk", "kvm", "vm"]
    );
}

#[test]
fn unsafe_stands_only_where_it_may() {
    for (path, text) in rust_files("src") {
        let allows = text.contains("#![allow(unsafe_code)]");
        let may = MAY_BE_UNSAFE.iter().any(|place| path.starts_with(place));
        assert!(!allows || may, "{path} opts into unsafe code");
    }
}

#[test]
fn files_are_of_a_size_that_one_reads_in_a_sitting() {
    let mut large = vec![];
    for directory in ["src", "tests"] {
        for (path, _) in rust_files(directory) {
            let bytes = fs::metadata(root().join(&path)).unwrap().len();
            if bytes > MAX_FILE_BYTES {
                large.push(format!("{path}: {bytes} bytes"));
            }
        }
    }
    assert!(large.is_empty(), "{large:#?}");
}

#[test]
fn one_version_of_the_crates_whose_types_cross_modules() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for name in ["vm-memory", "kvm-bindings", "vmm-sys-util", "virtio-queue"] {
        let count = lock.matches(&format!("name = \"{name}\"\n")).count();
        assert_eq!(count, 1, "{name}");
    }
}
