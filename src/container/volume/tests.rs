use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown, symlink};

use super::*;

fn volumes() -> (tempfile::TempDir, Volumes) {
    let directory = tempfile::tempdir().unwrap();
    let volumes = Volumes::new(directory.path());
    (directory, volumes)
}

fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

#[test]
fn volume_is_made_once_and_found_again() {
    let (_directory, volumes) = volumes();
    assert!(volumes.list().unwrap().is_empty());
    let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let made = volumes.create(Some("data"), &labels).unwrap();
    assert_eq!(volumes.create(Some("data"), &none()).unwrap(), made);
    assert_eq!(made.labels, labels);
    assert!(volumes.data("data").is_dir() && !made.anonymous);
    let unnamed = volumes.create(None, &none()).unwrap();
    assert!(unnamed.anonymous && unnamed.name.len() == 64);
    assert_eq!(volumes.list().unwrap().len(), 2);
    for name in ["", "../x", "a/b", ".x", "-x", "a\0", &"x".repeat(129)] {
        assert!(matches!(volumes.create(Some(name), &none()), Err(Error::Name(_))), "{name:?}");
        assert!(matches!(volumes.remove(name), Err(Error::Name(_))));
    }
    assert!(matches!(volumes.acquire(Some("data"), "../x"), Err(Error::Id(_))));
}

#[test]
fn volume_in_use_is_not_removed() {
    let (directory, volumes) = volumes();
    volumes.acquire(Some("data"), "aaa").unwrap();
    volumes.acquire(Some("data"), "bbb").unwrap();
    fs::write(volumes.data("data").join("file"), "x").unwrap();
    let message = volumes.remove("data").unwrap_err().to_string();
    assert_eq!(message, "volume \"data\" is in use by aaa, bbb");
    assert_eq!(volumes.prune(|_| true).unwrap(), (vec![], 0));
    volumes.release("aaa", false).unwrap();
    volumes.repair(|id| id != "bbb").unwrap();
    assert!(volumes.users("data").unwrap().is_empty());
    volumes.remove("data").unwrap();
    assert!(matches!(volumes.remove("data"), Err(Error::Missing(_))));
    assert_eq!(files::names(&directory.path().join("volumes")).unwrap(), ["lock"]);
}

#[test]
fn volumes_without_a_name_go_with_their_last_container() {
    let (_directory, volumes) = volumes();
    let unnamed = volumes.acquire(None, "aaa").unwrap();
    volumes.acquire(Some(&unnamed.name), "bbb").unwrap();
    volumes.acquire(Some("named"), "aaa").unwrap();
    volumes.release("aaa", true).unwrap();
    assert_eq!(volumes.list().unwrap().len(), 2);
    volumes.release("bbb", true).unwrap();
    let left = volumes.list().unwrap();
    assert_eq!((left.len(), left[0].name.as_str()), (1, "named"));
}

#[test]
fn prune_removes_what_is_named_and_what_was_interrupted() {
    let (directory, volumes) = volumes();
    volumes.create(Some("named"), &none()).unwrap();
    let unnamed = volumes.create(None, &none()).unwrap().name;
    fs::write(volumes.data(&unnamed).join("file"), vec![1; 20_000]).unwrap();
    let left = directory.path().join("volumes/.removed-abc");
    fs::create_dir(&left).unwrap();
    let (names, bytes) = volumes.prune(|volume| volume.anonymous).unwrap();
    assert_eq!(names, [unnamed]);
    assert!((20_000..100_000).contains(&bytes), "{bytes}");
    assert!(!left.exists());
    assert!(volumes.get("named").unwrap().is_some());
}

/// A root file system with everything that can be in one, and a directory beside it that must not be touched.
fn image() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    let at = root.join("var/lib/app");
    fs::create_dir_all(at.join("deep/er")).unwrap();
    fs::write(directory.path().join("secret"), "the host's").unwrap();
    fs::write(at.join("file"), "contents").unwrap();
    fs::hard_link(at.join("file"), at.join("deep/same")).unwrap();
    symlink("file", at.join("link")).unwrap();
    symlink(directory.path().join("secret"), at.join("away")).unwrap();
    symlink("../../../../../../../..", at.join("deep/up")).unwrap();
    // Directories and whole targets that lead out.
    symlink(directory.path(), root.join("escape")).unwrap();
    symlink("/var/lib/app", root.join("alias")).unwrap();
    nix::unistd::mkfifo(&at.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(at.join("deep/er"), PermissionsExt::from_mode(0o1555)).unwrap();
    fs::set_permissions(&at, PermissionsExt::from_mode(0o2750)).unwrap();
    (directory, root)
}

