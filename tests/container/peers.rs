//! The table of cases by Podman and by Docker, where Debian's run: what they do with the same command line must be what
//! rvmm does, or stand in [`DIFFERENCES`], which docs/containers.md repeats.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::cases::{Case, Want, all};
use super::home::{self, IMAGE, Ran, can_run_native, finish};
use super::table;
use crate::support::{announce, has_tool, skip};

/// One that runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Podman,
    Docker,
}

/// Cases in which a peer does something else, and why.
const DIFFERENCES: &[(&str, &[Peer], &str)] = &[
    (
        "an interpreter that is not there",
        BOTH,
        "a program of its own fails to run the file, and ends with 1; rvmm says 126",
    ),
    (
        "signals as they were",
        BOTH,
        "what their caller ignores stays ignored; rvmm's containers begin with no signal ignored",
    ),
    ("a port without a network", BOTH, "the port is dropped; rvmm refuses what cannot be"),
    ("two mounts at one place", DOCKER, "one mount hides the other; rvmm refuses it"),
    ("a further capability", DOCKER, "takes no list with commas, as Podman and rvmm do"),
    ("privileged", DOCKER, "wants all capabilities that there are, also where its own root has fewer"),
    ("capabilities", PODMAN, "its default is without AUDIT_WRITE, MKNOD and NET_RAW; rvmm has Docker's"),
    ("capabilities of a user", PODMAN, "the same"),
    ("a further capability", PODMAN, "the same"),
    ("no network", PODMAN, "the same: without NET_RAW there is no ping"),
    ("an init of its own", PODMAN, "needs the program catatonit, which Debian's package only recommends"),
    ("an init reaps", PODMAN, "the same"),
    (
        "a variable of the caller's",
        PODMAN,
        "one that the caller has not leaves the image's; Docker and rvmm take it away",
    ),
    ("a working directory that is made", PODMAN, "one that is not there is refused; Docker and rvmm make it"),
    ("numbers of nobody", PODMAN, "HOME is the working directory; Docker and rvmm have /"),
    ("further groups", PODMAN, "the same"),
    ("a user that is not there", PODMAN, "exit code 126; Docker and rvmm have 125"),
    ("a group that is not there", PODMAN, "the same"),
    (
        "memory runs no programs unless told",
        PODMAN,
        "its tmpfs allows programs; Docker's and rvmm's does not",
    ),
    (
        "a directory of the host that is made",
        PODMAN,
        "one that is not there is refused; Docker and rvmm make it",
    ),
    ("a host name", PODMAN, "/etc/hostname has no end of line"),
    ("lines of /etc/hosts", PODMAN, "its own lines are others"),
    ("name servers", PODMAN, "refused where there is no network"),
    ("too little memory", PODMAN, "there is no least amount; Docker and rvmm have 6 MiB"),
];
const BOTH: &[Peer] = &[Peer::Podman, Peer::Docker];
const PODMAN: &[Peer] = &[Peer::Podman];
const DOCKER: &[Peer] = &[Peer::Docker];

