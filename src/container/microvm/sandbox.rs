//! A sandbox: the VM that one or more containers are in, with the folder that it shares with the host.
//!
//! The monitor is a process of its own, started by the supervisor of the sandbox's first container. It belongs to nobody
//! afterwards: each container notes that it is in, and whoever takes the last note away ends the VM.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::translate::Shared;
use super::user;
use crate::container::backend::Error;
use crate::container::files::{self, Lock};
use crate::container::network::{Interface, TapPlug};
use crate::guest::client::Client;
use crate::guest::protocol::{self, Configuration};
use crate::program;
use crate::vm::config::{Balloon, SerialConfig, Share, VmConfig, Vsock};
use crate::vm::kernel_directories as directories;

/// File name of the agent's initial RAM disk.
const AGENT: &str = "agent.cpio";
/// Tag of the share.
pub const SHARE_TAG: &str = "sandbox";
/// The guest's vsock address: the same in all VMs, since each has a socket of its own on the host.
const CID: u32 = 3;
/// What the guest is told beside what the monitor adds.
const CMDLINE: &str = "quiet";
/// How long a guest may take to boot, on the slowest kind of KVM and a host on which twenty others boot: a hang, and not a time
/// that is met. A monitor that ends is seen at once.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);
/// How long a call of a running agent may take.
const CALL_PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest has to bring its file systems in order.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of the guest's random pool that the host gives.
const ENTROPY_BYTES: usize = 32;

/// The monitor of a sandbox, as it is noted in `monitor.json`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Monitor {
    pid: u32,
    /// Start of the process in ticks since the host's, which tells it from a later one of that number.
    started: u64,
}

/// A running sandbox.
#[derive(Debug)]
pub struct Sandbox {
    dir: PathBuf,
    monitor: Monitor,
    pidfd: OwnedFd,
}

fn failed<'a, E>(what: &'a str, path: &'a Path) -> impl FnOnce(E) -> Error + 'a
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |error| Error::failed(format!("cannot {what} {path:?}"), error)
}

