//! Containers in microVMs: the same specification as natively, applied by the agent in a guest.
//!
//! [`sandbox`] has the VM, `translate` what the agent is told; here is the [`Backend`] over both.

mod machine;
mod monitor;
mod sandbox;
pub mod template;
mod translate;
mod user;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};

use oci_spec::runtime::{Process, Spec};

use self::machine::{LAYERS_DISK, Machine, WRITABLE_DISK};
use self::sandbox::{Sandbox, Start};
use self::template::Templates;
use crate::container::backend::{
    Backend, Bundle, Error, Execution, ExitStatus, InterfaceStats, ProcessInfo, Stats, Streams, WindowSize,
};
use crate::container::config::ContainerConfig;
use crate::container::native;
use crate::container::network::{Interface, TapPlug, netns};
use crate::guest::client::{self, Client};
use crate::guest::protocol::{self, Event, FIRST_PROCESS, Failure, FileInfo, Target};
use crate::guest::spec::{self as agent, ProcessSpec, Root, Stdio, Upper, Volume};

pub use self::machine::Class;
pub use self::sandbox::{Started, leave};

/// Bytes of the writable disk unless the user says another number: a sparse file, so nothing is taken before it is used.
const WRITABLE_BYTES: u64 = 10 << 30;
/// The first size of a terminal that nobody has told the size of.
const WINDOW: WindowSize = WindowSize { columns: 80, rows: 24 };

/// What a microVM needs beside the bundle.
#[derive(Clone, Debug)]
pub struct Place {
    /// The sandbox's directory.
    pub sandbox: PathBuf,
    /// Whether the sandbox is the container's own, or that of another one which runs.
    pub own: bool,
    /// The sandbox's network namespace.
    pub netns: Option<PathBuf>,
    /// Its devices, and the taps beside them.
    pub interfaces: Vec<(Interface, TapPlug)>,
    /// The layers' file systems, the bottom one first.
    pub layers: Vec<PathBuf>,
    /// The container's writable disk; it is made if it is not there.
    pub writable: PathBuf,
    /// Snapshots of guests that have booted.
    pub templates: Templates,
}

/// A container in a microVM.
#[derive(Debug)]
pub struct Microvm {
    id: String,
    place: Place,
    running: Option<Running>,
    /// What the VM's processes may do is in the specification, which further processes need too.
    spec: Option<Spec>,
    /// The streams and the terminal's size, until the process is started.
    wanted: Option<Wanted>,
    window: Option<agent::WindowSize>,
    exit: Option<ExitStatus>,
    oom_killed: bool,
}

#[derive(Debug)]
struct Running {
    sandbox: Sandbox,
    client: Client,
}

fn agent_error(what: &str) -> impl FnOnce(client::Error) -> Error + '_ {
    move |error| match error {
        client::Error::Failed(Failure::NotFound { program, .. }) => Error::NotFound { program },
        client::Error::Failed(Failure::NotExecutable { program, errno }) => {
            Error::NotExecutable { program, reason: io::Error::from_raw_os_error(errno).to_string() }
        }
        error => Error::failed(format!("cannot {what} in the microVM"), error),
    }
}

impl Microvm {
    /// A container that is to be made.
    pub fn new(id: &str, place: Place) -> Microvm {
        Microvm {
            id: id.into(),
            place,
            running: None,
            spec: None,
            wanted: None,
            window: None,
            exit: None,
            oom_killed: false,
        }
    }

    /// A container that another process has made, with the specification that it was made from.
    pub fn open(id: &str, place: Place, spec: Spec) -> Result<Microvm, Error> {
        let sandbox = Sandbox::open(&place.sandbox)?.ok_or(Error::NotRunning)?;
        let client = sandbox.call()?;
        let mut microvm = Microvm::new(id, place);
        microvm.running = Some(Running { sandbox, client });
        microvm.spec = Some(spec);
        Ok(microvm)
    }

    fn client(&mut self) -> Result<&mut Client, Error> {
        self.running.as_mut().map(|running| &mut running.client).ok_or(Error::NotRunning)
    }

    /// The sandbox, started if it is the container's own.
    fn enter(&self, config: &ContainerConfig, hostname: &str) -> Result<Running, Error> {
        let dir = &self.place.sandbox;
        if !self.place.own {
            let sandbox = Sandbox::open(dir)?.ok_or(Error::NotRunning)?;
            sandbox.enter(&self.id)?;
            let client = sandbox.call()?;
            return Ok(Running { sandbox, client });
        }
        make_disk(&self.place.writable, config.limits.disk_bytes.unwrap_or(WRITABLE_BYTES))?;
        let Place { layers, writable, interfaces, netns, templates, .. } = &self.place;
        let machine = Machine::new(&config.limits, layers, writable, interfaces, netns.as_deref())?;
        let start =
            Start { dir, machine: &machine, interfaces, hostname, template: config.template, templates };
        let (sandbox, client) = Sandbox::start(&start)?;
        sandbox.enter(&self.id)?;
        Ok(Running { sandbox, client })
    }

