//! A sandbox: the VM that one or more containers are in, with the folder that it shares with the host.
//!
//! The monitor is a process of its own, started by the supervisor of the sandbox's first container. It belongs to nobody
//! afterwards: each container notes that it is in, and whoever takes the last note away ends the VM.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};

use super::machine::{Machine, SHARE_TAG, slot_mac};
use super::monitor::{self, API, Monitor, failed};
use super::template::{Template, Templates};
use super::translate::Shared;
use super::user;
use crate::container::backend::Error;
use crate::container::config::TemplateUse;
use crate::container::files::{self, Lock};
use crate::container::network::{Interface, TapPlug};
use crate::guest::client::Client;
use crate::guest::protocol::{self, Configuration};

/// How long a guest may take to boot, on the slowest kind of KVM and a host on which twenty others boot: a hang, and not a time
/// that is met. A monitor that ends is seen at once.
pub(super) const BOOT_PATIENCE: Duration = Duration::from_secs(600);
/// How long one may take that was restored.
const RESTORE_PATIENCE: Duration = Duration::from_secs(120);
/// How long a call of a running agent may take.
pub(super) const CALL_PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest has to bring its file systems in order.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);
/// File that says how the VM was started, and the one with its disk's parts.
const STARTED: &str = "started.json";
const LAYERS: &str = "layers.json";
/// Bytes of the guest's random pool that the host gives.
const ENTROPY_BYTES: usize = 64;

/// A running sandbox.
#[derive(Debug)]
pub struct Sandbox {
    dir: PathBuf,
    monitor: Monitor,
}

/// How the VM of a sandbox is started.
#[derive(Debug)]
pub struct Start<'a> {
    /// The sandbox's directory.
    pub dir: &'a Path,
    /// The VM.
    pub machine: &'a Machine,
    /// The devices of its network.
    pub interfaces: &'a [(Interface, TapPlug)],
    /// Its name.
    pub hostname: &'a str,
    /// Whether it goes on from a template.
    pub template: TemplateUse,
    /// Where templates are.
    pub templates: &'a Templates,
}

/// How a VM was started, as it is noted beside it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Started {
    /// Name of the template that it goes on from; `None` if its guest has booted.
    pub template: Option<String>,
    /// Microseconds from the start of the monitor to the agent's first answer.
    pub answer_us: u64,
    /// The same until the guest was set up for its first container.
    pub ready_us: u64,
}

impl Sandbox {
    /// Starts the VM of a sandbox and waits for its agent. What an earlier one has left in `dir` goes first.
    pub fn start(start: &Start<'_>) -> Result<(Sandbox, Client), Error> {
        let dir = start.dir;
        files::make_directory(dir).map_err(|error| Error::failed("cannot make the sandbox", error))?;
        let share = dir.join("share");
        fs::create_dir_all(&share).map_err(failed("make", &share))?;
        // Mounts that are made below it later must reach the file server, whatever the propagation of what it is on.
        mount_bind(&share, &share).map_err(failed("set up", &share))?;
        mount_change(&share, MountPropagationFlags::SHARED).map_err(failed("set up", &share))?;
        let (monitor, client, started) = match start.template {
            TemplateUse::Never => boot(start)?,
            TemplateUse::Require => restore(start, true)?,
            TemplateUse::Auto => match restore(start, false) {
                Ok(restored) => restored,
                Err(error) => {
                    tracing::warn!(
                        "the guest boots, since no template can be used: {}",
                        crate::error_chain(&error)
                    );
                    boot(start)?
                }
            },
        };
        files::write_json(&dir.join(STARTED), &started)
            .map_err(|error| Error::failed("cannot note how the VM was started", error))?;
        Ok((Sandbox { dir: dir.into(), monitor }, client))
    }

