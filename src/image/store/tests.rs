use std::fs;
use std::os::unix::fs::MetadataExt;
use std::thread;

use super::*;
use crate::image::Digest;
use crate::image::layers::testing::Archive;
use crate::image::reference::Reference;
use crate::image::testing::{image, image_with, layer};

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("images")).unwrap();
    Fixture { directory, store }
}

impl Fixture {
    fn image(&self, name: &str, text: &str) -> Image {
        image(&self.store, name, &[layer("base", "base"), layer("top", text)]).unwrap()
    }

    fn files(&self, directory: &str) -> usize {
        fs::read_dir(self.store.root().join(directory)).unwrap().count()
    }
}

fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap().or_latest()
}

#[test]
fn images_are_found_by_name_id_and_the_ids_beginning() {
    let f = fixture();
    let first = f.image("one:1", "1");
    let second = f.image("q.io/two", "2");
    let id = |text: &str| f.store.resolve(text).map(|image| image.id);
    for text in
        ["one:1", "docker.io/library/one:1", &first.id.to_string(), &first.id.hex(), &first.id.short()]
    {
        assert_eq!(id(text).unwrap(), first.id, "{text}");
    }
    assert_eq!(id("q.io/two").unwrap(), second.id);
    for text in ["one", "one:2", "q.io/one:1", &Digest::of(b"x").to_string(), "sha256:zz"] {
        assert!(matches!(id(text), Err(Error::NotFound(_))), "{text}: {:?}", id(text));
    }
    assert!(matches!(id("A B"), Err(Error::Reference(_))));
    // With so many images, some ids begin alike.
    for number in 0..17 {
        f.image("", &number.to_string());
    }
    let all = f.store.images().unwrap();
    assert_eq!(all.len(), 17);
    let alike = all
        .iter()
        .map(|image| image.id.hex()[..1].to_owned())
        .find(|first| all.iter().filter(|image| image.id.hex().starts_with(first.as_str())).count() > 1);
    assert!(matches!(id(&alike.unwrap()), Err(Error::Ambiguous { .. })));
}

#[test]
fn name_like_an_id_does_not_hide_the_image_with_that_id() {
    let f = fixture();
    let (first, second) = (f.image("one", "1"), f.image("two", "2"));
    f.store.tag("two", &name(&format!("sha256:{}", first.id.hex()))).unwrap();
    assert_eq!(f.store.image(&first.id).unwrap().id, first.id);
    assert_eq!(f.store.image(&second.id).unwrap().id, second.id);
}

#[test]
fn images_keep_what_their_configuration_says() {
    let f = fixture();
    let made = image_with(&f.store, "a", &[layer("f", "x")], |config| {
        config["config"]["Healthcheck"] = serde_json::json!({"Test": ["CMD", "true"], "Interval": 5});
    });
    let made = made.unwrap();
    let found = f.store.resolve("a").unwrap();
    assert_eq!((found.id, found.health.unwrap().interval), (made.id, 5));
    assert_eq!(found.config.config().as_ref().unwrap().cmd().as_deref(), Some(&["/bin/sh".to_owned()][..]));
    assert_eq!(Digest::of(&f.store.raw_config(&made).unwrap()), made.id);
    assert_eq!(made.layers[0].diff_id, made.layers[0].chain_id);
}

#[test]
fn names_move_and_images_go_with_their_last_one() {
    let f = fixture();
    let old = f.image("a", "old");
    let new = f.image("a", "new");
    assert_eq!(f.store.resolve("a").unwrap().id, new.id);
    assert!(f.store.image(&old.id).unwrap().names.is_empty());
    f.store.tag("a", &name("b:2")).unwrap();
    let removed = f.store.remove("a", false).unwrap();
    assert_eq!((removed.untagged, removed.deleted), (vec![name("a")], None));
    let removed = f.store.remove("b:2", false).unwrap();
    assert_eq!(removed.deleted, Some(new.id));
    assert!(f.store.remove("b:2", false).is_err());
    assert_eq!(f.store.remove(&old.id.short(), false).unwrap().deleted, Some(old.id));
    assert!(f.store.images().unwrap().is_empty());
}

