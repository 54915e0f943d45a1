//! Archives and folders, and the programs whose they are.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use rvmm::image::layers::testing::Archive;
use rvmm::image::{Digest, testing};
use serde_json::json;

use super::{Home, Ran, entries};
use crate::support::{has_tool, tool};

#[test]
fn images_come_back_from_every_form() {
    let here = Home::new();
    let image = here.image("q.io/a/b:1", 1, 20_000);
    here.run(&["tag", "q.io/a/b:1", "other"]).ok();
    for format in ["docker-archive", "oci-archive", "oci-dir"] {
        let path = here.path(format);
        let path = path.to_str().expect("a path");
        here.run(&["save", "--format", format, "-o", path, "q.io/a/b:1", "other"]).ok();
        let there = Home::new();
        let loaded = there.run(&["load", "-i", path]).ok().stdout;
        assert_eq!(loaded, "Loaded image: other:latest\nLoaded image: q.io/a/b:1\n", "{format}");
        let found = there.store.resolve("other").expect("an image");
        assert_eq!((found.id, found.manifest_digest), (image.id, image.manifest_digest), "{format}");
        there.verify_clean();
    }
    let archives =
        ["docker-archive", "oci-archive"].map(|format| fs::read(here.path(format)).expect("a file"));
    assert!(
        archives[0].windows(13).any(|bytes| bytes == b"manifest.json")
            && archives[1].len() < archives[0].len()
    );
    // By id, an image has no name in the archive; and the same image gives the same bytes.
    let path = here.path("by-id");
    for _ in 0..2 {
        let before = fs::read(&path).unwrap_or_default();
        here.run(&["save", "-o", path.to_str().expect("a path"), &image.id.hex()]).ok();
        assert!(before.is_empty() || before == fs::read(&path).expect("a file"));
    }
    let there = Home::new();
    let loaded = there.run(&["load", "-i", path.to_str().expect("a path")]).ok().stdout;
    assert_eq!(loaded, format!("Loaded image ID: {}\n", image.id));
}

