//! Roots of a test's own with an image of busybox in them, and `rvmm` on them. Everything goes when the value goes.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rvmm::image::Digest;
use serde_json::{Value, json};

use crate::support::{self, LINUX_PATIENCE, has_tool, is_root, skip};

/// The name of the image.
pub const IMAGE: &str = "table";
/// What a test with many microVMs needs at most for one command: a guest's boot on the slowest host.
const COMMAND_PATIENCE: Duration = LINUX_PATIENCE;

/// The two walls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wall {
    Native,
    Microvm,
}

impl Wall {
    pub fn flag(self) -> &'static str {
        match self {
            Wall::Native => "--isolation=native",
            Wall::Microvm => "--isolation=microvm",
        }
    }
}

/// How a command ended, and what it printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// What was printed by a command that must succeed.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// The message of a command that must fail.
    pub fn fails(self) -> String {
        assert_ne!(self.code, 0, "it did not fail: {}", self.stdout);
        self.stderr
    }
}

/// Roots of a test's own.
pub struct Home {
    directory: tempfile::TempDir,
}

/// Whether containers of that kind can run here; says so if not.
pub fn can_run(wall: Wall) -> bool {
    let native = can_run_native();
    match wall {
        Wall::Native => native,
        Wall::Microvm => {
            native && has_agent() && support::has_kvm() && has_tool("mke2fs") && has_tool("mkfs.erofs")
        }
    }
}

/// Whether there can be containers of busybox at all; says so if not.
pub fn can_run_native() -> bool {
    is_root() && has_tool("busybox") && archive().is_some()
}

fn has_agent() -> bool {
    let there = support::project("target/guest/agent.cpio").is_file();
    if !there {
        skip("needs the guest's agent: scripts/build-agent");
    }
    there
}

impl Home {
    pub fn new() -> Home {
        // In the emulated machine the root file system is an overlay, which cannot be below another one.
        let place =
            if std::env::var_os("RVMM_NESTED_HOST").is_some() { "/run".into() } else { std::env::temp_dir() };
        let directory =
            tempfile::Builder::new().prefix("rvmm-table-").tempdir_in(place).expect("a directory");
        Home::at(directory)
    }

    /// On a file system of their own, in memory, mounted with these options.
    pub fn on_a_disk(options: &str) -> Home {
        let directory = tempfile::Builder::new().prefix("rvmm-disk-").tempdir().expect("a directory");
        let place = directory.path().to_str().expect("a path");
        support::tool("mount", &["-t", "tmpfs", "-o", options, "rvmm-disk", place]);
        Home::at(directory)
    }

    fn at(directory: tempfile::TempDir) -> Home {
        let home = Home { directory };
        home.run(&["load", "-q", "-i", archive().expect("an archive").to_str().expect("a path")]).ok();
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file beside the roots, and returns its path.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(&path, text).expect("a file");
        path.to_str().expect("a path").to_owned()
    }