#[test]
fn image_with_names_in_several_repositories_goes_by_id_only_with_force() {
    let f = fixture();
    let image = f.image("a:1", "x");
    f.store.tag("a:1", &name("a:2")).unwrap();
    f.store.tag("a:1", &name("b")).unwrap();
    assert!(matches!(f.store.remove(&image.id.hex(), false), Err(Error::SeveralNames { .. })));
    let removed = f.store.remove(&image.id.hex(), true).unwrap();
    assert_eq!((removed.untagged.len(), removed.deleted), (3, Some(image.id)));
}

#[test]
fn pulled_digest_goes_with_the_repositorys_last_tag() {
    let f = fixture();
    let digest = name("a").at(Digest::of(b"manifest"));
    let made = f.image("a", "x");
    f.store.add_image(&made.manifest_digest, &[digest.clone(), name("b")]).unwrap();
    assert_eq!(f.store.resolve(&digest.to_string()).unwrap().id, made.id);
    assert_eq!(f.store.resolve(&format!("a:other@{}", Digest::of(b"manifest"))).unwrap().id, made.id);
    let removed = f.store.remove("a", false).unwrap();
    assert_eq!((removed.untagged.len(), removed.deleted), (2, None));
    assert_eq!(f.store.image(&made.id).unwrap().names, [name("b")]);
}

#[test]
fn used_images_are_refused_and_with_force_stay_until_they_are_released() {
    let f = fixture();
    let image = f.image("a", "x");
    f.store.hold(&image.id, "c1").unwrap();
    f.store.hold(&image.id, "c1").unwrap();
    let error = f.store.remove("a", false).unwrap_err().to_string();
    assert!(error.contains("c1"), "{error}");
    assert_eq!(f.store.remove("a", true).unwrap().deleted, None);
    assert!(f.store.prune(true).unwrap().deleted.is_empty());
    assert_eq!(f.store.layer_dirs(&image).unwrap().len(), 2);
    f.store.release(&image.id, "c1").unwrap();
    f.store.release(&image.id, "c1").unwrap();
    assert_eq!(f.store.prune(false).unwrap().deleted, [image.id]);
    assert!(matches!(f.store.hold(&image.id, "c1"), Err(Error::NotFound(_))));
    for id in ["", "../x", "a/b", "."] {
        assert!(f.store.hold(&image.id, id).is_err(), "{id}");
    }
}

#[test]
fn garbage_is_what_no_image_needs() {
    let f = fixture();
    let (first, second) = (f.image("a", "1"), f.image("b", "2"));
    f.store.layer_dirs(&first).unwrap();
    f.store.layer_dirs(&second).unwrap();
    assert_eq!((f.files("blobs/sha256"), f.files("layers")), (3 + 2 + 2, 3));
    assert_eq!(f.store.gc().unwrap(), Reclaimed::default());
    f.store.remove("a", false).unwrap();
    let reclaimed = f.store.gc().unwrap();
    assert!(reclaimed.bytes > 0 && reclaimed.count == 4, "{reclaimed:?}");
    assert_eq!((f.files("blobs/sha256"), f.files("layers"), f.files("trash")), (4, 2, 0));
    assert_eq!(f.store.layer_dirs(&f.store.resolve("b").unwrap()).unwrap().len(), 2);
    let pruned = f.store.prune(true).unwrap();
    assert_eq!((pruned.untagged.len(), pruned.deleted), (1, vec![second.id]));
    assert_eq!((f.files("blobs/sha256"), f.files("layers")), (0, 0));
}

