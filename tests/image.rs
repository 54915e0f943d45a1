//! Images: registries good and bad, archives, a store that is shared, killed and full, and what layers look like mounted.

mod archives;
mod crash;
mod hostile;
mod mounts;
mod registries;
pub mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rvmm::image::layers::testing::Archive;
use rvmm::image::{Digest, Image, Reference, Store, testing};

use crate::support::directory;

/// A store in a directory that goes away.
pub struct Home {
    directory: tempfile::TempDir,
    pub store: Store,
}

/// What a program printed, and its exit code.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Home {
    pub fn new() -> Self {
        let directory = directory();
        let store = Store::open(&directory.path().join("images")).expect("a store");
        Self { directory, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The engine on this store.
    pub fn engine(&self, arguments: &[&str]) -> Command {
        engine_at(self.directory.path(), arguments)
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran::from(self.engine(arguments).output().expect("the engine"))
    }

    /// An image of three layers; the third takes something of the first away.
    pub fn image(&self, name: &str, seed: u64, length: usize) -> Image {
        let base = Archive::new().directory("etc", 0o755).file("etc/a", "a").file("etc/b", "b").finish();
        let layers = [base, testing::large_layer(seed, length), testing::layer("etc/.wh.b", "")];
        testing::image(&self.store, name, &layers).expect("an image")
    }

    /// Every blob is what it is called, every image is whole, every layer is there with its record.
    pub fn verify(&self) {
        let root = self.store.root();
        for (name, path) in entries(&root.join("blobs/sha256")) {
            assert_eq!(Digest::of(&fs::read(&path).expect("a blob")).hex(), name, "a blob is damaged");
        }
        for image in self.store.images().expect("images") {
            for layer in &image.layers {
                assert!(
                    self.store.has_blob(&layer.digest, Some(layer.size)),
                    "a layer of {} is missing",
                    image.id
                );
            }
            assert!(self.store.image(&image.id).is_ok());
        }
        for (name, path) in entries(&root.join("layers")) {
            assert!(
                name.starts_with('.') || (path.join("layer.json").exists() && path.join("fs").is_dir()),
                "{name}"
            );
        }
    }

    /// After `prune`, nothing is left of what was broken off.
    pub fn verify_clean(&self) {
        self.verify();
        for directory in ["partial", "leases", "trash"] {
            assert_eq!(entries(&self.store.root().join(directory)), [], "{directory}");
        }
        for directory in ["layers", "disks", "images", "repositories"] {
            let left = entries(&self.store.root().join(directory));
            assert!(!left.iter().any(|(name, _)| name.starts_with('.')), "{directory}: {left:?}");
        }
    }
}

/// The engine with its data below `root`, and nothing of the user's own.
pub fn engine_at(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm-engine"));
    command.args(arguments).env("RVMM_ROOT", root).env("DOCKER_CONFIG", root.join("docker"));
    command.env_remove("HTTP_PROXY").env_remove("http_proxy").stdin(Stdio::null());
    command
}

/// Names and paths in a directory, in order.
pub fn entries(path: &Path) -> Vec<(String, PathBuf)> {
    let mut found: Vec<_> = fs::read_dir(path)
        .expect("a directory")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().into_string().expect("a name"), entry.path()))
        .collect();
    found.sort();
    found
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Ran {
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn fails_with(self, parts: &[&str]) -> Self {
        assert!(self.code.is_some_and(|code| code != 0), "{self:?}");
        assert_eq!(self.stderr.matches("panicked").count(), 0, "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        }
        self
    }
}

pub fn name(text: &str) -> Reference {
    Reference::parse(text).expect("a name").or_latest()
}

#[test]
fn verbs_print_what_dockers_print() {
    let home = Home::new();
    assert_eq!(home.run(&["images"]).ok().stdout, "REPOSITORY   TAG   IMAGE ID   CREATED   SIZE\n");
    let image = home.image("one:1", 1, 1000);
    home.store.layer_dirs(&image).expect("directories");
    home.run(&["tag", "one:1", "localhost:5000/two"]).ok();
    let list = home.run(&["images"]).ok().stdout;
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]);
    assert_eq!(lines[1][..3], ["one", "1", &image.id.short()]);
    assert_eq!(lines[2][..2], ["localhost:5000/two", "latest"]);
    assert_eq!(lines[1].last(), Some(&"1kB"));
    assert_eq!(home.run(&["images", "-q"]).ok().stdout, format!("{}\n", image.id.short()));
    assert_eq!(home.run(&["images", "-q", "--no-trunc", "one"]).ok().stdout, format!("{}\n", image.id));
    assert_eq!(home.run(&["images", "-q", "other"]).ok().stdout, "");
    assert_eq!(home.run(&["images", "-q", "-f", "dangling=true"]).ok().stdout, "");
    let json = home.run(&["images", "--format", "json"]).ok().stdout;
    let first: serde_json::Value = serde_json::from_str(json.lines().next().expect("a line")).expect("JSON");
    assert_eq!((first["Repository"].as_str(), first["Tag"].as_str()), (Some("one"), Some("1")));
    let inspected = home.run(&["image", "inspect", "one:1"]).ok().stdout;
    let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(inspected[0]["Id"], image.id.to_string());
    assert_eq!(inspected[0]["Config"]["Cmd"][0], "/bin/sh");
    let prune = home.run(&["image", "prune"]);
    prune.fails_with(&["--force"]);
    home.run(&["rmi", "one:1", "nope"]).fails_with(&["nope", "no image"]);
    let removed = home.run(&["rmi", "localhost:5000/two"]).ok().stdout;
    assert_eq!(removed, format!("Untagged: localhost:5000/two:latest\nDeleted: {}\n", image.id));
    home.verify_clean();
}
