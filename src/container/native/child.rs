//! New processes: how they come to be in a container, and how parent and child speak while they do.
//!
//! The first process is made with its process namespace by one clone3(2), in its control group, and then goes through
//! libcontainer's `container_init_process`. A process of `exec` takes two steps: one that enters the namespaces, and its
//! sibling, that is in them.
//!
//! Between parent and child there are three ways to speak:
//! - *go*: a pipe; a byte says that groups and maps of the child are set;
//! - libcontainer's channel: the child says that it is ready;
//! - *report*: a pipe that closes with the program's exec. What comes before that is why there will be none.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::notify_socket::{NotifyListener, NotifySocket};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel;
use libcontainer::process::init::container_init_process;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Linux, Process, Spec};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces, set_thread_groups};
use tracing::subscriber::{NoSubscriber, with_default};

use super::cgroup::Cgroup;
use super::program::{Plan, Program, Report, die_with_parent};
use super::rootless;
use super::streams::{self, Ends, Pending};
use super::sys;
use crate::container::backend::{Error, Streams};
use crate::container::fork;

/// Longest report.
const REPORT_BYTES_MAX: u64 = 64 << 10;

/// A process that waits for its start.
pub(super) struct Created {
    pub(super) child: sys::Child,
    pub(super) streams: Streams,
    /// The terminal, if it has one.
    pub(super) terminal: Option<OwnedFd>,
    pub(super) report: File,
}

/// What a first process is made of.
pub(super) struct First<'a> {
    /// As libcontainer is to see it.
    pub(super) spec: Spec,
    pub(super) rootfs: &'a Path,
    /// Where it listens for its start.
    pub(super) socket: &'a Path,
    pub(super) stdin: bool,
    pub(super) cgroup: &'a Cgroup,
    pub(super) own_pid_namespace: bool,
}

fn pipe(what: &str) -> Result<(OwnedFd, OwnedFd), Error> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|source| Error::failed(what, io::Error::from(source)))
}

/// Makes the first process of a container. Until `place` has returned, it does nothing but join its control group.
pub(super) fn create(
    first: First,
    mut plan: impl FnMut(OwnedFd) -> Result<Plan, Error>,
    place: impl FnOnce(i32) -> Result<(), Error>,
) -> Result<Created, Error> {
    let terminal = plan_terminal(&first.spec);
    let (ends, pending) = streams::make(terminal, first.stdin)
        .map_err(|source| Error::failed("cannot make the container's streams", source))?;
    let listener = NotifyListener::new(first.socket)
        .map_err(|source| Error::failed(format!("cannot listen on {:?}", first.socket), source))?;
    let (report, its_report) = pipe("cannot make a pipe")?;
    let plan = Rc::new(plan(its_report)?);
    let (go, its_go) = pipe("cannot make a pipe").map(|(its, ours)| (ours, its))?;
    let groups = groups(&first.spec);
    let args = arguments(&first.spec, first.rootfs, listener, &ends, &plan, ContainerType::InitContainer);
    let mut channels = Channels::new()?;

    let flags = if first.own_pid_namespace { libc::CLONE_NEWPID as u64 } else { 0 };
    let v2 = first.cgroup.open_v2();
    let child = sys::spawn(flags, v2.as_ref().map(File::as_fd), || {
        let body = || {
            if !join(first.cgroup, v2.is_none(), &plan) || !wait_go(&its_go) {
                return 1;
            }
            container_process(&plan, &args, &groups, &mut channels)
        };
        with_default(NoSubscriber::default(), body)
    })
    .map_err(|source| Error::failed("cannot make a process for the container", source))?;

    // A copy of the report's other end here would keep it open.
    drop((its_go, ends, args, plan));
    let mut report = File::from(report);
    let ready = place(child.pid).and_then(|()| {
        let sent = File::from(go).write_all(b"g");
        sent.map_err(|source| Error::failed("cannot let the container's process go on", source))?;
        channels.wait(&mut report)
    });
    let created = ready.and_then(|()| finish(pending));
    match created {
        Ok((streams, terminal)) => Ok(Created { child, streams, terminal, report }),
        Err(error) => {
            end(&child);
            Err(error)
        }
    }
}

