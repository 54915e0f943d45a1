//! What layers show when overlayfs puts them together: directories for native containers, disks for microVMs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rvmm::image::layers::testing::Archive;
use rvmm::image::{Commit, Image, commit, testing};
use tar::EntryType;

use super::Home;
use crate::support::{has_tool, is_root, skip, tool};

/// Mounts that go away, the last one first.
#[derive(Default)]
struct Mounts(Vec<PathBuf>);

impl Mounts {
    /// False if it cannot be mounted here, which is said.
    fn add(&mut self, arguments: &[&str], at: &Path) -> bool {
        fs::create_dir_all(at).expect("a directory");
        let done = Command::new("mount").args(arguments).arg(at).stderr(Stdio::null()).status();
        let mounted = done.is_ok_and(|status| status.success());
        if mounted {
            self.0.push(at.to_owned());
        } else {
            skip(&format!("cannot mount {}", arguments.join(" ")));
        }
        mounted
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

fn overlay(layers: &[PathBuf]) -> String {
    let lower: Vec<String> = layers.iter().rev().map(|path| path.display().to_string()).collect();
    format!("lowerdir={}", lower.join(":"))
}

/// What a tree is: for each name type and permissions, owner, size or device, time, contents or target, attributes.
fn tree(root: &Path) -> BTreeMap<String, String> {
    fn walk(root: &Path, path: &Path, found: &mut BTreeMap<String, String>) {
        let stat = fs::symlink_metadata(path).expect("a file");
        let name = path.strip_prefix(root).expect("a name").display().to_string();
        let contents = match stat.file_type() {
            kind if kind.is_file() => fs::read_to_string(path).unwrap_or_default(),
            kind if kind.is_symlink() => fs::read_link(path).expect("a link").display().to_string(),
            _ => String::new(),
        };
        let mut value = vec![0; 100];
        let capability = rustix::fs::lgetxattr(path, "security.capability", &mut value).unwrap_or(0);
        let links = if stat.is_file() { stat.nlink() } else { 0 };
        let (uid, gid, rdev, mtime) = (stat.uid(), stat.gid(), stat.rdev(), stat.mtime());
        let line = format!("{:o} {uid}:{gid} {rdev} {mtime} {links} {capability} {contents}", stat.mode());
        found.insert(name, line);
        if stat.is_dir() {
            for entry in fs::read_dir(path).expect("a directory") {
                walk(root, &entry.expect("an entry").path(), found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

fn image(home: &Home) -> Image {
    let owner = |header: &mut tar::Header| {
        header.set_uid(1000);
        header.set_gid(2000);
        header.set_mode(0o4755);
    };
    let null = |header: &mut tar::Header| {
        header.set_device_major(1).expect("a number");
        header.set_device_minor(3).expect("a number");
    };
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let base = Archive::new()
        .directory("./", 0o755)
        .directory("opaque", 0o750)
        .file("opaque/old", "old")
        .directory("merged", 0o755)
        .file("merged/kept", "kept")
        .file("merged/gone", "gone")
        .file("whole/deep/tree", "x")
        .file("replaced", "a file")
        .file("again/old", "old")
        .entry(EntryType::Regular, b"owned", b"", b"set-user-id", owner, &[])
        .entry(
            EntryType::Regular,
            b"capable",
            b"",
            b"x",
            |_| {},
            &[("SCHILY.xattr.security.capability", capability)],
        )
        .entry(EntryType::Char, b"null", b"", b"", null, &[])
        .entry(EntryType::Fifo, b"fifo", b"", b"", |_| {}, &[])
        .hard_link("linked", "owned")
        .symlink("link", "/merged/kept");
    let top = Archive::new()
        .directory("opaque", 0o700)
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "new")
        .file("merged/.wh.gone", "")
        .file("merged/added", "added")
        .file(".wh.whole", "")
        .directory("replaced", 0o755)
        .file("replaced/inner", "x")
        .file(".wh.again", "")
        .file("again/new", "new");
    testing::image(&home.store, "a", &[base.finish(), top.finish()]).expect("an image")
}

#[test]
fn directories_and_disks_of_layers_show_the_same_image() {
    if !is_root() || !has_tool("mkfs.erofs") {
        return;
    }
    let home = Home::new();
    let image = image(&home);
    let mut mounts = Mounts::default();
    let directories = home.store.layer_dirs(&image).expect("directories");
    let native = home.path("native");
    if !mounts.add(&["-t", "overlay", "-o", &overlay(&directories), "none"], &native) {
        return;
    }
    let native = tree(&native);
    let names: Vec<&str> = native.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "",
            "again",
            "again/new",
            "capable",
            "fifo",
            "link",
            "linked",
            "merged",
            "merged/added",
            "merged/kept",
            "null",
            "opaque",
            "opaque/new",
            "owned",
            "replaced",
            "replaced/inner",
        ]
    );
    assert!(native["owned"].starts_with("104755 1000:2000 0 1000 2 0 set-user-id"), "{}", native["owned"]);
    assert!(native["opaque"].starts_with("40700 "), "{}", native["opaque"]);
    let disks = home.store.layer_disks(&image).expect("disks");
    let mut mounted = vec![];
    for (number, disk) in disks.iter().enumerate() {
        let at = home.path(&format!("disk-{number}"));
        if !mounts.add(&["-t", "erofs", "-o", "loop,ro", disk.to_str().expect("a path")], &at) {
            return;
        }
        mounted.push(at);
    }
    let guest = home.path("guest");
    assert!(mounts.add(&["-t", "overlay", "-o", &overlay(&mounted), "none"], &guest), "overlayfs on EROFS");
    let guest = tree(&guest);
    for (name, line) in &native {
        assert_eq!(guest.get(name), Some(line), "{name}");
    }
    assert_eq!(native.len(), guest.len());
    assert!(native["capable"].contains(" 20 x"), "{}", native["capable"]);
}

#[test]
fn committed_changes_show_what_the_container_saw() {
    if !is_root() {
        return;
    }
    // On a file system that overlayfs can write to.
    let home = Home::new();
    let base = image(&home);
    let mut mounts = Mounts::default();
    if !mounts.add(&["-t", "tmpfs", "none"], &home.path("rw")) {
        return;
    }
    for name in ["rw/upper", "rw/work"] {
        fs::create_dir(home.path(name)).expect("a directory");
    }
    let directories = home.store.layer_dirs(&base).expect("directories");
    let options = format!(
        "{},upperdir={},workdir={}",
        overlay(&directories),
        home.path("rw/upper").display(),
        home.path("rw/work").display()
    );
    let root = home.path("root");
    if !mounts.add(&["-t", "overlay", "-o", &options, "none"], &root) {
        return;
    }
    fs::write(root.join("merged/mine"), "mine").expect("a file");
    fs::remove_file(root.join("merged/kept")).expect("a file");
    fs::remove_dir_all(root.join("replaced")).expect("a directory");
    fs::create_dir(root.join("replaced")).expect("a directory");
    fs::write(root.join("owned"), "changed").expect("a file");
    fs::hard_link(root.join("merged/mine"), root.join("mine-too")).expect("a link");
    let before = tree(&root);
    let changes = Commit {
        message: Some("mine".into()),
        changes: vec![r#"CMD ["x"]"#.parse().expect("a change")],
        ..Commit::default()
    };
    let image = commit(&home.store, &base, &home.path("rw/upper"), &changes, &[super::name("mine")])
        .expect("an image");
    assert_eq!((image.layers.len(), &image.layers[..2]), (3, &base.layers[..]));
    assert_eq!(image.config.config().as_ref().and_then(|c| c.cmd().clone()), Some(vec!["x".to_owned()]));
    let directories =
        home.store.layer_dirs(&home.store.resolve("mine").expect("an image")).expect("directories");
    let again = home.path("again");
    assert!(mounts.add(&["-t", "overlay", "-o", &overlay(&directories), "none"], &again));
    assert_eq!(tree(&again), before);
}

#[test]
fn busybox_from_debian_runs_from_its_layers() {
    if !is_root() || !has_tool("chroot") || !has_tool("python3") {
        return;
    }
    tool(crate::support::project("scripts/build-images").to_str().expect("a path"), &["busybox"]);
    let home = Home::new();
    let archive = crate::support::project("target/images/busybox.tar");
    home.run(&["load", "-i", archive.to_str().expect("a path")]).ok();
    let image = home.store.resolve("busybox").expect("an image");
    let directories = home.store.layer_dirs(&image).expect("directories");
    let root = directories[0].to_str().expect("a path");
    assert_eq!(
        tool("chroot", &[root, "/bin/sh", "-c", "echo $((6 * 7)); ls /bin/busybox"]),
        "42\n/bin/busybox\n"
    );
}

#[test]
fn user_without_rights_has_a_store_too() {
    if !is_root() || !has_tool("setpriv") {
        return;
    }
    let (source, home) = (Home::new(), Home::new());
    image(&source);
    // Where everybody can reach: the binary may lie below a home directory.
    let binary = home.path("engine");
    fs::copy(env!("CARGO_BIN_EXE_rvmm-engine"), &binary).expect("a copy");
    let archive = home.path("a.tar");
    source.run(&["save", "-o", archive.to_str().expect("a path"), "a"]).ok();
    let root = home.path("data");
    fs::create_dir(&root).expect("a directory");
    for path in [&home.path(""), &binary, &archive, &root] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(if path == &root { 0o777 } else { 0o755 });
        fs::set_permissions(path, mode).expect("permissions");
    }
    let run = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&binary).args(arguments);
        super::Ran::from(command.env("RVMM_ROOT", &root).output().expect("setpriv"))
    };
    run(&["load", "-i", archive.to_str().expect("a path")]).ok();
    let store = rvmm::image::Store::open(&root.join("images")).expect("a store");
    let loaded = store.resolve("a").expect("an image");
    let directories = store.layer_dirs(&loaded).expect("directories");
    let stat = |name: &str| fs::symlink_metadata(directories[1].join(name));
    assert_eq!(stat("opaque").expect("a directory").uid(), 65534);
    let mut value = [0];
    assert_eq!(rustix::fs::getxattr(directories[1].join("opaque"), "user.overlay.opaque", &mut value), Ok(1));
    assert_eq!(stat("whole").expect("a whiteout").rdev(), 0);
    assert!(!directories[0].join("null").exists() && directories[0].join("owned").exists());
    run(&["rmi", "a"]).ok();
    assert_eq!(super::entries(&root.join("images/layers")), []);
}
