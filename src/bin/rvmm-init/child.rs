//! The way from a new process to its program, as a list from top to bottom.
//!
//! All of it runs in the agent's memory while the agent waits, so nothing here allocates or frees, and what goes wrong is
//! left in the plan.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use rustix::fs::{self, Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::{Errno, write};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::stdio;
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::inside;
use crate::netlink::NETLINK_ROUTE;
use crate::path::Path;
use crate::plan::{Plan, StdioPlan, Step};
use crate::system;

type Failed = (Step, Errno);

/// What is added to an error to say where it happened.
pub fn at(step: Step) -> impl FnOnce(Errno) -> Failed {
    move |errno| (step, errno)
}

/// The child. It ends, or becomes another program.
pub fn run(plan: &mut Plan) -> ! {
    // Before the last step, so that the agent sees it if that succeeds.
    let Err((step, errno)) = prepare(plan).and_then(|()| exec(plan));
    plan.outcome.step = step;
    plan.outcome.errno = errno;
    system::exit(127)
}

fn prepare(plan: &mut Plan) -> Result<(), Failed> {
    if let Some(value) = &plan.oom_score_adj {
        write_file(c"/proc/self/oom_score_adj", value).map_err(at(Step::OomScore))?;
    }
    for (process, kinds) in &plan.joins {
        thread::move_into_thread_name_spaces(process.as_fd(), *kinds).map_err(at(Step::Join))?;
    }
    if plan.own_cgroup {
        system::unshare_cgroup().map_err(at(Step::CgroupNamespace))?;
    }
    process::setsid().map_err(at(Step::Session))?;
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.to_bytes()).map_err(at(Step::Hostname))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.to_bytes()).map_err(at(Step::Hostname))?;
    }
    if let Some(message) = &plan.loopback {
        loopback_up(message).map_err(at(Step::Loopback))?;
    }
    process::umask(Mode::empty());
    let terminal = match &plan.root {
        Some(root) => {
            let null = inside::enter(root)?;
            inside::furnish(root)?;
            let terminal = open_terminal(&plan.stdio)?;
            if let (Some((_, slave)), StdioPlan::Terminal { console: true, .. }) = (&terminal, &plan.stdio) {
                inside::bind_console(slave).map_err(at(Step::Console))?;
            }
            inside::finish(root, null)?;
            terminal
        }
        None => open_terminal(&plan.stdio)?,
    };
    plan.outcome.terminal = terminal;
    set_stdio(plan)?;
    for (index, limit) in plan.rlimits.iter().enumerate() {
        system::set_rlimit(limit.resource, limit.soft, limit.hard).map_err(at(Step::Rlimit(index)))?;
    }
    become_user(plan)
}

/// Brings up the loopback device of a new network namespace.
fn loopback_up(message: &[u8]) -> Result<(), Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        NETLINK_ROUTE,
    )?;
    rustix::net::sendto(&socket, message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    close(socket);
    Ok(())
}

/// A new terminal of the container, in the descriptor table that this process shares with the agent until then.
fn open_terminal(stdio: &StdioPlan) -> Result<Option<(OwnedFd, OwnedFd)>, Failed> {
    let StdioPlan::Terminal { size, .. } = stdio else { return Ok(None) };
    let open = || -> Result<_, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let master = fs::open(c"/dev/pts/ptmx", flags, Mode::empty())?;
        unlockpt(&master)?;
        let slave =
            ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let (ws_row, ws_col) = *size;
        tcsetwinsize(&slave, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })?;
        Ok((master, slave))
    };
    open().map(Some).map_err(at(Step::Terminal))
}