    /// `rvmm` with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(support::binary());
        command.args(arguments).env("RVMM_ROOT", self.path("data")).env("RVMM_RUN_ROOT", self.path("run"));
        command.env("DOCKER_CONFIG", self.path("docker")).env_remove("RVMM_ISOLATION").stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, b"")
    }

    /// The same with input.
    pub fn run_with(&self, arguments: &[&str], input: &[u8]) -> Ran {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command.spawn().expect("rvmm"), input, arguments)
    }

    /// Runs a shell's script in a new container, without a network.
    pub fn shell(&self, wall: Wall, options: &[&str], script: &str) -> Ran {
        let mut arguments = vec!["run", "--rm", wall.flag(), "--network=none"];
        arguments.extend(options);
        arguments.extend([IMAGE, "sh", "-c", script]);
        self.run(&arguments)
    }

    /// Starts a container in the background, without a network unless the options have one.
    pub fn start(&self, wall: Wall, name: &str, options: &[&str], script: &str) {
        let mut arguments = vec!["run", "-d", wall.flag(), "--name", name];
        if !options.iter().any(|option| option.starts_with("--network")) {
            arguments.push("--network=none");
        }
        arguments.extend(options);
        arguments.extend([IMAGE, "sh", "-c", script]);
        self.run(&arguments).ok();
    }

    /// What `inspect` says of one container.
    pub fn inspect(&self, name: &str) -> Value {
        let text = self.run(&["inspect", "--type=container", name]).ok();
        serde_json::from_str::<Value>(&text).expect("JSON")[0].take()
    }

    /// Waits until `inspect` says what is wanted.
    pub fn await_state(&self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LINUX_PATIENCE;
        loop {
            let found = self.inspect(name);
            if wanted(&found) {
                return found;
            }
            assert!(Instant::now() < deadline, "{name} did not get there: {}", found["State"]);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a container has printed something.
    pub fn await_log(&self, name: &str, wanted: &str) {
        let deadline = Instant::now() + LINUX_PATIENCE;
        while !self.run(&["logs", name]).stdout.contains(wanted) {
            assert!(
                Instant::now() < deadline,
                "{name} did not print {wanted:?}: {:?}",
                self.run(&["logs", name])
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What containers that are gone have left on this host. A supervisor ends moments after it has told of the end.
    pub fn left(&self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.processes().is_empty() && self.left_files().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut left = self.left_files();
        left.extend(self.processes().into_iter().map(|(pid, line)| format!("process {pid} {line}")));
        left
    }

    fn left_files(&self) -> Vec<String> {
        let root = self.directory.path().to_str().expect("a path");
        let mut left = vec![];
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        left.extend(mounts.lines().filter(|line| line.contains(root)).map(|line| format!("mount {line}")));
        for directory in ["run/containers", "run/sandboxes", "data/containers"] {
            for entry in fs::read_dir(self.path(directory)).into_iter().flatten().flatten() {
                if entry.file_name() != "lock" {
                    left.push(format!("file {}", entry.path().display()));
                }
            }
        }
        left
    }

    /// Processes that belong to these roots: by their environment, or their directory in it.
    pub fn processes(&self) -> Vec<(i32, String)> {
        processes_of(self.directory.path())
    }

    /// Control groups of containers of these roots.
    pub fn cgroups(ids: &[String]) -> Vec<PathBuf> {
        let mut found = vec![];
        let mut todo = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(directory) = todo.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if ids.iter().any(|id| entry.file_name().to_string_lossy().contains(id.as_str())) {
                    found.push(entry.path());
                }
                todo.push(entry.path());
            }
        }
        found
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let names = self.run(&["ps", "-aq", "--no-trunc"]).stdout;
        let mut arguments = vec!["rm", "-f", "-v"];
        arguments.extend(names.lines());
        if arguments.len() > 3 {
            self.run(&arguments);
        }
        // What a bug has left must not be left for the next test.
        for (pid, _) in self.processes() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let root = self.directory.path().to_str().unwrap_or_default().to_owned();
        for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if target.starts_with(&root) {
                let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}

/// Processes that have a directory in their environment or arguments.
pub fn processes_of(directory: &Path) -> Vec<(i32, String)> {
    let root = directory.to_str().expect("a path").as_bytes();
    let mut found = vec![];
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let (line, environment) = (read("cmdline"), read("environ"));
        let has = |text: &[u8]| text.windows(root.len()).any(|window| window == root);
        if has(&line) || has(&environment) {
            found.push((pid, String::from_utf8_lossy(&line).replace('\0', " ")));
        }
    }
    found
}

/// Waits for a program with input; one that hangs is killed and is an error.
pub fn finish(mut child: Child, input: &[u8], what: &[&str]) -> Ran {
    let (mut stdout, mut stderr) =
        (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
    let mut stdin = child.stdin.take();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever does not read all of it may do so.
            let _ = stdin.as_mut().map(|stdin| stdin.write_all(input));
        });
        let read = |from: &mut dyn Read| {
            let mut bytes = vec![];
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let errors = scope.spawn(move || read(&mut stderr));
        let output = scope.spawn(move || read(&mut stdout));
        let deadline = Instant::now() + COMMAND_PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child") {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("rvmm {what:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        use std::os::unix::process::ExitStatusExt;
        let code = status.code().or(status.signal().map(|signal| -signal)).expect("a status");
        let (stdout, stderr) = (output.join().expect("output"), errors.join().expect("errors"));
        Ran { code, stdout, stderr }
    })
}

/// An archive as `docker save` writes it, with busybox under all of its names and a few users; made once.
pub fn archive() -> Option<&'static Path> {
    static ARCHIVE: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let directory = ARCHIVE.get_or_init(make_archive).as_ref()?;
    Some(PATH.get_or_init(|| directory.path().join("image.tar")))
}

/// A layer with busybox under all of its names, a few users, and some files.
pub fn busybox_layer() -> Option<Vec<u8>> {
    let path = std::env::var_os("PATH")?;
    let busybox =
        std::env::split_paths(&path).map(|path| path.join("busybox")).find(|path| path.is_file())?;
    let mut layer = tar::Builder::new(vec![]);
    for (directory, mode) in
        [("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777), ("root", 0o700), ("home", 0o755)]
    {
        add(&mut layer, directory, mode, tar::EntryType::Directory, b"", (0, 0));
    }
    add(&mut layer, "home/ann", 0o755, tar::EntryType::Directory, b"", (1000, 1000));
    add(&mut layer, "data", 0o755, tar::EntryType::Directory, b"", (0, 0));
    add(&mut layer, "data/seed", 0o644, tar::EntryType::Regular, b"from the image\n", (0, 0));
    let users =
        "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbob:x:1001:29::/:/bin/sh\n";
    add(&mut layer, "etc/passwd", 0o644, tar::EntryType::Regular, users.as_bytes(), (0, 0));
    let groups = "root:x:0:\naudio:x:29:ann\nann:x:1000:\nstaff:x:50:bob\n";
    add(&mut layer, "etc/group", 0o644, tar::EntryType::Regular, groups.as_bytes(), (0, 0));
    add(&mut layer, "etc/not-a-program", 0o644, tar::EntryType::Regular, b"text\n", (0, 0));
    add(&mut layer, "bin/bad-interpreter", 0o755, tar::EntryType::Regular, b"#!/no/interpreter\n", (0, 0));
    add(&mut layer, "bin/busybox", 0o755, tar::EntryType::Regular, &fs::read(&busybox).ok()?, (0, 0));
    let names = Command::new(&busybox).arg("--list").output().ok()?;
    for name in String::from_utf8_lossy(&names.stdout).lines().filter(|name| *name != "busybox") {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        layer.append_link(&mut header, format!("bin/{name}"), "busybox").ok()?;
    }
    layer.into_inner().ok()
}

fn make_archive() -> Option<tempfile::TempDir> {
    let layer = busybox_layer()?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "OF_IMAGE=yes", "BOTH=image"],
            "Cmd": ["sh", "-c", "echo the image\\'s command"],
            "WorkingDir": "/home",
            "Labels": {"of": "image"},
        },
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let manifest =
        json!([{"Config": "config.json", "RepoTags": [format!("{IMAGE}:latest")], "Layers": ["layer.tar"]}]);
    let directory = support::directory();
    let mut archive = tar::Builder::new(fs::File::create(directory.path().join("image.tar")).ok()?);
    for (name, bytes) in [
        ("config.json", config.to_string().into_bytes()),
        ("layer.tar", layer),
        ("manifest.json", manifest.to_string().into_bytes()),
    ] {
        add(&mut archive, name, 0o644, tar::EntryType::Regular, &bytes, (0, 0));
    }
    archive.finish().ok()?;
    Some(directory)
}

fn add<W: Write>(
    archive: &mut tar::Builder<W>,
    name: &str,
    mode: u32,
    kind: tar::EntryType,
    data: &[u8],
    owner: (u64, u64),
) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mtime(1);
    header.set_size(data.len() as u64);
    archive.append_data(&mut header, name, data).expect("an archive");
}