    /// Counters of the devices of the sandbox's network, which see what the guest sends and gets.
    fn interfaces(&self) -> Vec<InterfaceStats> {
        let netns = self.place.sandbox.join("netns");
        if !netns::exists(&netns) {
            return vec![];
        }
        let text = netns::within(&netns, || fs::read_to_string("/proc/thread-self/net/dev"));
        let mut found = native::parse_interfaces(&text.unwrap_or_default());
        // Beside each is the tap, with the same numbers the other way round.
        found.retain(|interface| interface.name.starts_with("eth"));
        found
    }

    fn root(&self, bundle: &Bundle) -> Root {
        if !self.place.own {
            // A disk cannot be added to a VM that runs, so the host puts the layers together.
            return Root::Share { path: format!("{}/rootfs", self.id) };
        }
        let layer = |partition| Volume {
            disk: LAYERS_DISK.into(),
            partition,
            kind: "erofs".into(),
            data: String::new(),
        };
        let count = u32::try_from(self.place.layers.len()).unwrap_or(u32::MAX);
        let read_only = bundle.config.read_only;
        let upper = Volume {
            disk: WRITABLE_DISK.into(),
            partition: 0,
            kind: "ext4".into(),
            data: if read_only { "noload".into() } else { String::new() },
        };
        Root::Layers { lower: (1..=count).map(layer).collect(), upper: Upper::Volume(upper) }
    }

    /// Takes in what the agent has said.
    fn take_events(&mut self) -> Result<(), Error> {
        let Some(running) = &mut self.running else { return Ok(()) };
        loop {
            match running.client.next_event() {
                Ok(Some(Event::Exited { container, process, status, out_of_memory }))
                    if container == self.id && process == FIRST_PROCESS =>
                {
                    self.exit = Some(exit_status(status));
                    self.oom_killed |= out_of_memory;
                }
                Ok(Some(Event::OutOfMemory { container })) if container == self.id => self.oom_killed = true,
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                // The guest's kernel has ended, and with it everything.
                Err(client::Error::Ended | client::Error::Closed) => {
                    self.exit = self.exit.or(Some(ExitStatus::Signal(libc::SIGKILL as u8)));
                    return Ok(());
                }
                Err(error) => return Err(Error::failed("the microVM's agent", error)),
            }
        }
    }
}

/// Files of a container that runs.
impl Microvm {
    /// What a path in the container is.
    pub fn stat_path(&mut self, path: &str, follow: bool) -> Result<Option<FileInfo>, Error> {
        let id = self.id.clone();
        match self.client()?.stat_path(&id, path, follow) {
            Err(client::Error::Failed(Failure::System { errno: libc::ENOENT | libc::ENOTDIR, .. })) => {
                Ok(None)
            }
            result => result.map(Some).map_err(agent_error("look at a file")),
        }
    }

    /// Writes a path of the container to `to`, as a tar archive with its last component as the name.
    pub fn read_archive(&mut self, path: &str, mut to: impl io::Write) -> Result<(), Error> {
        let id = self.id.clone();
        self.client()?.read_archive(&id, path, &mut to).map_err(agent_error("copy out of the container"))
    }

    /// Writes what the container has written over its layers to `to`, as one more layer.
    pub fn read_changes(&mut self, mut to: impl io::Write) -> Result<(), Error> {
        let id = self.id.clone();
        self.client()?.read_changes(&id, &mut to).map_err(agent_error("read what the container has written"))
    }

    /// Unpacks a tar archive from `from` into a directory of the container.
    pub fn write_archive(&mut self, path: &str, mut from: impl io::Read) -> Result<(), Error> {
        let id = self.id.clone();
        self.client()?.write_archive(&id, path, &mut from).map_err(agent_error("copy into the container"))
    }
}

fn exit_status(status: protocol::ExitStatus) -> ExitStatus {
    match status {
        protocol::ExitStatus::Code(code) => ExitStatus::Code(code),
        protocol::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
    }
}

fn window(size: WindowSize) -> agent::WindowSize {
    agent::WindowSize { rows: size.rows, columns: size.columns }
}