fn set_stdio(plan: &Plan) -> Result<(), Failed> {
    let set = |files: [(BorrowedFd<'_>, bool); 3]| -> Result<(), Errno> {
        for (file, is_users) in files {
            // `/dev/stdout` is opened anew, by whoever the process is.
            if is_users && !plan.uid.is_root() {
                fs::fchown(file, Some(plan.uid), None)?;
            }
        }
        stdio::dup2_stdin(files[0].0)?;
        stdio::dup2_stdout(files[1].0)?;
        stdio::dup2_stderr(files[2].0)
    };
    match (&plan.stdio, &plan.outcome.terminal) {
        (StdioPlan::Files([stdin, stdout, stderr]), _) => {
            let files =
                [(stdin.0.as_fd(), stdin.1), (stdout.0.as_fd(), stdout.1), (stderr.0.as_fd(), stderr.1)];
            set(files).map_err(at(Step::Stdio))
        }
        (StdioPlan::Terminal { .. }, Some((_, slave))) => {
            // From here on the agent's own descriptors must not change.
            system::unshare_files().map_err(at(Step::Stdio))?;
            process::ioctl_tiocsctty(slave).map_err(at(Step::Terminal))?;
            set([(slave.as_fd(), true), (slave.as_fd(), false), (slave.as_fd(), false)])
                .map_err(at(Step::Stdio))
        }
        (StdioPlan::Terminal { .. }, None) => Err((Step::Terminal, Errno::NOTTY)),
    }
}

/// Takes away what the process is not to have, in the order in which each step is still allowed.
fn become_user(plan: &Plan) -> Result<(), Failed> {
    // A directory that only root can enter, or one that root cannot: on a file system of another owner's.
    let entered = enter_directory(plan);
    if plan.no_new_privileges {
        thread::set_no_new_privs(true).map_err(at(Step::NoNewPrivileges))?;
    } else {
        // Later the right to set a filter is gone.
        set_filter(plan)?;
    }
    for number in 0..=plan.last_capability.min(63) {
        if plan.capabilities.bounding & 1 << number == 0 {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            thread::remove_capability_from_bounding_set(capability).map_err(at(Step::Bounding))?;
        }
    }
    thread::set_keep_capabilities(true).map_err(at(Step::User))?;
    thread::set_thread_groups(&plan.groups).map_err(at(Step::User))?;
    thread::set_thread_res_gid(plan.gid, plan.gid, plan.gid).map_err(at(Step::User))?;
    thread::set_thread_res_uid(plan.uid, plan.uid, plan.uid).map_err(at(Step::User))?;
    thread::set_keep_capabilities(false).map_err(at(Step::User))?;
    entered.or_else(|_| enter_directory(plan)).map_err(at(Step::WorkingDirectory))?;
    let known = u64::MAX >> (63 - plan.last_capability.min(63));
    let set = |mask: u64| CapabilitySet::from_bits_retain(mask & known);
    let sets = CapabilitySets {
        effective: set(plan.capabilities.effective),
        permitted: set(plan.capabilities.permitted),
        inheritable: set(plan.capabilities.inheritable),
    };
    thread::set_capabilities(None, sets).map_err(at(Step::Capabilities))?;
    for number in 0..=plan.last_capability.min(63) {
        if plan.capabilities.ambient & 1 << number != 0 {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            thread::configure_capability_in_ambient_set(capability, true).map_err(at(Step::Capabilities))?;
        }
    }
    process::umask(Mode::from_raw_mode(plan.umask));
    if plan.no_new_privileges {
        set_filter(plan)?;
    }
    Ok(())
}

fn set_filter(plan: &Plan) -> Result<(), Failed> {
    let Some((program, flags)) = &plan.seccomp else { return Ok(()) };
    system::set_seccomp(program, *flags).map_err(at(Step::Seccomp))
}

fn enter_directory(plan: &Plan) -> Result<(), Errno> {
    match process::chdir(plan.cwd.as_c_str()) {
        Err(Errno::NOENT) if plan.make_cwd => {
            inside::make_directories(&mut Path::new(plan.cwd.as_c_str())?)?;
            process::chdir(plan.cwd.as_c_str())?;
        }
        other => other?,
    }
    // A path over a descriptor in /proc could lead out of the container.
    let mut buffer = [0; Path::BYTES_MAX];
    system::current_directory(&mut buffer)?;
    if buffer[0] == b'/' { Ok(()) } else { Err(Errno::NOENT) }
}

/// Becomes the program. What comes back is why not.
fn exec(plan: &mut Plan) -> Result<std::convert::Infallible, Failed> {
    system::close_on_exec().map_err(at(Step::Exec))?;
    // A process 1 does not get what it has no handler for, unless it is blocked; the reaper takes it later.
    let mask = if plan.reaper.is_some() { SigSet::all() } else { SigSet::empty() };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)
        .map_err(|error| (Step::Exec, Errno::from_raw_os_error(error as i32)))?;
    let mut found = None;
    // The agent sees the last value that was written before the program was loaded.
    plan.outcome.step = Step::Done;
    for (index, candidate) in plan.candidates.iter().enumerate() {
        let error = match &plan.reaper {
            None => system::exec(candidate, &plan.arguments, &plan.environment),
            Some((program, arguments)) => match (check_executable(candidate), arguments.get(index)) {
                (Ok(()), Some(arguments)) => system::exec_fd(program.as_fd(), arguments, &plan.environment),
                (Ok(()), None) => Errno::INVAL,
                (Err(error), _) => error,
            },
        };
        match error {
            // It is there, so its interpreter is not.
            Errno::NOENT if check_executable(candidate).is_ok() => return Err((Step::Exec, error)),
            Errno::NOENT | Errno::NOTDIR => {}
            // Further on in PATH there may be one that can be run.
            Errno::ACCESS => found = Some(error),
            error => return Err((Step::Exec, error)),
        }
    }
    match found {
        Some(error) => Err((Step::Exec, error)),
        None => Err((Step::NotFound, Errno::NOENT)),
    }
}

/// What execve(2) would say of a file, as far as that can be known.
fn check_executable(path: &CStr) -> Result<(), Errno> {
    fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?;
    let stat = fs::stat(path)?;
    if fs::FileType::from_raw_mode(stat.st_mode).is_file() { Ok(()) } else { Err(Errno::ACCESS) }
}

/// Writes a file of the kernel's.
pub fn write_file(path: &CStr, value: &[u8]) -> Result<(), Errno> {
    let file = fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?;
    let written = write(&file, value);
    close(file);
    written.map(drop)
}

/// Closes a descriptor now: the table may be the agent's.
pub fn close(file: OwnedFd) {
    drop(file);
}
