use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use super::testing::{Client, names, request, words};
use super::*;
use crate::fuse::{self, ROOT_NODE, opcode, setattr};

fn open(path: &Path) -> OwnedFd {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .unwrap()
        .into()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A folder with a server in this process.
struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn client(&self) -> Client<impl FnMut(&[u8]) -> Vec<u8>> {
        self.client_with(Options::default(), 1000)
    }

    fn client_with(&self, options: Options, fds_max: usize) -> Client<impl FnMut(&[u8]) -> Vec<u8> + use<>> {
        let mut server = FileServer::new(open(self.folder.path()), options, is_root(), fds_max).unwrap();
        let mut client = Client::new(move |request: &[u8]| {
            let mut reply = vec![];
            assert!(server.answer(request, &mut reply));
            reply
        });
        client.init().unwrap();
        client
    }
}

#[test]
fn files_are_made_written_read_and_deleted() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let (file, handle) = guest.create(ROOT_NODE, "file", libc::O_RDWR, 0o640).unwrap();
    assert_eq!(guest.write(file.node, handle, 3, b"hello"), Ok(5));
    assert_eq!(guest.read(file.node, handle, 0, 100), Ok(b"\0\0\0hello".to_vec()));
    assert_eq!(guest.read(file.node, handle, 8, 100), Ok(vec![]));
    assert_eq!(fs::read(rig.path("file")).unwrap(), b"\0\0\0hello");
    let attributes = guest.attributes(file.node).unwrap();
    assert_eq!((attributes.size, attributes.mode & 0o777), (8, 0o640));
    assert_eq!(guest.set(file.node, setattr::SIZE, 4, 0, (0, 0)).unwrap().size, 4);
    assert_eq!(guest.create(ROOT_NODE, "file", libc::O_RDWR | libc::O_EXCL, 0o600), Err(libc::EEXIST));
    let (same, other) = guest.create(ROOT_NODE, "file", libc::O_RDONLY, 0o600).unwrap();
    assert_eq!((same.node, same.size), (file.node, 4));
    assert_eq!(guest.write(same.node, other, 0, b"x"), Err(libc::EBADF));
    guest.unlink(ROOT_NODE, "file").unwrap();
    assert_eq!(guest.look_up(ROOT_NODE, "file"), Err(libc::ENOENT));
    assert_eq!(guest.read(file.node, handle, 3, 1), Ok(b"h".to_vec()), "it is open still");
}