#[test]
fn what_is_being_added_is_no_garbage_and_what_was_left_is() {
    use std::io::Write;
    let f = fixture();
    let lease = f.store.lease().unwrap();
    let digest = f.store.put_blob(&lease, b"x").unwrap();
    let mut unfinished = f.store.new_blob().unwrap();
    unfinished.write_all(b"y").unwrap();
    f.store.gc().unwrap();
    f.store.prune(true).unwrap();
    assert!(f.store.has_blob(&digest, Some(1)));
    f.store.finish_blob(&lease, unfinished).unwrap();
    // As after a crash: nobody holds the locks of these.
    drop(lease);
    for left in [
        "partial/new-1",
        "disks/.new-x",
        "images/.new-x",
        "repositories/.new-x",
        ".new-version",
        "leases/9-9",
    ] {
        fs::write(f.store.root().join(left), "x").unwrap();
    }
    fs::create_dir_all(f.store.root().join("layers/.new-x/fs/d")).unwrap();
    let partial = f.store.root().join("partial").join(Digest::of(b"z").hex());
    fs::write(&partial, "z").unwrap();
    f.store.gc().unwrap();
    for directory in ["blobs/sha256", "disks", "layers", "images", "repositories", "leases", "trash"] {
        assert_eq!(f.files(directory), 0, "{directory}");
    }
    assert!(partial.exists(), "a download of today is worth keeping");
    f.store.prune(false).unwrap();
    assert!(!partial.exists() && !f.store.root().join(".new-version").exists());
}

#[test]
fn record_that_cannot_be_read_stops_the_garbage_collection() {
    let f = fixture();
    let image = f.image("a", "x");
    fs::write(f.store.record_path(&image.id), "{").unwrap();
    assert!(f.store.gc().is_err());
    assert_eq!(f.files("blobs/sha256"), 4);
}

#[test]
fn partial_blobs_are_gone_on_with_and_compared_at_the_end() {
    let f = fixture();
    let digest = Digest::of(b"hello world");
    let mut partial = f.store.try_partial(&digest).unwrap().unwrap();
    partial.write_all(b"hello").unwrap();
    assert!(f.store.try_partial(&digest).unwrap().is_none(), "two have it");
    drop(partial);
    let mut partial = f.store.try_partial(&digest).unwrap().unwrap();
    assert_eq!(partial.length(), 5);
    partial.write_all(b" world").unwrap();
    f.store.finish_partial(partial, 11).unwrap();
    assert!(f.store.has_blob(&digest, Some(11)) && !f.store.has_blob(&digest, Some(12)));
    let mut partial = f.store.try_partial(&Digest::of(b"a")).unwrap().unwrap();
    partial.write_all(b"b").unwrap();
    assert!(matches!(f.store.finish_partial(partial, 1), Err(Error::WrongDigest { .. })));
    let mut partial = f.store.try_partial(&Digest::of(b"a")).unwrap().unwrap();
    assert_eq!(partial.length(), 0, "what was wrong is gone on with");
    partial.write_all(b"aa").unwrap();
    partial.clear().unwrap();
    partial.write_all(b"a").unwrap();
    f.store.finish_partial(partial, 1).unwrap();
}

#[test]
fn damaged_blobs_are_noticed() {
    let f = fixture();
    let image = f.image("a", "x");
    let path = |digest: &Digest| f.store.root().join("blobs/sha256").join(digest.hex());
    let layer = path(&image.layers[1].digest);
    let good = fs::read(&layer).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&layer, &bad).unwrap();
    assert!(matches!(f.store.layer_dirs(&image), Err(Error::Damaged { .. })));
    assert!(!layer.exists(), "it would not be fetched anew");
    fs::write(&layer, &good[..good.len() - 1]).unwrap();
    assert!(matches!(f.store.layer_dirs(&image), Err(Error::Damaged { .. })));
    assert!(matches!(f.store.layer_dirs(&image), Err(Error::Missing { .. })));
    fs::write(&layer, &good).unwrap();
    assert_eq!(f.store.layer_dirs(&image).unwrap().len(), 2);
    assert!(
        !fs::read_dir(f.store.root().join("layers")).unwrap().any(|e| e
            .unwrap()
            .file_name()
            .to_str()
            .unwrap()
            .starts_with('.'))
    );
    fs::write(path(&image.id), "{}").unwrap();
    assert!(matches!(f.store.resolve("a"), Err(Error::Damaged { .. })));
    f.image("b", "y");
    assert_eq!(f.store.images().unwrap().len(), 1);
    assert_eq!(f.store.remove("a", false).unwrap().deleted, Some(image.id));
}

