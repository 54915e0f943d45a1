//! Native containers: namespaces, control groups and filters of this host's kernel, set up by libcontainer.
//!
//! libcontainer's `container_init_process` does what happens in the new process: namespaces, root file system, mounts,
//! devices, terminal. What happens around it is here, since libcontainer's own way around it leaves control groups of
//! version 2 without device rules, gives `exec` no filter, changes the caller's own `oom_score_adj` and dumpability, and
//! takes twice as long: docs/native.md.
//!
//! The process that drives this has one thread.

mod adapt;
mod cgroup;
mod child;
mod own;
mod processes;
mod program;
mod rootfs;
mod rootless;
mod streams;
mod sys;

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use self::cgroup::{Cgroup, Hierarchies};
use self::program::Plan;
use super::backend::{
    Backend, Bundle, Error, Execution, ExitStatus, ProcessInfo, Stats, Streams, WindowSize,
};
use super::config::Secret;
use super::spec::{compile_seccomp, compile_seccomp_cached, load_flags};

pub use own::protect_own_program;
pub use processes::{parse_interfaces, start_ticks};
pub use rootless::{
    cgroup_parent, cgroup_path, enter_user_namespace, has_one_user, is_user_namespace, set_aside,
};

/// What was made for a container, for whoever has to clear it away.
const RECORD: &str = "native.json";
/// Where the first process listens for its start.
const START_SOCKET: &str = "start.sock";
/// Where secrets are, in the bundle's directory.
const SECRETS: &str = "secrets";
/// Largest secret, in bytes.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// A record of what was made, written before it is made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Where the overlay is; `None` for a root file system that was there before.
    overlay: Option<PathBuf>,
    cgroup: PathBuf,
    /// The first process, once there is one.
    pid: Option<i32>,
    /// When it was started, which tells it from a later one with its number.
    start_ticks: Option<u64>,
}

/// The first process.
struct FirstProcess {
    child: sys::Child,
    terminal: Option<OwnedFd>,
    /// Until it is started.
    report: Option<fs::File>,
    status: Option<ExitStatus>,
}

/// A native container.
pub struct Native {
    directory: PathBuf,
    filters: Option<PathBuf>,
    cgroup: Cgroup,
    spec: Option<Spec>,
    /// The compiled filter and its flags.
    filter: Option<(Rc<Vec<u8>>, u32)>,
    first: Option<FirstProcess>,
    /// The host's ends of the first process's streams, until it is started.
    streams: Option<Streams>,
    executions: Vec<Rc<Running>>,
}

/// Puts a bundle's layers together at its root file system's place.
pub fn mount_rootfs(bundle: &Bundle) -> Result<(), Error> {
    mount(&bundle.layers, &bundle.writable, &bundle.rootfs, bundle.config.auto_remove)
}

/// Puts layers together (the bottom one first) under a writable directory that nobody needs later, to be seen at `target`.
pub fn mount_layers(layers: &[PathBuf], writable: &Path, target: &Path) -> Result<(), Error> {
    mount(layers, writable, target, true)
}

fn mount(layers: &[PathBuf], writable: &Path, target: &Path, volatile: bool) -> Result<(), Error> {
    let user_namespace = rootless::is_user_namespace();
    let overlay = rootfs::Overlay { layers, writable, target, user_namespace, volatile };
    rootfs::mount_overlay(&overlay).map_err(|source| {
        Error::failed(format!("cannot mount {} layers at {target:?}", layers.len()), source)
    })
}

/// Puts layers together under a writable directory that is kept, to be looked at or changed without a container. What comes
/// back is the root directory; the mount is at no place, and ends with the last descriptor of it.
pub fn open_layers(layers: &[PathBuf], writable: &Path, place: &Path) -> Result<OwnedFd, Error> {
    unmount(place)?;
    mount(layers, writable, place, false)?;
    let opened = fs::File::open(place).map(OwnedFd::from);
    unmount(place)?;
    opened.map_err(|source| Error::failed(format!("cannot open {place:?}"), source))
}