#[test]
fn directories_links_and_renames_are_as_on_the_host() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let directory = guest.mkdir(ROOT_NODE, "d").unwrap();
    let (file, _) = guest.create(directory.node, "f", libc::O_RDWR, 0o600).unwrap();
    let linked = guest.link(file.node, ROOT_NODE, "hard").unwrap();
    assert_eq!((linked.node, linked.links), (file.node, 2));
    let soft = guest.symlink(ROOT_NODE, "soft", "d/f").unwrap();
    assert_eq!(guest.ask(opcode::READLINK, soft.node, &[]), Ok(b"d/f".to_vec()));
    let again = guest.link(soft.node, ROOT_NODE, "soft2").unwrap();
    assert_eq!((again.node, again.mode & libc::S_IFMT), (soft.node, libc::S_IFLNK));
    guest.rename(directory.node, "f", ROOT_NODE, "g", 0).unwrap();
    assert_eq!(guest.rename(ROOT_NODE, "g", ROOT_NODE, "hard", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    guest.rename(ROOT_NODE, "g", ROOT_NODE, "d", libc::RENAME_EXCHANGE).unwrap();
    assert!(rig.path("g").is_dir() && rig.path("d").is_file());
    assert_eq!(guest.rename(ROOT_NODE, "g", ROOT_NODE, "h", 1 << 20), Err(libc::EINVAL));
    assert_eq!(guest.ask(opcode::RMDIR, ROOT_NODE, &names(&["g"])), Ok(vec![]));
    assert_eq!(guest.ask(opcode::UNLINK, ROOT_NODE, &names(&["g"])), Err(libc::ENOENT));
}

#[test]
fn long_directories_are_listed_whole_in_pieces_of_any_size() {
    let rig = Rig::new();
    let mut expected: Vec<String> = (0..500).map(|n| format!("{n}-{}", "x".repeat(n % 200))).collect();
    expected.iter().for_each(|name| fs::write(rig.path(name), "").unwrap());
    expected.extend([".".into(), "..".into()]);
    expected.sort();
    let mut guest = rig.client();
    for size in [512, 4096, 1 << 20, u32::MAX] {
        let list = guest.list(ROOT_NODE, size).unwrap();
        for (name, ino) in list.iter().filter(|(name, _)| name != "..") {
            assert_eq!(fs::metadata(rig.path(name)).unwrap().ino(), *ino);
        }
        let mut found: Vec<String> = list.into_iter().map(|(name, _)| name).collect();
        found.sort();
        assert!(found == expected, "{size}");
    }
}

#[test]
fn names_are_single_components() {
    let rig = Rig::new();
    fs::create_dir(rig.path("d")).unwrap();
    fs::write(rig.path("d/f"), "").unwrap();
    let mut guest = rig.client();
    let long = "n".repeat(256);
    for (name, error) in [
        ("", libc::EINVAL),
        (".", libc::EINVAL),
        ("..", libc::EINVAL),
        ("/", libc::EINVAL),
        ("d/f", libc::EINVAL),
        ("../x", libc::EINVAL),
        ("/etc", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
    ] {
        assert_eq!(guest.look_up(ROOT_NODE, name), Err(error), "{name}");
        assert_eq!(guest.mkdir(ROOT_NODE, name), Err(error), "{name}");
        assert_eq!(guest.create(ROOT_NODE, name, libc::O_RDWR, 0o600), Err(error), "{name}");
        assert_eq!(guest.mknod(ROOT_NODE, name, libc::S_IFREG, 0), Err(error), "{name}");
        assert_eq!(guest.symlink(ROOT_NODE, name, "x"), Err(error), "{name}");
        assert_eq!(guest.link(ROOT_NODE, ROOT_NODE, name), Err(error), "{name}");
        assert_eq!(guest.unlink(ROOT_NODE, name), Err(error), "{name}");
        assert_eq!(guest.rename(ROOT_NODE, name, ROOT_NODE, "y", 0), Err(error), "{name}");
        assert_eq!(guest.rename(ROOT_NODE, "d", ROOT_NODE, name, 0), Err(error), "{name}");
    }
    assert!(rig.path("d/f").exists());
}

#[test]
fn links_are_not_followed() {
    let rig = Rig::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), rig.path("directory")).unwrap();
    symlink(outside.path().join("secret"), rig.path("file")).unwrap();
    symlink(outside.path().join("new"), rig.path("dangling")).unwrap();
    let mut guest = rig.client();
    for name in ["directory", "file", "dangling"] {
        let link = guest.look_up(ROOT_NODE, name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(guest.look_up(link.node, "secret"), Err(libc::ENOTDIR));
        assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.open_directory(link.node), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.set(link.node, setattr::MODE, 0, 0o777, (0, 0)), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.set(link.node, setattr::SIZE, 0, 0, (0, 0)), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.set_xattr(link.node, "user.x", b"y"), Err(libc::EOPNOTSUPP));
        assert!(guest.create(ROOT_NODE, name, libc::O_RDWR | libc::O_TRUNC, 0o600).is_err());
        assert!(guest.mkdir(link.node, "new").is_err());
    }
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn only_files_and_directories_are_opened() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let fifo = guest.mknod(ROOT_NODE, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let socket = guest.mknod(ROOT_NODE, "socket", libc::S_IFSOCK | 0o600, 0).unwrap();
    // Opening the FIFO would wait for ever.
    for node in [fifo.node, socket.node] {
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.xattr(node, "user.x", 10), Err(libc::ENODATA));
        assert_eq!(guest.ask(opcode::LISTXATTR, node, &[0; 8]), Ok(vec![0; 8]));
        assert!(guest.set(node, setattr::MODE, 0, 0o640, (0, 0)).is_ok());
    }
    let name = fs::metadata(rig.path("fifo")).unwrap();
    assert!(name.file_type().is_fifo() && name.permissions().mode() & 0o777 == 0o640);
    assert_eq!(guest.open(ROOT_NODE, libc::O_RDWR), Err(libc::EISDIR));
}