/// Makes an empty ext4 of that size at `path`, if there is none.
fn make_disk(path: &Path, bytes: u64) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let failed = |source: io::Error| Error::failed(format!("cannot make the writable disk {path:?}"), source);
    let new = path.with_extension("new");
    fs::File::create(&new).and_then(|file| file.set_len(bytes)).map_err(failed)?;
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256"])
        .args(["-O", "^resize_inode,^metadata_csum,^huge_file", "-J", "size=16"])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"])
        .arg(&new)
        .stdin(ProcessStdio::null())
        .output()
        .map_err(failed)?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
        return Err(failed(io::Error::other(format!("mke2fs: {why}"))));
    }
    fs::rename(&new, path).map_err(failed)
}

impl Backend for Microvm {
    fn create(&mut self, bundle: &Bundle) -> Result<(), Error> {
        let hostname = bundle.spec.hostname().clone().unwrap_or_default();
        let running = self.enter(&bundle.config, &hostname)?;
        let files = &bundle.dir;
        let mut translated = translate::container(&self.id, &bundle.spec, files, bundle.config.process.init)?;
        translated.spec.root = self.root(bundle);
        if !self.place.own {
            let path = bundle.rootfs.clone();
            translated.shared.push(translate::Shared { path, name: format!("{}/rootfs", self.id) });
        }
        running.sandbox.share(&translated.shared)?;
        let wanted =
            Wanted::new(&running.client, bundle.config.process.terminal, bundle.config.process.stdin)?;
        translated.spec.process.stdio = wanted.stdio();
        let running = self.running.insert(running);
        running.client.create(translated.spec).map_err(agent_error("make the container"))?;
        self.spec = Some(bundle.spec.clone());
        self.wanted = Some(wanted);
        Ok(())
    }

    fn start(&mut self) -> Result<Streams, Error> {
        let id = self.id.clone();
        let wanted = self.wanted.take().ok_or(Error::NotRunning)?;
        let window = self.window.take();
        let client = self.client()?;
        client.start(&id).map_err(agent_error("start the container"))?;
        if let Some(size) = window {
            client.resize(&id, FIRST_PROCESS, size).map_err(agent_error("resize the terminal"))?;
        }
        wanted.open(client)
    }

    fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.sandbox.pid())
    }

    fn exit_event(&self) -> Result<BorrowedFd<'_>, Error> {
        self.running.as_ref().map(|running| running.client.as_fd()).ok_or(Error::NotRunning)
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.take_events()?;
        Ok(self.exit)
    }

    fn oom_killed(&mut self) -> Result<bool, Error> {
        self.take_events()?;
        Ok(self.oom_killed)
    }

    fn signal(&mut self, signal: i32, all: bool) -> Result<(), Error> {
        let id = self.id.clone();
        let target = if all { Target::All } else { Target::Process(FIRST_PROCESS) };
        self.client()?.signal(&id, target, signal).map_err(agent_error("send a signal"))
    }

    fn resize(&mut self, size: WindowSize) -> Result<(), Error> {
        if self.wanted.is_some() {
            self.window = Some(window(size));
            return Ok(());
        }
        let id = self.id.clone();
        self.client()?.resize(&id, FIRST_PROCESS, window(size)).map_err(agent_error("resize the terminal"))
    }

    fn pause(&mut self) -> Result<(), Error> {
        let id = self.id.clone();
        self.client()?.pause(&id).map_err(agent_error("pause the container"))
    }

    fn resume(&mut self) -> Result<(), Error> {
        let id = self.id.clone();
        self.client()?.resume(&id).map_err(agent_error("resume the container"))
    }

    fn stats(&mut self) -> Result<Stats, Error> {
        let id = self.id.clone();
        let stats = self.client()?.stats(&id).map_err(agent_error("count what the container uses"))?;
        Ok(Stats {
            cpu_ns: Some(stats.cpu_us.saturating_mul(1000)),
            cpu_system_ns: Some(stats.cpu_system_us.saturating_mul(1000)),
            throttled_periods: Some(stats.throttled_periods),
            throttled_ns: Some(stats.throttled_us.saturating_mul(1000)),
            memory_bytes: Some(stats.memory_bytes.saturating_sub(stats.memory_inactive_file_bytes)),
            memory_limit_bytes: stats.memory_limit_bytes,
            cache_bytes: Some(stats.memory_inactive_file_bytes),
            pids: Some(stats.pids),
            pids_limit: stats.pids_limit,
            block_read_bytes: Some(stats.read_bytes),
            block_write_bytes: Some(stats.write_bytes),
            interfaces: self.interfaces(),
        })
    }

    fn processes(&mut self) -> Result<Vec<ProcessInfo>, Error> {
        let id = self.id.clone();
        let processes = self.client()?.processes(&id).map_err(agent_error("list the processes"))?;
        Ok(processes
            .into_iter()
            .map(|process| ProcessInfo {
                pid: process.pid,
                parent: process.parent,
                uid: process.uid,
                cpu_ms: process.cpu_ms,
                started_s: process.started,
                state: char::from(process.state),
                command: process.command,
            })
            .collect())
    }

    fn exec(&mut self, process: &Process) -> Result<(Box<dyn Execution>, Streams), Error> {
        let linux = self.spec.as_ref().and_then(|spec| spec.linux().clone()).unwrap_or_default();
        let mut spec: ProcessSpec = translate::process(process, &linux)?;
        let sandbox = Sandbox::open(&self.place.sandbox)?.ok_or(Error::NotRunning)?;
        // Events of one connection are one reader's: the process gets a connection of its own.
        let mut client = sandbox.call()?;
        let wanted = Wanted::new(&client, process.terminal().unwrap_or(false), true)?;
        spec.stdio = wanted.stdio();
        let random = getrandom::u32().map_err(|error| Error::failed("cannot get random numbers", error))?;
        let number = random.max(1);
        client.exec(&self.id, number, spec).map_err(agent_error("start a process"))?;
        let streams = wanted.open(&client)?;
        Ok((Box::new(Executed { container: self.id.clone(), number, client, exit: None }), streams))
    }

    fn delete(&mut self) -> Result<(), Error> {
        if let Some(mut running) = self.running.take() {
            // In a VM that ends anyway this is the file systems' end in good order; one that is gone needs none.
            if let Err(error) = running.client.delete(&self.id, true) {
                tracing::debug!("{}", crate::error_chain(&error));
            }
        }
        leave(&self.place.sandbox, &self.id).map(drop)
    }
}