#[test]
fn layer_that_is_not_what_the_configuration_says_is_refused() {
    let f = fixture();
    let made = image_with(&f.store, "a", &[layer("f", "x")], |config| {
        config["rootfs"]["diff_ids"] = serde_json::json!([Digest::of(b"other")]);
    });
    let error = f.store.layer_dirs(&made.unwrap()).unwrap_err();
    assert!(matches!(error, Error::WrongDigest { .. }), "{error}");
    let missing = image_with(&f.store, "a", &[layer("f", "x")], |config| {
        config["rootfs"]["diff_ids"] = serde_json::json!([]);
    });
    assert!(missing.unwrap_err().to_string().contains("1 layers"), "fewer layers than digests");
}

#[test]
fn layers_are_unpacked_once_however_many_want_them() {
    let f = fixture();
    let layers = [Archive::new().directory("d", 0o755).file("d/f", "x").finish(), layer("d/.wh.f", "")];
    let made = image(&f.store, "a", &layers).unwrap();
    let all: Vec<_> = thread::scope(|scope| {
        let tasks: Vec<_> = (0..8).map(|_| scope.spawn(|| f.store.layer_dirs(&made).unwrap())).collect();
        tasks.into_iter().map(|task| task.join().unwrap()).collect()
    });
    let inode = |path: &std::path::Path| fs::metadata(path).unwrap().ino();
    assert!(all.iter().all(|paths| paths == &all[0] && inode(&paths[0]) == inode(&all[0][0])));
    assert_eq!((f.files("layers"), f.store.unpacked_size(&made)), (2, Some(1)));
    assert!(all[0][0].join("d/f").exists());
}

#[test]
fn layers_of_other_images_above_the_same_are_shared() {
    let f = fixture();
    let (first, second) = (f.image("a", "1"), f.image("b", "2"));
    let (one, two) = (f.store.layer_dirs(&first).unwrap(), f.store.layer_dirs(&second).unwrap());
    assert!(one[0] == two[0] && one[1] != two[1]);
}

#[test]
fn store_of_another_version_is_refused() {
    let f = fixture();
    fs::write(f.store.root().join("version"), "7\n").unwrap();
    assert!(Store::open(f.store.root()).unwrap_err().to_string().contains('7'));
    assert!(f.directory.path().exists());
}

#[test]
fn disks_are_whole_pages_and_made_once() {
    let f = fixture();
    if std::process::Command::new("mkfs.erofs").arg("--help").output().is_err() {
        use std::io::Write;
        let thread = std::thread::current();
        let line = format!("skipped: {}: no mkfs.erofs\n", thread.name().unwrap_or("a test"));
        let _ = std::io::stderr().write_all(line.as_bytes());
        return;
    }
    let image = f.image("a", "x");
    let disks = f.store.layer_disks(&image).unwrap();
    assert_eq!(disks.len(), 2);
    for disk in &disks {
        let stat = fs::metadata(disk).unwrap();
        assert!(stat.len() > 0 && stat.len() % 4096 == 0, "{}", stat.len());
        let magic = fs::read(disk).unwrap()[1024..1028].to_vec();
        assert_eq!(magic, 0xe0f5_e1e2u32.to_le_bytes());
    }
    let inode = fs::metadata(&disks[0]).unwrap().ino();
    assert_eq!(f.store.layer_disks(&image).unwrap(), disks);
    assert_eq!(fs::metadata(&disks[0]).unwrap().ino(), inode);
    f.store.remove("a", false).unwrap();
    f.store.gc().unwrap();
    assert_eq!(f.files("disks"), 0);
}
