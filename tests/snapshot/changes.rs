//! Snapshots of what has changed since the one before.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{MIB, Saved, counting, names, restore, snapshot};
use crate::sandbox;
use crate::support::api::Api;
use crate::support::monitor::Running;
use crate::support::{Monitor, PATIENCE, has_kvm, is_root, tiny};

fn snapshot_of_changes(socket: &Path, place: &Path) {
    Monitor::new().arg("snapshot").arg("--diff").arg(socket).arg(place).run().exits(0);
}

/// Memory files, the one that takes most room on the disk first, with that room.
fn memories(place: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(place).expect("a directory").map(|entry| entry.expect("an entry").path());
    let memories = entries.filter(|path| path.to_str().unwrap().contains("memory-"));
    let room = |path: &PathBuf| fs::metadata(path).expect("a file").blocks() * 512;
    let mut all: Vec<_> = memories.map(|path| (room(&path), path)).collect();
    all.sort();
    all.reverse();
    all
}

/// Ends a guest that has counted `count` bytes before.
fn ends_at(mut running: Running, count: i32) {
    running.send("q");
    running.wait(PATIENCE).exits(count + 1);
}

fn counts(place: &Path, count: i32) {
    ends_at(restore(place).start_with_input(), count);
}

#[test]
fn changes_lie_over_the_snapshot_that_a_vm_was_restored_from() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&["--rng", "--balloon"]);
    first.feed("abc");
    let place = first.snapshot();
    drop(first.running);
    let api = Api::new(&first.guest.path("second"));
    let mut second = restore(&place).arg("--api-socket").arg(&api.path).start_with_input();
    second.send("de");
    second.expect("de");
    // Beside the first one, and in its place.
    let other = first.guest.path("other");
    snapshot_of_changes(&api.path, &other);
    second.send("f");
    second.expect("f");
    snapshot_of_changes(&api.path, &other);
    assert_eq!(names(&other), ["memory", "state"]);
    counts(&other, 6);
    counts(&place, 3);
    snapshot_of_changes(&api.path, &place);
    assert_eq!(names(&place), ["memory", "memory", "state"]);
    assert!(memories(&place).last().unwrap().0 < MIB);
    counts(&place, 6);
    second.send("g");
    second.expect("g");
    snapshot_of_changes(&api.path, &place);
    assert_eq!(names(&place), ["memory", "memory", "state"]);
    // A directory may be moved with all that is in it.
    let moved = first.guest.path("moved");
    fs::rename(&place, &moved).unwrap();
    counts(&moved, 7);
    restore(&other).run().fails_with(&["open the memory", "snapshot"]);

    // A whole one stands by itself again, and what comes after it cannot build on what was removed.
    fs::rename(&moved, &place).unwrap();
    snapshot(&api.path, &place);
    assert_eq!(names(&place), ["memory", "state"]);
    counts(&place, 7);
    snapshot_of_changes(&api.path, &other);
    ends_at(second, 7);
    fs::remove_dir_all(&place).unwrap();
    counts(&other, 7);
}

#[test]
fn changes_lie_over_each_other() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&["--rng", "--track-dirty-pages"]);
    first.feed("a");
    let place = first.snapshot();
    for (round, text) in (1..).zip(["bc", "d", "", "e"]) {
        if !text.is_empty() {
            first.feed(text);
        }
        snapshot_of_changes(&first.api.path, &place);
        assert_eq!(names(&place).len(), round + 2, "{:?}", names(&place));
    }
    assert!(memories(&place).iter().skip(1).all(|(room, _)| *room < MIB / 4), "{:?}", memories(&place));
    first.feed("f");
    counts(&place, 5);
    // It goes on, and so does the one that comes from it.
    let api = Api::new(&first.guest.path("second"));
    let monitor = restore(&place).args(["--track-dirty-pages", "--api-socket"]).arg(&api.path);
    let mut second = monitor.start_with_input();
    second.send("x");
    second.expect("x");
    let other = first.guest.path("other");
    snapshot_of_changes(&api.path, &other);
    second.send("y");
    second.expect("y");
    snapshot_of_changes(&api.path, &other);
    assert_eq!(names(&other), ["memory", "memory", "state"]);
    counts(&other, 7);
    ends_at(second, 7);
    ends_at(first.running, 6);

    let (_, base) = memories(&place).remove(0);
    let whole = fs::read(&base).unwrap();
    fs::write(&base, &whole[..whole.len() - 4096]).unwrap();
    restore(&place).run().fails_with(&["cut off"]);
    fs::remove_file(&base).unwrap();
    restore(&place).run().fails_with(&["open the memory"]);
    restore(&other).run().fails_with(&["open the memory"]);
    fs::write(&base, whole).unwrap();
    counts(&place, 5);
}

