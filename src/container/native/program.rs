//! The last steps in the new process: from a container that is set up to the user's program.
//!
//! libcontainer calls this when namespaces, root file system, user and groups are set. What it would do itself for
//! capabilities, the filter, environment and program is done here, because here
//! - the filter is compiled already, by the parent and for the next container too;
//! - `exec` gets a filter as well (libcontainer 0.7 gives it none);
//! - errors keep their kind on the way to the parent.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{FileType, Gid, Mode, Uid, fchown, fstat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_change, mount_remount};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet as Bits, CapabilitySets, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use serde::{Deserialize, Serialize};

use super::sys;
use crate::container::backend::Error;
use crate::container::spec::CapabilitySet;
use crate::error_chain;

/// What a child tells its parent if it does not get to its program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    NotFound { program: String },
    NotExecutable { program: String, reason: String },
    Failed { what: String, why: String },
}

impl Report {
    /// From an error and its causes.
    pub(super) fn failed(what: &str, error: &dyn std::error::Error) -> Report {
        Report::Failed { what: what.into(), why: error_chain(error) }
    }

    /// Sends it. There is nobody to tell if that fails.
    pub(super) fn send(&self, to: &OwnedFd) {
        let line = serde_json::to_vec(self).unwrap_or_default();
        if let Ok(to) = to.try_clone() {
            let _ = std::fs::File::from(to).write_all(&[&line[..], b"\n"].concat());
        }
    }

    /// What the parent makes of it.
    pub(super) fn into_error(self) -> Error {
        match self {
            Report::NotFound { program } => Error::NotFound { program },
            Report::NotExecutable { program, reason } => Error::NotExecutable { program, reason },
            Report::Failed { what, why } => Error::failed(what, why),
        }
    }
}

/// A program and what it runs with.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) args: Vec<CString>,
    pub(super) env: Vec<CString>,
    pub(super) cwd: PathBuf,
    pub(super) uid: u32,
    pub(super) bounding: CapabilitySet,
    pub(super) permitted: CapabilitySet,
    pub(super) effective: CapabilitySet,
    pub(super) inheritable: CapabilitySet,
    pub(super) ambient: CapabilitySet,
    pub(super) no_new_privileges: bool,
    /// Instructions and flags.
    pub(super) filter: Option<(Rc<Vec<u8>>, u32)>,
    pub(super) rlimits: Vec<(Resource, Rlimit, String)>,
    /// Mounts that get their propagation when all of them are there.
    pub(super) propagation: Vec<(PathBuf, MountPropagationFlags)>,
    /// Mounts that become read-only when others have been made in them.
    pub(super) read_only: Vec<PathBuf>,
    /// Whether this process stays as process 1 and the program is its child.
    pub(super) init: bool,
    /// Where errors go; it is closed with the program's exec, and that is what the parent waits for.
    pub(super) report: OwnedFd,
    /// Where the program was found.
    pub(super) found: RefCell<Vec<CString>>,
}

/// The plan in the form that libcontainer takes.
#[derive(Clone)]
pub(super) struct Program(pub(super) Rc<Plan>);

impl Executor for Program {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.0.prepare().map_err(|report| {
            report.send(&self.0.report);
            ExecutorValidationError::ArgValidationError("it has been reported".into())
        })
    }

    /// Nothing: the program gets its environment with its exec.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        self.0.run().send(&self.0.report);
        Err(ExecutorError::Other("it has been reported".into()))
    }
}

