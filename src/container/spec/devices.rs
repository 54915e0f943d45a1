//! Devices: what the container sees of them, and what it may do with them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{major, minor};

use super::Error;
use crate::container::config::{Device, Isolation, Security};

/// Entries of a directory of devices that are looked at, in all.
const ENTRIES_MAX: usize = 10_000;
/// What Docker lets every container do: its name for the kind, numbers (`None` for all), access.
const ALLOWED: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 11] = [
    // Making nodes, which are of no use unless they may be opened.
    (LinuxDeviceType::C, None, None, "m"),
    (LinuxDeviceType::B, None, None, "m"),
    // null, zero, full, random, urandom, tty, console, ptmx, terminals.
    (LinuxDeviceType::C, Some(1), Some(3), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(5), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(7), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(8), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(9), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(0), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(1), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(2), "rwm"),
    (LinuxDeviceType::C, Some(136), None, "rwm"),
];
/// Parts of the host's `/dev` that a container has of its own.
const OWN: [&str; 8] = [
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/dev/fd",
    "/dev/console",
    "/dev/ptmx",
    "/dev/core",
    "/dev/.udev",
];

/// Nodes that are made, and rules for the device controller. A privileged container has those of the host, if it has the
/// host's kernel: numbers of its devices say nothing to another one.
pub fn of_container(
    devices: &[Device],
    security: &Security,
    isolation: Isolation,
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), Error> {
    let mut nodes = vec![];
    let mut rules = vec![rule(!security.privileged, None, None, None, "rwm")];
    if security.privileged {
        rules[0].set_allow(true);
        if isolation == Isolation::Native {
            nodes = below(Path::new("/dev"), Path::new("/dev"))?;
        }
    } else {
        rules[0].set_allow(false);
        let allowed = ALLOWED
            .iter()
            .map(|(kind, major, minor, access)| rule(true, Some(*kind), *major, *minor, access));
        rules.extend(allowed);
    }
    for device in devices {
        if device.access.is_empty() || !device.access.chars().all(|letter| "rwm".contains(letter)) {
            return Err(Error::DeviceAccess { access: device.access.clone() });
        }
        let found = below(&device.host, &device.container)?;
        if found.is_empty() {
            return Err(Error::NoDevice { path: device.host.clone() });
        }
        for node in found {
            let kind = Some(node.typ());
            let (major, minor) = (Some(node.major()), Some(node.minor()));
            rules.push(rule(true, kind, major, minor, &device.access));
            nodes.retain(|earlier: &LinuxDevice| earlier.path() != node.path());
            nodes.push(node);
        }
    }
    Ok((nodes, rules))
}

fn rule(
    allow: bool,
    kind: Option<LinuxDeviceType>,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow);
    rule.set_typ(kind.or(Some(LinuxDeviceType::A)));
    rule.set_major(major);
    rule.set_minor(minor);
    rule.set_access(Some(access.into()));
    rule
}

/// The device at a path of the host, or all below a directory, as they are to be in the container.
fn below(host: &Path, container: &Path) -> Result<Vec<LinuxDevice>, Error> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Device { path, source }
    };
    let mut found = vec![];
    let mut waiting = vec![(host.to_owned(), container.to_owned(), true)];
    let mut looked_at = 0;
    while let Some((host, container, follow)) = waiting.pop() {
        looked_at += 1;
        if looked_at > ENTRIES_MAX || (!follow && OWN.iter().any(|own| host == Path::new(own))) {
            continue;
        }
        // The one that was named may be a link, as those in /dev/disk/by-id; links below a directory are left out.
        let metadata = if follow { fs::metadata(&host) } else { fs::symlink_metadata(&host) };
        let metadata = match metadata {
            // Devices come and go.
            Err(error) if !follow && error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.map_err(unreadable(&host))?,
        };
        if metadata.is_dir() {
            for entry in fs::read_dir(&host).map_err(unreadable(&host))? {
                let name = entry.map_err(unreadable(&host))?.file_name();
                waiting.push((host.join(&name), container.join(&name), false));
            }
        } else if metadata.file_type().is_char_device() || metadata.file_type().is_block_device() {
            found.push(node(container, &metadata)?);
        }
    }
    found.sort_by(|a, b| a.path().cmp(b.path()));
    Ok(found)
}