/// Takes that away again; nothing happens if it is not there.
pub fn unmount(target: &Path) -> Result<(), Error> {
    rootfs::unmount_and_remove(target)
        .map_err(|source| Error::failed(format!("cannot unmount {target:?}"), source))
}

/// Takes away what a container has on the host when its own record of that cannot be read: everything in its control group,
/// its mounts and its files at run time. `directory` is its bundle's. What is not there is no error.
pub fn clear_away(directory: &Path, cgroup: &Path) -> Result<(), Error> {
    let cgroup = Cgroup::at(&Hierarchies::find()?, cgroup);
    cgroup.kill()?;
    cgroup.remove()?;
    for name in [SECRETS, "rootfs"] {
        unmount(&directory.join(name))?;
    }
    for file in [START_SOCKET, RECORD] {
        let path = directory.join(file);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(|source| Error::failed(format!("cannot remove {path:?}"), source))?,
        }
    }
    Ok(())
}

/// The first process that was recorded in a bundle's directory, and when it was started ([`start_ticks`]).
pub fn recorded_process(directory: &Path) -> Option<(i32, u64)> {
    let record = Native::new(directory).read_record().ok()??;
    Some((record.pid?, record.start_ticks?))
}

/// A process of `exec`, shared by the container and whoever asked for it.
struct Running {
    child: sys::Child,
    terminal: Option<OwnedFd>,
    status: Cell<Option<ExitStatus>>,
}

impl Native {
    /// The container of a bundle's directory. Nothing is made, and what somebody else has made and left there can be
    /// deleted.
    pub fn new(directory: &Path) -> Native {
        Native {
            directory: directory.into(),
            filters: None,
            cgroup: Cgroup::default(),
            spec: None,
            filter: None,
            first: None,
            streams: None,
            executions: vec![],
        }
    }

