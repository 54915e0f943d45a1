//! Users and groups of a root file system: `/etc/passwd` and `/etc/group`, read from its layers.
//!
//! The layers are looked through as an overlay would show them, so nothing needs to be mounted. They are an image's, and
//! so nobody's word is taken: no path leaves its layer, and what is read has an upper bound.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fgetxattr, fstat, openat2};
use rustix::io::Errno;

use super::Error;

/// Largest file that is read.
const BYTES_MAX: u64 = 8 << 20;
/// Symbolic links that are followed from layer to layer.
const LINKS_MAX: usize = 16;
/// Largest number of a user or group, as runc has it.
const ID_MAX: u32 = i32::MAX as u32;

/// What is known of users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    users: Vec<User>,
    groups: Vec<Group>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// Whom a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups, with the first.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

impl Users {
    /// From directories, the bottom one first. Files that are not there are empty ones.
    pub fn in_layers<P: AsRef<Path>>(layers: &[P]) -> Result<Users, Error> {
        let read = |path: &str| -> Result<Vec<u8>, Error> {
            let found = read_in_layers(layers, Path::new(path));
            Ok(found.map_err(|source| Error::Users { path: path.into(), source })?.unwrap_or_default())
        };
        Ok(Users::parse(&read("etc/passwd")?, &read("etc/group")?))
    }

    /// From the files' contents. Lines that make no sense are passed over.
    pub fn parse(passwd: &[u8], group: &[u8]) -> Users {
        let users = lines(passwd).filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let (uid, gid) = (fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
            let home = fields.get(5).copied().unwrap_or_default();
            Some(User { name: fields[0].into(), uid, gid, home: home.into() })
        });
        let groups = lines(group).filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let members = fields.get(3).copied().unwrap_or_default().split(',');
            let members = members.filter(|name| !name.is_empty()).map(str::to_owned).collect();
            Some(Group { name: fields[0].into(), gid: fields.get(2)?.parse().ok()?, members })
        });
        Users { users: users.collect(), groups: groups.collect() }
    }

    /// Whom `USER[:GROUP]` and a list of further groups mean; an empty user is root.
    pub fn resolve(&self, user: &str, further: &[String]) -> Result<Identity, Error> {
        let (user, group) = user.split_once(':').unwrap_or((user, ""));
        let user = if user.is_empty() { "0" } else { user };
        let number = user.parse::<u32>().ok();
        let known = self.users.iter().find(|known| known.name == user);
        let known = known.or_else(|| self.users.iter().find(|known| Some(known.uid) == number));
        let uid = known.map(|known| known.uid).or(number);
        let uid = uid.ok_or_else(|| Error::NoUser { name: user.into() })?;

        let mut groups = vec![];
        let gid = if group.is_empty() {
            if let Some(known) = known {
                let of_user = self.groups.iter().filter(|group| group.members.contains(&known.name));
                groups.extend(of_user.map(|group| group.gid));
            }
            known.map_or(0, |known| known.gid)
        } else {
            self.group(group)?
        };
        for name in further {
            groups.push(self.group(name)?);
        }
        // The first group is among the others, so that giving it up by setgid(2) alone does not get around a mode
        // that shuts its members out.
        groups.insert(0, gid);
        if let Some(id) = groups.iter().chain([&uid]).find(|id| **id > ID_MAX) {
            return Err(Error::IdTooLarge { id: *id });
        }
        let mut seen = std::collections::BTreeSet::new();
        groups.retain(|gid| seen.insert(*gid));
        let home = known.map_or("", |known| known.home.as_str());
        Ok(Identity { uid, gid, groups, home: if home.is_empty() { "/".into() } else { home.into() } })
    }

    fn group(&self, name: &str) -> Result<u32, Error> {
        let known = self.groups.iter().find(|known| known.name == name).map(|known| known.gid);
        known.or_else(|| name.parse().ok()).ok_or_else(|| Error::NoGroup { name: name.into() })
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    let lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// What a layer has at a path.
enum Entry {
    File(OwnedFd),
    Link(PathBuf),
    /// Nothing, and lower layers count.
    Absent,
    /// Nothing, and lower layers do not count.
    Hidden,
}

/// A regular file's contents, as an overlay of the layers would show it; `None` if there is no such file.
pub fn read_in_layers<P: AsRef<Path>>(layers: &[P], path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let mut path = normal(path);
    for _ in 0..LINKS_MAX {
        let mut linked = None;
        for layer in layers.iter().rev() {
            match look_up(layer.as_ref(), &path)? {
                Entry::File(file) => {
                    let mut bytes = vec![];
                    // Through the descriptor's own entry: the file that was looked at, and not what may be there now.
                    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
                    if bytes.len() as u64 > BYTES_MAX {
                        return Err(std::io::Error::other(format!("it has more than {BYTES_MAX} bytes")));
                    }
                    return Ok(Some(bytes));
                }
                Entry::Link(target) => {
                    linked = Some(target);
                    break;
                }
                Entry::Absent => {}
                Entry::Hidden => return Ok(None),
            }
        }
        match linked {
            Some(target) => path = normal(&target),
            None => return Ok(None),
        }
    }
    Err(std::io::Error::other("there are too many symbolic links on the way"))
}

fn look_up(layer: &Path, path: &Path) -> std::io::Result<Entry> {
    let root = rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut prefix = PathBuf::new();
    let mut rest = path.components();
    while let Some(component) = rest.next() {
        prefix.push(component);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Every prefix is looked at in turn, so only its last component can be a link, and it is not followed.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let file = match openat2(root.as_fd(), &prefix, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT) => return Ok(Entry::Absent),
            Err(Errno::LOOP) => return read_link(&root, &prefix, rest.as_path()),
            file => file?,
        };
        let stat = fstat(&file)?;
        let is_last = rest.as_path().as_os_str().is_empty();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => return read_link(&root, &prefix, rest.as_path()),
            FileType::Directory if !is_last => {
                if is_opaque(&root, &prefix) {
                    // What is not in this directory is nowhere.
                    return Ok(match openat2(root.as_fd(), path, flags, Mode::empty(), resolve) {
                        Err(Errno::NOENT) => Entry::Hidden,
                        _ => continue,
                    });
                }
            }
            FileType::RegularFile if is_last => return Ok(Entry::File(file)),
            // A whiteout (a character device 0:0), or something that has no place there.
            _ => return Ok(Entry::Hidden),
        }
    }
    Ok(Entry::Hidden)
}

