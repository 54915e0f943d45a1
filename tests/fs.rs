//! Shared folders: the file server's process by itself, as a hostile guest would talk to it; in `guests`, Linux guests.

mod guests;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rvmm::fileserver::testing::{Client, names, words};
use rvmm::fuse::{OUT_HEADER_BYTES, ROOT_NODE, opcode, setattr};

use crate::support::{PATIENCE, announce, binary, directory, is_root, skip, tool};

/// A mount that goes away with the value.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts; `None` where that is not allowed, which is said.
    fn new(arguments: &[&str], at: &Path) -> Option<Mounted> {
        let works = Command::new("mount").args(arguments).arg(at).stderr(Stdio::null()).status();
        if works.is_ok_and(|status| status.success()) {
            return Some(Mounted(at.into()));
        }
        skip("cannot mount");
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A file server's process, and the test as the guest.
struct Server {
    child: Child,
    stream: UnixStream,
}

/// `None` where this host lets no file server shut itself in, which is said.
fn start(folder: &Path, arguments: &[&str]) -> Option<Server> {
    start_as(folder, arguments, None)
}

fn start_as(folder: &Path, arguments: &[&str], user: Option<u32>) -> Option<Server> {
    let (mut stream, its) = UnixStream::pair().expect("a socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(folder);
    let folder = OwnedFd::from(folder.expect("a folder"));
    let mut command = Command::new(binary());
    command.arg("file-server").args(arguments).stdin(OwnedFd::from(its)).stdout(folder);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let child = command.stderr(Stdio::null()).spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => {
            skip(&format!("cannot start a file server as another user: {error}"));
            return None;
        }
    };
    let mut first = [0];
    stream.read_exact(&mut first).expect("a word of the server");
    if first == *b"\n" {
        return Some(Server { child, stream });
    }
    let mut reason = vec![];
    let _ = stream.read_to_end(&mut reason);
    skip(&format!(
        "the file server cannot shut itself in: {}",
        String::from_utf8_lossy(&[&first[..], &reason].concat())
    ));
    None
}

impl Server {
    fn guest(&self) -> Client<impl FnMut(&[u8]) -> Vec<u8> + use<>> {
        let mut stream = self.stream.try_clone().expect("a descriptor");
        let mut guest = Client::new(move |request: &[u8]| {
            stream.write_all(request).expect("a server");
            let mut reply = vec![0; OUT_HEADER_BYTES];
            stream.read_exact(&mut reply).expect("a reply");
            let len = u32::from_le_bytes([reply[0], reply[1], reply[2], reply[3]]);
            reply.resize(len as usize, 0);
            stream.read_exact(&mut reply[OUT_HEADER_BYTES..]).expect("a whole reply");
            reply
        });
        guest.init().expect("a session");
        guest
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(self.proc("status")).expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    }

    /// The server must be alive still: nothing that a guest sends may end it.
    fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ways out of a folder, each tried; a way is shut if the try fails, or what it gets is of the folder itself.
#[test]
fn no_way_leads_out_of_the_folder() {
    let base = directory();
    let folder = base.path().join("share");
    let outside = base.path().join("outside");
    fs::create_dir_all(folder.join("inner/deep")).expect("a folder");
    fs::create_dir(&outside).expect("a folder");
    fs::write(outside.join("secret"), "the secret").expect("a secret");
    fs::write(folder.join("file"), "no secret").expect("a file");
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    symlink(&outside, folder.join("absolute")).expect("a link");
    symlink("../outside", folder.join("relative")).expect("a link");
    symlink("../outside/secret", folder.join("to-file")).expect("a link");
    symlink("../outside/new", folder.join("dangling")).expect("a link");
    symlink("/proc/self/root", folder.join("magic")).expect("a link");
    symlink("/proc/1/cwd", folder.join("magic-of-init")).expect("a link");
    fs::create_dir_all(folder.join("proc/self/fd")).expect("a folder");
    for n in 0..64 {
        symlink("../../../../outside/secret", folder.join(format!("proc/self/fd/{n}"))).expect("a link");
    }
    let Some(mut server) = start(&folder, &[]) else { return };
    let mut guest = server.guest();
    let inner = guest.look_up(ROOT_NODE, "inner").expect("a folder").node;
    let deep = guest.look_up(inner, "deep").expect("a folder").node;
    let file = guest.look_up(ROOT_NODE, "file").expect("a file").node;
    let mut ways = 0;
    let mut shut = |way: &str, holds: bool| {
        assert!(holds, "a way out: {way}");
        ways += 1;
    };

    for name in ["..", ".", "../outside", "../outside/secret", "/etc/passwd", "inner/../..", "", "/"] {
        shut(&format!("look up {name:?}"), guest.look_up(inner, name).is_err());
        shut(&format!("create {name:?}"), guest.create(deep, name, libc::O_RDWR, 0o600).is_err());
    }
    shut("mkdir", guest.mkdir(ROOT_NODE, "../outside/made").is_err());
    shut("mknod", guest.mknod(ROOT_NODE, "../outside/made", libc::S_IFREG | 0o600, 0).is_err());
    shut("symlink", guest.symlink(ROOT_NODE, "../outside/made", "x").is_err());
    shut("unlink", guest.unlink(ROOT_NODE, "../outside/secret").is_err());
    shut("rmdir", guest.ask(opcode::RMDIR, ROOT_NODE, &names(&["../outside"])).is_err());
    shut("link into", guest.link(file, ROOT_NODE, "../outside/made").is_err());
    shut("rename out", guest.rename(ROOT_NODE, "file", ROOT_NODE, "../outside/made", 0).is_err());
    shut("rename in", guest.rename(ROOT_NODE, "../outside/secret", ROOT_NODE, "mine", 0).is_err());
    shut(
        "exchange",
        guest.rename(ROOT_NODE, "file", inner, "../../outside/secret", libc::RENAME_EXCHANGE).is_err(),
    );
    for name in ["absolute", "relative", "magic", "magic-of-init", "to-file", "dangling"] {
        let link = guest.look_up(ROOT_NODE, name).expect("a link").node;
        shut(&format!("through {name}"), guest.look_up(link, "secret").is_err());
        shut(&format!("into {name}"), guest.create(link, "made", libc::O_RDWR, 0o600).is_err());
        shut(&format!("mkdir in {name}"), guest.mkdir(link, "made").is_err());
        shut(&format!("open {name}"), guest.open(link, libc::O_RDWR).is_err());
        shut(&format!("list {name}"), guest.list(link, 4096).is_err());
        shut(
            &format!("create {name}"),
            guest.create(ROOT_NODE, name, libc::O_RDWR | libc::O_TRUNC, 0o600).is_err(),
        );
        shut(&format!("truncate {name}"), guest.set(link, setattr::SIZE, 0, 0, (0, 0)).is_err());
        shut(&format!("chmod {name}"), guest.set(link, setattr::MODE, 0, 0o777, (0, 0)).is_err());
        shut(&format!("attribute of {name}"), guest.set_xattr(link, "user.x", b"y").is_err());
        let hard = guest.link(link, inner, &format!("hard-{name}"));
        let is_link = hard.is_ok_and(|hard| hard.mode & libc::S_IFMT == libc::S_IFLNK);
        shut(&format!("hard link to {name}"), is_link);
    }
    // The server's own way to reopen files must not lead through a folder of that name.
    let handle = guest.open(file, libc::O_RDWR).expect("a handle");
    shut("false /proc/self/fd", guest.read(file, handle, 0, 100) == Ok(b"no secret".to_vec()));
    let _ = guest.set_xattr(file, "user.x", b"y");
    shut("xattr by a false /proc", guest.set(file, setattr::MODE, 0, 0o644, (0, 0)).is_ok());
    for flags in
        [libc::O_PATH, libc::O_CREAT, libc::O_TMPFILE | libc::O_RDWR, libc::O_NOFOLLOW | libc::O_DIRECTORY]
    {
        let opened = guest.open(file, flags).map(|handle| guest.read(file, handle, 0, 100));
        shut(&format!("open with {flags:#o}"), opened.is_err() || opened == Ok(Ok(b"no secret".to_vec())));
    }
    let block = u32::try_from(nix::sys::stat::makedev(254, 0)).unwrap_or(0xfe00);
    shut("block device", guest.mknod(ROOT_NODE, "disk", libc::S_IFBLK | 0o666, block).is_err());
    shut("memory device", guest.mknod(ROOT_NODE, "mem", libc::S_IFCHR | 0o666, 0x101).is_err());
    let up = guest.list(ROOT_NODE, 4096).expect("a list");
    shut("`..` in a list", up.iter().any(|(name, _)| name == ".."));
    let known = [ROOT_NODE, inner, deep, file];
    let guessed = (0..200)
        .filter(|node| !known.contains(node))
        .filter_map(|node| guest.list(node, 4096).ok())
        .flatten();
    shut("guessed numbers", guessed.into_iter().all(|(name, _)| name != "secret"));
    shut("a folder's handle as a file's", {
        let handle = guest.open_directory(inner).expect("a handle");
        guest.read(file, handle, 0, 100).is_err() && guest.read(inner, handle, 0, 100).is_err()
    });
    // A folder that the host moves out stays what the guest holds, but has no way up.
    fs::rename(folder.join("inner/deep"), outside.join("deep")).expect("a move");
    shut("up from a moved folder", guest.look_up(deep, "..").is_err());
    shut("aside from a moved folder", guest.look_up(deep, "../secret").is_err());
    fs::rename(outside.join("deep"), folder.join("inner/deep")).expect("a move");
    // A folder that becomes a link to the outside while its node is held.
    fs::rename(folder.join("inner"), folder.join("was-inner")).expect("a move");
    symlink("../outside", folder.join("inner")).expect("a link");
    shut("a folder that became a link", guest.look_up(inner, "secret").is_err());

    shut("changes outside", fs::read(outside.join("secret")).is_ok_and(|bytes| bytes == b"the secret"));
    shut("new files outside", fs::read_dir(&outside).is_ok_and(|list| list.count() == 1));
    assert!(ways >= 30 && server.is_alive());
    announce(&format!("figure: {ways} ways out of a shared folder were tried, and none leads out"));
}

/// A name is exchanged all the time, between a folder and a link to the outside.
#[test]
fn races_do_not_lead_out_of_the_folder() {
    let base = directory();
    let (folder, outside) = (base.path().join("share"), base.path().join("outside"));
    fs::create_dir_all(folder.join("a")).expect("a folder");
    fs::create_dir(&outside).expect("a folder");
    fs::write(outside.join("f"), "outside").expect("a file");
    fs::write(folder.join("a/f"), "inside").expect("a file");
    symlink("../outside", folder.join("b")).expect("a link");
    symlink("/proc/self/cwd/../outside", folder.join("c")).expect("a link");
    let Some(mut server) = start(&folder, &[]) else { return };
    let mut guest = server.guest();
    let stop = AtomicBool::new(false);
    let (mut reads, mut made) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let names: Vec<_> = ["a", "b", "c"]
                .iter()
                .map(|name| std::ffi::CString::new(folder.join(name).to_str().unwrap()))
                .collect();
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                turn += 1;
                let (one, other) = (&names[turn % 3], &names[(turn + 1) % 3]);
                let (one, other) = (one.as_ref().unwrap().as_c_str(), other.as_ref().unwrap().as_c_str());
                let _ = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    one,
                    rustix::fs::CWD,
                    other,
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        });
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let Ok(there) = guest.look_up(ROOT_NODE, "a") else { continue };
            if let Ok(file) = guest.look_up(there.node, "f") {
                if let Ok(handle) = guest.open(file.node, libc::O_RDONLY) {
                    assert_eq!(guest.read(file.node, handle, 0, 10), Ok(b"inside".to_vec()));
                    reads += 1;
                    let mut body = handle.to_le_bytes().to_vec();
                    body.extend([0; 16]);
                    guest.ask(opcode::RELEASE, file.node, &body).expect("a release");
                }
                if guest.create(there.node, "made", libc::O_RDWR, 0o600).is_ok() {
                    made += 1;
                    let _ = guest.unlink(there.node, "made");
                }
            }
            guest.init().expect("a new session, so that nothing piles up");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads > 0 && made > 0, "{reads} reads, {made} files: the race was none");
    assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 1);
    assert!(server.is_alive());
}