#[test]
fn devices_are_made_only_where_that_is_allowed() {
    let rig = Rig::new();
    let mut guest = rig.client();
    for kind in [libc::S_IFBLK, libc::S_IFCHR] {
        assert_eq!(guest.mknod(ROOT_NODE, "device", kind | 0o666, 0x103), Err(libc::EPERM));
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        assert_eq!(guest.mknod(ROOT_NODE, "odd", kind | 0o666, 0), Err(libc::EINVAL));
    }
    assert!(!rig.path("device").exists() && !rig.path("odd").exists());
}

#[test]
fn readonly_share_refuses_every_change() {
    let rig = Rig::new();
    fs::write(rig.path("file"), "kept").unwrap();
    let mut guest = rig.client_with(Options { readonly: true, ..Options::default() }, 1000);
    let file = guest.look_up(ROOT_NODE, "file").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, handle, 0, 10), Ok(b"kept".to_vec()));
    let refused = [
        guest.open(file.node, libc::O_RDWR).map(|_| ()),
        guest.open(file.node, libc::O_WRONLY).map(|_| ()),
        guest.open(file.node, libc::O_RDONLY | libc::O_TRUNC).map(|_| ()),
        guest.create(ROOT_NODE, "new", libc::O_RDONLY, 0o600).map(|_| ()),
        guest.create(ROOT_NODE, "file", libc::O_RDONLY, 0o600).map(|_| ()),
        guest.mkdir(ROOT_NODE, "d").map(|_| ()),
        guest.mknod(ROOT_NODE, "n", libc::S_IFREG, 0).map(|_| ()),
        guest.symlink(ROOT_NODE, "s", "t").map(|_| ()),
        guest.link(file.node, ROOT_NODE, "l").map(|_| ()),
        guest.rename(ROOT_NODE, "file", ROOT_NODE, "f", 0),
        guest.unlink(ROOT_NODE, "file"),
        guest.ask(opcode::RMDIR, ROOT_NODE, &names(&["d"])).map(|_| ()),
        guest.write(file.node, handle, 0, b"x").map(|_| ()),
        guest.set(file.node, setattr::MODE, 0, 0o777, (0, 0)).map(|_| ()),
        guest.set_xattr(file.node, "user.x", b"y"),
        guest.ask(opcode::REMOVEXATTR, file.node, &names(&["user.x"])).map(|_| ()),
        guest.ask(opcode::FALLOCATE, file.node, &[0; 32]).map(|_| ()),
        guest.ask(opcode::COPY_FILE_RANGE, file.node, &[0; 56]).map(|_| ()),
    ];
    assert!(refused.iter().all(|result| *result == Err(libc::EROFS)), "{refused:?}");
    assert_eq!(fs::read(rig.path("file")).unwrap(), b"kept");
    assert_eq!(fs::read_dir(rig.folder.path()).unwrap().count(), 1);
}

