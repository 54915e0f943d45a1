//! A container's control group.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rvmm::guest::protocol::Failure;
use rvmm::guest::spec::Limits;

use crate::boot::CGROUPS;
use crate::disks::Disks;
use crate::failure::Doing;

/// How long a freeze may take.
const FREEZE_PATIENCE: Duration = Duration::from_secs(2);
/// Numbers of processes that are read at most.
const PIDS_MAX: usize = 32768;
/// Depth of groups that a container has made in its own.
const DEPTH_MAX: usize = 16;

/// The controllers that the kernel has, and those that are on for containers.
#[derive(Default)]
pub struct Controllers {
    all: BTreeSet<String>,
    on: BTreeSet<String>,
}

impl Controllers {
    /// Looks at what there is.
    pub fn read() -> Self {
        let all = fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")).unwrap_or_default();
        Self { all: all.split_whitespace().map(str::to_owned).collect(), on: BTreeSet::new() }
    }

    /// Their names.
    pub fn names(&self) -> String {
        self.all.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    /// Turns controllers on that are there and were not on. Each makes every container and every count dearer, so what
    /// nobody asks for stays off.
    pub fn turn_on<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) -> Result<(), Failure> {
        let wanted: BTreeSet<_> = names
            .into_iter()
            .filter(|name| self.all.contains(*name) && !self.on.contains(*name))
            .map(str::to_owned)
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let text = wanted.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
        write(&Path::new(CGROUPS).join("cgroup.subtree_control"), &text)
            .doing(|| format!("turn on the controllers {text}"))?;
        self.on.extend(wanted);
        Ok(())
    }
}

/// The files that limits are written to, with what is written.
fn files(limits: &Limits, disks: &mut Disks) -> Result<Vec<(String, String)>, Failure> {
    let mut files: Vec<(String, String)> = Vec::new();
    let mut put = |file: &str, value: Option<String>| {
        files.extend(value.map(|value| (file.to_owned(), value)));
    };
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    put("memory.max", number(limits.memory_bytes));
    put("memory.swap.max", number(limits.swap_bytes));
    put("memory.low", number(limits.memory_low_bytes));
    put("cpu.max", limits.cpu_quota.map(|(quota, period)| format!("{quota} {period}")));
    put("cpu.weight", number(limits.cpu_weight));
    put("cpuset.cpus", limits.cpuset.clone());
    put("pids.max", number(limits.pids));
    put("io.weight", limits.io_weight.map(|weight| format!("default {weight}")));
    for limit in &limits.io {
        let parts = [
            ("rbps", limit.read_bps),
            ("wbps", limit.write_bps),
            ("riops", limit.read_iops),
            ("wiops", limit.write_iops),
        ];
        let parts: String =
            parts.iter().filter_map(|(name, value)| Some(format!(" {name}={}", (*value)?))).collect();
        put("io.max", Some(format!("{}{parts}", disks.number(&limit.disk)?)));
    }
    for (file, value) in &limits.files {
        let is_plain = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
        if !is_plain || !file.contains('.') || file.starts_with('.') || file.starts_with("cgroup.") {
            return Err(Failure::Invalid(format!("{file:?} is no limit of a control group")));
        }
        put(file, Some(value.clone()));
    }
    Ok(files)
}

/// A control group.
pub struct Cgroup {
    path: PathBuf,
    /// The group's directory, for children that are born into it.
    directory: File,
    /// `memory.events`, which can be polled.
    memory_events: Option<File>,
}