fn read_link(root: &OwnedFd, link: &Path, rest: &Path) -> std::io::Result<Entry> {
    let target = rustix::fs::readlinkat(root, link, vec![])?;
    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
    let parent = link.parent().unwrap_or(Path::new(""));
    Ok(Entry::Link(parent.join(target).join(rest)))
}

fn is_opaque(root: &OwnedFd, path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let Ok(directory) = openat2(root.as_fd(), path, flags, Mode::empty(), resolve) else { return false };
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|name| {
        let mut value = [0u8; 1];
        fgetxattr(&directory, *name, &mut value).is_ok() && value == *b"y"
    })
}

/// A path below a root without `.`, `..` and a leading `/`; `..` at the root stays there.
fn normal(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# no\nbroken\nann:x:1000:1000::/home/ann:/bin/sh\n7:x:77:8::/seven:\n";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,ann\naudio:x:29:ann\nann:x:1000:\n";

    fn resolve(user: &str, further: &[&str]) -> Result<Identity, Error> {
        let further: Vec<String> = further.iter().map(|name| (*name).to_owned()).collect();
        Users::parse(PASSWD, GROUP).resolve(user, &further)
    }

    fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
        Identity { uid, gid, groups: groups.to_vec(), home: home.into() }
    }

    #[test]
    fn user_by_name_has_its_groups_and_home() {
        assert_eq!(resolve("ann", &[]).unwrap(), identity(1000, 1000, &[1000, 10, 29], "/home/ann"));
        assert_eq!(resolve("", &[]).unwrap(), identity(0, 0, &[0, 10], "/root"));
    }

    #[test]
    fn user_by_number_is_looked_up_and_need_not_be_there() {
        assert_eq!(resolve("1000", &[]).unwrap(), resolve("ann", &[]).unwrap());
        assert_eq!(resolve("4242", &[]).unwrap(), identity(4242, 0, &[0], "/"));
        // A name that looks like a number is a name first.
        assert_eq!(resolve("7", &[]).unwrap(), identity(77, 8, &[8], "/seven"));
    }

    #[test]
    fn group_of_its_own_replaces_those_of_the_user() {
        assert_eq!(resolve("ann:audio", &[]).unwrap(), identity(1000, 29, &[29], "/home/ann"));
        assert_eq!(resolve("ann:5", &["wheel", "99"]).unwrap().groups, [5, 10, 99]);
        assert_eq!(resolve(":audio", &[]).unwrap().gid, 29);
    }

    #[test]
    fn unknown_names_and_large_numbers_are_errors() {
        assert!(matches!(resolve("bob", &[]), Err(Error::NoUser { name }) if name == "bob"));
        assert!(matches!(resolve("ann:none", &[]), Err(Error::NoGroup { name }) if name == "none"));
        assert!(matches!(resolve("4294967295", &[]), Err(Error::IdTooLarge { .. })));
        assert!(matches!(resolve("1:4000000000", &[]), Err(Error::IdTooLarge { .. })));
        assert!(matches!(resolve("-1", &[]), Err(Error::NoUser { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_contents_are_read_or_passed_over(passwd: Vec<u8>, group in "[a-z:0-9,\n]{0,200}", user in "[a-z0-9:]{0,12}") {
            let users = Users::parse(&passwd, group.as_bytes());
            if let Ok(identity) = users.resolve(&user, &[]) {
                proptest::prop_assert_eq!(identity.groups.first(), Some(&identity.gid));
            }
        }
    }

    fn layers(count: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
        let directory = tempfile::tempdir().unwrap();
        let layers: Vec<PathBuf> = (0..count).map(|n| directory.path().join(n.to_string())).collect();
        layers.iter().for_each(|layer| create_dir_all(layer.join("etc")).unwrap());
        (directory, layers)
    }

    #[test]
    fn upper_layer_wins_and_lower_ones_show_through() {
        let (_guard, layers) = layers(3);
        write(layers[0].join("etc/passwd"), "low").unwrap();
        write(layers[0].join("etc/group"), "group").unwrap();
        write(layers[1].join("etc/passwd"), "high").unwrap();
        let read = |path: &str| read_in_layers(&layers, Path::new(path)).unwrap();
        assert_eq!(read("etc/passwd").unwrap(), b"high");
        assert_eq!(read("/etc/group").unwrap(), b"group");
        assert_eq!(read("etc/shadow"), None);
        assert_eq!(read("etc"), None);
    }

    #[test]
    fn links_are_followed_across_layers_and_never_out_of_them() {
        let (guard, layers) = layers(2);
        write(guard.path().join("secret"), "host").unwrap();
        create_dir_all(layers[0].join("usr/lib")).unwrap();
        write(layers[0].join("usr/lib/passwd"), "linked").unwrap();
        symlink("/usr/lib/passwd", layers[1].join("etc/passwd")).unwrap();
        symlink("../../../../secret", layers[1].join("etc/group")).unwrap();
        symlink("loop", layers[1].join("etc/loop")).unwrap();
        symlink("/usr/lib", layers[1].join("lib")).unwrap();
        assert_eq!(read_in_layers(&layers, Path::new("etc/passwd")).unwrap().unwrap(), b"linked");
        assert_eq!(read_in_layers(&layers, Path::new("lib/passwd")).unwrap().unwrap(), b"linked");
        assert_eq!(read_in_layers(&layers, Path::new("etc/group")).unwrap(), None);
        assert!(read_in_layers(&layers, Path::new("etc/loop")).is_err());
    }

    #[test]
    fn what_is_not_a_file_hides_lower_layers_and_is_never_opened() {
        let (_guard, layers) = layers(2);
        write(layers[0].join("etc/passwd"), "low").unwrap();
        // Opening it for reading would wait for a writer.
        nix::unistd::mkfifo(&layers[1].join("etc/passwd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_in_layers(&layers, Path::new("etc/passwd")).unwrap(), None);
    }

    #[test]
    fn opaque_directory_hides_lower_layers() {
        let (_guard, layers) = layers(2);
        write(layers[0].join("etc/passwd"), "low").unwrap();
        write(layers[0].join("etc/group"), "low").unwrap();
        write(layers[1].join("etc/group"), "high").unwrap();
        let etc = layers[1].join("etc");
        if rustix::fs::setxattr(&etc, "user.overlay.opaque", b"y", rustix::fs::XattrFlags::empty()).is_err() {
            // A file system without attributes of users; those of the kernel need root.
            let name = "trusted.overlay.opaque";
            rustix::fs::setxattr(&etc, name, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        }
        assert_eq!(read_in_layers(&layers, Path::new("etc/passwd")).unwrap(), None);
        assert_eq!(read_in_layers(&layers, Path::new("etc/group")).unwrap().unwrap(), b"high");
    }
}