/// Where a further process goes.
pub(super) struct Target<'a> {
    pub(super) first: &'a OwnedFd,
    pub(super) namespaces: ThreadNameSpaceType,
    pub(super) cgroup: &'a Cgroup,
}

/// Starts a further process in a container. It runs when this returns.
pub(super) fn exec(
    target: Target,
    spec: Spec,
    socket: &Path,
    stdin: bool,
    plan: impl FnOnce(OwnedFd) -> Result<Plan, Error>,
    place: impl FnOnce(i32) -> Result<(), Error>,
) -> Result<Created, Error> {
    let (ends, pending) = streams::make(plan_terminal(&spec), stdin)
        .map_err(|source| Error::failed("cannot make the process's streams", source))?;
    // The child finds its start waiting when it comes to listen for it.
    let listener = NotifyListener::new(socket)
        .map_err(|source| Error::failed(format!("cannot listen on {socket:?}"), source))?;
    NotifySocket::new(socket)
        .notify_container_start()
        .map_err(|source| Error::failed(format!("cannot use {socket:?}"), source))?;
    let _ = std::fs::remove_file(socket);
    let (report, its_report) = pipe("cannot make a pipe")?;
    let (go, its_go) = pipe("cannot make a pipe").map(|(its, ours)| (ours, its))?;
    let (number, its_number) = pipe("cannot make a pipe")?;
    let plan = Rc::new(plan(its_report)?);
    let groups = groups(&spec);
    let kind = ContainerType::TenantContainer { exec_notify_fd: -1 };
    let args = arguments(&spec, Path::new("/"), listener, &ends, &plan, kind);
    let mut channels = Channels::new()?;

    let v2 = target.cgroup.open_v2();
    let refused = |source: io::Error| {
        if source.kind() != io::ErrorKind::PermissionDenied || !rootless::is_user_namespace() {
            return Error::failed("cannot make a process for the container", source);
        }
        let what = "cannot put a process into the container's control group: this session is outside of the part of the tree \
                    that is yours (start rvmm by `systemd-run --user --scope -p Delegate=yes`, as the container was)";
        Error::failed(what, source)
    };
    let entering = sys::spawn(0, v2.as_ref().map(File::as_fd), || {
        let body = || {
            if !join(target.cgroup, v2.is_none(), &plan) || !wait_go(&its_go) {
                return 1;
            }
            if let Err(error) = move_into_thread_name_spaces(target.first.as_fd(), target.namespaces) {
                let error = io::Error::from(error);
                Report::failed("cannot enter the container", &error).send(&plan.report);
                return 1;
            }
            // A sibling, so that it is the caller's child and not this one's.
            let inner = || container_process(&plan, &args, &groups, &mut channels);
            match sys::spawn(libc::CLONE_PARENT as u64, None, inner) {
                Ok(child) => {
                    let sent = File::from(its_number).write_all(&child.pid.to_ne_bytes());
                    i32::from(sent.is_err())
                }
                Err(error) => {
                    Report::failed("cannot make a process in the container", &error).send(&plan.report);
                    1
                }
            }
        };
        with_default(NoSubscriber::default(), body)
    })
    .map_err(refused)?;

    drop((its_go, ends, args, plan));
    let mut report = File::from(report);
    let placed = place(entering.pid).and_then(|()| {
        let sent = File::from(go).write_all(b"g");
        sent.map_err(|source| Error::failed("cannot let the process go on", source))
    });
    let mut bytes = [0; 4];
    let found = placed.and_then(|()| {
        let read = File::from(number).read_exact(&mut bytes);
        read.map_err(|_| read_report(&mut report).unwrap_or(ended()))
    });
    // Its work is done, well or not.
    end(&entering);
    found?;
    let pid = i32::from_ne_bytes(bytes);
    let open = rustix::process::Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH);
    let pidfd = open
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(|source| Error::failed("cannot watch the process", io::Error::from(source)))?;
    let child = sys::Child { pid, pidfd };
    let created = channels.wait(&mut report).and_then(|()| finish(pending));
    let created = created.and_then(|done| match read_report(&mut report) {
        Some(error) => Err(error),
        None => Ok(done),
    });
    match created {
        Ok((streams, terminal)) => Ok(Created { child, streams, terminal, report }),
        Err(error) => {
            end(&child);
            Err(error)
        }
    }
}