#[test]
fn server_has_what_it_needs_and_nothing_else() {
    let base = directory();
    let folder = base.path().join("share");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("file"), "x").expect("a file");
    let Some(server) = start(&folder, &[]) else { return };
    let mut guest = server.guest();
    guest.look_up(ROOT_NODE, "file").expect("a file");
    // chown, dac_override, fowner, fsetid, setgid, setuid
    let wanted = "00000000000000db";
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(server.status(set), wanted, "{set}");
    }
    assert_eq!(server.status("CapInh"), "0000000000000000");
    assert_eq!(server.status("CapAmb"), "0000000000000000");
    assert_eq!((server.status("NoNewPrivs"), server.status("Seccomp")), ("1".into(), "2".into()));
    assert_eq!(server.status("Threads"), "1");
    if !is_root() {
        return;
    }
    let mounts = fs::read_to_string(server.proc("mountinfo")).expect("a process");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert_ne!(fs::read_link(server.proc("ns/mnt")).ok(), fs::read_link("/proc/self/ns/mnt").ok());
    let mut descriptors = vec![];
    for entry in fs::read_dir(server.proc("fd")).expect("a process") {
        let target = fs::read_link(entry.expect("a descriptor").path()).expect("a link");
        descriptors.push(target.to_string_lossy().into_owned());
    }
    let fine = |target: &String| {
        target.starts_with("socket:")
            || target.starts_with('/') && !target.contains("..")
            || target.contains("/fd")
    };
    assert!(descriptors.iter().all(fine) && descriptors.len() <= 9, "{descriptors:?}");
}

