use std::fs::{self, Metadata};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tar::EntryType;

use super::testing::Archive;
use super::*;

/// A directory with layers.
struct Layers {
    directory: tempfile::TempDir,
    paths: Vec<PathBuf>,
    options: Options,
}

impl Layers {
    fn new() -> Self {
        let limits = Limits { bytes: 1 << 20, entries: 1000, ratio: 500 };
        let options = Options { limits, rights: Rights::detect() };
        Self { directory: tempfile::tempdir().unwrap(), paths: vec![], options }
    }

    /// Unpacks on top of those that are there.
    fn add(&mut self, stream: &[u8]) -> Result<Unpacked, Error> {
        let path = self.directory.path().join(self.paths.len().to_string());
        fs::create_dir(&path).unwrap();
        let below: Vec<&Path> = self.paths.iter().rev().map(PathBuf::as_path).collect();
        let result = unpack(stream, &path, &below, self.options);
        self.paths.push(path);
        result
    }

    fn with(mut self, archive: Archive) -> Self {
        self.add(&archive.finish()).unwrap();
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.paths.last().unwrap().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn stat(&self, name: &str) -> Metadata {
        fs::symlink_metadata(self.path(name)).unwrap()
    }

    fn is_whiteout(&self, name: &str) -> bool {
        let stat = self.stat(name);
        stat.file_type().is_char_device() && stat.rdev() == 0
    }

    fn is_opaque(&self, name: &str) -> bool {
        xattr(&self.path(name), self.options.rights.opaque()).as_deref() == Some(b"y")
    }
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 1000];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

/// Whether the test can go on; says so if not.
fn is_root(rights: Rights) -> bool {
    if rights != Rights::ALL {
        let thread = std::thread::current();
        let line = format!("skipped: {}: not root\n", thread.name().unwrap_or("a test"));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    rights == Rights::ALL
}

#[test]
fn fields_in_which_nothing_is_written_are_zero() {
    let empty = |header: &mut tar::Header| {
        let old = header.as_old_mut();
        (old.uid, old.gid, old.mtime) = ([0; 8], [0; 8], [0; 12]);
    };
    let blank = |header: &mut tar::Header| {
        let old = header.as_old_mut();
        (old.uid, old.gid, old.size) = ([b' '; 8], [0; 8], [0; 12]);
    };
    let layers = Layers::new().with(
        Archive::new()
            .entry(EntryType::Regular, b"f", b"", b"text", empty, &[])
            .entry(EntryType::Directory, b"d", b"", b"", blank, &[])
            .entry(EntryType::Regular, b"g", b"", b"", |header| header.as_old_mut().mode = [0; 8], &[]),
    );
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(layers.text("f"), "text");
    assert_eq!((layers.stat("f").uid(), layers.stat("d").uid()), (own, own));
    assert_eq!((layers.stat("f").mtime(), layers.stat("g").mode() & 0o7777), (0, 0));
}

#[test]
fn files_directories_and_links_are_made_as_they_were_packed() {
    let layers = Layers::new().with(
        Archive::new()
            .directory("./", 0o751)
            .directory("./d", 0o1777)
            .file("d/f", "hello")
            .entry(EntryType::Regular, b"d/suid", b"", b"x", |header| header.set_mode(0o4755), &[])
            .symlink("d/s", "/etc/passwd")
            .hard_link("d/h", "./d/f")
            .entry(EntryType::Fifo, b"d/p", b"", b"", |_| {}, &[]),
    );
    assert_eq!(layers.text("d/f"), "hello");
    assert_eq!(layers.stat("d/f").ino(), layers.stat("d/h").ino());
    assert_eq!(fs::read_link(layers.path("d/s")).unwrap(), Path::new("/etc/passwd"));
    assert!(layers.stat("d/p").file_type().is_fifo());
    assert_eq!(layers.stat("d/suid").mode() & 0o7777, 0o4755);
    assert_eq!(layers.stat("d").mode() & 0o7777, 0o1777);
    assert_eq!(layers.stat("").mode() & 0o7777, 0o751);
    for name in ["", "d", "d/f", "d/s", "d/p", "d/suid"] {
        assert_eq!(layers.stat(name).mtime(), 1000, "{name}");
    }
}

#[test]
fn owners_devices_and_attributes_are_kept() {
    let mut layers = Layers::new();
    if !is_root(layers.options.rights) {
        return;
    }
    let capability = [1, 0, 0, 2, 10, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let owner = |header: &mut tar::Header| {
        header.set_uid(1234);
        header.set_gid(2345);
    };
    let device = |header: &mut tar::Header| {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_mode(0o666);
    };
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.user.note", b"two\nlines"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("uid", b"3000000"),
        ("mtime", b"12.5"),
    ];
    let archive = Archive::new()
        .entry(EntryType::Regular, b"f", b"", b"x", owner, records)
        .entry(EntryType::Symlink, b"s", b"f", b"", owner, &[("SCHILY.xattr.trusted.note", b"on a link")])
        .entry(EntryType::Char, b"null", b"", b"", device, &[])
        .entry(EntryType::Directory, b"d", b"", b"", owner, &[("SCHILY.xattr.trusted.overlay.opaque", b"y")]);
    layers.add(&archive.finish()).unwrap();
    let stat = layers.stat("f");
    assert_eq!((stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec()), (3_000_000, 2345, 12, 500_000_000));
    assert_eq!((layers.stat("s").uid(), layers.stat("d").gid()), (1234, 2345));
    assert_eq!(layers.stat("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(layers.stat("null").mode() & 0o7777, 0o666);
    assert_eq!(xattr(&layers.path("f"), "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(xattr(&layers.path("f"), "user.note").as_deref(), Some(&b"two\nlines"[..]));
    assert_eq!(xattr(&layers.path("s"), "trusted.note").as_deref(), Some(&b"on a link"[..]));
    assert_eq!(xattr(&layers.path("f"), "trusted.overlay.redirect"), None);
    assert!(!layers.is_opaque("d"), "the archive set overlayfs's own attribute");
}

#[test]
fn user_without_rights_keeps_what_can_be_kept() {
    let mut layers = Layers::new();
    layers.options.rights = Rights::USER;
    let owner = |header: &mut tar::Header| header.set_uid(1234);
    let device = |header: &mut tar::Header| {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
    };
    let archive = Archive::new()
        .entry(EntryType::Regular, b"f", b"", b"x", owner, &[])
        .entry(EntryType::Char, b"null", b"", b"", device, &[])
        .directory("d", 0o555)
        .file("d/.wh..wh..opq", "")
        .file("d/inner", "x")
        .file(".wh.gone", "");
    let unpacked = layers.add(&archive.finish()).unwrap();
    assert_eq!((unpacked.skipped_devices, layers.path("null").exists()), (1, false));
    assert_eq!(layers.stat("f").uid(), rustix::process::geteuid().as_raw());
    assert_eq!(xattr(&layers.path("d"), "user.overlay.opaque").as_deref(), Some(&b"y"[..]));
    assert_eq!(layers.stat("d").mode() & 0o777, 0o555);
    assert!(layers.is_whiteout("gone"));
}

#[test]
fn whiteouts_become_devices_and_opaque_directories_attributes() {
    let layers = Layers::new().with(Archive::new().file("a", "").file("d/x", "").file("e/x", "")).with(
        Archive::new()
            .file(".wh.a", "")
            .file("d/.wh..wh..opq", "")
            .file("d/y", "new")
            .file(".wh..wh.plnk", "")
            .file(".wh..wh.aufs", "x"),
    );
    assert!(layers.is_whiteout("a"));
    assert!(layers.is_opaque("d") && layers.text("d/y") == "new");
    assert_eq!(fs::read_dir(layers.path("")).unwrap().count(), 2);
}

#[test]
fn what_a_layer_has_itself_outlives_its_own_whiteout_in_either_order() {
    let below = || Archive::new().file("d/old", "").file("f", "old");
    let first = Archive::new()
        .file(".wh.d", "")
        .directory("d", 0o755)
        .file("d/new", "")
        .file(".wh.f", "")
        .file("f", "n");
    let last = Archive::new()
        .directory("d", 0o755)
        .file("d/new", "")
        .file(".wh.d", "")
        .file("f", "n")
        .file(".wh.f", "");
    let implied = Archive::new().file(".wh.d", "").file("d/new", "").file("f", "n").file(".wh.f", "");
    for archive in [first, last, implied] {
        let layers = Layers::new().with(below()).with(archive);
        assert!(layers.is_opaque("d"), "the old directory shows through");
        assert!(layers.path("d/new").exists());
        assert_eq!(layers.text("f"), "n");
    }
}

#[test]
fn directories_that_an_archive_leaves_out_are_as_below() {
    let mut layers = Layers::new()
        .with(Archive::new().directory("./", 0o711).directory("tmp", 0o1777).directory("tmp/a", 0o750));
    layers.add(&Archive::new().file("tmp/a/b/f", "x").finish()).unwrap();
    for (name, mode) in [("", 0o711), ("tmp", 0o1777), ("tmp/a", 0o750), ("tmp/a/b", 0o755)] {
        assert_eq!(layers.stat(name).mode() & 0o7777, mode, "{name}");
    }
    assert_eq!((layers.stat("tmp").mtime(), layers.stat("tmp/a/b").mtime()), (1000, 0));
}

#[test]
fn names_behind_links_are_found_within_the_image() {
    let below = Archive::new()
        .directory("usr/bin", 0o755)
        .symlink("bin", "usr/bin")
        .symlink("abs", "/usr/bin")
        .file("usr/bin/sh", "sh");
    let layers = Layers::new().with(below).with(
        Archive::new()
            .file("bin/new", "1")
            .file("abs/other", "2")
            .file("bin/.wh.sh", "")
            .symlink("up", "../../../../usr")
            .file("up/lib/x", "3")
            .symlink("loop", "loop"),
    );
    assert_eq!((layers.text("usr/bin/new"), layers.text("usr/bin/other")), ("1".into(), "2".into()));
    assert_eq!(layers.text("usr/lib/x"), "3");
    assert!(layers.is_whiteout("usr/bin/sh"));
    assert!(!layers.path("bin").exists(), "the link of the layer below would be hidden");
}

#[test]
fn hard_links_to_files_of_layers_below_copy_them_up() {
    let below = Archive::new().directory("d", 0o750).entry(
        EntryType::Regular,
        b"d/f",
        b"",
        b"data",
        |h| h.set_mode(0o640),
        &[],
    );
    let layers = Layers::new().with(below).with(Archive::new().hard_link("h", "d/f"));
    assert_eq!(layers.text("h"), "data");
    assert_eq!(layers.stat("h").ino(), layers.stat("d/f").ino());
    assert_eq!((layers.stat("h").mode() & 0o777, layers.stat("d").mode() & 0o777), (0o640, 0o750));
}

#[test]
fn later_entries_replace_earlier_ones() {
    let layers = Layers::new().with(
        Archive::new()
            .file("a", "1")
            .file("a", "2")
            .file("d/x/y", "")
            .file("d", "file")
            .symlink("s", "/etc")
            .directory("s", 0o755)
            .file("s/f", "in s")
            .hard_link("a", "a"),
    );
    assert_eq!(
        (layers.text("a"), layers.text("d"), layers.text("s/f")),
        ("2".into(), "file".into(), "in s".into())
    );
    assert!(layers.stat("s").is_dir());
}

#[test]
fn hostile_archives_are_refused_and_write_nothing_outside() {
    let huge = |header: &mut tar::Header| header.set_size(1 << 40);
    let long = "a/".repeat(250) + "f";
    let whiteout = |header: &mut tar::Header| {
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
    };
    let far = |key, value| Archive::new().entry(EntryType::Regular, b"f", b"", b"", |_| {}, &[(key, value)]);
    let records = vec![b'x'; 2 << 20];
    let many = (0..1001).fold(Archive::new(), |archive, n| archive.file(&format!("{n}"), ""));
    let deep =
        (0..20).fold(Archive::new(), |archive, n| archive.file(&format!("{n}/{}f", "b/".repeat(100)), ""));
    let cases: Vec<(&str, Archive, &str)> = vec![
        ("leads upwards", Archive::new().file("../f", "x"), "upwards"),
        ("leads upwards inside", Archive::new().file("a/../../f", "x"), "upwards"),
        ("leads upwards by pax", far("path", b"../../f"), "upwards"),
        ("zero byte", far("path", b"a\0b"), "zero byte"),
        ("behind a file", Archive::new().file("a", "").file("a/b", ""), "no directory"),
        ("loop of links", Archive::new().symlink("l", "l").file("l/f", ""), "too many symbolic links"),
        ("hard link out", Archive::new().hard_link("h", "../../etc/passwd"), "upwards"),
        ("hard link to nothing", Archive::new().hard_link("h", "/etc/passwd"), "not there"),
        (
            "hard link behind a link",
            Archive::new().symlink("e", "/etc").hard_link("h", "e/passwd"),
            "not there",
        ),
        ("hard link to a directory", Archive::new().directory("d", 0o755).hard_link("h", "d"), "directory"),
        ("root as file", Archive::new().file("./", "x").symlink("/", "/etc"), "root"),
        ("whiteout of nothing", Archive::new().file(".wh.", ""), "deletes nothing"),
        ("whiteout of the parent", Archive::new().file("d/.wh...", ""), "deletes nothing"),
        ("directory like a whiteout", Archive::new().file("d/.wh.x/f", ""), "name of a whiteout"),
        (
            "the same behind a link",
            Archive::new().symlink("l", ".wh.x").file("l/f", ""),
            "name of a whiteout",
        ),
        (
            "whiteout as device",
            Archive::new().entry(EntryType::Char, b"f", b"", b"", whiteout, &[]),
            "deleted file",
        ),
        (
            "unknown type",
            Archive::new().entry(EntryType::new(b'Q'), b"f", b"", b"", |_| {}, &[]),
            "type of entry",
        ),
        ("deep name", far("path", long.as_bytes()), "too long"),
        ("long name", far("path", &[b'n'; 5000]), "too long"),
        (
            "huge extended header",
            Archive::new().entry(EntryType::XHeader, b"p", b"", b"", huge, &[]),
            "extended header",
        ),
        (
            "large extended header",
            Archive::new().entry(EntryType::XHeader, b"p", b"", &records, |_| {}, &[]),
            "extended header",
        ),
        (
            "huge long name",
            Archive::new().entry(EntryType::GNULongName, b"p", b"", b"", huge, &[]),
            "in a name",
        ),
        (
            "malformed extended header",
            Archive::new().entry(EntryType::XHeader, b"p", b"", b"9 x=", |_| {}, &[]),
            "malformed",
        ),
        ("huge file", Archive::new().entry(EntryType::Regular, b"f", b"", b"", huge, &[]), "bytes in files"),
        ("size of all ones", far("size", b"18446744073709551615"), "too large"),
        ("owner of all ones", far("uid", b"4294967295"), "owner"),
        ("sparse bomb", far("GNU.sparse.size", b"1099511627776"), "bytes in files"),
        ("sparse out of order", sparse_0_1("4,2,0,2", "8", "abcd"), "sparse"),
        ("sparse beyond its end", sparse_0_1("0,2,8,2", "9", "abcd"), "sparse"),
        ("sparse overflow", sparse_0_1("18446744073709551615,4", "9", "abcd"), "sparse"),
        ("many entries", many, "more than 1000 entries"),
        ("many directories on the way", deep, "more than 1000 entries"),
        (
            "headers without end",
            (0..40)
                .fold(Archive::new(), |a, _| a.entry(EntryType::XGlobalHeader, b"g", b"", b"", |_| {}, &[])),
            "in a row",
        ),
        ("no archive", Archive::new().raw(&[7; 1024]), "no tar archive"),
    ];
    let outside = tempfile::tempdir().unwrap();
    for (case, archive, expected) in cases {
        let mut layers = Layers::new();
        let error = layers.add(&archive.finish()).err().unwrap_or_else(|| panic!("{case}: was unpacked"));
        let text = crate::error_chain(&error);
        assert!(text.contains(expected), "{case}: {text}");
        assert_eq!(fs::read_dir(layers.directory.path()).unwrap().count(), 1, "{case}");
    }
    // Links that lead out are kept as they are and never followed.
    let target = outside.path().to_str().unwrap();
    let mut layers = Layers::new();
    layers.add(&Archive::new().symlink("out", target).file("out/f", "x").finish()).unwrap();
    assert_eq!(layers.text(&format!("{target}/f")[1..]), "x");
    let link_then_file = Archive::new().symlink("f", &format!("{target}/f")).file("f", "x").finish();
    layers.add(&link_then_file).unwrap();
    assert_eq!(layers.text("f"), "x");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

fn sparse_0_1(map: &str, size: &str, data: &str) -> Archive {
    let records: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", size.as_bytes()),
        ("GNU.sparse.map", map.as_bytes()),
        ("GNU.sparse.name", b"s"),
    ];
    Archive::new().entry(EntryType::Regular, b"GNUSparseFile.0/s", b"", data.as_bytes(), |_| {}, records)
}

#[test]
fn sparse_files_have_their_holes_in_every_form() {
    let expected = "\0\0ab\0\0\0cd\0";
    let mut map = b"2\n2\n2\n7\n2\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"abcd");
    let new: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"10"),
    ];
    let old = |header: &mut tar::Header| {
        let gnu = header.as_gnu_mut().unwrap();
        for (at, (offset, length)) in [(2, 2), (7, 2)].into_iter().enumerate() {
            gnu.sparse[at].offset.copy_from_slice(format!("{offset:011o}\0").as_bytes());
            gnu.sparse[at].numbytes.copy_from_slice(format!("{length:011o}\0").as_bytes());
        }
        gnu.realsize.copy_from_slice(format!("{:011o}\0", 10).as_bytes());
    };
    for archive in [
        sparse_0_1("2,2,7,2", "10", "abcd"),
        Archive::new().entry(EntryType::Regular, b"GNUSparseFile.0/s", b"", &map, |_| {}, new),
        Archive::new().entry(EntryType::GNUSparse, b"s", b"", b"abcd", old, &[]),
    ] {
        let layers = Layers::new().with(archive.file("after", "x"));
        assert_eq!(layers.text("s"), expected);
        assert_eq!(layers.text("after"), "x");
    }
}

#[test]
fn archives_that_break_off_are_refused_at_every_byte() {
    let whole = Archive::new().directory("d", 0o755).file("d/f", &"x".repeat(700)).unfinished();
    for length in 0..whole.len() {
        let result = Layers::new().add(&whole[..length]);
        // An archive may end without zeroes, but only between entries.
        assert_eq!(result.is_ok(), length == 0 || length == 512, "{length}: {result:?}");
    }
}

#[test]
fn digests_are_those_of_the_whole_streams() {
    let plain = [Archive::new().file("f", "x").finish(), vec![0; 9000]].concat();
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    let packed = encoder.finish().unwrap();
    let unpacked = Layers::new().add(&packed).unwrap();
    assert_eq!(unpacked.diff_id, crate::image::digest::Digest::of(&plain));
    assert_eq!(unpacked.blob, (crate::image::digest::Digest::of(&packed), packed.len() as u64));
    assert_eq!((unpacked.entries, unpacked.bytes), (2, 1));
}

#[test]
fn bombs_are_stopped() {
    let zeroes = zstd::encode_all(vec![0; 8 << 20].as_slice(), 1).unwrap();
    let bomb =
        [zstd::encode_all(Archive::new().file("f", "").unfinished().as_slice(), 1).unwrap(), zeroes].concat();
    let error = Layers::new().add(&bomb).unwrap_err();
    assert!(crate::error_chain(&error).contains("more than 1048576 bytes"), "{error:?}");
}

#[test]
fn packed_directories_come_back_the_same() {
    let mut layers = Layers::new();
    let long = "n".repeat(120);
    let archive = Archive::new()
        .directory("./", 0o755)
        .directory("d", 0o1770)
        .file("d/f", "data")
        .hard_link("d/g", "d/f")
        .symlink("s", &"t".repeat(100))
        .file(&long[..100], "long")
        .entry(EntryType::Regular, b"x", b"", b"x", |_| {}, &[("path", long.as_bytes()), ("mtime", b"5.25")])
        .file(".wh.gone", "")
        .directory("o", 0o755)
        .file("o/.wh..wh..opq", "")
        .entry(EntryType::Fifo, b"p", b"", b"", |_| {}, &[]);
    layers.add(&archive.finish()).unwrap();
    let rights = layers.options.rights;
    let mut first = vec![];
    let packed = pack(&layers.path(""), &mut first, rights).unwrap();
    assert!(packed.entries >= 10 && packed.bytes == 4 + 4 + 1, "{packed:?}");
    layers.add(&first).unwrap();
    let mut second = vec![];
    pack(&layers.path(""), &mut second, rights).unwrap();
    assert!(first == second, "the archive of what was unpacked is another one");
    assert!(layers.is_whiteout("gone") && layers.is_opaque("o"));
    assert_eq!(layers.text(&long), "x");
    assert_eq!((layers.stat(&long).mtime(), layers.stat(&long).mtime_nsec()), (5, 250_000_000));
    assert_eq!(layers.stat("d/f").ino(), layers.stat("d/g").ino());
}

#[test]
fn files_that_would_delete_something_are_not_packed() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(".wh.f"), "").unwrap();
    assert!(pack(directory.path(), vec![], Rights::detect()).is_err());
}

#[test]
fn trees_are_removed_whatever_their_permissions() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/f"), "").unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("a/etc")).unwrap();
    for path in ["a/b", "a"] {
        fs::set_permissions(tree.join(path), fs::Permissions::from_mode(0o000)).unwrap();
    }
    remove_tree(&tree).unwrap();
    remove_tree(&tree).unwrap();
    assert!(!tree.exists() && Path::new("/etc/passwd").exists());
}