#[test]
fn owners_are_the_guests_users() {
    if !is_root() {
        return;
    }
    let rig = Rig::new();
    // In the server's own process its rights do not change with the user.
    fs::set_permissions(rig.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut guest = rig.client();
    guest.user = (1234, 5678);
    let directory = guest.mkdir(ROOT_NODE, "d").unwrap();
    let (file, _) = guest.create(directory.node, "f", libc::O_RDWR, 0o600).unwrap();
    let link = guest.symlink(directory.node, "l", "x").unwrap();
    assert!([directory, file, link].iter().all(|made| made.owner == (1234, 5678)));
    let owners = setattr::UID | setattr::GID;
    assert_eq!(guest.set(file.node, owners, 0, 0, (7, 8)).unwrap().owner, (7, 8));
    assert_eq!(guest.set(link.node, owners, 0, 0, (9, 10)).unwrap().owner, (9, 10));
    assert_eq!(guest.set(file.node, setattr::UID, 0, 0, (u32::MAX, 0)), Err(libc::EINVAL));
    guest.user = (u32::MAX, 0);
    assert_eq!(guest.mkdir(ROOT_NODE, "nobody's"), Err(libc::EPERM));
    guest.user = (0, 0);
    assert_eq!(guest.mkdir(ROOT_NODE, "root's").unwrap().owner, (0, 0));
}

#[test]
fn a_write_by_a_user_takes_privileges_away() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let (file, handle) = guest.create(ROOT_NODE, "f", libc::O_RDWR, 0o600).unwrap();
    let mut write = |flags: u32| {
        assert!(guest.set(file.node, setattr::MODE, 0, 0o6775, (0, 0)).is_ok());
        let mut body = [handle.to_le_bytes(), 0u64.to_le_bytes()].concat();
        body.extend(words(&[1, flags, 0, 0, 0, 0]));
        body.push(b'x');
        guest.ask(opcode::WRITE, file.node, &body).unwrap();
        guest.attributes(file.node).unwrap().mode & 0o7777
    };
    assert_eq!(write(fuse::WRITE_KILL_SUIDGID), 0o775);
    if is_root() {
        assert_eq!(write(0), 0o6775, "root's writes leave them");
    }
}

#[test]
fn extended_attributes_are_kept() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let (file, _) = guest.create(ROOT_NODE, "f", libc::O_RDWR, 0o600).unwrap();
    if guest.set_xattr(file.node, "user.a", b"value") == Err(libc::EOPNOTSUPP) {
        // Not on every temporary file system.
        return;
    }
    assert_eq!(guest.xattr(file.node, "user.a", 100), Ok(b"value".to_vec()));
    assert_eq!(guest.xattr(file.node, "user.a", 0), Ok(words(&[5, 0])));
    assert_eq!(guest.xattr(file.node, "user.a", 2), Err(libc::ERANGE));
    assert_eq!(guest.xattr(file.node, "user.a", u32::MAX), Ok(b"value".to_vec()));
    assert_eq!(guest.xattr(file.node, "user.b", 100), Err(libc::ENODATA));
    assert_eq!(guest.ask(opcode::LISTXATTR, file.node, &words(&[100, 0])), Ok(b"user.a\0".to_vec()));
    assert_eq!(guest.ask(opcode::REMOVEXATTR, file.node, &names(&["user.a"])), Ok(vec![]));
    assert_eq!(guest.xattr(file.node, "user.a", 100), Err(libc::ENODATA));
}

#[test]
fn more_files_than_descriptors_stay_usable() {
    const FILES: usize = 1500;
    let rig = Rig::new();
    fs::create_dir_all(rig.path("a/b")).unwrap();
    (0..FILES).for_each(|n| fs::write(rig.path(&format!("a/b/{n}")), n.to_string()).unwrap());
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut guest = rig.client_with(Options::default(), 400);
    let directory = guest.walk("a/b").unwrap();
    let nodes: Vec<u64> =
        (0..FILES).map(|n| guest.look_up(directory.node, &n.to_string()).unwrap().node).collect();
    // Other tests run in this process, too.
    assert!(descriptors() < before + 600, "{} descriptors", descriptors() - before);
    for (n, node) in nodes.iter().enumerate().rev() {
        let handle = guest.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(*node, handle, 0, 10), Ok(n.to_string().into_bytes()));
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 16]);
        guest.ask(opcode::RELEASE, *node, &body).unwrap();
    }
    // One that became another file meanwhile is not taken for it.
    fs::remove_file(rig.path("a/b/1499")).unwrap();
    symlink("/etc/passwd", rig.path("a/b/1499")).unwrap();
    assert_eq!(guest.attributes(nodes[FILES - 1]), Err(libc::ESTALE));
    // Nor is one below a directory that became a link.
    fs::rename(rig.path("a"), rig.path("moved")).unwrap();
    symlink("moved", rig.path("a")).unwrap();
    let gone = (0..10).filter(|n| guest.attributes(nodes[FILES - 2 - n]) == Err(libc::ESTALE)).count();
    let there = (0..10).filter(|n| guest.attributes(nodes[FILES - 2 - n]).is_ok()).count();
    assert_eq!(gone + there, 10);
}

