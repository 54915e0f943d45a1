//! What each request does.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use rvmm::guest::protocol::{
    CONTAINERS_MAX, ContainerInfo, FIRST_PROCESS, Failure, PROCESSES_MAX, Reply, Request, State, Target,
    VERSION,
};
use rvmm::guest::spec::{ContainerSpec, Namespace, ProcessSpec, Stdio, WindowSize};

use crate::agent::{Agent, Asked};
use crate::archive::Direction;
use crate::cgroup::Cgroup;
use crate::container::{Container, Process, copy, failure_of, joined_namespaces, new_namespaces};
use crate::failure::Doing;
use crate::plan::{Plan, StdioPlan, Step};
use crate::prepare::{self, Ends, check_id};
use crate::root::{RootMount, c_string};
use crate::stream::{Kind, Stream};
use crate::{child, netlink, observe, sandbox, system, users};

/// Archives that wait for their streams at most.
const ASKED_MAX: usize = 64;

/// The longest time that processes get to end.
const STOP_MS_MAX: u32 = 10 * 60 * 1000;

impl Agent {
    /// Carries a request out. No reply means that it comes later.
    pub fn carry_out(&mut self, by: (u64, u32), request: Request) -> Result<Option<Reply>, Failure> {
        let greeted = self.controls.get(&by.0).is_some_and(|control| control.greeted);
        let done = match request {
            Request::Hello { version, events } => return self.hello(by, version, events),
            _ if !greeted => return Err(Failure::Invalid("the first request is no greeting".into())),
            Request::Configure(configuration) => sandbox::configure(&configuration),
            Request::SetClock(ns) => sandbox::set_clock(ns),
            Request::MountShare { tag } => self.share.mount(&tag),
            Request::CreateContainer(spec) => self.create(*spec),
            Request::Start { container } => return self.start(&container).map(Reply::Started).map(Some),
            Request::Exec { container, process, spec } => {
                return self.exec(&container, process, &spec).map(Reply::Started).map(Some);
            }
            Request::Signal { container, target, signal } => self.signal(&container, target, signal),
            Request::Resize { container, process, size } => self.resize(&container, process, size),
            Request::Pause { container } => self.freeze(&container, true),
            Request::Resume { container } => self.freeze(&container, false),
            Request::Update { container, limits } => self.update(&container, &limits),
            Request::Stats { container } => {
                // What counts disks is off until somebody wants to know.
                self.container(&container)?;
                self.controllers.turn_on(["io"])?;
                let stats = observe::stats(&mut self.container_mut(&container)?.cgroup);
                return Ok(Some(Reply::Stats(Box::new(stats))));
            }
            Request::Processes { container } => {
                return Ok(Some(Reply::Processes(observe::processes(&self.container(&container)?.cgroup))));
            }
            Request::Containers => {
                let info = |(id, container): (&String, &Container)| ContainerInfo {
                    id: id.clone(),
                    state: container.state(),
                };
                return Ok(Some(Reply::Containers(self.containers.iter().map(info).collect())));
            }
            Request::DeleteProcess { container, process } => self.delete_process(&container, process),
            Request::Delete { container, force } => {
                return self.delete(by, &container, force).map(|()| None);
            }
            Request::StatPath { container, path, follow } => {
                let root = self.container(&container)?.root_directory()?;
                return observe::stat_path(root, &path, follow).map(Reply::File).map(Some);
            }
            Request::ReadArchive { container, path, stream } => {
                return self.ask(by, container, path, stream, Direction::Read).map(|()| None);
            }
            Request::WriteArchive { container, path, stream } => {
                return self.ask(by, container, path, stream, Direction::Write).map(|()| None);
            }
            Request::ReadChanges { container, stream } => {
                return self.ask(by, container, "/".into(), stream, Direction::Changes).map(|()| None);
            }
            Request::Settle => {
                self.disks.scan();
                Ok(())
            }
            Request::Sync => {
                rustix::fs::sync();
                Ok(())
            }
            Request::Shutdown { timeout_ms } => {
                self.begin_stop(Duration::from_millis(timeout_ms.min(STOP_MS_MAX).into()));
                Ok(())
            }
        };
        done.map(|()| Some(Reply::Done))
    }