impl Sandbox {
    /// Starts the VM of a sandbox and waits for its agent. What an earlier one has left in `dir` goes first.
    pub fn start(
        dir: &Path,
        mut config: VmConfig,
        interfaces: &[(Interface, TapPlug)],
        hostname: &str,
    ) -> Result<(Sandbox, Client), Error> {
        files::make_directory(dir).map_err(|error| Error::failed("cannot make the sandbox", error))?;
        let share = dir.join("share");
        fs::create_dir_all(&share).map_err(failed("make", &share))?;
        // Mounts that are made below it later must reach the file server, whatever the propagation of what it is on.
        mount_bind(&share, &share).map_err(failed("set up", &share))?;
        mount_change(&share, MountPropagationFlags::SHARED).map_err(failed("set up", &share))?;
        let agent = directories().into_iter().map(|place| place.join(AGENT)).find(|path| path.is_file());
        config.initrd = Some(agent.ok_or_else(|| Error::Unsupported {
            what: format!("microVMs need the guest's agent, and there is no {AGENT}: build it with `scripts/build-agent`"),
        })?);
        config.cmdline = Some(CMDLINE.into());
        config.rng = true;
        config.balloon =
            Some(Balloon { free_page_reporting: true, deflate_on_oom: true, ..Balloon::default() });
        config.vsock = Some(Vsock { cid: CID, socket: dir.join("vsock.sock") });
        config.shares = vec![Share::new(SHARE_TAG, share)];
        config.serial = SerialConfig::File(dir.join("console.log"));
        let file = dir.join("vm.json");
        files::write_json(&file, &config).map_err(|error| Error::failed("cannot describe the VM", error))?;
        let child = spawn(dir, &file)?;
        let pid = Pid::from_raw(child as i32).ok_or(Error::NotRunning)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed("watch", dir))?;
        let monitor = Monitor { pid: child, started: start_time(child).unwrap_or(0) };
        let note = dir.join("monitor.json");
        files::write_json(&note, &monitor).map_err(|error| Error::failed("cannot note the VM", error))?;
        let sandbox = Sandbox { dir: dir.into(), monitor, pidfd };
        let mut client = sandbox.connect(BOOT_PATIENCE)?;
        client.set_patience(Some(CALL_PATIENCE));
        let mut entropy = vec![0; ENTROPY_BYTES];
        getrandom::fill(&mut entropy).map_err(|error| Error::failed("cannot get random numbers", error))?;
        let configuration = Configuration {
            hostname: Some(hostname.into()),
            clock_ns: Some(crate::container::state::now_ns()),
            entropy,
            interfaces: interfaces.iter().map(interface).collect::<Result<_, _>>()?,
            sysctls: vec![],
        };
        let agent = |error| Error::failed("cannot set the guest up", error);
        client.configure(configuration).map_err(agent)?;
        client.mount_share(SHARE_TAG).map_err(agent)?;
        Ok((sandbox, client))
    }

    /// The sandbox at `dir`, if its VM runs.
    pub fn open(dir: &Path) -> Result<Option<Sandbox>, Error> {
        let note = dir.join("monitor.json");
        let monitor: Monitor = match files::read_json(&note) {
            Ok(monitor) => monitor,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(Error::failed("cannot find the sandbox", error)),
        };
        let Some(pid) = i32::try_from(monitor.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(None) };
        // Asked with the descriptor open: from here on the number belongs to this process.
        if start_time(monitor.pid) != Some(monitor.started) {
            return Ok(None);
        }
        Ok(Some(Sandbox { dir: dir.into(), monitor, pidfd }))
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.monitor.pid
    }

    /// A connection to the agent, with events.
    pub fn connect(&self, patience: Duration) -> Result<Client, Error> {
        let socket = self.dir.join("vsock.sock");
        Client::connect(&socket, Some(self.pidfd.as_fd()), patience, true).map_err(|error| {
            Error::failed(format!("the VM's agent does not answer{}", last_words(&self.dir)), error)
        })
    }

    /// A connection to the agent of a VM that has booted.
    pub fn call(&self) -> Result<Client, Error> {
        self.connect(CALL_PATIENCE)
    }

    /// Notes that a container is in.
    pub fn enter(&self, id: &str) -> Result<(), Error> {
        let users = self.dir.join("users");
        fs::create_dir_all(&users).map_err(failed("make", &users))?;
        let note = users.join(id);
        File::create(&note).map(drop).map_err(failed("make", &note))
    }

    /// Shows paths of the host to the guest.
    pub fn share(&self, shared: &[Shared]) -> Result<(), Error> {
        for Shared { path, name } in shared {
            let target = self.dir.join("share").join(name);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent).map_err(failed("make", parent))?;
            }
            let is_directory = fs::metadata(path).map_err(failed("find", path))?.is_dir();
            let made = match is_directory {
                true => fs::create_dir_all(&target),
                false => File::create(&target).map(drop),
            };
            made.map_err(failed("make", &target))?;
            mount_bind(path, &target).map_err(failed("share", path))?;
        }
        Ok(())
    }

    fn end(&self, client: Option<Client>) {
        let asked = client.is_some_and(|mut client| client.shutdown(1000).is_ok());
        if asked && self.wait(SHUTDOWN_PATIENCE) {
            return;
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait(SHUTDOWN_PATIENCE);
    }

    /// Waits for the monitor's end, and takes its status if it is our child.
    fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        let _ = rustix::process::waitid(
            rustix::process::WaitId::PidFd(self.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        );
        true
    }
}

/// Takes a container's note out of the sandbox at `dir`, and its part of the share; with the last one the VM ends and the
/// directory goes. Nothing happens if there is none. Returns whether the VM has ended.
pub fn leave(dir: &Path, id: &str) -> Result<bool, Error> {
    if !dir.exists() {
        return Ok(true);
    }
    let _lock =
        Lock::wait(&dir.join("lock")).map_err(|error| Error::failed("cannot lock the sandbox", error))?;
    unshare(&dir.join("share").join(id))?;
    let _ = fs::remove_file(dir.join("users").join(id));
    let others = fs::read_dir(dir.join("users")).map(|users| users.count()).unwrap_or(0);
    if others > 0 {
        return Ok(false);
    }
    if let Some(sandbox) = Sandbox::open(dir)? {
        let client = Client::connect(
            &dir.join("vsock.sock"),
            Some(sandbox.pidfd.as_fd()),
            Duration::from_secs(2),
            false,
        );
        sandbox.end(client.ok());
    }
    unshare(&dir.join("share"))?;
    for name in ["monitor.json", "vm.json", "vsock.sock", "api.sock", "console.log", "monitor.log"] {
        let _ = fs::remove_file(dir.join(name));
    }
    let _ = fs::remove_dir_all(dir.join("users"));
    let _ = fs::remove_dir(dir.join("jail"));
    user::give_back(dir);
    Ok(true)
}

