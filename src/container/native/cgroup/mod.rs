//! Control groups, of both versions and mixed, as the host has them.
//!
//! Where they are is read from the mounts, and nothing is assumed about which controller is where: each one that there is
//! belongs to a hierarchy of version 1 or to that of version 2. A container's group has the same path in all of them.

mod devices;
mod limits;
mod stats;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::container::backend::Error;

/// How long processes may take to end after they were killed: those in the kernel's hands may take some.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// First wait for them; it doubles.
const END_WAIT: Duration = Duration::from_micros(200);
/// Depth and number of groups that a container may have made, and that are cleared away.
const GROUPS_MAX: usize = 10_000;

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// Controllers of version 1, with `name=…` for one without; empty for version 2.
    controllers: Vec<String>,
}

/// All hierarchies of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hierarchies {
    v1: Vec<Hierarchy>,
    v2: Option<Hierarchy>,
}

/// Version 1 or 2 of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Hierarchies {
    /// Those that are mounted.
    pub(super) fn find() -> Result<Hierarchies, Error> {
        let mounts = fs::read_to_string("/proc/self/mountinfo");
        Ok(Hierarchies::parse(
            &mounts.map_err(|source| Error::failed("cannot read the host's mounts", source))?,
        ))
    }

    /// A group's directory in the version 2 tree.
    pub(super) fn v2_directory(&self, path: &Path) -> Option<PathBuf> {
        let mount = &self.v2.as_ref()?.mount;
        Some(mount.join(path.strip_prefix("/").unwrap_or(path)))
    }

    /// From `/proc/self/mountinfo` (proc_pid_mountinfo(5)). One that is mounted twice counts once, where it is first.
    fn parse(mounts: &str) -> Hierarchies {
        let mut found = Hierarchies::default();
        let mut seen = BTreeSet::new();
        for line in mounts.lines() {
            let Some((first, second)) = line.split_once(" - ") else { continue };
            let (Some(mount), Some(device)) = (first.split(' ').nth(4), first.split(' ').nth(2)) else {
                continue;
            };
            let mut second = second.split(' ');
            let (kind, options) = (second.next().unwrap_or_default(), second.nth(1).unwrap_or_default());
            if !matches!(kind, "cgroup" | "cgroup2") || !seen.insert(device.to_owned()) {
                continue;
            }
            let mount = PathBuf::from(mount.replace("\\040", " "));
            if kind == "cgroup2" {
                found.v2.get_or_insert(Hierarchy { mount, controllers: vec![] });
            } else {
                // Controllers stand among the options of the file system, `xattr` and others too.
                let no_controller = ["rw", "ro", "xattr", "noprefix", "clone_children", "release_agent"];
                let options = options.split(',').filter(|option| !no_controller.contains(option));
                let controllers = options.filter(|option| !option.starts_with("release_agent="));
                found.v1.push(Hierarchy { mount, controllers: controllers.map(str::to_owned).collect() });
            }
        }
        found
    }
}

/// A container's group in one hierarchy.
#[derive(Clone, Debug)]
struct Part {
    version: Version,
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    directory: PathBuf,
    controllers: Vec<String>,
}

/// A container's group.
#[derive(Clone, Debug, Default)]
pub(super) struct Cgroup {
    parts: Vec<Part>,
}

impl Cgroup {
    /// A group by its path from the root of each hierarchy. Nothing is made.
    pub(super) fn at(hierarchies: &Hierarchies, path: &Path) -> Cgroup {
        let path: PathBuf =
            path.components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
        let part = |version: Version, hierarchy: &Hierarchy| Part {
            version,
            mount: hierarchy.mount.clone(),
            directory: hierarchy.mount.join(&path),
            controllers: hierarchy.controllers.clone(),
        };
        if path.as_os_str().is_empty() {
            return Cgroup::default();
        }
        let mut parts: Vec<Part> = hierarchies.v1.iter().map(|one| part(Version::V1, one)).collect();
        parts.extend(hierarchies.v2.iter().map(|one| part(Version::V2, one)));
        Cgroup { parts }
    }

    /// A group that somebody else has made, with the controllers that version 2 has there.
    pub(super) fn existing(mut self) -> Cgroup {
        self.parts.retain(|part| part.directory.is_dir());
        for part in self.parts.iter_mut().filter(|part| part.version == Version::V2) {
            let there = fs::read_to_string(part.directory.join("cgroup.controllers")).unwrap_or_default();
            part.controllers = there.split_whitespace().map(str::to_owned).collect();
        }
        self
    }