    /// The sandbox at `dir`, if its VM runs.
    pub fn open(dir: &Path) -> Result<Option<Sandbox>, Error> {
        Ok(Monitor::open(dir)?.map(|monitor| Sandbox { dir: dir.into(), monitor }))
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    /// A connection to the agent of a VM that has booted, with events.
    pub fn call(&self) -> Result<Client, Error> {
        self.monitor.connect(CALL_PATIENCE, true)
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
        if !asked || !self.monitor.wait(SHUTDOWN_PATIENCE) {
            self.monitor.kill(SHUTDOWN_PATIENCE);
        }
    }
}

/// Boots the VM.
fn boot(start: &Start<'_>) -> Result<(Monitor, Client, Started), Error> {
    let dir = start.dir;
    let file = dir.join("vm.json");
    let config = start.machine.config(dir)?;
    files::write_json(&file, &config).map_err(|error| Error::failed("cannot describe the VM", error))?;
    let begun = Instant::now();
    let monitor = spawn(dir, vec!["--config".into(), file.into()])?;
    let mut client = monitor.connect(BOOT_PATIENCE, true)?;
    let answer_us = micros(begun);
    set_up(start, &mut client, false)?;
    Ok((monitor, client, Started { template: None, answer_us, ready_us: micros(begun) }))
}

/// Has the VM go on from a template. When that fails nothing is left of it, and neither is the template.
fn restore(start: &Start<'_>, insist: bool) -> Result<(Monitor, Client, Started), Error> {
    let templates = start.templates;
    if start.dir.as_os_str().as_encoded_bytes().contains(&b',') {
        return Err(Error::Unsupported { what: format!("a restore cannot be told of {:?}", start.dir) });
    }
    let template = templates
        .get(&start.machine.class, insist)
        .map_err(|error| Error::failed("cannot have a template of the microVM", error))?;
    let restored = try_restore(start, &template);
    match &restored {
        Ok(_) => templates.prove(&template),
        Err(error) => {
            let why = crate::error_chain(error);
            if let Ok(Some(monitor)) = Monitor::open(start.dir) {
                monitor.kill(SHUTDOWN_PATIENCE);
            }
            monitor::clean(start.dir);
            if let Err(error) = templates.discard(&template, &why) {
                tracing::warn!("{}", crate::error_chain(&error));
            }
        }
    }
    restored
}

fn try_restore(start: &Start<'_>, template: &Template) -> Result<(Monitor, Client, Started), Error> {
    let begun = Instant::now();
    let monitor = spawn(start.dir, start.machine.restore(&template.path, start.dir)?)?;
    let mut client = monitor.connect_restored(RESTORE_PATIENCE, true)?;
    let answer_us = micros(begun);
    set_up(start, &mut client, true)?;
    Ok((monitor, client, Started { template: Some(template.name()), answer_us, ready_us: micros(begun) }))
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Tells a guest who it is. Until then one that was restored is what all others of its template are.
fn set_up(start: &Start<'_>, client: &mut Client, restored: bool) -> Result<(), Error> {
    client.set_patience(Some(CALL_PATIENCE));
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy).map_err(|error| Error::failed("cannot get random numbers", error))?;
    let interface = |(index, (interface, _)): (usize, &(Interface, TapPlug))| {
        interface_for_guest(interface, restored.then(|| slot_mac(index)))
    };
    let configuration = Configuration {
        hostname: Some(start.hostname.into()),
        clock_ns: Some(crate::container::state::now_ns()),
        entropy,
        interfaces: start.interfaces.iter().enumerate().map(interface).collect::<Result<_, _>>()?,
        sysctls: vec![],
    };
    let agent = |error| Error::failed("cannot set the guest up", error);
    client.configure(configuration).map_err(agent)?;
    client.mount_share(SHARE_TAG).map_err(agent)
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
        let client = sandbox.monitor.connect(Duration::from_secs(2), false);
        sandbox.end(client.ok());
    }
    unshare(&dir.join("share"))?;
    monitor::clean(dir);
    for name in [STARTED, LAYERS] {
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

/// Starts a monitor in a jail, where there can be one.
fn spawn(dir: &Path, mut arguments: Vec<OsString>) -> Result<Monitor, Error> {
    arguments.extend(["--api-socket".into(), dir.join(API).into()]);
    if let Some(uid) = user::take(dir).map_err(failed("find a user for", dir))? {
        // An empty directory is all that a monitor sees of the host's files.
        let jail = dir.join("jail");
        fs::create_dir_all(&jail).map_err(failed("make", &jail))?;
        let mut description = jail.into_os_string();
        description.push(format!(",uid={uid}"));
        arguments.extend(["--jail".into(), description]);
    }
    Monitor::start(dir, &arguments)
}

fn interface_for_guest(
    interface: &Interface,
    found_by: Option<[u8; 6]>,
) -> Result<protocol::Interface, Error> {
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
        found_by,
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
}