#[test]
fn forgotten_files_are_forgotten() {
    let rig = Rig::new();
    fs::write(rig.path("f"), "").unwrap();
    let mut server = FileServer::new(open(rig.folder.path()), Options::default(), false, 1000).unwrap();
    let mut reply = vec![];
    let look_up = request(opcode::LOOKUP, 2, ROOT_NODE, (0, 0), &names(&["f"]));
    for _ in 0..3 {
        assert!(server.answer(&look_up, &mut reply));
    }
    let node = testing::entry(&reply[fuse::OUT_HEADER_BYTES..]).node;
    assert_eq!(server.nodes.len(), 2);
    let count = |count: u64| request(opcode::FORGET, 4, node, (0, 0), &count.to_le_bytes());
    assert!(!server.answer(&count(2), &mut reply));
    assert_eq!(server.nodes.len(), 2);
    let batch =
        [words(&[2, 0]), [ROOT_NODE, 100, node, u64::MAX].iter().flat_map(|n| n.to_le_bytes()).collect()];
    assert!(!server.answer(&request(opcode::BATCH_FORGET, 6, 0, (0, 0), &batch.concat()), &mut reply));
    assert_eq!(server.nodes.len(), 1);
    for _ in 0..3 {
        assert!(server.answer(&look_up, &mut reply));
        assert!(server.answer(&request(opcode::DESTROY, 8, 0, (0, 0), &[]), &mut reply));
        assert_eq!(server.nodes.len(), 1);
    }
}

#[test]
fn requests_that_are_cut_short_are_refused() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let (file, _) = guest.create(ROOT_NODE, "f", libc::O_RDWR, 0o600).unwrap();
    let no_body =
        [opcode::DESTROY, opcode::STATFS, opcode::FLUSH, opcode::READLINK, opcode::OPENDIR, opcode::SYNCFS];
    let silent = [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT];
    for code in (0..60).filter(|code| !no_body.contains(code) && !silent.contains(code)) {
        for len in [0, 1, 7] {
            let result = guest.ask(code, file.node, &vec![0; len]);
            assert!(matches!(result, Err(libc::EINVAL | libc::ENOSYS | libc::ERANGE)), "{code}: {result:?}");
        }
    }
    let mut server = FileServer::new(open(rig.folder.path()), Options::default(), false, 1000).unwrap();
    let mut reply = vec![];
    for len in 0..fuse::IN_HEADER_BYTES {
        assert!(server.answer(&vec![0xff; len], &mut reply));
        assert_eq!(reply.len(), fuse::OUT_HEADER_BYTES);
    }
}

#[test]
fn handles_belong_to_their_file() {
    let rig = Rig::new();
    let mut guest = rig.client();
    let (one, handle) = guest.create(ROOT_NODE, "one", libc::O_RDWR, 0o600).unwrap();
    let (two, _) = guest.create(ROOT_NODE, "two", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(guest.read(two.node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(one.node, handle + 100, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(999, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.look_up(999, "x"), Err(libc::ESTALE));
    assert_eq!(guest.attributes(0), Err(libc::ESTALE));
    assert_eq!(guest.read(one.node, handle, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(guest.write(one.node, handle, u64::MAX, b"x"), Err(libc::EINVAL));
}

#[test]
fn old_protocols_are_refused() {
    let rig = Rig::new();
    let mut guest = rig.client();
    for (major, minor) in [(6, 38), (7, 0), (7, 30)] {
        assert_eq!(guest.ask(opcode::INIT, 0, &words(&[major, minor, 0, 0])), Err(libc::EPROTO));
    }
    for (major, minor) in [(7, 31), (7, 999), (8, 0)] {
        let reply = guest.ask(opcode::INIT, 0, &words(&[major, minor, 0, 0])).unwrap();
        assert_eq!((&reply[..8], reply.len()), (&words(&[7, 38])[..], 64));
    }
}