/// An archive in the form of old Dockers: layers by names, the same one twice as a link.
fn old_archive(tag: &str, config_name: Option<&str>, diff_ids: Option<Vec<Digest>>) -> Vec<u8> {
    let layer = testing::layer("f", "x");
    let ids = diff_ids.unwrap_or(vec![Digest::of(&layer), Digest::of(&layer)]);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": null},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    let config = config.to_string();
    let name = config_name.map_or(format!("{}.json", Digest::of(config.as_bytes()).hex()), str::to_owned);
    let manifest = json!([{"Config": name, "RepoTags": [tag], "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let regular = tar::EntryType::Regular;
    Archive::new()
        .file("repositories", "{}")
        .entry(regular, name.as_bytes(), b"", config.as_bytes(), |_| {}, &[])
        .directory("a/", 0o755)
        .entry(regular, b"a/layer.tar", b"", &layer, |_| {}, &[])
        .symlink("b/layer.tar", "../a/layer.tar")
        .file("manifest.json", &manifest.to_string())
        .finish()
}

#[test]
fn archives_of_old_dockers_are_loaded_from_a_pipe_compressed_or_not() {
    let archive = old_archive("old:1", None, None);
    for bytes in
        [archive.clone(), testing::gzip(&archive), zstd::encode_all(archive.as_slice(), 1).expect("zstd")]
    {
        let home = Home::new();
        let mut command = home.engine(&["load", "-q"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the engine");
        child.stdin.take().expect("a pipe").write_all(&bytes).expect("an archive");
        let ran = Ran::from(child.wait_with_output().expect("the engine")).ok();
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("Loaded image: old:1\n", ""));
        assert_eq!(entries(&home.store.root().join("blobs/sha256")).len(), 3, "the archive's own files stay");
        home.verify_clean();
    }
}

#[test]
fn archives_that_are_not_what_they_say_are_refused() {
    let home = Home::new();
    let hex = Digest::of(b"other").hex();
    let wrong_name = format!("{hex}.json");
    for (case, bytes, expected) in [
        ("nothing", vec![], "it is no archive of images"),
        ("no archive", vec![7; 3000], "no tar archive"),
        ("another archive", Archive::new().file("README", "x").finish(), "neither index.json"),
        ("configuration under a wrong name", old_archive("a", Some(&wrong_name), None), "has the digest"),
        (
            "layer with a wrong digest",
            old_archive("a", None, Some(vec![Digest::of(b"x"); 2])),
            "has the digest",
        ),
        ("fewer layers", old_archive("a", None, Some(vec![])), "it has 2 layers"),
        ("name that is none", old_archive("A B", None, None), "not the name of an image"),
        ("broken off", old_archive("a", None, None)[..2000].to_vec(), "cannot read"),
        (
            "manifest that is none",
            Archive::new().file("manifest.json", "{}").finish(),
            "manifest.json is not valid",
        ),
        (
            "index of nothing",
            Archive::new().file("index.json", r#"{"schemaVersion":2,"manifests":[]}"#).finish(),
            "no image in it",
        ),
        ("bzip2", b"BZh91AY&SY".to_vec(), "bzip2"),
    ] {
        let path = home.path("archive");
        fs::write(&path, bytes).expect("a file");
        let error = rvmm::image::archive::load_path(&home.store, &path).expect_err(case);
        let text = rvmm::error_chain(&error);
        assert!(text.contains(expected), "{case}: {text}");
        home.store.prune(true).expect("a clean store");
        assert_eq!(entries(&home.store.root().join("blobs/sha256")), [], "{case}");
    }
    home.verify_clean();
}

#[test]
fn folders_lead_nowhere_else() {
    let home = Home::new();
    home.image("a", 1, 100);
    let folder = home.path("layout");
    home.run(&["save", "--format", "oci-dir", "-o", folder.to_str().expect("a path"), "a"]).ok();
    let (_, blob) = entries(&folder.join("blobs/sha256")).remove(0);
    let outside = home.path("outside");
    fs::rename(&blob, &outside).expect("a file");
    std::os::unix::fs::symlink(&outside, &blob).expect("a link");
    let there = Home::new();
    there.run(&["load", "-i", folder.to_str().expect("a path")]).fails_with(&["cannot read"]);
    fs::remove_file(&blob).expect("a link");
    fs::write(&blob, "other").expect("a file");
    there.run(&["load", "-i", folder.to_str().expect("a path")]).fails_with(&["has the digest"]);
}

#[test]
fn images_are_taken_over_from_docker_and_podman() {
    let home = Home::new();
    fs::write(home.path("saved"), old_archive("old:1", None, None)).expect("a file");
    fs::create_dir(home.path("bin")).expect("a directory");
    for program in ["docker", "podman"] {
        let path = home.path(&format!("bin/{program}"));
        let script = format!(
            "#!/bin/sh\nfor name; do :; done\n[ \"$name\" = old:1 ] || {{ echo \"no such image: $name\" >&2; exit 1; }}\ncat {}\n",
            home.path("saved").display()
        );
        fs::write(&path, script).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    let path = format!("{}:/usr/bin:/bin", home.path("bin").display());
    let run = |arguments: &[&str]| {
        Ran::from(home.engine(arguments).env("PATH", &path).output().expect("the engine"))
    };
    for source in ["docker-daemon:old:1", "podman:old:1", "containers-storage:old:1"] {
        assert_eq!(run(&["pull", source]).ok().stdout, "old:1\n");
        run(&["rmi", "old:1"]).ok();
    }
    run(&["pull", "docker-daemon:none:1"]).fails_with(&["docker save", "no such image: none:1"]);
    run(&["pull", "docker-daemon:--help"]).fails_with(&["not the name"]);
    let without = home.engine(&["pull", "podman:a"]).env("PATH", "/nowhere").output();
    Ran::from(without.expect("the engine")).fails_with(&["cannot run podman", "installed"]);
    home.verify_clean();
}

#[test]
fn other_programs_read_what_is_saved() {
    if !has_tool("skopeo") {
        return;
    }
    let home = Home::new();
    let image = home.image("q.io/a/b:1", 1, 20_000);
    for (format, transport) in
        [("docker-archive", "docker-archive"), ("oci-archive", "oci-archive"), ("oci-dir", "oci")]
    {
        let path = home.path(format);
        home.run(&["save", "--format", format, "-o", path.to_str().expect("a path"), "q.io/a/b:1"]).ok();
        let inspected =
            tool("skopeo", &["inspect", "--config", "--raw", &format!("{transport}:{}", path.display())]);
        assert_eq!(Digest::of(inspected.trim_end().as_bytes()), image.id, "{format}: {inspected}");
        // And the other way round.
        let copied = home.path(&format!("copied-{format}"));
        let (from, to) = (
            format!("{transport}:{}", path.display()),
            format!("oci-archive:{}:q.io/c/d:2", copied.display()),
        );
        tool("skopeo", &["copy", "-q", "--insecure-policy", &from, &to]);
        let there = Home::new();
        let loaded = there.run(&["load", "-i", copied.to_str().expect("a path")]).ok().stdout;
        assert_eq!(loaded, "Loaded image: q.io/c/d:2\n", "{format}");
        there.verify_clean();
    }
}