impl Plan {
    /// For a process of a `Spec`.
    pub(super) fn new(process: &Process, report: OwnedFd) -> Result<Plan, Error> {
        let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, Error> {
            let one = |text: &String| CString::new(text.as_bytes());
            let all = list.iter().flatten().map(one).collect::<Result<Vec<_>, _>>();
            all.map_err(|source| Error::failed("an argument or a variable has a zero byte in it", source))
        };
        let args = strings(process.args())?;
        if args.is_empty() {
            return Err(Error::failed("cannot run a program", "no command is given"));
        }
        let sets = process.capabilities().as_ref();
        let set = |list: Option<&Option<oci_spec::runtime::Capabilities>>| {
            list.and_then(|list| list.as_ref()).map_or(CapabilitySet::default(), CapabilitySet::of)
        };
        Ok(Plan {
            args,
            env: strings(process.env())?,
            cwd: process.cwd().clone(),
            uid: process.user().uid(),
            bounding: set(sets.map(|sets| sets.bounding())),
            permitted: set(sets.map(|sets| sets.permitted())),
            effective: set(sets.map(|sets| sets.effective())),
            inheritable: set(sets.map(|sets| sets.inheritable())),
            ambient: set(sets.map(|sets| sets.ambient())),
            no_new_privileges: process.no_new_privileges() == Some(true),
            filter: None,
            rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
            propagation: vec![],
            read_only: vec![],
            init: false,
            report,
            found: RefCell::default(),
        })
    }

