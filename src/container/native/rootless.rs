//! Without root: a user namespace in which this process is root over a range of users that the host has set aside for it.
//!
//! The whole process enters it, with a mount namespace of its own, and then makes containers as root would. Users of the
//! container are users of the range; what the container's root may do ends at the namespace.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, getgid, getuid, waitpid};
use rustix::thread::UnshareFlags;

use super::cgroup::Hierarchies;
use super::{child, sys};
use crate::container::backend::Error;

/// Largest `/etc/subuid` that is read, in bytes.
const BYTES_MAX: usize = 1 << 20;

/// A range of numbers: first and count.
type Range = (u32, u32);

/// Enters a user namespace and a mount namespace. Does nothing for root.
///
/// Called once, by a process with one thread, before anything is made for a container. With entries in `/etc/subuid` and
/// `/etc/subgid` it takes `newuidmap` and `newgidmap`; without, the container has only one user, its root.
pub fn enter_user_namespace() -> Result<(), Error> {
    if getuid().is_root() {
        return Ok(());
    }
    child::check_single_thread()?;
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    let (users, groups) = ranges_of(uid);
    if users.is_empty() || groups.is_empty() {
        unshare(UnshareFlags::NEWUSER)?;
        let write = |file: &str, text: String| {
            let path = format!("/proc/self/{file}");
            fs::write(&path, text).map_err(|source| Error::failed(format!("cannot write {path}"), source))
        };
        // Whoever is not permitted to change groups could otherwise leave one that shuts him out of something.
        write("setgroups", "deny".into())?;
        write("uid_map", format!("0 {uid} 1"))?;
        write("gid_map", format!("0 {gid} 1"))?;
    } else {
        unshare_with_maps(&mapping(uid, &users), &mapping(gid, &groups))?;
    }
    unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).map_err(|source| {
        Error::failed("cannot take the mounts for this process alone", io::Error::from(source))
    })
}

/// The users and groups that are set aside for a user.
fn ranges_of(uid: u32) -> (Vec<Range>, Vec<Range>) {
    let name = user_name(uid);
    let ranges = |path: &str| sub_ranges(&read(path), name.as_deref(), uid);
    (ranges("/etc/subuid"), ranges("/etc/subgid"))
}

/// How many users and groups the host has set aside for this one.
pub fn set_aside() -> (u64, u64) {
    let (users, groups) = ranges_of(getuid().as_raw());
    let count = |ranges: &[Range]| ranges.iter().map(|(_, count)| u64::from(*count)).sum();
    (count(&users), count(&groups))
}

fn unshare(what: UnshareFlags) -> Result<(), Error> {
    sys::unshare(what.bits()).map_err(|source| {
        Error::failed("cannot make a namespace (is it forbidden for users of this host?)", source)
    })
}

/// The maps are written by programs with the right to do so, and they must stay outside.
fn unshare_with_maps(users: &[String], groups: &[String]) -> Result<(), Error> {
    let pid = std::process::id().to_string();
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(|source| Error::failed("cannot make a pipe", io::Error::from(source)))?;
    let helper = sys::fork(|| {
        let mut byte = [0u8; 1];
        if rustix::io::read(&wait, &mut byte) != Ok(1) {
            return 1;
        }
        let run = |program: &str, map: &[String]| Command::new(program).arg(&pid).args(map).status();
        match (run("newuidmap", users), run("newgidmap", groups)) {
            (Ok(users), Ok(groups)) if users.success() && groups.success() => 0,
            (Err(_), _) | (_, Err(_)) => 2,
            _ => 1,
        }
    })
    .map_err(|source| Error::failed("cannot make a process", source))?;
    unshare(UnshareFlags::NEWUSER)?;
    drop(wait);
    fs::File::from(go)
        .write_all(b"g")
        .map_err(|source| Error::failed("cannot set the maps of users", source))?;
    let status = waitpid(Pid::from_raw(helper), WaitOptions::empty())
        .map_err(|source| Error::failed("cannot set the maps of users", io::Error::from(source)))?;
    match status.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        Some(2) => Err(Error::Unsupported {
            what: "running without root takes the programs newuidmap and newgidmap (package uidmap)".into(),
        }),
        _ => Err(Error::failed("cannot set the maps of users", "newuidmap or newgidmap has failed")),
    }
}

/// Arguments for `newuidmap`: 0 inside is the user, and from 1 on come the ranges.
fn mapping(own: u32, ranges: &[Range]) -> Vec<String> {
    let mut words = vec![0, own, 1];
    let mut next = 1u32;
    for (first, count) in ranges {
        let Some(after) = next.checked_add(*count) else { break };
        words.extend([next, *first, *count]);
        next = after;
    }
    words.iter().map(u32::to_string).collect()
}

/// Ranges of a user, by name or number (subuid(5)).
fn sub_ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<Range> {
    let one = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        if Some(owner) != name && owner != uid.to_string() {
            return None;
        }
        let range: Range = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (range.1 > 0).then_some(range)
    };
    text.lines().filter_map(one).collect()
}

fn user_name(uid: u32) -> Option<String> {
    let passwd = read("/etc/passwd");
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
    })
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(Path::new(path)).unwrap_or_default();
    if text.len() > BYTES_MAX { String::new() } else { text }
}

/// Whether this process's users are not the host's.
pub fn is_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let words: Vec<&str> = map.split_whitespace().collect();
    !words.is_empty() && words != ["0", "0", "4294967295"]
}

/// Whether the only user here is this one, since the host has set none aside for it.
pub fn has_one_user() -> bool {
    is_user_namespace() && !has_user(1)
}

/// Whether a user's number means something here.
pub(super) fn has_user(uid: u32) -> bool {
    is_mapped("/proc/self/uid_map", uid)
}

/// Whether a group's number means something here.
pub(super) fn has_group(gid: u32) -> bool {
    is_mapped("/proc/self/gid_map", gid)
}

fn is_mapped(path: &str, id: u32) -> bool {
    let map = fs::read_to_string(path).unwrap_or_default();
    map.lines().any(|line| {
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if id >= first && id - first < count)
    })
}

/// The control group for a container: `/rvmm/ID` for root; else beside this process's own, where a service manager has
/// given that part of the tree to the user.
pub fn cgroup_path(id: &str) -> PathBuf {
    let root = Path::new("/rvmm").join(id);
    if !is_user_namespace() && getuid().is_root() {
        return root;
    }
    own_parent().map_or(root, |parent| parent.join(format!("rvmm-{id}")))
}

/// The group above this process's own in the version 2 tree, unless it is the whole tree.
fn own_parent() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).map(Path::new)?;
    own.parent().filter(|parent| parent.parent().is_some()).map(Path::to_path_buf)
}

/// The directory that a user's containers have their groups in, if there is a version 2 tree.
pub fn cgroup_parent() -> Option<PathBuf> {
    let parent = own_parent()?;
    Hierarchies::find().ok()?.v2_directory(&parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_number() {
        let text = "root:1:2\nann:100000:65536\nbad\n1000:300000:10\nann:x:1\nann:5:0\n";
        assert_eq!(sub_ranges(text, Some("ann"), 1000), [(100_000, 65_536), (300_000, 10)]);
        assert_eq!(sub_ranges(text, None, 7), []);
    }

    #[test]
    fn own_user_is_root_inside_and_ranges_follow() {
        let words = mapping(1000, &[(100_000, 65_536), (300_000, 10)]).join(" ");
        assert_eq!(words, "0 1000 1 1 100000 65536 65537 300000 10");
        assert_eq!(mapping(1, &[(5, u32::MAX), (7, 1)]).len(), 3, "more than there are numbers");
    }
}