/// Kills a child and takes its end.
pub(super) fn end(child: &sys::Child) {
    let _ = rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL);
    let wait = rustix::process::WaitId::PidFd(child.pidfd.as_fd());
    let _ = rustix::process::waitid(wait, rustix::process::WaitIdOptions::EXITED);
}

/// What a child has reported; `None` when it has become its program.
pub(super) fn read_report(report: &mut File) -> Option<Error> {
    let mut text = String::new();
    let read = report.take(REPORT_BYTES_MAX).read_to_string(&mut text);
    if let Err(error) = read {
        return Some(Error::failed("cannot hear from the container's process", error));
    }
    let line = text.lines().next()?;
    Some(match serde_json::from_str::<Report>(line) {
        Ok(report) => report.into_error(),
        Err(error) => Error::failed("cannot understand the container's process", error),
    })
}

fn ended() -> Error {
    Error::failed("cannot set up the container", "its process has ended")
}

/// libcontainer's channels, of which only "ready" is used.
struct Channels {
    ready: (channel::MainSender, channel::MainReceiver),
    unused: (channel::InitSender, channel::InitReceiver),
}

impl Channels {
    fn new() -> Result<Channels, Error> {
        let failed = |source| Error::failed("cannot make sockets for the container's process", source);
        Ok(Channels {
            ready: channel::main_channel().map_err(failed)?,
            unused: channel::init_channel().map_err(failed)?,
        })
    }

    /// In the parent: until the child is ready, or has told why not.
    fn wait(mut self, report: &mut File) -> Result<(), Error> {
        let _ = self.ready.0.close();
        let ready = self.ready.1.wait_for_init_ready();
        let _ = self.ready.1.close();
        let _ = (self.unused.0.close(), self.unused.1.close());
        match ready {
            Ok(()) => Ok(()),
            Err(_) => Err(read_report(report).unwrap_or(ended())),
        }
    }
}

fn finish(pending: Pending) -> Result<(Streams, Option<OwnedFd>), Error> {
    match pending {
        Pending::Pipes(streams) => Ok((streams, None)),
        Pending::Terminal(socket) => {
            let received = streams::receive_terminal(&socket);
            let received = received.and_then(|terminal| Ok((terminal.try_clone()?, terminal)));
            let (copy, terminal) =
                received.map_err(|source| Error::failed("cannot get the container's terminal", source))?;
            Ok((Streams { stdin: None, stdout: terminal, stderr: None }, Some(copy)))
        }
    }
}

fn plan_terminal(spec: &Spec) -> bool {
    spec.process().as_ref().and_then(Process::terminal).unwrap_or(false)
}

/// All groups of the process; libcontainer leaves the caller's own if it is given none.
fn groups(spec: &Spec) -> Vec<rustix::process::Gid> {
    let user = spec.process().as_ref().map(|process| process.user());
    let list = user.and_then(|user| user.additional_gids().clone()).unwrap_or_default();
    list.into_iter().map(rustix::process::Gid::from_raw).collect()
}

fn arguments(
    spec: &Spec,
    rootfs: &Path,
    notify_listener: NotifyListener,
    ends: &Ends,
    plan: &Rc<Plan>,
    container_type: ContainerType,
) -> ContainerArgs {
    let streams = ends.numbers();
    ContainerArgs {
        container_type,
        syscall: SyscallType::Linux,
        spec: Rc::new(for_libcontainer(spec.clone())),
        rootfs: rootfs.to_owned(),
        console_socket: ends.socket(),
        notify_listener,
        preserve_fds: 0,
        container: None,
        user_ns_config: None,
        cgroup_config: libcgroups::common::CgroupConfig {
            cgroup_path: PathBuf::new(),
            systemd_cgroup: false,
            container_name: String::new(),
        },
        detached: true,
        executor: Box::new(Program(plan.clone())),
        no_pivot: false,
        stdin: streams.map(|streams| streams[0]),
        stdout: streams.map(|streams| streams[1]),
        stderr: streams.map(|streams| streams[2]),
        as_sibling: false,
        pid_file: None,
    }
}

