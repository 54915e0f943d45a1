//! The unprivileged user of a monitor: a number of its own for each sandbox, that nothing else on the host has.
//!
//! Which numbers are taken is noted by links in a directory, one for each, that lead to their sandboxes.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The first number, far above those of people, services and the usual ranges of `/etc/subuid`.
const FIRST: u32 = 0x7000_0000;
/// How many numbers there are.
const COUNT: u32 = 1 << 16;
/// File in a sandbox that says which number is its own.
const NOTE: &str = "uid";

/// Takes a number for the sandbox at `dir`; `None` where this user has none to give.
pub fn take(dir: &Path) -> io::Result<Option<u32>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let Some((first, count)) = range(&map) else { return Ok(None) };
    if let Ok(Ok(uid)) = fs::read_to_string(dir.join(NOTE)).map(|text| text.trim().parse()) {
        return Ok(Some(uid));
    }
    let links = links(dir);
    fs::create_dir_all(&links)?;
    let target = fs::canonicalize(dir)?;
    // Neighbours start at different places, so that few meet.
    let start = std::process::id() % count;
    for step in 0..count {
        let uid = first + (start + step) % count;
        let link = links.join(uid.to_string());
        match symlink(&target, &link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A sandbox that was not left in good order, and is gone.
                if fs::metadata(&link).is_ok() || fs::remove_file(&link).is_err() {
                    continue;
                }
                if symlink(&target, &link).is_err() {
                    continue;
                }
            }
            Err(error) => return Err(error),
        }
        fs::write(dir.join(NOTE), uid.to_string())?;
        return Ok(Some(uid));
    }
    Err(io::Error::other("all users for monitors are taken"))
}

/// Gives the number of the sandbox at `dir` back.
pub fn give_back(dir: &Path) {
    if let Ok(uid) = fs::read_to_string(dir.join(NOTE)) {
        let _ = fs::remove_file(links(dir).join(uid.trim()));
        let _ = fs::remove_file(dir.join(NOTE));
    }
}

/// `RUN/uids` for `RUN/sandboxes/ID`.
fn links(dir: &Path) -> PathBuf {
    dir.parent().and_then(Path::parent).unwrap_or(dir).join("uids")
}

/// The numbers for monitors in a user namespace with this map, and how many: as they are on the host, or the upper quarter
/// of a range of subordinate numbers.
fn range(map: &str) -> Option<(u32, u32)> {
    let ranges: Vec<(u32, u32)> = map
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace().map(str::parse::<u32>);
            let (inside, _, count) = (words.next()?.ok()?, words.next()?.ok()?, words.next()?.ok()?);
            Some((inside, count))
        })
        .collect();
    let holds_all = |(inside, count): &&(u32, u32)| {
        *inside <= FIRST && u64::from(*inside) + u64::from(*count) >= u64::from(FIRST) + u64::from(COUNT)
    };
    if ranges.iter().find(holds_all).is_some() {
        return Some((FIRST, COUNT));
    }
    let (inside, count) = ranges.into_iter().max_by_key(|(_, count)| *count)?;
    let quarter = count / 4;
    (quarter > 0).then(|| (inside + (count - quarter), quarter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lie_in_what_is_mapped() {
        assert_eq!(range("         0          0 4294967295\n"), Some((FIRST, COUNT)));
        assert_eq!(range("0 1000 1\n1 100000 65536\n"), Some((1 + 65536 - 16384, 16384)));
        assert_eq!(range("0 1000 1\n"), None);
        assert_eq!(range(""), None);
    }

    #[test]
    fn each_sandbox_has_its_own_number_until_it_is_left() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let run = tempfile::tempdir().unwrap();
        let dirs = ["a", "b"].map(|name| run.path().join("sandboxes").join(name));
        dirs.iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
        let Some(first) = take(&dirs[0]).unwrap() else { return };
        let second = take(&dirs[1]).unwrap().unwrap();
        assert_ne!(first, second);
        assert_eq!(take(&dirs[0]).unwrap(), Some(first));
        give_back(&dirs[0]);
        assert!(!run.path().join("uids").join(first.to_string()).exists());
        // The number of a sandbox that is gone is free.
        fs::remove_dir_all(&dirs[1]).unwrap();
        fs::create_dir_all(&dirs[1]).unwrap();
        assert!(take(&dirs[1]).unwrap().is_some());
    }
}