    fn hello(&mut self, by: (u64, u32), version: u32, events: bool) -> Result<Option<Reply>, Failure> {
        if version != VERSION {
            return Err(Failure::Version { host: version, agent: VERSION });
        }
        let info = sandbox::info(&self.controllers);
        if let Some(control) = self.controls.get_mut(&by.0) {
            control.greeted = true;
        }
        self.reply(by, Ok(Reply::Hello(info)));
        if events {
            self.subscribe(by.0);
        }
        Ok(None)
    }

    fn create(&mut self, spec: ContainerSpec) -> Result<(), Failure> {
        check_id(&spec.id)?;
        if self.containers.contains_key(&spec.id) {
            return Err(Failure::Exists(spec.id));
        }
        if self.containers.len() >= CONTAINERS_MAX {
            return Err(Failure::TooMany("containers".into()));
        }
        let root = RootMount::new(&spec, &mut self.disks, &self.share)?;
        let cgroup = Cgroup::create(&spec.id, &spec.limits, &mut self.controllers, &mut self.disks)?;
        if !spec.device_filter.is_empty() {
            let attached = system::attach_device_filter(cgroup.directory(), &spec.device_filter);
            if let Err(error) = attached {
                let _ = cgroup.remove();
                return Err(error).doing(|| "set the filter for devices".to_owned());
            }
        }
        let container = Container {
            root,
            cgroup,
            first: None,
            paused: false,
            processes: BTreeMap::new(),
            oom_kills: 0,
            watches_memory: spec.limits.memory_bytes.is_some(),
            deleting: Vec::new(),
            spec,
        };
        self.containers.insert(container.spec.id.clone(), container);
        Ok(())
    }

    fn start(&mut self, id: &str) -> Result<u32, Failure> {
        let container = self.container(id)?;
        if container.state() != State::Created || !container.deleting.is_empty() {
            return Err(container.wrong_state());
        }
        let spec = &container.spec;
        let identity = users::resolve(&spec.process.user, container.root_directory()?.as_fd())?;
        let (mut plan, ends) = prepare::process(&spec.process, identity, self.last_capability)?;
        for (of, kind) in joined_namespaces(spec) {
            plan.joins.push((copy(self.container(of)?.running()?)?, kind));
        }
        plan.own_cgroup = spec.namespaces.cgroup == Namespace::Own;
        if spec.namespaces.uts == Namespace::Own {
            plan.hostname = spec.hostname.as_deref().map(c_string).transpose()?;
            plan.domainname = spec.domainname.as_deref().map(c_string).transpose()?;
        }
        if spec.namespaces.network == Namespace::Own {
            plan.loopback = Some(netlink::loopback_up());
        }
        plan.make_cwd = true;
        if spec.reaper {
            prepare::with_reaper(&mut plan, &spec.process)?;
        }
        if let StdioPlan::Terminal { console, .. } = &mut plan.stdio {
            *console = true;
        }
        let pid_namespace = match &spec.namespaces.pid {
            Namespace::Container(of) => Some(copy(self.container(of)?.running()?)?),
            Namespace::Own | Namespace::Sandbox => None,
        };
        let (flags, root) = (new_namespaces(spec), container.root.path());
        // Borrowed apart from the container, which is looked up again.
        let (disks, share) = (&mut self.disks, &self.share);
        let container = self.containers.get(id).ok_or_else(|| Failure::NoContainer(id.to_owned()))?;
        plan.root = Some(prepare::file_system(&container.spec, &root, disks, share)?);
        self.spawn(id, FIRST_PROCESS, None, plan, ends, flags, pid_namespace)
    }

