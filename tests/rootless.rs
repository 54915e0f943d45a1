//! Users without root: the life of their containers, natively and in a microVM. Each test makes a user in an `/etc` of its own,
//! which nobody else sees and which goes with it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};
use serde_json::Value;

use crate::container::home::{IMAGE, Ran, archive, finish, processes_of};
use crate::support::{self, LINUX_PATIENCE, has_tool, is_root, skip, tool};

/// Numbers of users, which no two tests share: whose a process is tells whose container it was.
static USERS: AtomicU32 = AtomicU32::new(0);

/// A user, with a home that has rvmm's roots in it.
struct User {
    home: tempfile::TempDir,
    uid: u32,
    /// The first of the 65,536 users that are set aside.
    others: u32,
}

/// A user with others set aside for it, or without. `None`, and said so, where there can be no such user.
fn user(others: bool) -> Option<User> {
    let tools = ["busybox", "setpriv", "useradd", "groupadd", "newuidmap", "pasta", "ip", "mount"];
    if !is_root() || !tools.iter().all(|name| has_tool(name)) {
        return None;
    }
    let forbidden = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
    if !Path::new("/proc/self/ns/user").exists()
        || forbidden("/proc/sys/kernel/unprivileged_userns_clone")
        || forbidden("/proc/sys/user/max_user_namespaces")
    {
        skip("this host has no user namespaces for users");
        return None;
    }
    if unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).is_err() {
        skip("cannot make namespaces");
        return None;
    }
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .expect("mounts of our own");
    // pasta looks for the host's way out.
    tool("ip", &["link", "set", "lo", "up"]);
    tool("ip", &["link", "add", "out0", "type", "veth", "peer", "name", "out1"]);
    tool("ip", &["addr", "add", "203.0.113.2/24", "dev", "out0"]);
    tool("ip", &["link", "set", "out0", "up"]);
    tool("ip", &["link", "set", "out1", "up"]);
    tool("ip", &["route", "add", "default", "via", "203.0.113.1"]);

    // In the emulated machine the root file system is an overlay, which cannot be below another one.
    let place = if std::env::var_os("RVMM_NESTED_HOST").is_some() { "/run" } else { "/tmp" };
    let home = tempfile::Builder::new().prefix("rvmm-user-").tempdir_in(place).expect("a directory");
    let number = std::process::id() % 1000 * 10 + USERS.fetch_add(1, Ordering::Relaxed) % 10;
    let (uid, first) = (3_000_000 + number, 10_000_000 + number * 65_536);
    let path = |name: &str| home.path().join(name).to_str().expect("a path").to_owned();
    tool("mkdir", &[&path("etc"), &path("bin"), &path("guest"), &path("dev")]);
    tool("cp", &["-a", "/etc/.", &path("etc")]);
    tool("mount", &["--bind", &path("etc"), "/etc"]);
    tool("useradd", &["--no-log-init", "--no-create-home", "--uid", &uid.to_string(), "ann"]);
    // Whatever useradd has set aside by itself.
    for file in ["/etc/subuid", "/etc/subgid"] {
        fs::write(file, if others { format!("ann:{first}:65536\n") } else { String::new() }).expect("a file");
    }
    // The host's own may be root's alone.
    tool("mknod", &["-m", "666", &path("dev/tun"), "c", "10", "200"]);
    tool("mount", &["-t", "tmpfs", "tmpfs", "/dev/net"]);
    tool("mknod", &["-m", "666", "/dev/net/tun", "c", "10", "200"]);
    // Where the user can reach it: the binary may lie below a home directory.
    for name in ["rvmm", "rvmm-engine"] {
        fs::copy(support::binary().with_file_name(name), home.path().join("bin").join(name)).expect("a copy");
    }
    fs::copy(archive().expect("an archive"), home.path().join("image.tar")).expect("a copy");
    fs::set_permissions(home.path(), PermissionsExt::from_mode(0o711)).expect("permissions");
    for name in ["", "own"] {
        let directory = home.path().join(name);
        fs::create_dir_all(&directory).expect("a directory");
        chown(directory, Some(uid), Some(uid)).expect("an owner");
    }
    Some(User { home, uid, others: first })
}

