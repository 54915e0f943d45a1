//! A container of the sandbox and its processes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;
use rvmm::guest::protocol::{ExitStatus, FIRST_PROCESS, Failure, State};
use rvmm::guest::spec::{ContainerSpec, Namespace};

use crate::archive::View;
use crate::cgroup::Cgroup;
use crate::failure::Doing;
use crate::plan::{MountWhat, Plan, Step};
use crate::root::RootMount;

/// A container.
pub struct Container {
    /// As the host described it.
    pub spec: ContainerSpec,
    /// Its root file system.
    pub root: RootMount,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its first process, while that runs.
    pub first: Option<OwnedFd>,
    /// Whether it is frozen.
    pub paused: bool,
    /// Its processes by the host's numbers.
    pub processes: BTreeMap<u32, Process>,
    /// How many the kernel has killed for lack of memory, as far as was told.
    pub oom_kills: u64,
    /// Whether somebody has to be told of the kernel's killing when it happens.
    pub watches_memory: bool,
    /// Connections and requests that wait until it is removed.
    pub deleting: Vec<(u64, u32)>,
}

/// A process that the host knows.
pub struct Process {
    /// Its number in the sandbox.
    pub pid: i32,
    /// How it ended, if it has.
    pub status: Option<ExitStatus>,
    /// Whether the host was told.
    pub told: bool,
    /// Its streams.
    pub streams: Vec<u64>,
    /// Its side of its terminal, so that the terminal stays while it changes hands.
    pub terminal: Option<OwnedFd>,
}

impl Container {
    /// What it does.
    pub fn state(&self) -> State {
        match self.processes.get(&FIRST_PROCESS) {
            None => State::Created,
            Some(Process { status: Some(status), .. }) => State::Stopped(*status),
            Some(_) if self.paused => State::Paused,
            Some(_) => State::Running,
        }
    }

    /// An error for what cannot be done in this state.
    pub fn wrong_state(&self) -> Failure {
        Failure::State { container: self.spec.id.clone(), state: self.state() }
    }

    /// Its first process, if it runs and is not frozen.
    pub fn running(&self) -> Result<BorrowedFd<'_>, Failure> {
        match (&self.first, self.state()) {
            (Some(first), State::Running) => Ok(first.as_fd()),
            _ => Err(self.wrong_state()),
        }
    }

    /// A process of it.
    pub fn process(&self, process: u32) -> Result<&Process, Failure> {
        let missing = || Failure::NoProcess { container: self.spec.id.clone(), process };
        self.processes.get(&process).ok_or_else(missing)
    }

    /// Whether nothing of it runs that the host has started.
    pub fn is_at_rest(&self) -> bool {
        self.processes.values().all(|process| process.status.is_some())
    }

    /// Its root as its processes see it, with all mounts; without processes as it is on its disk.
    pub fn root_directory(&self) -> Result<OwnedFd, Failure> {
        let path = match (&self.first, self.processes.get(&FIRST_PROCESS)) {
            (Some(_), Some(process)) => format!("/proc/{}/root", process.pid),
            _ => self.root.path().to_string_lossy().into_owned(),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).doing(|| "open the container's root".to_owned())
    }

    /// What it has written over its layers, for a child that packs it.
    pub fn changes(&self) -> Result<View, Failure> {
        let missing = || Failure::Invalid("the container writes to no directory of this machine".into());
        Ok(View::Upper(copy(self.root.upper().ok_or_else(missing)?)?))
    }

    /// The same for a child that enters it.
    pub fn view(&self) -> Result<View, Failure> {
        Ok(match &self.first {
            Some(first) => View::Process(copy(first.as_fd())?),
            None => View::Root(self.root.path()),
        })
    }
}

/// Another descriptor for the same.
pub fn copy(fd: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    fd.try_clone_to_owned().doing(|| "copy a descriptor".to_owned())
}

/// The namespaces of a container but that of processes, which is the agent's matter: flags for those that are new.
pub fn new_namespaces(spec: &ContainerSpec) -> u64 {
    let namespaces = [
        (&spec.namespaces.pid, libc::CLONE_NEWPID),
        (&spec.namespaces.uts, libc::CLONE_NEWUTS),
        (&spec.namespaces.ipc, libc::CLONE_NEWIPC),
        (&spec.namespaces.network, libc::CLONE_NEWNET),
    ];
    let new = namespaces.iter().filter(|(namespace, _)| **namespace == Namespace::Own);
    new.fold(libc::CLONE_NEWNS as u64, |flags, (_, flag)| flags | *flag as u64)
}