    fn exec(&mut self, id: &str, process: u32, spec: &ProcessSpec) -> Result<u32, Failure> {
        let container = self.container(id)?;
        let first = container.running()?;
        if process == FIRST_PROCESS || container.processes.contains_key(&process) {
            return Err(Failure::Exists(format!("{id} with process {process}")));
        }
        if container.processes.len() > PROCESSES_MAX {
            return Err(Failure::TooMany(format!("processes of container {id}")));
        }
        let first = copy(first)?;
        let identity = users::resolve(&spec.user, container.root_directory()?.as_fd())?;
        let (mut plan, ends) = prepare::process(spec, identity, self.last_capability)?;
        let namespaces = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::NETWORK
            | ThreadNameSpaceType::CONTROL_GROUP;
        plan.joins.push((copy(first.as_fd())?, namespaces));
        self.spawn(id, process, Some(&spec.stdio), plan, ends, 0, Some(first))
    }

    /// Starts what a plan says, as a process of a container. `stdio` is that of the container's first process if it is
    /// not said.
    #[expect(clippy::too_many_arguments)]
    fn spawn(
        &mut self,
        id: &str,
        process: u32,
        stdio: Option<&Stdio>,
        mut plan: Plan,
        ends: Ends,
        mut flags: u64,
        pid_namespace: Option<std::os::fd::OwnedFd>,
    ) -> Result<u32, Failure> {
        let container = self.containers.get_mut(id).ok_or_else(|| Failure::NoContainer(id.to_owned()))?;
        let spec = container.spec.process.clone();
        let stdio = stdio.unwrap_or(&spec.stdio);
        let streams = stdio.streams();
        for (index, stream) in streams.iter().enumerate() {
            if self.streams.contains_key(stream)
                || self.asked.contains_key(stream)
                || streams[..index].contains(stream)
            {
                return Err(Failure::Exists(format!("with stream {stream}")));
            }
        }
        if matches!(plan.stdio, StdioPlan::Terminal { .. }) {
            // The terminal is opened in the container's file system, and its descriptors are needed here.
            flags |= libc::CLONE_FILES as u64;
        }
        let cgroup = Some(container.cgroup.directory().as_fd());
        let doing = || "make a process".to_owned();
        if let Some(of) = &pid_namespace {
            move_into_thread_name_spaces(of.as_fd(), ThreadNameSpaceType::PROCESS_ID)
                .doing(|| "enter the namespace of processes".to_owned())?;
        }
        let spawned = system::spawn(flags, cgroup, &mut self.stack, &mut plan, child::run);
        if pid_namespace.is_some()
            && move_into_thread_name_spaces(self.own.as_fd(), ThreadNameSpaceType::PROCESS_ID).is_err()
        {
            // All that is started from here on would be in a container. It cannot fail, and must not go on.
            std::process::abort();
        }
        let (pid, pidfd) = spawned.doing(doing)?;
        if plan.outcome.step != Step::Done {
            let program = plan.arguments.first().to_string_lossy().into_owned();
            return Err(failure_of(&plan, &program));
        }
        let owner = || (id.to_owned(), process);
        let mut add = |stream: Option<u64>, end: Option<std::os::fd::OwnedFd>, kind| {
            if let (Some(stream), Some(end)) = (stream, end) {
                self.streams.insert(stream, Stream::new(kind, owner(), end));
            }
        };
        let mut terminal = None;
        match *stdio {
            Stdio::Streams { stdin, stdout, stderr } => {
                add(stdin, ends.stdin, Kind::Input);
                add(stdout, ends.stdout, Kind::Output);
                add(stderr, ends.stderr, Kind::Output);
            }
            Stdio::Terminal { stream, .. } => {
                if let Some((ours, its)) = plan.outcome.terminal.take() {
                    add(Some(stream), Some(ours), Kind::Terminal);
                    terminal = Some(its);
                }
            }
        }
        if process == FIRST_PROCESS {
            container.first = Some(pidfd);
        }
        container.processes.insert(process, Process { pid, status: None, told: false, streams, terminal });
        Ok(pid.unsigned_abs())
    }

