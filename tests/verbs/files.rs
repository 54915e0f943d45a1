//! `cp`, `commit`, `diff` and `container prune`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Stdio;

use super::Place;
use crate::support::{has_fast_kvm, project, skip};

/// A tree on the host: `tree/inner/file`, a link to it, and hard links.
fn tree(place: &Place) {
    let tree = place.host().join("tree");
    fs::create_dir_all(tree.join("inner")).unwrap();
    fs::write(tree.join("inner/file"), "from the host\n").unwrap();
    fs::set_permissions(tree.join("inner/file"), fs::Permissions::from_mode(0o640)).unwrap();
    chown(tree.join("inner/file"), Some(123), Some(456)).unwrap();
    symlink("inner/file", tree.join("link")).unwrap();
    fs::hard_link(tree.join("inner/file"), tree.join("hard")).unwrap();
    fs::write(tree.join(".wh.name"), "a file like others\n").unwrap();
}

/// All that `cp` does, with a container that can `exec`.
fn copies(place: &Place, id: &str) {
    tree(place);
    let inside = |script: &str| place.rvmm(&["exec", id, "sh", "-c", script]);
    let to = |path: &str| format!("{id}:{path}");

    // To a name that is not there, into a directory that is, and what is in it.
    place.rvmm(&["cp", "tree", &to("/new")]);
    place.rvmm(&["cp", "tree", &to("/tmp")]);
    place.rvmm(&["cp", "tree/.", &to("/tmp/")]);
    for directory in ["/new", "/tmp/tree", "/tmp"] {
        assert_eq!(
            inside(&format!("cat {directory}/inner/file {directory}/link")),
            "from the host\n".repeat(2)
        );
        let shown =
            inside(&format!("stat -c '%a %u %g %h' {directory}/inner/file; readlink {directory}/link"));
        assert!(shown.starts_with("640 0 0 ") && shown.contains("inner/file"), "{shown}");
        assert_eq!(inside(&format!("cat {directory}/.wh.name")), "a file like others\n");
    }
    place.rvmm(&["cp", "-a", "tree/inner/file", &to("/tmp/owned")]);
    assert_eq!(inside("stat -c '%u %g' /tmp/owned"), "123 456\n");
    place.rvmm(&["cp", "tree/inner/file", &to("/tmp/owned")]);
    assert_eq!(inside("stat -c '%u %g' /tmp/owned"), "0 0\n");
    for (from, path) in
        [("tree/inner/file", "/none/"), ("tree/inner/file", "/none/x"), ("tree", "/tmp/owned")]
    {
        place.fails(&["cp", from, &to(path)]);
    }

    // And back.
    let host = place.host();
    inside(
        "mkdir -p /out/deep; echo inside >/out/deep/file; ln -s deep/file /out/link; chown 7:8 /out/deep/file",
    );
    place.rvmm(&["cp", &to("/out"), "copied"]);
    place.rvmm(&["cp", &to("/out/link"), "link"]);
    place.rvmm(&["cp", "-L", &to("/out/link"), "followed"]);
    fs::create_dir(host.join("there")).unwrap();
    place.rvmm(&["cp", &to("/out"), "there"]);
    place.rvmm(&["cp", &to("out/."), "there"]);
    place.rvmm(&["cp", "-a", &to("/out/deep/file"), "there/owned"]);
    for file in ["copied/deep/file", "followed", "there/out/deep/file", "there/deep/file", "copied/link"] {
        assert_eq!(fs::read_to_string(host.join(file)).unwrap(), "inside\n", "{file}");
    }
    assert_eq!(fs::read_link(host.join("link")).unwrap().to_str(), Some("deep/file"));
    assert_eq!(fs::metadata(host.join("copied/deep/file")).unwrap().uid(), 0);
    assert_eq!(fs::metadata(host.join("there/owned")).unwrap().uid(), 7);
    assert!(place.fails(&["cp", &to("/none"), "x"]).contains("none"));

    // As a stream, both ways.
    let archive = place.command(&["cp", &to("/out"), "-"]).stdin(Stdio::null()).output().unwrap();
    assert!(archive.status.success());
    let names: Vec<String> = tar::Archive::new(&archive.stdout[..])
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().to_string_lossy().trim_end_matches('/').to_owned())
        .collect();
    assert!(names.contains(&"out/deep/file".to_owned()), "{names:?}");
    place.feed(&["cp", "-", &to("/tmp")], &archive.stdout);
    assert_eq!(inside("cat /tmp/out/deep/file; stat -c %u /tmp/out/deep/file"), "inside\n7\n");
}