/// A peer with directories of its own.
struct Engine {
    peer: Peer,
    directory: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Engine {
    /// `None`, which is said, where the peer is not installed or cannot run anything.
    fn start(peer: Peer) -> Option<Engine> {
        if std::env::var_os("RVMM_NESTED_HOST").is_some() {
            skip("others are compared on this host, where they take their usual time");
            return None;
        }
        let programs: &[&str] =
            if peer == Peer::Podman { &["podman", "crun"] } else { &["dockerd", "docker", "runc"] };
        if !can_run_native() || !programs.iter().all(|name| has_tool(name)) {
            return None;
        }
        let place = if Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("rvmm-peer-").tempdir_in(place).expect("a directory");
        let mut engine = Engine { peer, directory, daemon: None };
        if peer == Peer::Docker {
            engine.daemon = Some(engine.daemon());
            let deadline = Instant::now() + Duration::from_secs(60);
            while engine.run(&["version"]).code != 0 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        let archive = home::archive().expect("an archive");
        let loaded = engine.run(&["load", "-q", "-i", archive.to_str().expect("a path")]);
        let mut arguments = engine.begin();
        arguments.extend([engine.image(), "true"]);
        let tried = engine.run(&arguments);
        if loaded.code != 0 || tried.code != 0 {
            skip(&format!("{peer:?} runs nothing here: {} {}", loaded.stderr.trim(), tried.stderr.trim()));
            return None;
        }
        Some(engine)
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a path").to_owned()
    }

    fn image(&self) -> &'static str {
        if self.peer == Peer::Podman { "localhost/table:latest" } else { IMAGE }
    }

    fn begin(&self) -> Vec<&'static str> {
        let mut arguments = vec!["run", "--rm", "--network=none"];
        if self.peer == Peer::Podman {
            // Its own defaults are above what root may have on some hosts.
            arguments.extend(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]);
        }
        arguments
    }

    fn daemon(&self) -> Child {
        let mut daemon = Command::new("dockerd");
        daemon.args(["--iptables=false", "--bridge=none", "--data-root", &self.path("data")]);
        daemon.args(["--exec-root", &self.path("run"), "--pidfile", &self.path("pid")]);
        daemon.args(["-H", &format!("unix://{}", self.path("sock"))]);
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("dockerd")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        match self.peer {
            Peer::Docker => {
                let mut command = Command::new("docker");
                command.args(["-H", &format!("unix://{}", self.path("sock"))]).args(arguments);
                command.env("DOCKER_CONFIG", self.path("config"));
                command
            }
            Peer::Podman => {
                // crun refuses a version 2 hierarchy beside version 1.
                let mut command = Command::new("unshare");
                command.args([
                    "-m",
                    "sh",
                    "-c",
                    "umount /sys/fs/cgroup/unified 2>/dev/null; exec \"$@\"",
                    "sh",
                ]);
                command.args([
                    "podman",
                    "--cgroup-manager=cgroupfs",
                    "--events-backend=none",
                    "--log-level=error",
                ]);
                command.args(["--root", &self.path("data"), "--runroot", &self.path("run")]);
                command.args(arguments);
                command
            }
        }
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        self.finish(self.command(arguments), b"", arguments)
    }

    fn finish(&self, mut command: Command, input: &[u8], arguments: &[&str]) -> Ran {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command.spawn().expect("a program"), input, arguments)
    }

    /// The case, if the peer has what it needs.
    fn case(&self, case: &Case, at: usize) -> Option<Ran> {
        let dir = self.path(&format!("case-{at}"));
        table::prepare(Path::new(&dir));
        let options: Vec<String> = case.options.iter().map(|option| option.replace("{DIR}", &dir)).collect();
        // Secrets are made by commands of their own there.
        if options.iter().any(|option| option == "--secret") {
            return None;
        }
        let mut arguments = self.begin();
        if options.iter().any(|option| option.starts_with("nofile")) {
            arguments.retain(|argument| !argument.contains("nofile"));
        }
        let unmask = |option: &String| match (self.peer, option.as_str()) {
            (Peer::Podman, "systempaths=unconfined") => "unmask=ALL".to_owned(),
            _ => option.clone(),
        };
        let options: Vec<String> = options.iter().map(unmask).collect();
        arguments.extend(options.iter().map(String::as_str));
        arguments.push(self.image());
        arguments.extend(&case.command);
        let mut command = self.command(&arguments);
        command.env("TABLE_TEST", "from the caller").env_remove("OF_IMAGE");
        Some(self.finish(command, &case.stdin, &arguments))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = daemon.wait();
        }
        // What either may have left mounted in this namespace.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let root = self.path("");
        for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if target.starts_with(&root) {
                let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}

fn agrees(peer: Peer) {
    let Some(engine) = Engine::start(peer) else { return };
    let known =
        |name: &str| DIFFERENCES.iter().any(|(case, peers, _)| *case == name && peers.contains(&peer));
    let (mut agreed, mut different, mut without) = (0, vec![], 0);
    for (at, case) in all().iter().enumerate() {
        let Some(ran) = engine.case(case, at) else {
            without += 1;
            continue;
        };
        // The words of messages are each program's own.
        let code = if case.refused { ran.code != 0 } else { ran.code == case.code };
        let output = matches!(case.stdout, Want::Any) || table::meets(&ran.stdout, &case.stdout);
        if code && output {
            agreed += 1;
        } else if !known(case.name) {
            different.push(format!("{}: {:?}", case.name, ran));
        }
    }
    assert!(different.is_empty(), "{} of {peer:?}:\n{}", different.len(), different.join("\n"));
    announce(&format!(
        "figure: {peer:?} agrees in {agreed} cases, differs in {} known ones, and has no words for {without}",
        all().len() - agreed - without
    ));
}

#[test]
fn podman_does_what_the_table_says() {
    agrees(Peer::Podman);
}

#[test]
fn docker_does_what_the_table_says() {
    agrees(Peer::Docker);
}