/// The namespaces that a container takes from others: whose, and which.
pub fn joined_namespaces(spec: &ContainerSpec) -> Vec<(&str, ThreadNameSpaceType)> {
    let namespaces = [
        (&spec.namespaces.uts, ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME),
        (&spec.namespaces.ipc, ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION),
        (&spec.namespaces.network, ThreadNameSpaceType::NETWORK),
        (&spec.namespaces.cgroup, ThreadNameSpaceType::CONTROL_GROUP),
    ];
    let joined = namespaces.into_iter().filter_map(|(namespace, kind)| match namespace {
        Namespace::Container(id) => Some((id.as_str(), kind)),
        Namespace::Own | Namespace::Sandbox => None,
    });
    joined.collect()
}

/// What a child has left as a failure of the whole.
pub fn failure_of(plan: &Plan, program: &str) -> Failure {
    let errno = plan.outcome.errno.raw_os_error();
    let text = |string: Option<&std::ffi::CString>| {
        string.map(|string| string.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let root = plan.root.as_ref();
    let doing = match plan.outcome.step {
        Step::NotFound => return Failure::NotFound { program: program.to_owned() },
        Step::Exec => return Failure::NotExecutable { program: program.to_owned(), errno },
        Step::WorkingDirectory => {
            return Failure::WorkingDirectory { path: text(Some(&plan.cwd)), errno };
        }
        Step::Begin | Step::Done => "prepare the process: it was killed".to_owned(),
        Step::Join => "join namespaces".to_owned(),
        Step::CgroupNamespace => "make a control group namespace".to_owned(),
        Step::Session => "make a session".to_owned(),
        Step::Hostname => "set the host name".to_owned(),
        Step::Loopback => "bring the loopback device up".to_owned(),
        Step::OomScore => "set the process's out-of-memory score".to_owned(),
        Step::Root => "change the root".to_owned(),
        Step::Mount(index) => match root.and_then(|root| root.mounts.get(index)) {
            Some(mount) => match &mount.what {
                MountWhat::New(kind, ..) => {
                    format!("mount {} at {}", text(Some(kind)), text(Some(&mount.target)))
                }
                _ => format!("bind at {}", text(Some(&mount.target))),
            },
            None => "mount".to_owned(),
        },
        Step::Device(index) => {
            format!(
                "make the device {}",
                text(root.and_then(|root| root.devices.get(index)).map(|device| &device.path))
            )
        }
        Step::Link(index) => {
            format!(
                "make the link {}",
                text(root.and_then(|root| root.links.get(index)).map(|(path, _)| path))
            )
        }
        Step::Sysctl(index) => {
            format!("write {}", text(root.and_then(|root| root.sysctls.get(index)).map(|(path, _)| path)))
        }
        Step::Mask(index) => format!("mask {}", text(root.and_then(|root| root.masked.get(index)))),
        Step::ReadOnly(index) => {
            format!("make {} read-only", text(root.and_then(|root| root.read_only.get(index))))
        }
        Step::ReadOnlyRoot => "make the root read-only".to_owned(),
        Step::Terminal => "open a terminal".to_owned(),
        Step::Console => "bind the terminal to /dev/console".to_owned(),
        Step::Stdio => "set up the standard streams".to_owned(),
        Step::Rlimit(index) => match plan.rlimits.get(index) {
            Some(limit) => format!("set resource limit {}", limit.resource),
            None => "set a resource limit".to_owned(),
        },
        Step::Bounding => "reduce the capabilities' bounding set".to_owned(),
        Step::User => format!("become user {} of group {}", plan.uid.as_raw(), plan.gid.as_raw()),
        Step::Capabilities => "set capabilities".to_owned(),
        Step::NoNewPrivileges => "give up new privileges".to_owned(),
        Step::Seccomp => "set the system call filter".to_owned(),
    };
    Failure::System { doing, errno }
}