    /// What is done before the container counts as created.
    fn prepare(&self) -> Result<(), Report> {
        // The new user and group have taken this back.
        die_with_parent(true);
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: rustix::io::Errno| Report::failed(&what, &std::io::Error::from(error))
        };
        for (path, propagation) in &self.propagation {
            mount_change(path, *propagation).map_err(failed("cannot set the propagation of a mount"))?;
        }
        for path in &self.read_only {
            let flags = MountFlags::BIND
                | MountFlags::RDONLY
                | MountFlags::NOSUID
                | MountFlags::NODEV
                | MountFlags::NOEXEC;
            mount_remount(path, flags, "").map_err(failed("cannot make a mount read-only"))?;
        }
        self.own_streams();
        self.enter_directory()?;
        let found = self.find()?;
        *self.found.borrow_mut() = found;
        Ok(())
    }

    /// Gives the streams to the user, so that it can open them again by `/dev/stdout`.
    fn own_streams(&self) {
        for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
            let Ok(stat) = fstat(stream) else { continue };
            let is_terminal = rustix::termios::isatty(stream);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo || is_terminal {
                // The group of terminals stays. Where it cannot be done, the user goes without.
                let _ = fchown(stream, Some(Uid::from_raw(self.uid)), None::<Gid>);
            }
        }
    }

    /// Makes the working directory if need be, and goes there.
    fn enter_directory(&self) -> Result<(), Report> {
        let what = format!("cannot go to the working directory {:?}", self.cwd);
        let failed = |error: std::io::Error| Report::failed(&what, &error);
        let enter = || rustix::process::chdir(&self.cwd);
        if enter() == Err(rustix::io::Errno::NOENT) {
            // A mount may have hidden the one that was made. It is root's, as that is.
            let _ = rustix::process::umask(Mode::from_raw_mode(0o022));
            let mut path = PathBuf::new();
            for component in self.cwd.components() {
                path.push(component);
                if std::fs::create_dir(&path).is_ok() {
                    std::os::unix::fs::chown(&path, Some(0), Some(0)).map_err(failed)?;
                }
            }
        }
        enter().map_err(|error| failed(error.into()))?;
        // A directory of the host that is open here could be entered by its number in /proc/self/fd.
        let inside = rustix::process::getcwd(vec![]).is_ok_and(|path| path.as_bytes().starts_with(b"/"));
        if !inside {
            return Err(Report::Failed { what, why: "it is not in the container".into() });
        }
        Ok(())
    }

    /// Where the program may be, in the order of the search path.
    fn find(&self) -> Result<Vec<CString>, Report> {
        let program = &self.args[0];
        let name = program.to_string_lossy().into_owned();
        if program.as_bytes().is_empty() {
            return Err(Report::NotFound { program: name });
        }
        let candidates = if program.as_bytes().contains(&b'/') {
            vec![program.clone()]
        } else {
            let path = self.env.iter().find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="));
            let directories = path.unwrap_or_default().split(|byte| *byte == b':');
            // An empty part is the working directory.
            let join = |directory: &[u8]| match directory {
                [] => CString::new([b"./", program.as_bytes()].concat()),
                _ => CString::new([directory, b"/", program.as_bytes()].concat()),
            };
            directories.filter_map(|directory| join(directory).ok()).collect()
        };
        let mut not_executable = None;
        let mut found = vec![];
        for candidate in candidates {
            let path = Path::new(std::ffi::OsStr::from_bytes(candidate.as_bytes()));
            match std::fs::metadata(path) {
                Ok(metadata) if metadata.is_file() && is_executable(&metadata) => found.push(candidate),
                Ok(metadata) if metadata.is_dir() => {
                    not_executable.get_or_insert("it is a directory".to_owned());
                }
                Ok(_) => {
                    not_executable.get_or_insert("permission denied".to_owned());
                }
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    not_executable.get_or_insert(error.to_string());
                }
            }
        }
        match (found.is_empty(), not_executable) {
            (false, _) => Ok(found),
            (true, Some(reason)) => Err(Report::NotExecutable { program: name, reason }),
            (true, None) => Err(Report::NotFound { program: name }),
        }
    }

    /// Gives up what the program must not have, and becomes it. What comes back is why not.
    fn run(&self) -> Report {
        if let Err(report) = self.restrict() {
            return report;
        }
        if !self.init {
            return self.become_program();
        }
        // Whoever waits for the program's start must not wait for this process to end.
        match sys::fork(|| {
            let _ = nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0));
            block(&[Signal::SIGTTOU]);
            sys::set_foreground(std::process::id() as i32);
            sys::default_signals();
            self.become_program().send(&self.report);
            1
        }) {
            Ok(child) => reap(child),
            Err(error) => Report::failed("cannot start the program under an init", &error),
        }
    }

    fn restrict(&self) -> Result<(), Report> {
        die_with_parent(false);
        let failed = |what: &'static str| {
            move |error: rustix::io::Errno| Report::failed(what, &std::io::Error::from(error))
        };
        for (resource, limit, name) in &self.rlimits {
            setrlimit(*resource, *limit).map_err(|error| {
                let shown = |value: Option<u64>| value.map_or("unlimited".to_owned(), |value| value.to_string());
                let hard = rustix::process::getrlimit(*resource).maximum;
                let what = format!(
                    "cannot set the resource limit {name} to {}:{} (the hard limit here is {}, and it takes the \
                     capability SYS_RESOURCE to raise it)",
                    shown(limit.current),
                    shown(limit.maximum),
                    shown(hard)
                );
                Report::failed(&what, &std::io::Error::from(error))
            })?;
        }
        let capabilities = "cannot set the capabilities";
        for number in 0..CapabilitySet::all().0.count_ones() {
            let bit = Bits::from_bits_retain(1 << number);
            if self.bounding.0 & (1 << number) == 0 {
                match remove_capability_from_bounding_set(bit) {
                    // One that this kernel does not know.
                    Err(rustix::io::Errno::INVAL) => break,
                    result => result.map_err(failed(capabilities))?,
                }
            }
        }
        if self.no_new_privileges {
            set_no_new_privs(true).map_err(failed("cannot give up new privileges"))?;
        }
        // Without "no new privileges" it takes SYS_ADMIN to load a filter. It is gone with the exec: that computes the
        // sets anew from those that are inherited, bounding and ambient.
        let keep =
            if self.filter.is_some() && !self.no_new_privileges { Bits::SYS_ADMIN } else { Bits::empty() };
        clear_ambient_capability_set().or_else(ignore_invalid).map_err(failed(capabilities))?;
        let sets = |keep: Bits| CapabilitySets {
            effective: Bits::from_bits_retain(self.effective.0) | keep,
            permitted: Bits::from_bits_retain(self.permitted.0) | keep,
            inheritable: Bits::from_bits_retain(self.inheritable.0),
        };
        set_capabilities(None, sets(keep)).map_err(failed(capabilities))?;
        for number in
            (0..CapabilitySet::all().0.count_ones()).filter(|number| self.ambient.0 & (1 << number) != 0)
        {
            let bit = Bits::from_bits_retain(1 << number);
            configure_capability_in_ambient_set(bit, true).map_err(failed(capabilities))?;
        }
        if let Some((program, flags)) = &self.filter {
            sys::load_filter(program, *flags)
                .map_err(|error| Report::failed("cannot load the filter", &error))?;
            if self.init && !keep.is_empty() {
                // This process stays and so must give it up itself.
                set_capabilities(None, sets(Bits::empty())).map_err(failed(capabilities))?;
            }
        }
        Ok(())
    }

    fn become_program(&self) -> Report {
        let mut denied = None;
        let mut last = Errno::ENOENT;
        for program in self.found.borrow().iter() {
            let Err(error) =
                nix::unistd::execve::<&CStr, &CStr>(program, &refs(&self.args), &refs(&self.env));
            match error {
                Errno::ENOENT | Errno::ENOTDIR => last = error,
                Errno::EACCES => denied = Some(error),
                _ => {
                    last = error;
                    denied = None;
                    break;
                }
            }
        }
        let program = self.args[0].to_string_lossy().into_owned();
        let error = denied.unwrap_or(last);
        if error == Errno::ENOENT {
            // The file is there, so what it names as its interpreter is not.
            let reason = "its interpreter is not there".to_owned();
            return Report::NotExecutable { program, reason };
        }
        Report::NotExecutable { program, reason: std::io::Error::from(error).to_string() }
    }
}

