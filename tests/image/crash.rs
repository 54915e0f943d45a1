//! A store that many processes use at once, whose users are killed, and whose disk is full.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use rvmm::image::registry::{Options, Progress, push};
use rvmm::image::testing;

use super::server::Registry;
use super::{Home, Ran, engine_at, name};
use crate::support::{directory, is_root, skip};

#[test]
fn eight_processes_share_a_store() {
    let Some(registry) = Registry::start(None) else { return };
    let (source, home) = (Home::new(), Home::new());
    let tags: Vec<String> = (0..2).map(|number| registry.name(&format!("a/{number}"))).collect();
    for (number, tag) in tags.iter().enumerate() {
        let image = source.image(tag, number as u64, 60_000);
        push(&source.store, &image, &name(tag), &Options::default(), &Progress::Quiet).expect("a push");
    }
    let archive = home.path("archive.tar");
    let path = archive.to_str().expect("a path");
    source.run(&["save", "-o", path, &tags[0]]).ok();
    thread::scope(|scope| {
        for process in 0..8 {
            let (home, tags) = (&home, &tags);
            scope.spawn(move || {
                for round in 0..3 {
                    let tag = &tags[(process + round) % 2];
                    let own = format!("own-{process}:{round}");
                    match process % 4 {
                        0 | 1 => drop(home.run(&["pull", tag]).ok()),
                        2 => drop(home.run(&["load", "-i", path]).ok()),
                        _ => drop(home.run(&["image", "prune", "-f"]).ok()),
                    }
                    // Somebody may have removed it in between; that is all that may be wrong.
                    let named = home.run(&["tag", tag, &own]);
                    if named.code == Some(0) {
                        home.run(&["rmi", &own]).ok();
                    } else {
                        named.fails_with(&["no image"]);
                    }
                    if round == 1 && process % 4 == 1 {
                        let removed = home.run(&["rmi", "-f", tag]);
                        assert!(
                            removed.code == Some(0) || removed.stderr.contains("no image"),
                            "{removed:?}"
                        );
                    }
                }
            });
        }
    });
    for tag in &tags {
        home.run(&["pull", tag]).ok();
    }
    home.run(&["image", "prune", "-f"]).ok();
    home.verify_clean();
    assert_eq!(home.store.images().expect("images").len(), 2);
}

#[test]
fn killed_at_any_moment_the_store_stays_whole() {
    let Some(registry) = Registry::start(None) else { return };
    let (source, home) = (Home::new(), Home::new());
    let tag = registry.name("a/b");
    let layers: Vec<_> = (0..4).map(|seed| testing::large_layer(seed, 120_000)).collect();
    let image = testing::image(&source.store, &tag, &layers).expect("an image");
    push(&source.store, &image, &name(&tag), &Options::default(), &Progress::Quiet).expect("a push");
    let started = std::time::Instant::now();
    home.run(&["pull", "-q", &tag]).ok();
    let whole = started.elapsed();
    let rounds = 24;
    for round in 0..rounds {
        if round % 4 == 0 {
            home.run(&["rmi", "-f", &tag]);
            home.run(&["image", "prune", "-f"]).ok();
        }
        let mut pull = home
            .engine(&["pull", &tag])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the engine");
        // Spread over the whole of it, start and end included.
        thread::sleep(whole * (round * 7 % rounds) / (rounds - 2));
        let _ = pull.kill();
        let _ = pull.wait();
        home.verify();
        if round % 3 == 0 {
            home.run(&["images"]).ok();
            home.store.gc().expect("a garbage collection");
            home.verify();
        }
    }
    home.run(&["pull", &tag]).ok();
    let pulled = home.store.resolve(&tag).expect("an image");
    for (directory, seed) in home.store.layer_dirs(&pulled).expect("directories").iter().zip(0..) {
        let file = fs::read(directory.join(format!("large-{seed}"))).expect("a file");
        assert!(file == testing::noise(seed, 120_000), "layer {seed} is damaged");
    }
    home.run(&["image", "prune", "-f"]).ok();
    home.verify_clean();
}

/// A small file system that goes away.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(bytes: &str) -> Option<Self> {
        let directory = directory();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "none"])
            .arg(directory.path())
            .stderr(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            skip("cannot mount a file system");
            return None;
        }
        Some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn full_disk_breaks_nothing_and_can_be_cleared() {
    if !is_root() {
        return;
    }
    let Some(registry) = Registry::start(None) else { return };
    let Some(small) = Small::mount("2m") else { return };
    let source = Home::new();
    let (little, large) = (registry.name("a/little"), registry.name("a/large"));
    for (tag, length) in [(&little, 50_000), (&large, 1_500_000)] {
        let image = source.image(tag, 9, length);
        push(&source.store, &image, &name(tag), &Options::default(), &Progress::Quiet).expect("a push");
    }
    let engine =
        |arguments: &[&str]| Ran::from(engine_at(small.path(), arguments).output().expect("the engine"));
    engine(&["pull", &little]).ok();
    // The blob fits, the unpacked layer beside it does not.
    engine(&["pull", &large]).fails_with(&["No space left"]);
    engine(&["images"]).ok();
    fs::write(small.path().join("ballast"), vec![0; 2 << 20]).expect_err("a full disk");
    engine(&["pull", &large]).fails_with(&["No space left"]);
    engine(&["tag", &little, "other"]).fails_with(&["No space left"]);
    // On a disk without a free byte, removing works.
    engine(&["rmi", "-f", &large]);
    engine(&["image", "prune", "-f"]).ok();
    assert_eq!(engine(&["images", "-q", &little]).ok().stdout.lines().count(), 1);
    fs::remove_file(small.path().join("ballast")).expect("a file");
    engine(&["rmi", &little]).ok();
    engine(&["pull", &little]).ok();
    let store = rvmm::image::Store::open(&small.path().join("images")).expect("a store");
    for image in store.images().expect("images") {
        store.layer_dirs(&image).expect("directories");
    }
    assert_eq!(fs::read_dir(small.path().join("images/partial")).expect("a directory").count(), 0);
}