    /// A container that another process has made from `spec` and looks after, to be looked at or added to.
    pub fn open(directory: &Path, spec: Spec) -> Result<Native, Error> {
        let mut native = Native::new(directory);
        let record = native.read_record()?.ok_or(Error::NotRunning)?;
        let number = record.pid.ok_or(Error::NotRunning)?;
        let pid = Pid::from_raw(number).ok_or(Error::NotRunning)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| Error::NotRunning)?;
        // With the descriptor open, the number cannot be given anew.
        if record.start_ticks.is_none() || processes::start_ticks(number) != record.start_ticks {
            return Err(Error::NotRunning);
        }
        native.cgroup = Cgroup::at(&Hierarchies::find()?, &record.cgroup).existing();
        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        native.filter = match seccomp {
            Some(seccomp) => Some((Rc::new(native.compiled(seccomp)?), load_flags(seccomp))),
            None => None,
        };
        native.spec = Some(spec);
        let child = sys::Child { pid: number, pidfd };
        native.first = Some(FirstProcess { child, terminal: None, report: None, status: None });
        Ok(native)
    }

    fn compiled(&self, seccomp: &oci_spec::runtime::LinuxSeccomp) -> Result<Vec<u8>, Error> {
        let program = match &self.filters {
            Some(cache) => compile_seccomp_cached(seccomp, cache),
            None => compile_seccomp(seccomp),
        };
        program.map_err(|source| Error::failed("cannot make the container's filter", source))
    }

    /// The host's ends of the streams of a process that is not started yet.
    pub fn take_streams(&mut self) -> Option<Streams> {
        self.streams.take()
    }

    /// Keeps compiled filters in a directory that no other user can write to.
    pub fn keep_filters_in(mut self, directory: &Path) -> Native {
        self.filters = Some(directory.into());
        self
    }

    /// Where the directory is that is to be `/run/secrets`, for [`super::spec::Inputs`].
    pub fn secrets_directory(directory: &Path) -> PathBuf {
        directory.join(SECRETS)
    }

    fn first(&self) -> Result<&FirstProcess, Error> {
        self.first.as_ref().filter(|first| first.status.is_none()).ok_or(Error::NotRunning)
    }

    fn record_path(&self) -> PathBuf {
        self.directory.join(RECORD)
    }

    fn write_record(&self, record: &Record) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let temporary = self.directory.join(format!("{RECORD}.new"));
            fs::write(&temporary, serde_json::to_vec(record)?)?;
            fs::rename(&temporary, self.record_path())
        };
        write().map_err(|source| Error::failed(format!("cannot write {:?}", self.record_path()), source))
    }

    fn read_record(&self) -> Result<Option<Record>, Error> {
        let unreadable = |source| Error::failed(format!("cannot read {:?}", self.record_path()), source);
        match fs::read(self.record_path()) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|source| unreadable(source.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(error)),
        }
    }

    /// All but the record, which the caller has written.
    fn make(&mut self, bundle: &Bundle, record: &mut Record) -> Result<Streams, Error> {
        let mut spec = bundle.spec.clone();
        let user_namespace = rootless::is_user_namespace();
        if !bundle.layers.is_empty() {
            mount_rootfs(bundle)?;
        }
        if !bundle.config.secrets.is_empty() {
            copy_secrets(&bundle.config.secrets, &Native::secrets_directory(&self.directory))?;
        }
        let process = spec.process().clone().ok_or_else(|| missing("process"))?;
        rootfs::make_directory(&bundle.rootfs, process.cwd()).map_err(|source| {
            Error::failed(format!("cannot make the working directory {:?}", process.cwd()), source)
        })?;

        self.cgroup = Cgroup::at(&Hierarchies::find()?, &record.cgroup);
        self.cgroup.create()?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
        let resources = resources.unwrap_or_default();
        self.cgroup.limit(&resources)?;
        let privileged = bundle.config.security.privileged;
        self.cgroup.limit_devices(&resources, !user_namespace && !privileged)?;

        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        self.filter = match seccomp {
            Some(seccomp) => Some((Rc::new(self.compiled(seccomp)?), load_flags(seccomp))),
            None => None,
        };
        if user_namespace {
            adapt::check_users(&process)?;
            adapt::for_users(&mut spec, &bundle.config.devices)?;
        }
        let afterwards = adapt::for_libcontainer(&mut spec, &self.cgroup)?;
        self.spec = Some(spec.clone());

        let first = child::First {
            own_pid_namespace: has_new_namespace(&spec, LinuxNamespaceType::Pid),
            spec,
            rootfs: &bundle.rootfs,
            socket: &self.directory.join(START_SOCKET),
            stdin: bundle.config.process.stdin,
            cgroup: &self.cgroup,
        };
        let init = bundle.config.process.init;
        let plan = |report| -> Result<Plan, Error> {
            let mut plan = Plan::new(&process, report)?;
            plan.filter.clone_from(&self.filter);
            plan.propagation.clone_from(&afterwards.propagation);
            plan.read_only.clone_from(&afterwards.read_only);
            plan.init = init;
            Ok(plan)
        };
        let oom_score = process.oom_score_adj();
        let place = |pid| -> Result<(), Error> {
            set_oom_score(pid, oom_score)?;
            record.pid = Some(pid);
            record.start_ticks = processes::start_ticks(pid);
            self.write_record(record)
        };
        let created = child::create(first, plan, place)?;
        self.first = Some(FirstProcess {
            child: created.child,
            terminal: created.terminal,
            report: Some(created.report),
            status: None,
        });
        Ok(created.streams)
    }

    /// Kills what another process has left.
    fn kill_recorded(&self, record: &Record) -> Result<(), Error> {
        let Some(pid) = record.pid.and_then(Pid::from_raw) else { return Ok(()) };
        // First the process, then the look whether it is the one: a number can be given anew in between.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        if record.start_ticks.is_none() || processes::start_ticks(pid.as_raw_pid()) != record.start_ticks {
            return Ok(());
        }
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        // It is another's child, but its end can be seen. One that is frozen ends when the group is thawed, below.
        wait_readable(pidfd.as_fd(), 100);
        Ok(())
    }

    fn reap_executions(&self) {
        for running in &self.executions {
            let _ = running.ended();
        }
    }
}

