//! A native container for a test: a root file system of busybox, and the driver that makes containers of it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rvmm::container::config::{
    ContainerConfig, Isolation, Limits, Network, NetworkMode, Process, Restart, Security,
};
use serde_json::{Value, json};

use crate::support::{has_tool, is_root, skip};

/// The driver, which cargo builds beside the tests.
fn driver() -> PathBuf {
    let tests = std::env::current_exe().expect("the tests' own path");
    tests.parent().and_then(Path::parent).expect("a target directory").join("examples/native")
}

/// Whether native containers can be made here; says so if not.
pub fn can_run() -> bool {
    if !driver().exists() {
        skip("needs the example `native`: cargo build --example native");
        return false;
    }
    is_root() && has_tool("busybox") && layer().is_some()
}

/// A layer with busybox under all of its names, and two users; made once.
fn layer() -> Option<&'static Path> {
    static LAYER: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    let layer = LAYER.get_or_init(|| {
        let path = std::env::var_os("PATH")?;
        let busybox =
            std::env::split_paths(&path).map(|path| path.join("busybox")).find(|path| path.is_file())?;
        let layer = tempfile::tempdir().expect("a directory");
        for directory in ["bin", "etc", "tmp", "root", "home/ann"] {
            fs::create_dir_all(layer.path().join(directory)).expect("a directory");
        }
        fs::set_permissions(layer.path(), PermissionsExt::from_mode(0o755)).expect("a mode");
        fs::copy(&busybox, layer.path().join("bin/busybox")).expect("busybox");
        let names = Command::new(&busybox).arg("--list").output().expect("busybox");
        for name in String::from_utf8_lossy(&names.stdout).lines().filter(|name| *name != "busybox") {
            symlink("busybox", layer.path().join("bin").join(name)).expect("a link");
        }
        let write = |path: &str, text: &str| fs::write(layer.path().join(path), text).expect("a file");
        write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n");
        write("etc/group", "root:x:0:\naudio:x:29:ann\nann:x:1000:\n");
        Some(layer)
    });
    if layer.is_none() {
        skip("needs busybox");
    }
    layer.as_ref().map(|layer| layer.path())
}

/// A container that is not made yet.
pub struct Plan {
    pub config: ContainerConfig,
    pub layers: Vec<PathBuf>,
    pub volumes: BTreeMap<String, PathBuf>,
    pub host_network: bool,
    /// The user that makes it, instead of root.
    pub user: Option<u32>,
    /// Whether its driver runs from a read-only mount.
    pub protect: bool,
    directory: tempfile::TempDir,
}

/// A container's driver.
pub struct Container {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub id: String,
    directory: tempfile::TempDir,
    setup: String,
}

/// What a process has left.
#[derive(Debug)]
pub struct End {
    pub code: u64,
    pub stdout: String,
    pub stderr: String,
    pub signal: Option<u64>,
}

impl Plan {
    /// A container that runs a command.
    pub fn new(command: &[&str]) -> Plan {
        let directory = tempfile::tempdir().expect("a directory");
        let mut id = [0; 32];
        getrandom::fill(&mut id).expect("random bytes");
        let config = ContainerConfig {
            id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
            name: "test".into(),
            created_ns: 0,
            isolation: Isolation::Native,
            image: "busybox".into(),
            image_id: "sha256:0".into(),
            process: Process {
                args: command.iter().map(|word| (*word).to_owned()).collect(),
                cwd: "/".into(),
                ..Process::default()
            },
            hostname: None,
            limits: Limits::default(),
            mounts: vec![],
            read_only: false,
            devices: vec![],
            security: Security::default(),
            network: Network {
                mode: NetworkMode::None,
                ports: vec![],
                dns: vec![],
                dns_search: vec![],
                dns_options: vec![],
                hosts: vec![],
            },
            sysctls: BTreeMap::new(),
            restart: Restart::No,
            auto_remove: true,
            stop_signal: "TERM".into(),
            stop_timeout: Duration::from_secs(10),
            health: None,
            labels: BTreeMap::new(),
            secrets: vec![],
            template: Default::default(),
        };
        let layers = layer().map(Path::to_owned).into_iter().collect();
        Plan {
            config,
            layers,
            volumes: BTreeMap::new(),
            host_network: false,
            user: None,
            protect: false,
            directory,
        }
    }

    /// One that runs a line of shell.
    pub fn shell(line: &str) -> Plan {
        Plan::new(&["sh", "-c", line])
    }