fn node(path: PathBuf, metadata: &fs::Metadata) -> Result<LinuxDevice, Error> {
    if !path.starts_with("/dev") {
        return Err(Error::DevicePlace { path });
    }
    let block = metadata.file_type().is_block_device();
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(if block { LinuxDeviceType::B } else { LinuxDeviceType::C })
        .major(major(metadata.rdev()))
        .minor(minor(metadata.rdev()))
        .file_mode(metadata.mode() & 0o777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .map_err(Error::Oci)
}

/// Major and minor number of a block device.
pub fn block_device(path: &Path) -> Result<(i64, i64), Error> {
    let metadata = fs::metadata(path).map_err(|source| Error::Device { path: path.into(), source })?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::NotBlockDevice { path: path.into() });
    }
    Ok((major(metadata.rdev()).into(), minor(metadata.rdev()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, access: &str) -> Device {
        Device { host: host.into(), container: container.into(), access: access.into() }
    }

    #[test]
    fn default_rules_deny_all_and_allow_eleven() {
        let (nodes, rules) = of_container(&[], &Security::default(), Isolation::Native).unwrap();
        assert!(nodes.is_empty());
        let lines: Vec<String> = rules.iter().map(|rule| format!("{} {rule}", rule.allow())).collect();
        assert_eq!(lines.len(), 12);
        assert_eq!(lines[0], "false a *:* rwm");
        assert_eq!(lines[1], "true c *:* m");
        assert_eq!(lines[11], "true c 136:* rwm");
    }

    #[test]
    fn device_is_made_where_it_is_asked_for_with_its_access() {
        let (nodes, rules) = of_container(
            &[device("/dev/zero", "/dev/nothing", "r")],
            &Security::default(),
            Isolation::Native,
        )
        .unwrap();
        assert_eq!((nodes[0].path().as_path(), nodes[0].minor()), (Path::new("/dev/nothing"), 5));
        assert_eq!(rules.last().unwrap().to_string(), "c 1:5 r");
    }

    #[test]
    fn privileged_container_has_the_devices_of_the_host_but_not_its_terminals() {
        let privileged = Security { privileged: true, ..Security::default() };
        let (nodes, rules) = of_container(&[], &privileged, Isolation::Native).unwrap();
        assert_eq!((rules.len(), rules[0].allow()), (1, true));
        assert!(nodes.iter().any(|node| node.path() == Path::new("/dev/null")));
        assert!(!nodes.iter().any(|node| node.path().starts_with("/dev/pts")));
        let (nodes, rules) = of_container(&[], &privileged, Isolation::Microvm).unwrap();
        assert_eq!((nodes.len(), rules.len(), rules[0].allow()), (0, 1, true));
    }

    #[test]
    fn what_is_no_device_is_an_error() {
        let one = |host, container, access| {
            of_container(&[device(host, container, access)], &Security::default(), Isolation::Native)
        };
        assert!(matches!(one("/etc/passwd", "/dev/x", "r"), Err(Error::NoDevice { .. })));
        assert!(matches!(one("/dev/not-there", "/dev/x", "r"), Err(Error::Device { .. })));
        assert!(matches!(one("/dev/zero", "/dev/zero", "rx"), Err(Error::DeviceAccess { .. })));
        assert!(matches!(one("/dev/zero", "/etc/zero", "r"), Err(Error::DevicePlace { .. })));
        assert!(matches!(block_device(Path::new("/dev/zero")), Err(Error::NotBlockDevice { .. })));
    }
}