impl Backend for Native {
    fn pid(&self) -> Option<u32> {
        self.first.as_ref().and_then(|first| u32::try_from(first.child.pid).ok())
    }

    fn create(&mut self, bundle: &Bundle) -> Result<(), Error> {
        child::check_single_thread()?;
        if self.first.is_some() {
            return Err(Error::failed("cannot make the container", "it is there already"));
        }
        if bundle.config.limits.disk_bytes.is_some() {
            let what =
                "cannot limit the size of what a native container writes; a microVM has a disk of its own";
            return Err(Error::Unsupported { what: what.into() });
        }
        let cgroup = bundle.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
        let overlay = (!bundle.layers.is_empty()).then(|| bundle.rootfs.clone());
        let mut record = Record { overlay, cgroup: cgroup.unwrap_or_default(), ..Record::default() };
        if !record.cgroup.as_os_str().is_empty() && !record.cgroup.is_absolute() {
            let what = "the container's control group is not an absolute path";
            return Err(Error::Unsupported { what: what.into() });
        }
        self.write_record(&record)?;
        match self.make(bundle, &mut record) {
            Ok(streams) => {
                self.streams = Some(streams);
                Ok(())
            }
            Err(error) => {
                // The first error counts; what could not be cleared away now is recorded.
                let _ = self.delete();
                Err(error)
            }
        }
    }

    fn start(&mut self) -> Result<Streams, Error> {
        let socket = self.directory.join(START_SOCKET);
        let first = self.first.as_mut().ok_or(Error::NotRunning)?;
        let mut report =
            first.report.take().ok_or_else(|| Error::failed("cannot start the container", "it runs"))?;
        let started = child::start(&socket, &mut report);
        let _ = fs::remove_file(&socket);
        started?;
        self.streams.take().ok_or(Error::NotRunning)
    }