    /// With a change to its configuration.
    pub fn with(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Plan {
        change(&mut self.config);
        self
    }

    /// Where a test may put files.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Starts its driver.
    pub fn driver(self) -> Container {
        let setup = json!({
            "directory": self.directory.path(), "layers": self.layers, "config": self.config,
            "host_network": self.host_network, "volumes": self.volumes, "rootless": self.user.is_some(),
        });
        let mut command = match self.user {
            None => Command::new(driver()),
            Some(user) => {
                // Where it was built may be out of the user's reach.
                let own = self.directory.path().join("driver");
                fs::copy(driver(), &own).expect("a copy");
                chown(self.directory.path(), Some(user), Some(user)).expect("an owner");
                let mut command = Command::new(own);
                command.uid(user).gid(user);
                command
            }
        };
        if self.protect {
            command.env("RVMM_DRIVER_PROTECT", "1");
        }
        Container::drive(command, setup.to_string(), self.config.id, self.directory)
    }

    /// Creates and starts it.
    pub fn start(self) -> Container {
        let mut container = self.driver();
        container.ask(json!("create"));
        container.ask(json!("start"));
        container
    }

    /// Runs it to its end, deletes it, and looks whether it is gone.
    pub fn run(self) -> End {
        let mut container = self.start();
        let end = container.wait(0);
        container.delete();
        end
    }

    /// What it says if it cannot be created or started, and the exit code for that. Nothing is left then.
    pub fn fails(self) -> (String, u64) {
        let (failure, mut container) = self.fail();
        container.delete();
        failure
    }

    /// The same without a look at what is left.
    pub fn fails_without_look(self) -> (String, u64) {
        self.fail().0
    }

    fn fail(self) -> ((String, u64), Container) {
        let mut container = self.driver();
        let mut answer = container.request(json!("create"));
        if answer.get("error").is_none() {
            answer = container.request(json!("start"));
        }
        (failure(&answer).unwrap_or_else(|| panic!("it starts: {answer}")), container)
    }
}

fn failure(answer: &Value) -> Option<(String, u64)> {
    Some((answer.get("error")?.as_str()?.to_owned(), answer.get("code")?.as_u64()?))
}

impl Container {
    fn drive(mut command: Command, setup: String, id: String, directory: tempfile::TempDir) -> Container {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the driver");
        let mut input = child.stdin.take().expect("its input");
        writeln!(input, "{setup}").expect("the driver listens");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Container { child, input, output, id, directory, setup }
    }

    /// An answer, whatever it is.
    pub fn request(&mut self, request: Value) -> Value {
        writeln!(self.input, "{request}").expect("the driver listens");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{request}: {error}: {line:?}"))
    }

    /// An answer that is no error.
    pub fn ask(&mut self, request: Value) -> Value {
        let answer = self.request(request.clone());
        assert!(answer.get("error").is_none(), "{request}: {answer}");
        answer
    }

    /// An answer that is an error.
    pub fn refused(&mut self, request: Value) -> (String, u64) {
        let answer = self.request(request.clone());
        failure(&answer).unwrap_or_else(|| panic!("{request}: {answer}"))
    }

    /// Runs a further process, and returns its number.
    pub fn exec(&mut self, process: &Process) -> u64 {
        self.ask(json!({ "exec": process })).as_u64().expect("a number")
    }

    /// Runs a line of shell beside the first process, to its end.
    pub fn exec_shell(&mut self, line: &str) -> End {
        let args = ["sh", "-c", line].map(str::to_owned).to_vec();
        let number = self.exec(&Process { args, ..Process::default() });
        self.ask(json!({ "close": number }));
        self.wait(number)
    }

    /// Until a process has ended; 0 is the first.
    pub fn wait(&mut self, process: u64) -> End {
        let answer = self.ask(json!({ "wait": process }));
        let text = |at: usize| answer["output"][at].as_str().expect("a text").to_owned();
        End {
            code: answer["docker"].as_u64().expect("a code"),
            stdout: text(0),
            stderr: text(1),
            signal: answer["status"]["signal"].as_u64(),
        }
    }

    /// Until a text comes out of a process.
    pub fn expect(&mut self, process: u64, text: &str) {
        self.ask(json!({ "expect": [process, text] }));
    }

    /// Deletes it and looks whether anything is left.
    pub fn delete(&mut self) {
        self.ask(json!("delete"));
        self.assert_gone();
    }

    /// Nothing of it is left: mounts, control groups, processes, files.
    pub fn assert_gone(&self) {
        let directory = self.directory.path().to_str().expect("a path");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounts.contains(directory), "mounts are left: {mounts}");
        assert_eq!(groups(&self.id), Vec::<PathBuf>::new());
        for name in ["native.json", "start.sock", "rootfs", "secrets"] {
            assert!(!self.directory.path().join(name).exists(), "{name} is left");
        }
        let mine = |process: &fs::DirEntry| {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            let name = format!("HOSTNAME={}", &self.id[..12]);
            environment.windows(name.len()).any(|part| part == name.as_bytes())
        };
        let left = fs::read_dir("/proc").expect("processes").flatten().filter(mine).count();
        assert_eq!(left, 0, "processes are left");
    }

    /// Kills the driver as hard as can be, and returns one that finds what it left.
    pub fn kill_driver(mut self) -> Container {
        self.child.kill().expect("a kill");
        self.child.wait().expect("an end");
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().expect("a directory"));
        Container::drive(Command::new(driver()), self.setup.clone(), self.id.clone(), directory)
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            return;
        }
        // A test that fails leaves nothing either.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().expect("a directory"));
        let _ = rvmm::container::backend::Backend::delete(&mut rvmm::container::native::Native::new(
            directory.path(),
        ));
    }
}

/// Control groups with a container's id, wherever they are mounted.
pub fn groups(id: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let group = Path::new(line.split(' ').nth(4).expect("a mount")).join("rvmm-test").join(id);
        if group.exists() {
            found.push(group);
        }
    }
    found
}