#[test]
fn files_are_copied_to_and_from_a_running_container() {
    let Some(place) = Place::new() else { return };
    let id = place.sleeper(&["-v", "data:/data"], "");
    copies(&place, &id);
    // A volume is where the container has it.
    place.rvmm(&["cp", "tree/link", &format!("{id}:/data/")]);
    place.rvmm(&["cp", "tree/inner", &format!("{id}:/data/")]);
    assert!(place.data().join("volumes/data/_data/inner/file").exists());
    // Its links are its own.
    fs::write(place.host().join("secret"), "of the host").unwrap();
    let secret = place.host().join("secret");
    place.rvmm(&["exec", &id, "ln", "-s", secret.to_str().unwrap(), "/tmp/trap"]);
    place.fails(&["cp", "-L", &format!("{id}:/tmp/trap"), "stolen"]);
    place.rvmm(&["exec", &id, "ln", "-s", place.host().to_str().unwrap(), "/tmp/door"]);
    place.fails(&["cp", "tree/inner/file", &format!("{id}:/tmp/door/file")]);
    assert!(!place.host().join("file").exists());
}

#[test]
fn files_are_copied_to_and_from_a_stopped_container() {
    let Some(place) = Place::new() else { return };
    tree(&place);
    let script = "cat /etc/new/inner/file; sleep 100000";
    let id = place.rvmm(&[
        "create",
        "--network",
        "none",
        "--init",
        "-v",
        "data:/data",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    let id = id.trim();
    place.rvmm(&["cp", "tree", &format!("{id}:/etc/new")]);
    place.rvmm(&["cp", &format!("{id}:/etc/kept"), "kept"]);
    assert_eq!(fs::read_to_string(place.host().join("kept")).unwrap(), "kept\n");
    assert!(place.fails(&["cp", "tree", &format!("{id}:/data/x")]).contains("volume"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*place.run().to_string_lossy()), "a mount is left");
    place.rvmm(&["start", id]);
    while !place.rvmm(&["logs", id]).contains("from the host") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    place.rvmm(&["kill", id]);
    place.rvmm(&["cp", &format!("{id}:/etc/new/inner"), "again"]);
    assert_eq!(fs::read_to_string(place.host().join("again/file")).unwrap(), "from the host\n");
}

#[test]
fn changes_are_shown_and_made_an_image() {
    let Some(place) = Place::new() else { return };
    let script = "echo x >/etc/own; echo more >>/etc/kept; rm /etc/gone; mkdir /made; rm -r /tmp; mkdir /tmp";
    let id = place.sleeper(&["-e", "COLOR=red"], script);
    let changes = place.rvmm(&["diff", &id]);
    for line in ["C /etc", "A /etc/own", "C /etc/kept", "D /etc/gone", "A /made"] {
        assert!(changes.lines().any(|changed| changed == line), "no {line} in\n{changes}");
    }
    let made = place.rvmm(&[
        "commit",
        "-a",
        "somebody",
        "-m",
        "why",
        "-c",
        "CMD [\"cat\",\"/etc/kept\"]",
        "-c",
        "WORKDIR /made",
        &id,
        "made:1",
    ]);
    assert!(made.starts_with("sha256:"), "{made}");
    assert!(place.rvmm(&["ps"]).contains("Up "), "{}", place.rvmm(&["ps"]));
    assert!(!place.rvmm(&["ps"]).contains("Paused"));
    assert_eq!(place.rvmm(&["run", "--rm", "--network", "none", "made:1"]), "kept\nmore\n");
    let script = "pwd; echo $COLOR; ls /etc";
    let shown = place.rvmm(&["run", "--rm", "--network", "none", "made:1", "sh", "-c", script]);
    assert!(shown.starts_with("/made\nred\n") && shown.contains("own") && !shown.contains("gone"), "{shown}");
    let config = place.rvmm(&["image", "inspect", "made:1"]);
    assert!(config.contains("somebody") && config.contains("why"), "{config}");
    place.fails(&["commit", "-c", "RUN ls", &id]);
    place.fails(&["commit", &id, "made@sha256:0"]);
}

#[test]
fn pruning_removes_what_does_not_run() {
    let Some(place) = Place::new() else { return };
    let id = place.sleeper(&[], "");
    place.rvmm(&["create", "--network", "none", "--label", "keep", "--name", "kept", "busybox", "true"]);
    place.rvmm(&["run", "--network", "none", "--name", "ended", "busybox", "true"]);
    assert!(place.fails(&["container", "prune"]).contains("--force"));
    let pruned = place.rvmm(&["container", "prune", "-f", "--filter", "label!=keep"]);
    assert!(pruned.contains("Deleted Containers") && pruned.contains("reclaimed"), "{pruned}");
    let left = place.rvmm(&["container", "ls", "-a"]);
    assert!(left.contains("kept") && left.contains(&id[..12]) && !left.contains("ended"), "{left}");
}

#[test]
fn files_are_copied_to_and_from_a_microvm() {
    if !has_fast_kvm() {
        return;
    }
    if !project("target/guest/agent.cpio").exists() {
        skip("needs the agent, which scripts/build-agent makes");
        return;
    }
    let Some(place) = Place::new() else { return };

    let id = place.sleeper(&["--isolation", "microvm"], "");
    copies(&place, &id);
    assert!(place.fails(&["diff", &id]).contains("native"));
    assert!(place.fails(&["commit", &id, "x"]).contains("rvmm cp"));
    place.rvmm(&["kill", &id]);
    assert!(place.fails(&["cp", "tree", &format!("{id}:/x")]).contains("start it"));
}