    fn exit_event(&self) -> Result<BorrowedFd<'_>, Error> {
        Ok(self.first.as_ref().ok_or(Error::NotRunning)?.child.pidfd.as_fd())
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.reap_executions();
        let first = self.first.as_mut().ok_or(Error::NotRunning)?;
        if first.status.is_none() {
            first.status = reap(&first.child)?;
        }
        Ok(first.status)
    }

    fn oom_killed(&mut self) -> Result<bool, Error> {
        Ok(self.cgroup.oom_kills() > 0)
    }

    fn signal(&mut self, signal: i32, all: bool) -> Result<(), Error> {
        let first = self.first()?;
        send(&first.child.pidfd, signal)?;
        if all {
            for pid in self.cgroup.processes() {
                if pid != first.child.pid {
                    sys::send_signal(pid, signal);
                }
            }
        }
        // A process of a version 1 group that is frozen does not even die.
        if signal == libc::SIGKILL && self.cgroup.is_frozen() {
            self.cgroup.freeze(false)?;
        }
        Ok(())
    }

    fn resize(&mut self, size: WindowSize) -> Result<(), Error> {
        resize(self.first()?.terminal.as_ref(), size)
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.first()?;
        self.cgroup.freeze(true)
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.first()?;
        self.cgroup.freeze(false)
    }

    fn stats(&mut self) -> Result<Stats, Error> {
        let first = self.first()?;
        let mut stats = self.cgroup.stats();
        stats.interfaces = processes::interfaces(first.child.pid);
        Ok(stats)
    }

    fn processes(&mut self) -> Result<Vec<ProcessInfo>, Error> {
        let first = self.first()?;
        let mut pids = self.cgroup.processes();
        if pids.is_empty() {
            pids = processes::in_namespace_of(first.child.pid);
        }
        Ok(processes::describe(&pids))
    }

    fn exec(&mut self, process: &Process) -> Result<(Box<dyn Execution>, Streams), Error> {
        child::check_single_thread()?;
        self.executions.retain(|running| running.status.get().is_none());
        let first = self.first()?;
        if first.report.is_some() {
            return Err(Error::NotRunning);
        }
        if self.cgroup.is_frozen() {
            return Err(Error::failed("cannot run a process in the container", "it is paused"));
        }
        let container = self.spec.as_ref().ok_or(Error::NotRunning)?;
        let spec = child::spec_for_exec(container, process);
        let socket = self.directory.join(child::socket_name(&first.child.pidfd));
        let filter = self.filter.clone();
        let target = child::Target {
            first: &first.child.pidfd,
            namespaces: namespaces(container),
            cgroup: &self.cgroup,
        };
        let oom_score = process.oom_score_adj();
        let created = child::exec(
            target,
            spec,
            &socket,
            true,
            |report| {
                let mut plan = Plan::new(process, report)?;
                plan.filter = filter;
                Ok(plan)
            },
            |pid| set_oom_score(pid, oom_score),
        )?;
        let running =
            Rc::new(Running { child: created.child, terminal: created.terminal, status: Cell::new(None) });
        self.executions.push(running.clone());
        Ok((Box::new(running), created.streams))
    }

    fn delete(&mut self) -> Result<(), Error> {
        let record = self.read_record()?;
        if let Some(record) = &record {
            self.cgroup = Cgroup::at(&Hierarchies::find()?, &record.cgroup);
        }
        for running in std::mem::take(&mut self.executions) {
            if running.status.get().is_none() {
                let _ = pidfd_send_signal(&running.child.pidfd, Signal::KILL);
            }
            if self.cgroup.is_frozen() {
                let _ = self.cgroup.freeze(false);
            }
            while running.status.get().is_none() && wait_readable(running.child.pidfd.as_fd(), -1) {
                let _ = running.ended()?;
            }
        }
        if let Some(first) = self.first.take()
            && first.status.is_none()
        {
            let _ = pidfd_send_signal(&first.child.pidfd, Signal::KILL);
            if self.cgroup.is_frozen() {
                let _ = self.cgroup.freeze(false);
            }
            child::end(&first.child);
        }
        if let Some(record) = &record {
            self.kill_recorded(record)?;
            self.cgroup.kill()?;
            self.cgroup.remove()?;
        }
        let failed = |what: &str, path: &Path| {
            let what = format!("cannot {what} {path:?}");
            move |source| Error::failed(what, source)
        };
        let secrets = Native::secrets_directory(&self.directory);
        rootfs::unmount_and_remove(&secrets).map_err(failed("unmount", &secrets))?;
        let Some(record) = record else { return Ok(()) };
        if let Some(overlay) = &record.overlay {
            rootfs::unmount_and_remove(overlay).map_err(failed("unmount", overlay))?;
        }
        for file in [START_SOCKET, RECORD] {
            let path = self.directory.join(file);
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(failed("remove", &path))?,
            }
        }
        Ok(())
    }
}

impl Running {
    fn ended(&self) -> Result<Option<ExitStatus>, Error> {
        if self.status.get().is_none() {
            self.status.set(reap(&self.child)?);
        }
        Ok(self.status.get())
    }
}

impl Execution for Rc<Running> {
    fn exit_event(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.ended()
    }

    fn signal(&mut self, signal: i32) -> Result<(), Error> {
        if self.status.get().is_some() {
            return Err(Error::NotRunning);
        }
        send(&self.child.pidfd, signal)
    }

    fn resize(&mut self, size: WindowSize) -> Result<(), Error> {
        resize(self.terminal.as_ref(), size)
    }
}