impl Cgroup {
    /// Makes the group of a container.
    pub fn create(
        id: &str,
        limits: &Limits,
        controllers: &mut Controllers,
        disks: &mut Disks,
    ) -> Result<Self, Failure> {
        let files = files(limits, disks)?;
        let needed = files.iter().filter_map(|(file, _)| file.split('.').next());
        controllers.turn_on(["memory", "pids"].into_iter().chain(needed))?;
        let path = Path::new(CGROUPS).join(format!("c_{id}"));
        fs::create_dir(&path).doing(|| format!("make the control group of container {id}"))?;
        let open = || -> io::Result<Self> {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_DIRECTORY);
            let directory = options.open(&path)?;
            let memory_events = File::open(path.join("memory.events")).ok();
            Ok(Self { path: path.clone(), directory, memory_events })
        };
        let group = open().doing(|| format!("open the control group of container {id}"))?;
        match group.write_all(files, controllers) {
            Ok(()) => Ok(group),
            Err(error) => {
                let _ = group.remove();
                Err(error)
            }
        }
    }

    /// Changes limits.
    pub fn update(
        &self,
        limits: &Limits,
        controllers: &mut Controllers,
        disks: &mut Disks,
    ) -> Result<(), Failure> {
        let files = files(limits, disks)?;
        controllers.turn_on(files.iter().filter_map(|(file, _)| file.split('.').next()))?;
        self.write_all(files, controllers)
    }

    fn write_all(&self, files: Vec<(String, String)>, controllers: &Controllers) -> Result<(), Failure> {
        for (file, value) in files {
            match write(&self.path.join(&file), &value) {
                // There is no swap to limit, or a kernel for one processor has nothing to choose from.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && (file == "memory.swap.max"
                            || file.starts_with("cpuset.") && !controllers.all.contains("cpuset")) => {}
                other => other.doing(|| format!("write {value:?} to {file}"))?,
            }
        }
        Ok(())
    }

    /// The group's directory.
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// What becomes urgent to read when the kernel has killed for lack of memory.
    pub fn memory_events(&self) -> Option<&File> {
        self.memory_events.as_ref()
    }

    /// How many processes the kernel has killed for lack of memory.
    pub fn oom_kills(&mut self) -> u64 {
        let Some(file) = &mut self.memory_events else { return 0 };
        let mut text = String::new();
        if file.rewind().and_then(|()| file.read_to_string(&mut text)).is_err() {
            return 0;
        }
        field(&text, "oom_kill")
    }

    /// A file's contents; nothing where there is no such file.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Freezes or thaws it, and waits until it is.
    pub fn freeze(&self, freeze: bool) -> Result<(), Failure> {
        let (value, wanted) = if freeze { ("1", 1) } else { ("0", 0) };
        let doing = || if freeze { "freeze the container" } else { "thaw the container" }.to_owned();
        let mut events = File::open(self.path.join("cgroup.events")).doing(doing)?;
        write(&self.path.join("cgroup.freeze"), value).doing(doing)?;
        let end = Instant::now() + FREEZE_PATIENCE;
        loop {
            let mut text = String::new();
            events.rewind().and_then(|()| events.read_to_string(&mut text)).doing(doing)?;
            if field(&text, "frozen") == wanted {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let _ = write(&self.path.join("cgroup.freeze"), "0");
                return Err(Failure::System { doing: doing(), errno: libc::EBUSY });
            }
            let timeout = Timespec::try_from(left).ok();
            let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], timeout.as_ref());
        }
    }

    /// Kills everything in it.
    pub fn kill(&self) {
        if write(&self.path.join("cgroup.kill"), "1").is_err() {
            for pid in self.processes() {
                let _ = crate::system::kill(pid, libc::SIGKILL);
            }
        }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        field(&self.read("cgroup.events"), "populated") == 0
    }

    /// The numbers of its processes, and of those in groups that the container has made.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        read_processes(&self.path, DEPTH_MAX, &mut pids);
        pids
    }

    /// Removes it and what the container has made in it. Fails while something is in it.
    pub fn remove(&self) -> io::Result<()> {
        remove_tree(&self.path, DEPTH_MAX)
    }
}

fn read_processes(path: &Path, depth: usize, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 1));
    pids.truncate(PIDS_MAX);
    if depth > 0 {
        for below in directories(path) {
            read_processes(&below, depth - 1, pids);
        }
    }
}

fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) && depth > 0 => {
            for below in directories(path) {
                remove_tree(&below, depth - 1)?;
            }
            fs::remove_dir(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Writes a file of the kernel's in one piece.
pub fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// The number behind a name at the beginning of a line; 0 if there is none.
pub fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_is_found_by_its_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), 2);
        assert_eq!(field(text, "oom"), 3);
        assert_eq!(field(text, "max"), 0);
    }

    #[test]
    fn limits_become_files() {
        let limits = Limits {
            memory_bytes: Some(1 << 20),
            cpu_quota: Some((50_000, 100_000)),
            pids: Some(10),
            io_weight: Some(50),
            files: vec![("memory.high".into(), "max".into())],
            ..Limits::default()
        };
        let files = files(&limits, &mut Disks::default()).unwrap();
        let expected = [
            ("memory.max", "1048576"),
            ("cpu.max", "50000 100000"),
            ("pids.max", "10"),
            ("io.weight", "default 50"),
            ("memory.high", "max"),
        ];
        assert_eq!(files, expected.map(|(file, value)| (file.to_owned(), value.to_owned())));
    }

    #[test]
    fn file_that_is_no_limit_is_refused() {
        for file in ["cgroup.procs", "../memory.max", "memory", ".hidden", "a/b.c"] {
            let limits = Limits { files: vec![(file.into(), "1".into())], ..Limits::default() };
            assert!(files(&limits, &mut Disks::default()).is_err(), "{file}");
        }
    }
}