/// Streams that a process is to have.
#[derive(Debug)]
struct Wanted {
    terminal: bool,
    stdin: Option<u64>,
    stdout: u64,
    stderr: Option<u64>,
}

impl Wanted {
    fn new(client: &Client, terminal: bool, stdin: bool) -> Result<Wanted, Error> {
        let new = || client.new_stream().map_err(agent_error("name a stream"));
        Ok(Wanted {
            terminal,
            stdin: if stdin && !terminal { Some(new()?) } else { None },
            stdout: new()?,
            stderr: if terminal { None } else { Some(new()?) },
        })
    }

    fn stdio(&self) -> Stdio {
        match self.terminal {
            true => Stdio::Terminal { stream: self.stdout, size: window(WINDOW) },
            false => Stdio::Streams { stdin: self.stdin, stdout: Some(self.stdout), stderr: self.stderr },
        }
    }

    fn open(&self, client: &Client) -> Result<Streams, Error> {
        let open = |stream| -> Result<OwnedFd, Error> {
            client.open_stream(stream).map(OwnedFd::from).map_err(agent_error("open a stream"))
        };
        Ok(Streams {
            stdin: self.stdin.map(open).transpose()?,
            stdout: open(self.stdout)?,
            stderr: self.stderr.map(open).transpose()?,
        })
    }
}

/// A further process in a container.
struct Executed {
    container: String,
    number: u32,
    client: Client,
    exit: Option<ExitStatus>,
}

impl Drop for Executed {
    fn drop(&mut self) {
        // Not before: the agent forgets the process's streams with it, and one that was opened late may still have output.
        if self.exit.is_some() {
            let _ = self.client.delete_process(&self.container, self.number);
        }
    }
}

impl Execution for Executed {
    fn exit_event(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error> {
        while self.exit.is_none() {
            match self.client.next_event() {
                Ok(Some(Event::Exited { container, process, status, .. }))
                    if container == self.container && process == self.number =>
                {
                    self.exit = Some(exit_status(status));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(client::Error::Ended | client::Error::Closed) => {
                    self.exit = Some(ExitStatus::Signal(libc::SIGKILL as u8));
                }
                Err(error) => return Err(Error::failed("the microVM's agent", error)),
            }
        }
        Ok(self.exit)
    }

    fn signal(&mut self, signal: i32) -> Result<(), Error> {
        let target = Target::Process(self.number);
        self.client.signal(&self.container, target, signal).map_err(agent_error("send a signal"))
    }

    fn resize(&mut self, size: WindowSize) -> Result<(), Error> {
        let resized = self.client.resize(&self.container, self.number, window(size));
        resized.map_err(agent_error("resize the terminal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_errors_keep_their_kind() {
        let error = agent_error("x")(client::Error::Ended);
        assert!(matches!(error, Error::Failed { .. }));
    }
}
