//! A guest with an agent, and what containers are made of.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rvmm::guest::client::{Client, Error};
use rvmm::guest::protocol::{Event, ExitStatus, FIRST_PROCESS, Failure, Target};
use rvmm::guest::spec::*;

use crate::support::guest::agent_kernel;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, Monitor, announce, directory, has_tool, is_root, tool};

/// Docker's default capabilities.
pub const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

/// A guest that runs, and a connection to its agent.
pub struct Sandbox {
    pub client: Client,
    pub socket: PathBuf,
    ended: OwnedFd,
    running: Running,
    events: Vec<Event>,
    began: Instant,
    next_id: u32,
    pub share: PathBuf,
    _directory: tempfile::TempDir,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out_of_memory: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// What it has written, without a line's end, if it has succeeded.
    #[track_caller]
    pub fn output(&self) -> &str {
        assert_eq!(self.status, ExitStatus::Code(0), "{self:?}");
        self.stdout.trim_end()
    }
}

/// The streams of a process that runs.
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: JoinHandle<Vec<u8>>,
    pub stderr: JoinHandle<Vec<u8>>,
}

fn reader(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

fn write(root: &Path, path: &str, contents: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, contents).unwrap();
}

/// An image of busybox, as a directory.
fn base(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "data", "srv/web"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in tool("/bin/busybox", &["--list"]).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    write(root, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv/web:/bin/sh\n");
    write(root, "etc/group", "root:x:0:\nlog:x:90:web\nweb:x:34:\n");
    write(root, "etc/below", "lowest\n");
    write(root, "etc/gone", "to be hidden\n");
    write(root, "opaque/old", "to be hidden\n");
    symlink("/proc/1/root/c", root.join("evil")).unwrap();
    symlink("../../../../../../m", root.join("up")).unwrap();
}

/// Where images are made. In an emulated machine the root cannot hold an overlay's own attributes.
fn place() -> tempfile::TempDir {
    match std::env::var_os("RVMM_NESTED_HOST") {
        Some(_) => tempfile::tempdir_in("/dev/shm").expect("a temporary directory"),
        None => directory(),
    }
}

/// Packs a directory as an EROFS image.
fn pack(directory: &Path, image: &Path) {
    tool("mkfs.erofs", &["-T0", "--quiet", image.to_str().unwrap(), directory.to_str().unwrap()]);
    let len = fs::metadata(image).unwrap().len();
    fs::File::options().write(true).open(image).unwrap().set_len(len.next_multiple_of(4096)).unwrap();
}

/// One disk with a partition for each image.
fn compose(images: &[PathBuf], disk: &Path) {
    const MIB: u64 = 1 << 20;
    let mut table = String::from("label: gpt\n");
    let mut start = MIB;
    let mut places = vec![];
    for image in images {
        let len = fs::metadata(image).unwrap().len();
        table.push_str(&format!("start={}, size={}\n", start / 512, len.div_ceil(512)));
        places.push((start, image));
        start = (start + len).next_multiple_of(64 << 10);
    }
    crate::support::image(disk, start + MIB);
    let script = disk.with_extension("table");
    fs::write(&script, table).unwrap();
    tool("sh", &["-c", &format!("sfdisk -q {} <{}", disk.display(), script.display())]);
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(disk).unwrap();
    for (start, image) in places {
        file.write_all_at(&fs::read(image).unwrap(), start).unwrap();
    }
}

impl Sandbox {
    /// Boots a guest: a disk of layers, one of a single layer, one to write to, and a shared folder.
    pub fn boot() -> Option<Sandbox> {
        Self::boot_with(&[])
    }

    /// The same with further arguments for rvmm.
    pub fn boot_with(arguments: &[&str]) -> Option<Sandbox> {
        if !is_root() || !has_tool("mkfs.erofs") || !has_tool("sfdisk") || !has_tool("mkfs.ext4") {
            return None;
        }
        let (kernel, initrd) = agent_kernel()?;
        let directory = place();
        let at = |name: &str| directory.path().join(name);
        let layers = at("layers");
        base(&layers.join("1"));
        write(&layers, "2/etc/above", "higher\n");
        write(&layers, "2/opaque/new", "new\n");
        tool("mknod", &[layers.join("2/etc/gone").to_str().unwrap(), "c", "0", "0"]);

        set_xattr(&layers.join("2/opaque"), "trusted.overlay.opaque", b"y");
        let mut images = vec![];
        for number in 1..=2 {
            images.push(at(&format!("{number}.erofs")));
            pack(&layers.join(number.to_string()), images.last().unwrap());
        }
        for number in 3..=100 {
            write(&layers, &format!("{number}/many/{number}"), "");
            images.push(at(&format!("{number}.erofs")));
            pack(&layers.join(number.to_string()), images.last().unwrap());
        }
        compose(&images, &at("layers.img"));
        crate::support::image(&at("rw.img"), 64 << 20);
        tool("mkfs.ext4", &["-q", at("rw.img").to_str().unwrap()]);
        let share = at("share");
        write(&share, "folder/file", "shared\n");
        base(&share.join("bundle"));
        let disk = |name: &str, options: &str| format!("{}{options}", at(name).display());
        let socket = at("vsock");
        let running = Monitor::new()
            .arg("--kernel")
            .arg(&kernel)
            .arg("--initrd")
            .arg(&initrd)
            .args(["--memory", "128M", "--cmdline", "quiet", "--rng"])
            .args(["--disk", &disk("layers.img", ",readonly,id=layers")])
            .args(["--disk", &disk("1.erofs", ",readonly,id=whole")])
            .args(["--disk", &disk("rw.img", ",id=rw")])
            .args(["--share", &format!("tag=share,path={}", share.display())])
            .args(arguments)
            .args(["--vsock", &format!("cid=3,socket={}", socket.display())])
            .start_quiet();
        let began = Instant::now();
        let pid = rustix::process::Pid::from_raw(running.pid() as i32).unwrap();
        let ended = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let client = Client::connect(&socket, Some(ended.as_fd()), LINUX_PATIENCE, true);
        let client = client.unwrap_or_else(|error| panic!("{error:?}\n{}", running.story()));
        let sandbox = Sandbox {
            client,
            socket,
            ended,
            running,
            events: vec![],
            began,
            next_id: 0,
            share,
            _directory: directory,
        };
        sandbox.section("agent");
        Some(sandbox)
    }

    /// Says how far it is, and after what time: for whoever watches.
    pub fn section(&self, name: &str) {
        let (wall, own) = (self.began.elapsed().as_secs_f64(), self.processor_time().as_secs_f64());
        announce(&format!("figure: agent, {name}: begins after {wall:.1} s, {own:.1} s of processor time"));
    }

    /// Processor time of the monitor and its guest.
    pub fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.running.pid())).expect("a process");
        let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Another connection.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket, Some(self.ended.as_fd()), LINUX_PATIENCE, true).expect("an agent")
    }

    /// An id that no container has had.
    pub fn id(&mut self) -> String {
        self.next_id += 1;
        format!("c{}", self.next_id)
    }

    /// A process that runs a shell's commands, with streams for output.
    pub fn shell(&self, commands: &str) -> ProcessSpec {
        self.program(&["sh", "-c", commands])
    }

    /// A process that runs a program.
    pub fn program(&self, args: &[&str]) -> ProcessSpec {
        let stream = || Some(self.client.new_stream().unwrap());
        ProcessSpec {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec!["PATH=/bin:/sbin".into()],
            cwd: "/".into(),
            stdio: Stdio::Streams { stdin: None, stdout: stream(), stderr: stream() },
            capabilities: Capabilities::of(DEFAULT_CAPABILITIES),
            ..ProcessSpec::default()
        }
    }

    /// A container over the first two layers, with memory to write to, that runs a process.
    pub fn container(&mut self, process: ProcessSpec) -> ContainerSpec {
        let new = |kind: &str, target: &str, flags, data: &str| Mount {
            source: Source::New { kind: kind.into(), data: data.into() },
            target: target.into(),
            flags,
            propagation: 0,
        };
        let safe = libc::MS_NOSUID | libc::MS_NOEXEC;
        ContainerSpec {
            id: self.id(),
            root: Root::Layers { lower: vec![layer(1), layer(2)], upper: Upper::Memory("size=16m".into()) },
            mounts: vec![
                new("proc", "/proc", safe | libc::MS_NODEV, ""),
                new("tmpfs", "/dev", libc::MS_NOSUID | libc::MS_STRICTATIME, "mode=755,size=64k"),
                new("devpts", "/dev/pts", safe, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
            ],
            devices: default_devices(),
            links: default_links(),
            process,
            // As a microVM's container has it; a network namespace of its own is dear.
            namespaces: Namespaces { network: Namespace::Sandbox, ..Namespaces::default() },
            hostname: Some("box".into()),
            ..ContainerSpec::default()
        }
    }

    /// Opens the streams of a process and begins to read.
    pub fn open(&self, stdio: &Stdio) -> Streams {
        let open =
            |stream: Option<u64>| stream.map(|stream| self.client.open_stream(stream).expect("a stream"));
        let Stdio::Streams { stdin, stdout, stderr } = *stdio else { panic!("a terminal") };
        let read = |stream| open(stream).map_or_else(|| thread::spawn(Vec::new), reader);
        Streams { stdin: open(stdin), stdout: read(stdout), stderr: read(stderr) }
    }

    /// Makes and starts a container; its streams come back.
    pub fn start(&mut self, spec: &ContainerSpec) -> Streams {
        self.client.create(spec.clone()).expect("a container");
        self.client.start(&spec.id).unwrap_or_else(|error| panic!("{:?}: {error}", spec.process.args));
        self.open(&spec.process.stdio)
    }

    /// Waits for the end of a process.
    pub fn wait_exit(&mut self, container: &str, process: u32) -> (ExitStatus, bool) {
        loop {
            let found = self.events.iter().position(
                |event| matches!(event, Event::Exited { container: c, process: p, .. } if c == container && *p == process),
            );
            if let Some(at) = found
                && let Event::Exited { status, out_of_memory, .. } = self.events.remove(at)
            {
                return (status, out_of_memory);
            }
            let event = self.client.wait_event().unwrap_or_else(|error| panic!("{container}: {error}"));
            self.events.push(event);
        }
    }

    /// Whether an event has come.
    pub fn has_seen(&self, event: &Event) -> bool {
        self.events.contains(event)
    }

    /// Waits for the end of a process and takes its output.
    pub fn finish(&mut self, container: &str, process: u32, streams: Streams) -> Ended {
        let (status, out_of_memory) = self.wait_exit(container, process);
        drop(streams.stdin);
        let text =
            |reader: JoinHandle<Vec<u8>>| String::from_utf8_lossy(&reader.join().unwrap()).into_owned();
        Ended { status, out_of_memory, stdout: text(streams.stdout), stderr: text(streams.stderr) }
    }

    /// Runs a container to its end and removes it.
    pub fn run(&mut self, spec: &ContainerSpec) -> Ended {
        let streams = self.start(spec);
        let ended = self.finish(&spec.id, FIRST_PROCESS, streams);
        self.client.delete(&spec.id, false).expect("to delete");
        ended
    }

    /// Runs a shell's commands in a container of their own, which is as `change` makes it.
    pub fn run_shell(&mut self, commands: &str, change: impl FnOnce(&mut ContainerSpec)) -> Ended {
        let process = self.shell(commands);
        let mut spec = self.container(process);
        change(&mut spec);
        self.run(&spec)
    }

    /// Runs a process in a container that runs.
    pub fn exec(&mut self, container: &str, process: u32, spec: ProcessSpec) -> Ended {
        let stdio = spec.stdio.clone();
        self.client.exec(container, process, spec).expect("a process");
        let streams = self.open(&stdio);
        let ended = self.finish(container, process, streams);
        self.client.delete_process(container, process).expect("to delete");
        ended
    }

    /// A container that must not start: why, and it is removed.
    pub fn start_fails(&mut self, spec: &ContainerSpec) -> Failure {
        self.client.create(spec.clone()).expect("a container");
        let failure = failure(self.client.start(&spec.id));
        self.client.delete(&spec.id, false).expect("to delete");
        failure
    }

    /// A container that does nothing until it is removed; its id.
    pub fn idle(&mut self) -> String {
        let mut process = self.program(&["sleep", "100000"]);
        process.stdio = Stdio::default();
        let spec = self.container(process);
        self.start(&spec);
        spec.id
    }

    /// Removes a container that runs.
    pub fn remove(&mut self, container: &str) {
        self.client.signal(container, Target::All, libc::SIGKILL).expect("to kill");
        self.wait_exit(container, FIRST_PROCESS);
        self.client.delete(container, false).expect("to delete");
    }

    /// Powers the guest off, which must be its end.
    pub fn power_off(mut self) {
        self.section("power off");
        self.client.shutdown(100).expect("to shut down");
        self.running.wait(LINUX_PATIENCE).exits(0);
    }
}

/// Why a call has failed.
#[track_caller]
pub fn failure<T: std::fmt::Debug>(result: Result<T, Error>) -> Failure {
    match result {
        Err(Error::Failed(failure)) => failure,
        other => panic!("{other:?} and no failure"),
    }
}

/// A layer on the disk of layers.
pub fn layer(partition: u32) -> Volume {
    Volume { disk: "layers".into(), partition, kind: "erofs".into(), data: String::new() }
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).expect("an attribute");
}
