//! Who runs rvmm, and what is installed for it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Check;
use crate::kvm::kind::Kind;
use crate::vm;

/// A user and the groups of this system.
pub struct Account {
    /// Login name, or the number where there is none.
    pub name: String,
    groups: Vec<Group>,
}

struct Group {
    name: String,
    gid: u32,
    /// `/etc/group` lists the user.
    listed: bool,
}

impl Account {
    /// The user that this process runs as.
    pub fn current() -> Account {
        // The owner of a process's directory is its effective user.
        let uid = std::fs::metadata("/proc/self").map_or(u32::MAX, |metadata| metadata.uid());
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let name = user_name(&passwd, uid).unwrap_or_else(|| uid.to_string());
        let groups = parse_groups(&std::fs::read_to_string("/etc/group").unwrap_or_default(), &name);
        Account { name, groups }
    }

    /// Name of a group.
    pub fn group_name(&self, gid: u32) -> Option<&str> {
        self.groups.iter().find(|group| group.gid == gid).map(|group| group.name.as_str())
    }

    /// Whether the system lists the user as a member, which takes effect with the next login.
    pub fn is_listed_in(&self, group: &str) -> bool {
        self.groups.iter().any(|other| other.name == group && other.listed)
    }

    #[cfg(test)]
    pub(super) fn for_test(name: &str, groups: &[(&str, u32, bool)]) -> Account {
        let groups = groups.iter().map(|(name, gid, listed)| Group {
            name: (*name).into(),
            gid: *gid,
            listed: *listed,
        });
        Account { name: name.into(), groups: groups.collect() }
    }
}

fn user_name(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

fn parse_groups(text: &str, user: &str) -> Vec<Group> {
    let parse = |line: &str| {
        let mut fields = line.split(':');
        let (name, gid) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        let listed = fields.next().is_some_and(|members| members.split(',').any(|member| member == user));
        Some(Group { name: name.to_owned(), gid, listed })
    };
    text.lines().filter_map(parse).collect()
}

/// The guest kernel that this host needs.
pub fn guest_kernel(kind: Option<Kind>) -> Check {
    kernel_in(&vm::kernel_directories(), kind)
}

fn kernel_in(directories: &[PathBuf], kind: Option<Kind>) -> Check {
    let (id, title) = ("guest-kernel", "guest kernel");
    let wanted = vm::kernel_file_name(kind.unwrap_or(Kind::Unknown));
    match directories.iter().map(|directory| directory.join(wanted)).find(|path| path.is_file()) {
        Some(path) => Check::ok(id, title, path.display().to_string()),
        None => Check::warn(id, title, format!("no {wanted} found; --kernel can name another"))
            .with_fix("scripts/build-kernel"),
    }
}

/// Programs that some commands of rvmm start, or that comparisons use, and the Debian packages they are in.
const TOOLS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("mkfs.ext4", "e2fsprogs"),
    ("busybox", "busybox-static"),
];

/// Optional programs.
pub fn tools() -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // System directories are often missing from the PATH of ordinary users.
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories: Vec<PathBuf> = std::env::split_paths(&path).chain(system).collect();
    tools_by(&|name| directories.iter().any(|directory| is_program(&directory.join(name))))
}

pub(super) fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn tools_by(has: &dyn Fn(&str) -> bool) -> Check {
    let (id, title) = ("tools", "tools");
    let (there, missing): (Vec<_>, Vec<_>) = TOOLS.iter().partition(|(name, _)| has(name));
    let names = |tools: &[&(&str, &str)]| tools.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if missing.is_empty() {
        return Check::ok(id, title, names(&there));
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Check::warn(id, title, format!("missing: {}", names(&missing)))
        .with_fix(format!("sudo apt-get install {}", packages.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn group_file_is_read() {
        let groups = "root:x:0:\nkvm:x:104:ann,bob\nbad line\nvideo:x:44:bob\n";
        let account = Account { name: "ann".into(), groups: parse_groups(groups, "ann") };
        assert_eq!(account.group_name(104), Some("kvm"));
        assert!(account.is_listed_in("kvm") && !account.is_listed_in("video"));
        assert_eq!(user_name("root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/:/bin/sh", 1000).unwrap(), "ann");
    }

    #[test]
    fn kernel_of_the_kind_is_looked_for() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("vmlinux"), "").unwrap();
        let directories = [directory.path().to_owned()];
        assert_eq!(kernel_in(&directories, Some(Kind::Nested)).state, State::Ok);
        let check = kernel_in(&directories, Some(Kind::Pvm));
        assert_eq!((check.state, check.fix.as_deref()), (State::Warn, Some("scripts/build-kernel")));
    }

    #[test]
    fn missing_tools_name_their_packages_once() {
        let check = tools_by(&|name| !matches!(name, "ip" | "tc" | "nft"));
        assert_eq!(check.fix.unwrap(), "sudo apt-get install iproute2 nftables");
        assert_eq!(tools_by(&|_| true).state, State::Ok);
    }
}
