//! Containers whose files are garbage or missing are shown, and can be removed with all that they have.

use std::fs;
use std::path::{Path, PathBuf};

use super::Place;

/// Processes of a container's control group, in all hierarchies.
fn processes(id: &str) -> String {
    let mut found = String::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let mount = line.split(' ').nth(4).expect("a mount point");
        let list = Path::new(mount).join("rvmm").join(id).join("cgroup.procs");
        found.push_str(&fs::read_to_string(list).unwrap_or_default());
    }
    found
}

fn run_directory(place: &Place) -> PathBuf {
    let mut entries = fs::read_dir(place.run().join("containers")).expect("containers");
    entries.next().expect("a container").expect("an entry").path()
}

/// Spoils files of a container, `kill`ing its supervisor before if that is asked for, and removes it.
fn removes(spoil: &[&str], kill: bool, content: Option<&str>) {
    let Some(place) = Place::new() else { return };
    let id = place.sleeper(&["-v", "named:/data"], "");
    let run = run_directory(&place);
    assert!(!processes(&id).is_empty(), "the container has no control group");
    if kill {
        let state: serde_json::Value = serde_json::from_slice(
            &fs::read(place.data().join("containers").join(&id).join("state.json")).unwrap(),
        )
        .unwrap();
        let supervisor = i32::try_from(state["supervisor"].as_i64().unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        while nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), None).is_ok()
            && !fs::read_to_string(format!("/proc/{supervisor}/stat")).is_ok_and(|stat| stat.contains(") Z "))
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    for name in spoil {
        let path = match *name {
            "native.json" | "spec.json" => run.join(name),
            _ => place.data().join("containers").join(&id).join(name),
        };
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
    }
    let listed = place.rvmm(&["ps", "-a"]);
    assert!(listed.contains(&id[..12]), "ps does not show it: {listed}");
    if spoil.contains(&"config.json") && kill {
        let text = place.fails(&["rm", &id]);
        assert!(text.contains("--force"), "{text}");
    }
    place.rvmm(&["rm", "-f", &id]);
    assert_eq!(processes(&id), "", "processes are left");
    assert!(!run.exists(), "{run:?} is left");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*place.run().to_string_lossy()), "mounts are left");
    assert!(!place.rvmm(&["ps", "-a"]).contains(&id[..12]));
    // Nothing holds the image or the volume any more.
    place.rvmm(&["volume", "rm", "named"]);
    place.rvmm(&["rmi", "busybox"]);
}

#[test]
fn garbage_in_all_records_of_a_crashed_container_does_not_keep_it() {
    removes(&["native.json", "state.json", "config.json", "spec.json"], true, Some("{garbage"));
}

#[test]
fn missing_records_of_a_crashed_container_do_not_keep_it() {
    removes(&["native.json", "state.json", "config.json"], true, None);
}

#[test]
fn garbage_in_native_record_alone_does_not_keep_it() {
    removes(&["native.json"], true, Some("[]"));
}

#[test]
fn garbage_in_records_of_a_running_container_does_not_keep_it() {
    removes(&["native.json", "state.json", "config.json"], false, Some(""));
}