/// A process that waits for its start is of no use without the parent, and keeps its locks.
pub(super) fn die_with_parent(die: bool) {
    let signal = die.then_some(rustix::process::Signal::KILL);
    let _ = rustix::process::set_parent_process_death_signal(signal);
}

fn refs(list: &[CString]) -> Vec<&CStr> {
    list.iter().map(CString::as_c_str).collect()
}

fn ignore_invalid(error: rustix::io::Errno) -> rustix::io::Result<()> {
    // A kernel without ambient sets.
    if error == rustix::io::Errno::INVAL { Ok(()) } else { Err(error) }
}

fn is_executable(metadata: &std::fs::Metadata) -> bool {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o111 != 0
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

fn rlimit(limit: &oci_spec::runtime::PosixRlimit) -> (Resource, Rlimit, String) {
    use oci_spec::runtime::PosixRlimitType as Kind;
    let resource = match limit.typ() {
        Kind::RlimitAs => Resource::As,
        Kind::RlimitCore => Resource::Core,
        Kind::RlimitCpu => Resource::Cpu,
        Kind::RlimitData => Resource::Data,
        Kind::RlimitFsize => Resource::Fsize,
        Kind::RlimitLocks => Resource::Locks,
        Kind::RlimitMemlock => Resource::Memlock,
        Kind::RlimitMsgqueue => Resource::Msgqueue,
        Kind::RlimitNice => Resource::Nice,
        Kind::RlimitNofile => Resource::Nofile,
        Kind::RlimitNproc => Resource::Nproc,
        Kind::RlimitRss => Resource::Rss,
        Kind::RlimitRtprio => Resource::Rtprio,
        Kind::RlimitRttime => Resource::Rttime,
        Kind::RlimitSigpending => Resource::Sigpending,
        Kind::RlimitStack => Resource::Stack,
    };
    let value = |value: u64| (value != u64::MAX).then_some(value);
    let name = limit.typ().to_string().trim_start_matches("RLIMIT_").to_owned();
    (resource, Rlimit { current: value(limit.soft()), maximum: value(limit.hard()) }, name)
}

fn block(signals: &[Signal]) -> SigSet {
    let set: SigSet = signals.iter().copied().collect();
    let _ = set.thread_block();
    set
}

/// Process 1 of a container with `--init`: hands signals on to the program, reaps, and ends as the program does.
fn reap(child: i32) -> ! {
    // Of what the parent has open nothing must stay open here: its locks would be held by this process, too.
    sys::close_all_but_streams();
    let _ = SigSet::all().thread_block();
    let child = Pid::from_raw(child);
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == child => sys::exit(code),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => sys::exit(128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => {}
            }
        }
        match sys::wait_signal() {
            libc::SIGCHLD => {}
            signal => sys::send_signal(child.as_raw(), signal),
        }
    }
}