/// Without what is done here and not there.
fn for_libcontainer(mut spec: Spec) -> Spec {
    if let Some(process) = spec.process_mut() {
        process.set_capabilities(None).set_no_new_privileges(None).set_rlimits(None);
        // A home that is set keeps it from asking the container's libraries for one.
        process.set_env(Some(vec!["HOME=/".into()])).set_cwd("/".into());
        process.user_mut().set_additional_gids(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_seccomp(None).set_resources(None);
    }
    spec
}

/// A `Spec` for a further process: what the container's own says of it is not of interest.
pub(super) fn spec_for_exec(container: &Spec, process: &Process) -> Spec {
    let mut spec = container.clone();
    let mut linux = Linux::default();
    linux.set_namespaces(Some(vec![])).set_masked_paths(None).set_readonly_paths(None);
    spec.set_linux(Some(linux)).set_process(Some(process.clone())).set_mounts(None);
    spec
}

fn wait_go(go: &OwnedFd) -> bool {
    let mut byte = [0u8; 1];
    loop {
        match rustix::io::read(go, &mut byte) {
            Ok(1) => return true,
            Err(rustix::io::Errno::INTR) => {}
            _ => return false,
        }
    }
}

/// Puts the calling child into its control group.
fn join(cgroup: &Cgroup, v2: bool, plan: &Plan) -> bool {
    let joined = cgroup.join(v2);
    if let Err(error) = &joined {
        Report::failed("cannot set up the container", error).send(&plan.report);
    }
    joined.is_ok()
}

/// From the new process's own hands to libcontainer's, and to its program.
fn container_process(
    plan: &Rc<Plan>,
    args: &ContainerArgs,
    groups: &[rustix::process::Gid],
    channels: &mut Channels,
) -> i32 {
    die_with_parent(true);
    sys::default_signals();
    // Its memory is a copy of the parent's.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    if let Err(error) = set_groups(groups) {
        Report::failed("cannot set the process's groups", &io::Error::from(error)).send(&plan.report);
        return 1;
    }
    let _ = channels.ready.1.close();
    if let Err(error) = container_init_process(args, &mut channels.ready.0, &mut channels.unused.1) {
        // One that was reported before is not heard a second time.
        Report::failed("cannot set up the container", &error).send(&plan.report);
    }
    1
}

/// Sets the process's groups. In a user namespace where they cannot be changed, only the first could be meant.
fn set_groups(groups: &[rustix::process::Gid]) -> rustix::io::Result<()> {
    match set_thread_groups(groups) {
        Err(rustix::io::Errno::PERM) if groups.len() <= 1 => {
            let setting = std::fs::read_to_string("/proc/self/setgroups").unwrap_or_default();
            if setting.trim() == "deny" { Ok(()) } else { Err(rustix::io::Errno::PERM) }
        }
        result => result,
    }
}

/// Lets a first process go on to its program.
pub(super) fn start(socket: &Path, report: &mut File) -> Result<(), Error> {
    NotifySocket::new(socket)
        .notify_container_start()
        .map_err(|source| Error::failed("cannot start the container's process", source))?;
    match read_report(report) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Whether this process has one thread, without which its copies are not whole.
pub(super) fn check_single_thread() -> Result<(), Error> {
    match fork::threads().map_err(|source| Error::failed("cannot count threads", source))? {
        1 => Ok(()),
        count => Err(Error::failed("cannot make a container", format!("this process has {count} threads"))),
    }
}

/// Number of a descriptor, for a name.
pub(super) fn socket_name(of: &OwnedFd) -> String {
    format!("exec-{}-{}", std::process::id(), of.as_raw_fd())
}
