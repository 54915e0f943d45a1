//! What containers need of this host beside KVM, and what users without root do.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Check;
use super::user::{Account, is_program};
use crate::container::native::{cgroup_parent, set_aside};

/// Programs that containers take, the Debian packages they are in, and what they are for.
const TOOLS: [(&str, &str); 9] = [
    ("netavark", "netavark"),
    ("aardvark-dns", "aardvark-dns"),
    ("iptables", "iptables"),
    ("mkfs.erofs", "erofs-utils"),
    ("mke2fs", "e2fsprogs"),
    ("pasta", "passt"),
    ("passt", "passt"),
    ("newuidmap", "uidmap"),
    ("newgidmap", "uidmap"),
];
/// Where the first two are.
const HELPERS: [&str; 4] = ["/usr/lib/podman", "/usr/libexec/podman", "/usr/sbin", "/sbin"];
/// Users that an image may have, as Debian sets them aside.
const ENOUGH_USERS: u64 = 65_536;
/// Controllers that limits of containers take.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Programs.
pub fn tools() -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> =
        std::env::split_paths(&path).chain(HELPERS.iter().map(PathBuf::from)).collect();
    tools_by(&|name| directories.iter().any(|directory| is_program(&directory.join(name))))
}

fn tools_by(has: &dyn Fn(&str) -> bool) -> Check {
    let (id, title) = ("container-tools", "container tools");
    let missing: Vec<_> = TOOLS.iter().filter(|(name, _)| !has(name)).collect();
    if missing.is_empty() {
        let names: Vec<&str> = TOOLS.iter().map(|(name, _)| *name).collect();
        return Check::ok(id, title, names.join(", "));
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Check::warn(id, title, format!("missing: {}", names.join(", ")))
        .with_fix(format!("sudo apt-get install {}", packages.join(" ")))
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Users that the host sets aside for this one.
pub fn sub_users() -> Check {
    let account = Account::current();
    sub_users_from(is_root(), set_aside(), &account.name)
}

fn sub_users_from(root: bool, (users, groups): (u64, u64), name: &str) -> Check {
    let (id, title) = ("sub-users", "users for containers");
    if root {
        return Check::ok(id, title, "root needs none set aside");
    }
    let seen = format!("{users} users in /etc/subuid and {groups} groups in /etc/subgid are {name}'s");
    if users.min(groups) >= ENOUGH_USERS {
        return Check::ok(id, title, seen);
    }
    Check::warn(id, title, format!("{seen}: containers have few users, or root alone")).with_fix(format!(
        "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name} (a range that no other line has)"
    ))
}

/// Whether limits can be had.
pub fn delegation() -> Check {
    let parent = cgroup_parent();
    let found = parent
        .as_deref()
        .filter(|parent| is_writable(parent))
        .map(|parent| fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default());
    delegation_from(is_root(), found.as_deref())
}

fn is_writable(directory: &Path) -> bool {
    rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok()
}

/// From the controllers of the part of the tree that is the user's, if one is.
fn delegation_from(root: bool, controllers: Option<&str>) -> Check {
    let (id, title) = ("cgroup-delegation", "cgroup delegation");
    if root {
        return Check::ok(id, title, "root needs none");
    }
    let again = "start rvmm by `systemd-run --user --scope -p Delegate=yes`, and see docs/rootless.md for the controllers";
    let Some(controllers) = controllers else {
        let seen = "no part of the version 2 tree is this user's here: native containers have no limits and no pause";
        return Check::warn(id, title, seen).with_fix(again);
    };
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|name| controllers.split_whitespace().all(|there| there != *name))
        .collect();
    if missing.is_empty() {
        return Check::ok(id, title, format!("with controllers {}", CONTROLLERS.join(", ")));
    }
    Check::warn(id, title, format!("without controllers {}", missing.join(", "))).with_fix(again)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn missing_programs_name_their_packages_once() {
        let check = tools_by(&|name| !matches!(name, "pasta" | "passt" | "mkfs.erofs"));
        assert_eq!(check.fix.unwrap(), "sudo apt-get install erofs-utils passt");
        assert_eq!(tools_by(&|_| true).state, State::Ok);
    }

    #[test]
    fn users_are_counted_for_those_who_are_not_root() {
        assert_eq!(sub_users_from(true, (0, 0), "root").state, State::Ok);
        assert_eq!(sub_users_from(false, (65_536, 65_536), "ann").state, State::Ok);
        let check = sub_users_from(false, (65_536, 0), "ann");
        assert!(check.state == State::Warn && check.fix.unwrap().contains("usermod"));
    }

    #[test]
    fn controllers_that_are_missing_are_named() {
        assert_eq!(delegation_from(true, None).state, State::Ok);
        assert_eq!(delegation_from(false, None).state, State::Warn);
        assert_eq!(delegation_from(false, Some("cpu io memory pids hugetlb")).state, State::Ok);
        assert_eq!(delegation_from(false, Some("memory pids")).seen, "without controllers cpu, io");
    }
}