#[test]
fn empty_volume_takes_everything_that_the_image_has() {
    let (directory, volumes) = volumes();
    let (outside, root) = image();
    let at = root.join("var/lib/app");
    let with_attributes =
        rustix::fs::lsetxattr(at.join("file"), "user.note", b"kept", rustix::fs::XattrFlags::empty());
    if is_root() {
        chown(at.join("file"), Some(1234), Some(2345)).unwrap();
        fs::set_permissions(at.join("file"), PermissionsExt::from_mode(0o4755)).unwrap();
        std::os::unix::fs::lchown(at.join("link"), Some(77), Some(78)).unwrap();
        chown(&at, Some(1000), Some(1001)).unwrap();
        fs::set_permissions(&at, PermissionsExt::from_mode(0o2750)).unwrap();
    }
    let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::open(at.join("deep")).unwrap().set_modified(old).unwrap();

    volumes.create(Some("data"), &none()).unwrap();
    assert!(volumes.fill("data", &root, Path::new("/var/lib/app")).unwrap());
    let data = volumes.data("data");
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "contents");
    for name in [".", "file", "link", "away", "pipe", "deep", "deep/er", "deep/same", "deep/up"] {
        let (from, to) =
            (at.join(name).symlink_metadata().unwrap(), data.join(name).symlink_metadata().unwrap());
        assert_eq!(
            (from.mode(), from.uid(), from.gid(), from.mtime()),
            (to.mode(), to.uid(), to.gid(), to.mtime()),
            "{name}"
        );
        if name != "." {
            assert_eq!(from.nlink(), to.nlink(), "{name}");
        }
    }
    assert_eq!(data.join("file").metadata().unwrap().ino(), data.join("deep/same").metadata().unwrap().ino());
    assert_eq!(fs::read_link(data.join("link")).unwrap(), Path::new("file"));
    assert_eq!(fs::read_link(data.join("away")).unwrap(), outside.path().join("secret"));
    assert!(data.join("pipe").symlink_metadata().unwrap().file_type().is_fifo());
    if with_attributes.is_ok() {
        let mut value = [0; 16];
        let len = rustix::fs::lgetxattr(data.join("deep/same"), "user.note", &mut value).unwrap();
        assert_eq!(&value[..len], b"kept");
    }
    assert_eq!(
        files::names(&directory.path().join("volumes/data")).unwrap(),
        ["_data", "lock", "users", "volume.json"]
    );

    // A volume that has something is left alone.
    fs::remove_file(data.join("file")).unwrap();
    assert!(!volumes.fill("data", &root, Path::new("/var/lib/app")).unwrap());
    assert!(!data.join("file").exists());
}

#[test]
fn targets_are_found_inside_of_the_image_only() {
    let (_directory, volumes) = volumes();
    let (outside, root) = image();
    for (index, target) in
        ["/escape", "/escape/root", "/none", "/var/lib/app/file", "/../.."].iter().enumerate()
    {
        let name = format!("v{index}");
        volumes.create(Some(&name), &none()).unwrap();
        let done = volumes.fill(&name, &root, Path::new(target)).unwrap();
        assert!(!volumes.data(&name).join("secret").exists(), "{target}");
        // The root above all is the image's own.
        assert_eq!(done, *target == "/../..", "{target}");
    }
    volumes.create(Some("alias"), &none()).unwrap();
    assert!(volumes.fill("alias", &root, Path::new("/alias")).unwrap());
    assert!(volumes.data("alias").join("file").exists());
    assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "the host's");
}

#[test]
fn interrupted_fill_is_ended_by_the_next() {
    let (directory, volumes) = volumes();
    let (_outside, root) = image();
    volumes.create(Some("data"), &none()).unwrap();
    let place = directory.path().join("volumes/data");
    fs::create_dir(place.join("copy.new")).unwrap();
    fs::write(place.join("copy.new/half"), "").unwrap();
    assert!(volumes.fill("data", &root, Path::new("/var/lib/app")).unwrap());
    assert!(!volumes.data("data").join("half").exists() && volumes.data("data").join("file").exists());

    // Whole, and moved in part.
    fs::create_dir(place.join("copy")).unwrap();
    fs::write(place.join("copy/more"), "").unwrap();
    fs::write(place.join("copy/file"), "not this").unwrap();
    assert!(volumes.fill("data", &root, Path::new("/var/lib/app")).unwrap());
    assert!(volumes.data("data").join("more").exists());
    assert_eq!(fs::read_to_string(volumes.data("data").join("file")).unwrap(), "contents");
    assert!(!place.join("copy").exists());
}

#[test]
fn of_many_at_once_one_fills() {
    let (_directory, volumes) = volumes();
    let (_outside, root) = image();
    let filled: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|index| {
                let (volumes, root) = (&volumes, &root);
                scope.spawn(move || {
                    volumes.acquire(Some("data"), &format!("c{index}")).unwrap();
                    volumes.fill("data", root, Path::new("/var/lib/app")).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
    });
    assert_eq!(filled, 1);
    assert_eq!(volumes.users("data").unwrap().len(), 8);
}