impl User {
    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path").to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=ann", "--regid=ann", "--init-groups"])
            .arg(self.path("bin/rvmm"))
            .args(arguments);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", self.path("own"));
        command.env("XDG_DATA_HOME", self.path("own/data")).env("XDG_RUNTIME_DIR", self.path("own/run"));
        command.current_dir(self.path("own")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command.spawn().expect("setpriv"), b"", arguments)
    }

    fn load(&self) -> Ran {
        self.run(&["load", "-q", "-i", &self.text("image.tar")])
    }

    fn shell(&self, options: &[&str], script: &str) -> Ran {
        self.run(&[&["run", "--rm"], options, &[IMAGE, "sh", "-c", script]].concat())
    }

    fn inspect(&self, name: &str) -> Value {
        let text = self.run(&["inspect", "--type=container", name]).ok();
        serde_json::from_str::<Value>(&text).expect("JSON")[0].take()
    }

    fn await_log(&self, name: &str, wanted: &str) {
        let deadline = Instant::now() + LINUX_PATIENCE;
        loop {
            let log = self.run(&["logs", name]);
            if log.stdout.contains(wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} did not print {wanted:?}: {log:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The port of the host at which the first port of a container is.
    fn port(&self, name: &str) -> u16 {
        let line = self.run(&["port", name]).ok();
        line.trim().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    fn processes(&self) -> Vec<(i32, String)> {
        let mut found = processes_of(self.home.path());
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
            let uid = field("Uid:").and_then(|line| line.split_whitespace().next()?.parse::<u32>().ok());
            let is_own = |uid| uid == self.uid || (self.others..self.others + 65_536).contains(&uid);
            if uid.is_some_and(is_own)
                && field("State:").is_some_and(|state| !state.contains('Z'))
                && let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            {
                found.push((pid, field("Name:").unwrap_or_default().to_owned()));
            }
        }
        found
    }

    /// What containers that are gone have left.
    fn left(&self) -> Vec<String> {
        let mut left = vec![];
        for directory in [
            "run/rvmm/containers",
            "run/rvmm/sandboxes",
            "run/rvmm/namespace",
            "run/rvmm/networks/attached",
            "data/rvmm/containers",
            "data/rvmm/volumes",
        ] {
            for entry in fs::read_dir(self.path("own").join(directory)).into_iter().flatten().flatten() {
                if entry.file_name() != "lock" {
                    left.push(entry.path().display().to_string());
                }
            }
        }
        left.extend(self.processes().into_iter().map(|(pid, line)| format!("process {pid} {line}")));
        left
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        // The directory can go when nothing is mounted from it; the thread's mounts go with the thread.
        let _ = rustix::mount::unmount("/etc", rustix::mount::UnmountFlags::DETACH);
    }
}

fn get(port: u16) -> String {
    let deadline = Instant::now() + LINUX_PATIENCE;
    loop {
        let mut text = String::new();
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
            let _ = stream.write_all(b"GET /page HTTP/1.0\r\n\r\n");
            let _ = stream.read_to_string(&mut text);
        }
        if text.contains("\r\n\r\n") || Instant::now() > deadline {
            return text;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A server whose files belong to several users.
const SERVER: &str = "mkdir -p /www && echo of the page >/www/page && echo kept >/kept/file && chown 1000:50 /kept/file && \
                      echo written >/written && chown 33 /written && echo ready && \
                      trap 'echo term; exit 5' TERM; httpd -p 80 -h /www; while :; do sleep 0.2; done";

#[test]
fn life_of_a_users_container() {
    let Some(user) = user(true) else { return };
    user.load().ok();
    let ran = user
        .shell(&["--network=none"], "id -u; cat /proc/self/uid_map; ls -ln /etc/passwd; ls -dn /home/ann");
    let lines: Vec<Vec<&str>> = ran.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["0"], "{ran:?}");
    assert_eq!(lines[1], ["0", &user.uid.to_string(), "1"]);
    assert_eq!(lines[2], ["1", &user.others.to_string(), "65536"]);
    assert_eq!((lines[3][2], lines[4][2]), ("0", "1000"), "{ran:?}");
    assert_eq!(user.shell(&["--network=none", "-u", "ann"], "id -u; id -G").ok(), "1000\n1000 29\n");

    let options =
        ["run", "-d", "--name=one", "-p", "127.0.0.1:0:80", "-v", "kept:/kept", IMAGE, "sh", "-c", SERVER];
    user.run(&options).ok();
    user.await_log("one", "ready");
    assert!(get(user.port("one")).ends_with("of the page\n"));
    assert_eq!(
        user.run(&["exec", "one", "sh", "-c", "id -u; stat -c %u:%g /kept/file"]).ok(),
        "0\n1000:50\n"
    );
    assert_eq!(user.run(&["exec", "-u", "ann", "one", "id", "-u"]).ok(), "1000\n");
    assert!(user.run(&["exec", "one", "cat", "/etc/resolv.conf"]).ok().contains("nameserver 10.0.2.3"));
    assert!(user.run(&["top", "one"]).ok().contains("httpd"));
    user.run(&["stats", "--no-stream", "one"]).ok();
    assert_eq!(
        user.run(&["run", "--rm", "--network=container:one", IMAGE, "wget", "-qO-", "http://127.0.0.1/page"])
            .ok(),
        "of the page\n"
    );
    assert!(user.run(&["diff", "one"]).ok().contains("A /written"));
    user.run(&["cp", "one:/written", "copy"]).ok();
    let copy = fs::metadata(user.path("own/copy")).expect("a copy");
    assert_eq!(copy.uid(), user.uid);

    // On the host they are the users that were set aside.
    let volume = user.path("own/data/rvmm/volumes/kept/_data/file");
    let owner = fs::metadata(&volume).map(|found| (found.uid(), found.gid())).expect("a file");
    assert_eq!(owner, (user.others + 999, user.others + 49));
    user.run(&["stop", "one"]).ok();
    assert_eq!(user.inspect("one")["State"]["ExitCode"], 5);
    user.run(&["start", "one"]).ok();
    assert_eq!(user.run(&["exec", "one", "stat", "-c", "%u", "/written"]).ok(), "33\n");
    user.run(&["commit", "one", "changed"]).ok();
    user.run(&["rm", "-f", "one"]).ok();
    let ran = user.run(&["run", "--rm", "--network=none", "changed", "stat", "-c", "%u", "/written"]);
    assert_eq!(ran.ok(), "33\n");
    user.run(&["volume", "rm", "kept"]).ok();
    assert!(!volume.exists());
    assert_eq!(user.left(), [] as [String; 0]);
    user.run(&["rmi", "changed", IMAGE]).ok();
    assert_eq!(fs::read_dir(user.path("own/data/rvmm/images/layers")).expect("a directory").count(), 0);
}

#[test]
fn what_a_users_killed_supervisors_have_left_is_cleared_away() {
    let Some(user) = user(true) else { return };
    user.load().ok();
    let script = "echo ready; while :; do sleep 0.2; done";
    for (name, options) in [("one", ["-u", "ann", "--network=none"]), ("two", ["-p", "0:80", "-q"])] {
        let options = options.iter().filter(|option| **option != "-q");
        let mut arguments = vec!["run", "-d", "--name", name];
        arguments.extend(options);
        arguments.extend([IMAGE, "sh", "-c", script]);
        user.run(&arguments).ok();
        user.await_log(name, "ready");
    }
    for name in ["one", "two"] {
        let id = user.inspect(name)["Id"].as_str().expect("an id").to_owned();
        let state =
            fs::read(user.path("own/data/rvmm/containers").join(&id).join("state.json")).expect("a file");
        let state: Value = serde_json::from_slice(&state).expect("JSON");
        let supervisor =
            state["supervisor"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a number");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL)
            .expect("a kill");
    }
    // No process of the user's is in the mount namespace any more, and the containers are of users that are not this one.
    let ran = user.run(&["ps", "-a", "--format", "json"]).ok();
    assert_eq!(ran.matches("exited").count(), 2, "{ran}");
    for name in ["one", "two"] {
        assert_eq!(user.inspect(name)["State"]["ExitCode"], 255);
    }
    assert!(user.processes().is_empty(), "{:?}", user.processes());
    user.run(&["start", "one"]).ok();
    assert_eq!(user.run(&["exec", "one", "id", "-u"]).ok(), "1000\n");
    user.run(&["rm", "-f", "one", "two"]).ok();
    assert_eq!(user.left(), [] as [String; 0]);
}

#[test]
fn user_for_whom_no_others_are_set_aside_has_containers_of_one() {
    let Some(user) = user(false) else { return };
    let loaded = user.load();
    assert!(loaded.code == 0 && loaded.stderr.contains("/etc/subuid"), "{loaded:?}");
    let ran =
        user.shell(&[], "id -u; wc -l </proc/self/uid_map; stat -c %u /home/ann; echo x >/x && echo made");
    assert_eq!(ran.ok(), "0\n1\n0\nmade\n");
    let refused = user.shell(&["-u", "ann"], "true");
    assert!(refused.code == 125 && refused.stderr.contains("no user 1000"), "{refused:?}");
    assert_eq!(user.left(), [] as [String; 0]);
}

#[test]
fn what_users_cannot_have_is_refused_with_a_reason() {
    let Some(user) = user(true) else { return };
    user.load().ok();
    for (options, reason) in [
        (["--memory=64M", "--network=none"], "Delegate=yes"),
        (["--cpus=0.5", "--network=none"], "Delegate=yes"),
        (["--network=web", "--init"], "need root"),
        (["--ip=10.0.2.7", "--init"], "needs root"),
        (["-p", "0:80/sctp"], "needs root"),
    ] {
        let refused = user.shell(&options, "true");
        assert!(refused.code == 125 && refused.stderr.contains(reason), "{options:?}: {refused:?}");
    }
    assert!(user.run(&["network", "create", "web"]).fails().contains("need root"));
    user.run(&["run", "-d", "--name=one", "--network=none", IMAGE, "sleep", "100"]).ok();
    assert!(user.run(&["pause", "one"]).fails().contains("Delegate=yes"));
    user.run(&["rm", "-f", "one"]).ok();
    assert_eq!(user.left(), [] as [String; 0]);
    // Places that others could have made are not trusted.
    let mut command = user.command(&["ps"]);
    command.env_remove("XDG_RUNTIME_DIR").stdout(Stdio::piped()).stderr(Stdio::piped());
    let place = PathBuf::from(format!("/tmp/rvmm-run-{}", user.uid));
    fs::create_dir_all(&place).expect("a directory");
    let ran = finish(command.spawn().expect("setpriv"), b"", &["ps"]);
    fs::remove_dir_all(&place).expect("a directory");
    assert!(ran.fails().contains("not yours alone"));
}

#[test]
fn users_containers_have_the_limits_of_groups_that_are_the_users() {
    let Some(user) = user(true) else { return };
    user.load().ok();
    // As a service manager lays it out: the version 2 tree alone, a part of it the user's.
    tool("umount", &["-R", "-l", "/sys/fs/cgroup"]);
    tool("mount", &["-t", "cgroup2", "none", "/sys/fs/cgroup"]);
    let root = Path::new("/sys/fs/cgroup");
    let slice = root.join(format!("rvmm-test-{}", std::process::id()));
    let own = slice.join("user.service/app.slice/own.scope");
    fs::create_dir_all(&own).expect("a group");
    let parts =
        [slice.clone(), slice.join("user.service"), slice.join("user.service/app.slice"), own.clone()];
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).expect("controllers");
    let has_memory = controllers.split_whitespace().any(|name| name == "memory");
    for (at, part) in [root.to_owned()].iter().chain(&parts).enumerate() {
        if has_memory && part != &own {
            fs::write(part.join("cgroup.subtree_control"), "+memory +pids").expect("controllers");
        }
        if at > 1 {
            for name in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
                chown(part.join(name), Some(user.uid), Some(user.uid)).expect("an owner");
            }
        }
    }
    let inside = |arguments: &[&str]| {
        let line = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", own.display());
        let wrapped = user.command(arguments);
        let mut command = Command::new("sh");
        command.args(["-c", &line, "sh"]).arg(wrapped.get_program()).args(wrapped.get_args()).env_clear();
        command.envs(wrapped.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
            .current_dir(user.path("own"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(command.spawn().expect("sh"), b"", arguments)
    };
    let mut arguments = vec!["run", "-d", "--name=one", "--network=none"];
    if has_memory {
        arguments.extend(["--memory=32M", "--pids-limit=20"]);
    } else {
        support::announce("this host's version 2 tree has no memory controller: limits are not looked at");
    }
    arguments.extend([
        IMAGE,
        "sh",
        "-c",
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max; echo ready; sleep 1000",
    ]);
    inside(&arguments).ok();
    user.await_log("one", "ready");
    if has_memory {
        assert_eq!(user.run(&["logs", "one"]).stdout, "33554432\n20\nready\n");
    }
    inside(&["pause", "one"]).ok();
    assert_eq!(user.inspect("one")["State"]["Paused"], true);
    inside(&["unpause", "one"]).ok();
    assert_eq!(inside(&["exec", "one", "echo", "in"]).ok(), "in\n");
    let outside = user.run(&["exec", "one", "echo", "in"]);
    assert!(outside.stderr.contains("control group"), "{outside:?}");
    inside(&["rm", "-f", "one"]).ok();
    assert_eq!(user.left(), [] as [String; 0]);
    for part in parts.iter().rev() {
        fs::remove_dir(part).expect("an empty group");
    }
}

#[test]
fn users_microvm() {
    let Some(user) = user(true) else { return };
    if !support::has_kvm() || !["mke2fs", "mkfs.erofs", "passt"].iter().all(|name| has_tool(name)) {
        return;
    }
    let guest = support::project("target/guest");
    if !guest.join("agent.cpio").is_file() {
        skip("needs the guest's agent: scripts/build-agent");
        return;
    }
    for name in ["agent.cpio", "vmlinux", "vmlinux-pvm"] {
        if guest.join(name).is_file() {
            fs::copy(guest.join(name), user.path("guest").join(name)).expect("a copy");
        }
    }
    user.load().ok();
    tool("mount", &["-t", "tmpfs", "tmpfs", &user.text("dev")]);
    tool("mknod", &["-m", "660", &user.text("dev/kvm"), "c", "10", "232"]);
    tool("mount", &["--bind", &user.text("dev/kvm"), "/dev/kvm"]);
    let refused = user.shell(&["--isolation=microvm", "--network=none"], "true");
    assert!(refused.code == 125 && refused.stderr.contains("group kvm"), "{refused:?}");

    tool("groupadd", &["-f", "kvm"]);
    tool("usermod", &["-aG", "kvm", "ann"]);
    tool("chgrp", &["kvm", "/dev/kvm"]);
    user.run(&[
        "run",
        "-d",
        "--isolation=microvm",
        "--template=require",
        "--name=one",
        "--memory=96M",
        "-p",
        "127.0.0.1:0:80",
        "-v",
        "kept:/kept",
        IMAGE,
        "sh",
        "-c",
        SERVER,
    ])
    .ok();
    user.await_log("one", "ready");
    assert!(get(user.port("one")).ends_with("of the page\n"));
    let seen = user.run(&["exec", "one", "sh", "-c", "stat -c %u:%g /kept/file; cat /etc/resolv.conf"]).ok();
    assert!(seen.starts_with("1000:50\nnameserver 10.0.2.3"), "{seen}");
    user.run(&["stop", "one"]).ok();
    assert_eq!(user.inspect("one")["State"]["ExitCode"], 5);
    user.run(&["rm", "one"]).ok();
    assert_eq!(
        user.shell(&["--network=none", "-v", "kept:/kept"], "stat -c %u:%g /kept/file").ok(),
        "1000:50\n"
    );
    user.run(&["volume", "rm", "kept"]).ok();
    assert_eq!(user.left(), [] as [String; 0]);
}