/// A process that asks for what is not on its list is killed, which ends the share and nothing else.
#[test]
fn server_ends_with_its_monitor_and_only_then() {
    let base = directory();
    let Some(mut server) = start(base.path(), &[]) else { return };
    let mut guest = server.guest();
    guest.mkdir(ROOT_NODE, "d").expect("a folder");
    assert!(server.is_alive());
    drop(guest);
    server.stream.shutdown(std::net::Shutdown::Both).expect("a socket");
    let end = Instant::now() + PATIENCE;
    while server.is_alive() {
        assert!(Instant::now() < end, "the server goes on without a monitor");
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = server.child.wait().expect("a child");
    assert!(status.success(), "{status}");
}

#[test]
fn server_of_an_ordinary_user_serves_what_is_the_users() {
    const USER: u32 = 65534;
    if !is_root() {
        return;
    }
    let base = directory();
    let folder = base.path().join("share");
    fs::create_dir(&folder).expect("a folder");
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    fs::write(folder.join("foreign"), "x").expect("a file");
    fs::set_permissions(folder.join("foreign"), fs::Permissions::from_mode(0o600)).expect("a mode");
    lchown(&folder, Some(USER), Some(USER)).expect("an owner");
    let Some(server) = start_as(&folder, &[], Some(USER)) else { return };
    let mut guest = server.guest();
    guest.user = (1000, 1000);
    let (file, handle) = guest.create(ROOT_NODE, "file", libc::O_RDWR, 0o640).expect("a file");
    assert_eq!(guest.write(file.node, handle, 0, b"hello"), Ok(5));
    assert_eq!(file.owner, (0, 0), "the user is the guest's root");
    assert_eq!(fs::metadata(folder.join("file")).expect("a file").uid(), USER);
    assert_eq!(guest.set(file.node, setattr::UID, 0, 0, (1000, 0)), Err(libc::EINVAL));
    let foreign = guest.look_up(ROOT_NODE, "foreign").expect("a file");
    assert_eq!(guest.open(foreign.node, libc::O_RDONLY), Err(libc::EACCES));
    assert_eq!(guest.set(foreign.node, setattr::MODE, 0, 0o666, (0, 0)), Err(libc::EPERM));
}

#[test]
fn folders_mounted_later_appear_and_stay_readonly() {
    if !is_root() {
        return;
    }
    let base = directory();
    let folder = base.path().join("share");
    fs::create_dir_all(folder.join("late")).expect("a folder");
    let Some(_mounted) = Mounted::new(&["--bind", folder.to_str().unwrap()], &folder) else { return };
    tool("mount", &["--make-shared", folder.to_str().unwrap()]);
    let (Some(writable), Some(readonly)) = (start(&folder, &[]), start(&folder, &["--readonly"])) else {
        return;
    };
    let (mut guest, mut reader) = (writable.guest(), readonly.guest());
    assert!(guest.walk("late/file").is_err());
    let Some(_late) = Mounted::new(&["-t", "tmpfs", "none"], &folder.join("late")) else { return };
    fs::write(folder.join("late/file"), "late").expect("a file");
    for guest in [&mut guest as &mut dyn Reads, &mut reader] {
        assert_eq!(guest.contents("late/file"), b"late");
    }
    let late = guest.walk("late").expect("a folder").node;
    guest.create(late, "made", libc::O_RDWR, 0o600).expect("a file");
    assert!(folder.join("late/made").exists());
    let late = reader.walk("late").expect("a folder").node;
    assert_eq!(reader.create(late, "other", libc::O_RDWR, 0o600).map(|_| ()), Err(libc::EROFS));
    assert_eq!(reader.unlink(late, "made"), Err(libc::EROFS));
    // And nothing that happens inside comes out.
    assert_eq!(fs::read_to_string("/proc/mounts").expect("mounts").matches("/late").count(), 1);
}

trait Reads {
    fn contents(&mut self, path: &str) -> Vec<u8>;
}

impl<T: FnMut(&[u8]) -> Vec<u8>> Reads for Client<T> {
    fn contents(&mut self, path: &str) -> Vec<u8> {
        let node = self.walk(path).expect(path).node;
        let handle = self.open(node, libc::O_RDONLY).expect(path);
        self.read(node, handle, 0, 1 << 16).expect(path)
    }
}

#[test]
fn random_requests_do_not_end_the_server() {
    let base = directory();
    let folder = base.path().join("share");
    fs::create_dir(&folder).expect("a folder");
    let Some(mut server) = start(&folder, &[]) else { return };
    let mut guest = server.guest();
    let (file, handle) = guest.create(ROOT_NODE, "file", libc::O_RDWR, 0o600).expect("a file");
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    for _ in 0..20_000 {
        let opcode = random() % 56;
        if [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT].contains(&opcode) {
            continue;
        }
        let mut body: Vec<u8> = match random() % 3 {
            0 => [handle.to_le_bytes().to_vec(), words(&[random() % 9, 0, random() % 99, 0, 0, 0, 0, 0])]
                .concat(),
            1 => words(&std::array::from_fn::<u32, 24, _>(|_| random())),
            _ => words(&std::array::from_fn::<u32, 8, _>(|_| random() % 4)),
        };
        // Not so large that a disk runs full.
        body.truncate(random() as usize % (body.len() + 1));
        body.extend(names(&["file", "x"]));
        if matches!(opcode, opcode::FALLOCATE | opcode::SETATTR | opcode::WRITE) {
            body.iter_mut().skip(8).for_each(|byte| *byte &= 3);
            body.iter_mut().skip(11).step_by(4).for_each(|byte| *byte = 0);
        }
        let node = [ROOT_NODE, file.node, u64::from(random() % 8)][random() as usize % 3];
        let _ = guest.ask(opcode, node, &body);
    }
    assert!(server.is_alive());
}

/// As `rm -r` does it. In a ramfs, positions in a directory shift when files before them are deleted.
#[test]
fn files_that_are_deleted_while_they_are_listed_hide_no_others() {
    let base = directory();
    let Some(_mounted) = Mounted::new(&["-t", "ramfs", "none"], base.path()) else { return };
    let Some(server) = start(base.path(), &[]) else { return };
    let mut guest = server.guest();
    for size in [4096, 60_000] {
        for n in 0..600 {
            fs::write(base.path().join(format!("{n}-{}", "x".repeat(n % 60))), "").expect("a file");
        }
        let listed = guest.list_in_pieces(ROOT_NODE, size, |names| {
            for (name, _) in names.iter().filter(|(name, _)| !matches!(&name[..], "." | "..")) {
                fs::remove_file(base.path().join(name)).expect("a file that was listed");
            }
        });
        assert_eq!(listed.expect("a list").len(), 602, "{size}");
    }
}