fn missing(what: &str) -> Error {
    Error::failed("cannot make the container", format!("its specification has no {what}"))
}

fn reap(child: &sys::Child) -> Result<Option<ExitStatus>, Error> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), options)
        .map_err(|source| Error::failed("cannot learn how the process ended", io::Error::from(source)))?;
    let byte = |number: i32| u8::try_from(number & 0xff).unwrap_or(u8::MAX);
    Ok(status.and_then(|status| {
        let code = status.exit_status().map(|code| ExitStatus::Code(byte(code)));
        code.or_else(|| status.terminating_signal().map(|signal| ExitStatus::Signal(byte(signal))))
    }))
}

fn send(pidfd: &OwnedFd, signal: i32) -> Result<(), Error> {
    match sys::signal_pidfd(pidfd.as_fd(), signal) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::NotRunning),
        result => result.map_err(|source| Error::failed(format!("cannot send signal {signal}"), source)),
    }
}

fn resize(terminal: Option<&OwnedFd>, size: WindowSize) -> Result<(), Error> {
    let terminal =
        terminal.ok_or_else(|| Error::Unsupported { what: "the process has no terminal".into() })?;
    sys::set_window_size(terminal.as_fd(), size)
        .map_err(|source| Error::failed("cannot set the terminal's size", source))
}

fn wait_readable(descriptor: BorrowedFd<'_>, timeout_ms: i16) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout =
        if timeout_ms < 0 { PollTimeout::NONE } else { PollTimeout::from(timeout_ms.unsigned_abs()) };
    poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], timeout).is_ok_and(|count| count > 0)
}

fn set_oom_score(pid: i32, score: Option<i32>) -> Result<(), Error> {
    let Some(score) = score else { return Ok(()) };
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()).map_err(|source| {
        Error::failed(format!("cannot set the score for want of memory to {score}"), source)
    })
}

fn has_new_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    list.into_iter().flatten().any(|namespace| namespace.typ() == kind && namespace.path().is_none())
}

/// Those of a container that a further process enters.
fn namespaces(spec: &Spec) -> ThreadNameSpaceType {
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let bit = |kind| match kind {
        LinuxNamespaceType::Mount => ThreadNameSpaceType::MOUNT,
        LinuxNamespaceType::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
        LinuxNamespaceType::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
        LinuxNamespaceType::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
        LinuxNamespaceType::User => ThreadNameSpaceType::USER,
        LinuxNamespaceType::Pid => ThreadNameSpaceType::PROCESS_ID,
        LinuxNamespaceType::Network => ThreadNameSpaceType::NETWORK,
        LinuxNamespaceType::Time => ThreadNameSpaceType::TIME,
    };
    list.into_iter().flatten().fold(ThreadNameSpaceType::empty(), |all, namespace| all | bit(namespace.typ()))
}

/// Copies secrets into memory at `directory`. [`Backend::delete`] takes them away.
pub fn copy_secrets(secrets: &[Secret], directory: &Path) -> Result<(), Error> {
    rootfs::mount_memory(directory)
        .map_err(|source| Error::failed(format!("cannot mount memory at {directory:?}"), source))?;
    for secret in secrets {
        let copy = || -> io::Result<()> {
            use io::Read;
            let mut bytes = vec![];
            fs::File::open(&secret.source)?.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > SECRET_BYTES_MAX {
                return Err(io::Error::other(format!("it has more than {SECRET_BYTES_MAX} bytes")));
            }
            // The name is one part of a path; `spec` has seen to that.
            let path = directory.join(&secret.name);
            fs::write(&path, bytes)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(secret.mode & 0o7777))?;
            chown(&path, Some(secret.uid), Some(secret.gid))
        };
        copy()
            .map_err(|source| Error::failed(format!("cannot copy the secret {:?}", secret.name), source))?;
    }
    Ok(())
}