    fn signal(&mut self, id: &str, target: Target, signal: i32) -> Result<(), Failure> {
        let container = self.container(id)?;
        if !(0..=64).contains(&signal) {
            return Err(Failure::Invalid(format!("{signal} is no signal")));
        }
        match target {
            Target::All if signal == libc::SIGKILL => container.cgroup.kill(),
            Target::All => {
                for pid in container.cgroup.processes() {
                    // One that has ended meanwhile needs no signal.
                    let _ = system::kill(pid, signal);
                }
            }
            Target::Process(number) => {
                let process = container.process(number)?;
                if process.status.is_some() {
                    return Err(container.wrong_state());
                }
                system::kill(process.pid, signal).doing(|| format!("send signal {signal}"))?;
            }
        }
        Ok(())
    }

    fn resize(&mut self, id: &str, process: u32, size: WindowSize) -> Result<(), Failure> {
        let process = self.container(id)?.process(process)?;
        let mut streams = process.streams.iter().filter_map(|id| self.streams.get(id));
        let terminal = streams.find_map(Stream::terminal);
        let terminal = terminal.ok_or_else(|| Failure::Invalid("the process has no terminal".into()))?;
        let size =
            rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size).doing(|| "change the terminal's size".to_owned())
    }

    fn freeze(&mut self, id: &str, freeze: bool) -> Result<(), Failure> {
        let container = self.container_mut(id)?;
        match container.state() {
            State::Running if freeze => {}
            State::Paused if !freeze => {}
            _ => return Err(container.wrong_state()),
        }
        container.cgroup.freeze(freeze)?;
        container.paused = freeze;
        Ok(())
    }

    fn update(&mut self, id: &str, limits: &rvmm::guest::spec::Limits) -> Result<(), Failure> {
        let container = self.containers.get_mut(id).ok_or_else(|| Failure::NoContainer(id.to_owned()))?;
        container.cgroup.update(limits, &mut self.controllers, &mut self.disks)?;
        container.watches_memory |= limits.memory_bytes.is_some();
        Ok(())
    }

    fn delete_process(&mut self, id: &str, process: u32) -> Result<(), Failure> {
        let container = self.container_mut(id)?;
        if process == FIRST_PROCESS {
            return Err(Failure::Invalid("the first process goes with its container".into()));
        }
        if container.process(process)?.status.is_none() {
            return Err(container.wrong_state());
        }
        container.processes.remove(&process);
        self.forget_streams(id, Some(process));
        Ok(())
    }

    /// Begins to remove a container; the answer comes when nothing of it is left.
    fn delete(&mut self, by: (u64, u32), id: &str, force: bool) -> Result<(), Failure> {
        let container = self.container_mut(id)?;
        if matches!(container.state(), State::Running | State::Paused) && !force {
            return Err(container.wrong_state());
        }
        container.deleting.push(by);
        // What has a namespace of its own has ended with its first process.
        if !container.is_at_rest() || container.spec.namespaces.pid != Namespace::Own {
            container.cgroup.kill();
        }
        // Nobody is to hold it up by not reading.
        self.forget_streams(id, None);
        Ok(())
    }

    fn ask(
        &mut self,
        by: (u64, u32),
        container: String,
        path: String,
        stream: u64,
        direction: Direction,
    ) -> Result<(), Failure> {
        self.container(&container)?;
        if !path.starts_with('/') {
            return Err(Failure::Invalid(format!("the path {path:?} is not absolute")));
        }
        if self.asked.len() >= ASKED_MAX {
            return Err(Failure::TooMany("archives at once".into()));
        }
        if self.streams.contains_key(&stream) || self.asked.contains_key(&stream) {
            return Err(Failure::Exists(format!("with stream {stream}")));
        }
        self.asked.insert(stream, Asked { by, container, direction, path });
        Ok(())
    }
}