#[test]
fn changes_are_asked_for_in_firecrackers_words() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&counting());
    let (state, memory) = (guest.path("vm.snap"), |name: &str| guest.path(name));
    let api = Api::new(&guest.path("api"));
    let first = Monitor::new().arg("--api-socket").arg(&api.path);
    let mut running = first.start_with_input();
    let machine = "{\"vcpu_count\":1,\"mem_size_mib\":16,\"track_dirty_pages\":true}";
    api.change("PUT", "/machine-config", machine);
    let kernel = format!("{{\"kernel_image_path\":\"{}\"}}", guest.kernel.display());
    api.change("PUT", "/boot-source", &kernel);
    api.change("PUT", "/actions", "{\"action_type\":\"InstanceStart\"}");
    running.expect("ready");
    assert_eq!(api.get("/machine-config").get("track_dirty_pages").unwrap(), true);
    let save = |api: &Api, kind: &str, memory: &Path| {
        let paths =
            format!("\"snapshot_path\":\"{}\",\"mem_file_path\":\"{}\"", state.display(), memory.display());
        api.change("PUT", "/snapshot/create", &format!("{{\"snapshot_type\":\"{kind}\",{paths}}}"));
    };
    // There is nothing yet to compare with, so it is a whole one.
    save(&api, "Diff", &memory("base"));
    running.send("ab");
    running.expect("ab");
    save(&api, "Diff", &memory("more"));
    running.send("c");
    running.expect("c");
    let load = |memory: &Path| {
        format!(
            "{{\"snapshot_path\":\"{}\",\"mem_backend\":{{\"backend_type\":\"File\",\"backend_path\":\"{}\"}},\
             \"track_dirty_pages\":true,\"resume_vm\":true}}",
            state.display(),
            memory.display()
        )
    };
    let other = Api::new(&guest.path("other"));
    let mut second = Monitor::new().arg("--api-socket").arg(&other.path).start_with_input();
    other.refuses("PUT", "/snapshot/load", &load(&memory("base")), 400, "memory");
    other.change("PUT", "/snapshot/load", &load(&memory("more")));
    second.send("x");
    second.expect("x");
    // In the place of a file that it would lie over, it is a whole one.
    save(&other, "Diff", &memory("base"));
    fs::remove_file(memory("more")).unwrap();
    ends_at(second, 3);
    ends_at(running, 3);
    let third = Monitor::new().arg("--api-socket").arg(&other.path).start_with_input();
    other.change("PUT", "/snapshot/load", &load(&memory("base")));
    ends_at(third, 3);
}

#[test]
fn changes_of_a_vm_in_a_jail_lie_beside_each_other() {
    if !has_kvm() || !is_root() {
        return;
    }
    let guest = tiny(&counting());
    let jail = sandbox::jailed(guest.directory.path(), ",uid=123456");
    let api = Api::new(&guest.path("api"));
    let first = guest.monitor().arg("--track-dirty-pages").arg("--jail").arg(&jail);
    let mut running = first.arg("--api-socket").arg(&api.path).start_with_input();
    running.expect("ready");
    for (kind, text) in [("Full", "a"), ("Diff", "b"), ("Diff", "c")] {
        running.send(text);
        running.expect(text);
        let body = format!("{{\"snapshot_path\":\"/saved/state\",\"snapshot_type\":\"{kind}\"}}");
        api.change("PUT", "/snapshot/create", &body);
    }
    ends_at(running, 3);
    let place = guest.path("jail/saved");
    assert_eq!(names(&place).len(), 4);
    counts(&place, 3);
}