    /// Makes it. Hierarchies in which that is not permitted are left out; what needs them is refused later.
    pub(super) fn create(&mut self) -> Result<(), Error> {
        let mut made: Vec<Part> = vec![];
        for mut part in std::mem::take(&mut self.parts) {
            match part.create() {
                Ok(()) => made.push(part),
                Err(error) if is_not_permitted(&error) => {
                    tracing::debug!("no control group at {}: {error}", part.directory.display());
                }
                Err(error) => {
                    let what = format!("cannot make the control group {:?}", part.directory);
                    self.parts = made;
                    return Err(Error::failed(what, error));
                }
            }
        }
        self.parts = made;
        Ok(())
    }

    /// The part with a controller.
    fn part(&self, controller: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.controllers.iter().any(|name| name == controller))
    }

    fn v2(&self) -> Option<&Part> {
        self.parts.iter().find(|part| part.version == Version::V2)
    }

    /// The directory in the version 2 hierarchy, for clone3(2).
    pub(super) fn open_v2(&self) -> Option<fs::File> {
        let part = self.v2()?;
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        fs::OpenOptions::new().read(true).custom_flags(flags).open(&part.directory).ok()
    }

    /// Puts the calling process, which has one thread, into it; `v2` says whether also in the version 2 hierarchy.
    ///
    /// A thread that moves itself needs no lock; to move another would hold up all forks and exits of the host, and wait
    /// for a grace period of 5 to 15 ms.
    pub(super) fn join(&self, v2: bool) -> Result<(), Error> {
        for part in self.parts.iter().filter(|part| v2 || part.version == Version::V1) {
            let file = if part.version == Version::V1 { "tasks" } else { "cgroup.procs" };
            write(&part.directory.join(file), "0").map_err(|source| {
                Error::failed(format!("cannot put the container into {:?}", part.directory), source)
            })?;
        }
        Ok(())
    }

    /// Names below `/sys/fs/cgroup` in the container, and directories of version 1 that are to be there.
    pub(super) fn v1_mounts(&self) -> Vec<(String, PathBuf)> {
        let mut mounts = vec![];
        for part in self.parts.iter().filter(|part| part.version == Version::V1) {
            for controller in &part.controllers {
                let name = controller.strip_prefix("name=").unwrap_or(controller);
                mounts.push((name.to_owned(), part.directory.clone()));
            }
        }
        mounts
    }

    /// Whether containers have the version 2 hierarchy, alone and at its place.
    pub(super) fn is_unified(&self) -> bool {
        self.parts.iter().all(|part| part.version == Version::V2)
            && self.v2().is_some_and(|part| part.mount == Path::new("/sys/fs/cgroup"))
    }

    /// Numbers of its processes, and of those in groups below it.
    pub(super) fn processes(&self) -> Vec<i32> {
        let mut found = BTreeSet::new();
        // All are in all hierarchies, but for a container that has moved some in one of them.
        for part in self.parts.iter().take(1) {
            for directory in with_those_below(&part.directory) {
                let list = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
        }
        found.into_iter().filter(|pid| *pid > 0).collect()
    }

    /// Stops all processes, or lets them go on.
    pub(super) fn freeze(&self, freeze: bool) -> Result<(), Error> {
        let failed = |source| Error::failed("cannot pause or resume the container", source);
        let (file, value, asked) = if let Some(part) = self.part("freezer") {
            (part.directory.join("freezer.state"), if freeze { "FROZEN" } else { "THAWED" }, None)
        } else if let Some(part) = self.v2().filter(|part| part.directory.join("cgroup.freeze").exists()) {
            (part.directory.join("cgroup.freeze"), if freeze { "1" } else { "0" }, Some(part))
        } else {
            let what = "this host has no freezer to pause the container with";
            return Err(Error::Unsupported { what: limits::with_way_out(what.into()) });
        };
        let deadline = Instant::now() + END_PATIENCE;
        let mut wait = END_WAIT;
        loop {
            write(&file, value).map_err(failed)?;
            let done = match asked {
                None => fs::read_to_string(&file).map_err(failed)?.trim() == value,
                Some(part) => {
                    let events = fs::read_to_string(part.directory.join("cgroup.events")).map_err(failed)?;
                    events.lines().any(|line| line == format!("frozen {value}"))
                }
            };
            if done {
                return Ok(());
            }
            if Instant::now() > deadline {
                // Half a pause would be neither.
                let _ = write(&file, if asked.is_some() { "0" } else { "THAWED" });
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_millis(20));
        }
    }

    /// Whether it is stopped.
    pub(super) fn is_frozen(&self) -> bool {
        let reads = |part: Option<&Part>, file: &str, values: &[&str]| {
            let text = part.and_then(|part| fs::read_to_string(part.directory.join(file)).ok());
            text.is_some_and(|text| values.contains(&text.trim()))
        };
        reads(self.part("freezer"), "freezer.state", &["FROZEN", "FREEZING"])
            || reads(self.v2(), "cgroup.freeze", &["1"])
    }

    /// Kills everything in it, and returns when it is gone.
    pub(super) fn kill(&self) -> Result<(), Error> {
        if let Some(part) = self.v2() {
            let _ = write(&part.directory.join("cgroup.kill"), "1");
        }
        let deadline = Instant::now() + END_PATIENCE;
        let mut wait = END_WAIT;
        loop {
            let left = self.processes();
            if left.is_empty() {
                return Ok(());
            }
            for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = kill_process(pid, Signal::KILL);
            }
            if self.is_frozen() {
                let _ = self.freeze(false);
            }
            if Instant::now() > deadline {
                let what = format!("processes {left:?} of the container do not end");
                return Err(Error::failed(what, io::Error::from(io::ErrorKind::TimedOut)));
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_millis(20));
        }
    }

    /// Takes it away with all groups below it. There are no processes in it any more.
    pub(super) fn remove(&self) -> Result<(), Error> {
        let deadline = Instant::now() + END_PATIENCE;
        for part in &self.parts {
            let mut wait = END_WAIT;
            loop {
                let result = remove_tree(&part.directory);
                match result {
                    Ok(()) => break,
                    // The last process is not quite gone.
                    Err(error)
                        if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                    {
                        std::thread::sleep(wait);
                        wait = (wait * 2).min(Duration::from_millis(20));
                    }
                    Err(error) => {
                        let what = format!("cannot remove the control group {:?}", part.directory);
                        return Err(Error::failed(what, error));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Part {
    fn create(&mut self) -> io::Result<()> {
        let mut path = self.mount.clone();
        let rest = self.directory.strip_prefix(&self.mount).unwrap_or(Path::new("")).to_owned();
        for component in rest.components() {
            if self.version == Version::V2 {
                pass_controllers_down(&path);
            }
            let parent = path.clone();
            path.push(component);
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result?,
            }
            if self.version == Version::V1 && self.controllers.iter().any(|name| name == "cpuset") {
                take_cpuset_over(&parent, &path)?;
            }
        }
        if self.version == Version::V2 {
            let there = fs::read_to_string(self.directory.join("cgroup.controllers"))?;
            self.controllers = there.split_whitespace().map(str::to_owned).collect();
        }
        Ok(())
    }
}

/// Gives the groups below one all controllers that it has itself. One that cannot be given is missing there then.
fn pass_controllers_down(directory: &Path) {
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let given = read("cgroup.subtree_control");
    for controller in read("cgroup.controllers").split_whitespace() {
        if !given.split_whitespace().any(|name| name == controller) {
            let _ = write(&directory.join("cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
}

/// In version 1, a new group has no processors and no memory nodes, and nothing can run in it.
fn take_cpuset_over(parent: &Path, directory: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(directory.join(file))?.trim().is_empty() {
            write(&directory.join(file), fs::read_to_string(parent.join(file))?.trim())?;
        }
    }
    Ok(())
}

fn is_not_permitted(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem)
}

/// One write, as control files want it.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// A group and all below it, it first.
fn with_those_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    let mut at = 0;
    while at < found.len() && found.len() < GROUPS_MAX {
        for entry in fs::read_dir(&found[at]).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
        at += 1;
    }
    found
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    // Nearly always there is nothing below it.
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(()) => return Ok(()),
        Err(_) => {}
    }
    for below in with_those_below(directory).into_iter().rev() {
        match fs::remove_dir(&below) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