/// Removes a folder of the share with all that is mounted in it. What is mounted is not touched.
fn unshare(folder: &Path) -> Result<(), Error> {
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").map_err(failed("read", Path::new("mountinfo")))?;
    let below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .filter(|path| path.starts_with(folder))
        .collect();
    for path in below.iter().rev() {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(failed("unmount", path)(io::Error::from(errno))),
        }
    }
    remove_empty(folder).map_err(failed("remove", folder))
}

/// Removes mount points: empty files and directories. Anything else stays, so that no mistake can remove data.
fn remove_empty(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if !metadata.is_dir() {
        return if metadata.len() == 0 { fs::remove_file(path) } else { Ok(()) };
    }
    for entry in fs::read_dir(path)? {
        remove_empty(&entry?.path())?;
    }
    fs::remove_dir(path)
}

/// A path of `mountinfo`, where blanks and backslashes are octal numbers.
fn unescape(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text + rest
}

fn spawn(dir: &Path, config: &Path) -> Result<u32, Error> {
    let program = program::directory().map_err(failed("find", Path::new("rvmm")))?.join("rvmm");
    let log = dir.join("monitor.log");
    let log =
        OpenOptions::new().append(true).create(true).mode(0o600).open(&log).map_err(failed("make", &log))?;
    let mut command = Command::new(&program);
    command.arg("--config").arg(config).arg("--api-socket").arg(dir.join("api.sock"));
    if let Some(uid) = user::take(dir).map_err(failed("find a user for", dir))? {
        // An empty directory is all that a monitor sees of the host's files.
        let jail = dir.join("jail");
        fs::create_dir_all(&jail).map_err(failed("make", &jail))?;
        let mut description = jail.into_os_string();
        description.push(format!(",uid={uid}"));
        command.arg("--jail").arg(description);
    }
    // A terminal's signals are for the container, and its end must not be the monitor's before the guest's.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    Ok(command.spawn().map_err(failed("start", &program))?.id())
}

/// When a process was started, in ticks since the host was.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may contain anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// What the monitor has said last.
fn last_words(dir: &Path) -> String {
    let log = fs::read_to_string(dir.join("monitor.log")).unwrap_or_default();
    log.lines().last().map_or_else(String::new, |line| format!(" ({line})"))
}

fn interface((interface, _): &(Interface, TapPlug)) -> Result<protocol::Interface, Error> {
    let mac: Vec<u8> = interface
        .mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()
        .map_err(|error| Error::failed(format!("the address {:?} is none", interface.mac), error))?;
    let mac = <[u8; 6]>::try_from(mac)
        .map_err(|_| Error::Unsupported { what: format!("the address {:?} is none", interface.mac) })?;
    let everywhere = |gateway: &IpAddr| match gateway {
        IpAddr::V4(_) => (IpAddr::from([0; 4]), 0),
        IpAddr::V6(_) => (IpAddr::from([0; 16]), 0),
    };
    Ok(protocol::Interface {
        mac,
        found_by: None,
        name: interface.name.clone(),
        mtu: Some(u32::from(interface.mtu)),
        addresses: interface.addresses.iter().map(|net| (net.addr(), net.prefix_len())).collect(),
        routes: interface
            .gateways
            .iter()
            .map(|gateway| protocol::Route {
                destination: everywhere(gateway),
                gateway: Some(*gateway),
                metric: Some(interface.metric),
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mountinfo_are_read() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/plain\x"), r"/plain\x");
    }

    #[test]
    fn only_mount_points_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("share");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/empty"), "").unwrap();
        remove_empty(&root.join("a")).unwrap();
        assert!(!root.join("a").exists());
        fs::create_dir_all(root.join("c")).unwrap();
        fs::write(root.join("c/data"), "kept").unwrap();
        assert!(remove_empty(&root.join("c")).is_err());
        assert_eq!(fs::read_to_string(root.join("c/data")).unwrap(), "kept");
    }

    #[test]
    fn this_process_has_a_start() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }
}
