//! The ways to run the work: one trait, driven through public command lines.

pub mod engine;
pub mod mock;
pub mod oci;
pub mod plain;
pub mod vm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{self, Invocation, Running, Spawner};
use super::results::Isolation;

/// How long a single command of an executor may take. Guests of emulated kernels take their time.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Where the helper is in every instance.
pub const HELPER: &str = "/rvmm-probe";

/// Why an executor did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has no such thing.
    #[error("{0}")]
    Unable(String),
    /// A command of it failed.
    #[error("{what}")]
    Command {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: process::Error,
    },
    /// A file of it cannot be made.
    #[error("cannot make {path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// The whole run is to end, and nothing is wrong with the executor.
    pub fn is_interruption(&self) -> bool {
        matches!(self, Error::Command { source: process::Error::Interrupted, .. })
    }
}

/// Names what a command was for.
pub(super) fn doing(what: &'static str) -> impl FnOnce(process::Error) -> Error {
    move |source| Error::Command { what, source }
}

/// The image, made ready for all executors: it has the helper in it.
#[derive(Clone, Debug)]
pub struct Image {
    /// The name that it has in every engine.
    pub name: String,
    /// The same as an archive.
    pub archive: PathBuf,
    /// Its files.
    pub rootfs: PathBuf,
    /// Its environment: NAME=VALUE.
    pub env: Vec<String>,
    /// What it runs by itself.
    pub command: Vec<String>,
}

/// One use of an instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Job {
    /// Name of the instance.
    pub name: String,
    /// Another image than the one that was made ready.
    pub image: Option<String>,
    /// What to run; empty: what the image runs by itself.
    pub argv: Vec<String>,
    /// Its network.
    pub network: Network,
    /// Ports to publish: on the host, and inside.
    pub ports: Vec<(u16, u16)>,
    /// Directories of the host, and where they are inside.
    pub volumes: Vec<(PathBuf, String)>,
    /// Bytes of memory that it may use.
    pub memory: Option<u64>,
    /// Processes that it may have.
    pub processes: Option<u32>,
    /// Processors that it may keep busy.
    pub cpus: Option<u32>,
    /// With all rights that the executor can give.
    pub privileged: bool,
}

impl Job {
    /// Runs the helper, without a network.
    pub fn helper<S: Into<String>>(name: impl Into<String>, arguments: impl IntoIterator<Item = S>) -> Job {
        let argv = std::iter::once(HELPER.to_owned()).chain(arguments.into_iter().map(Into::into)).collect();
        Job { name: name.into(), argv, ..Job::default() }
    }
}

/// A job's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// None but the instance's own loopback.
    #[default]
    None,
    /// What the executor gives when a service is to be reached.
    Bridge,
}

/// A long-lived instance.
pub struct Instance {
    /// What it was started with.
    pub job: Job,
    /// The command that stays with it. Engines have none.
    pub running: Option<Running>,
}

/// A process of the host that is there for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// What for.
    pub role: Role,
}

/// What a process is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The work itself.
    Workload,
    /// Whatever looks after it on the host: supervisor, shim, file server.
    Runtime,
    /// A virtual machine's monitor; the guest's memory is in it.
    Monitor,
}

/// A way to run the work.
pub trait Executor {
    /// Its name in `catalogue::EXECUTORS`.
    fn name(&self) -> &str;

    /// What separates the work from the host.
    fn isolation(&self) -> Isolation;

    /// What it says about itself, or why it cannot be used.
    fn version(&mut self, spawner: &Spawner) -> Result<String, String>;

    /// Makes the image ready.
    fn prepare(&mut self, spawner: &Spawner, image: &Image) -> Result<(), Error>;

    /// Loads another image, of which jobs then can tell the name.
    fn load(&self, _spawner: &Spawner, _archive: &Path, _name: &str) -> Result<(), Error> {
        Err(Error::Unable(format!("{} runs no images other than the one under test", self.name())))
    }

    /// Whether an image of that name is there.
    fn has_image(&self, _spawner: &Spawner, _name: &str) -> bool {
        false
    }

    /// Removes an image.
    fn unload(&self, _spawner: &Spawner, _name: &str) {}

    /// The command line that runs a job in a fresh instance, and ends with it and leaves nothing.
    fn run(&self, job: &Job) -> Result<Invocation, Error>;

    /// Starts a job that goes on by itself.
    fn start(&self, spawner: &Spawner, job: &Job) -> Result<Instance, Error> {
        let running = spawner.spawn(&self.run(job)?).map_err(doing("start an instance"))?;
        Ok(Instance { job: job.clone(), running: Some(running) })
    }

    /// What the command of an instance has written so far, until `wanted` finds what it wants in it.
    fn wait_for_line(
        &self,
        spawner: &Spawner,
        instance: &mut Instance,
        wanted: &str,
    ) -> Result<String, Error>;

    /// All lines with `wanted` that an instance has written so far, in all its lives, where an engine keeps them.
    fn lines(&self, _spawner: &Spawner, _instance: &Instance, _wanted: &str) -> Result<Vec<String>, Error> {
        Ok(vec![])
    }

    /// The command line that runs a further program in an instance.
    fn exec(&self, instance: &Instance, argv: &[String]) -> Result<Invocation, Error>;

    /// Ends the work in the way that is meant for it, and returns when it has ended.
    fn stop(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error>;

    /// Ends it without asking.
    fn kill(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error>;

    /// Starts a stopped instance again, with what is left of it.
    fn restart(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error>;

    /// Removes an instance, running or not.
    fn remove(&self, spawner: &Spawner, instance: Instance) -> Result<(), Error>;

    /// The host's processes that are there for it.
    fn processes(&self, spawner: &Spawner, instance: &Instance) -> Result<Vec<Process>, Error>;

    /// Removes every instance of a run, and the image as it was made ready.
    fn cleanup(&self, spawner: &Spawner, run: &str);

    /// The address at which the host reaches an instance, where it has one.
    fn address(&self, _spawner: &Spawner, _instance: &Instance) -> Result<String, Error> {
        Err(Error::Unable(format!("{} gives instances no addresses that the host can reach", self.name())))
    }

    /// Bytes of the kernel and the initial programs that its instances boot, where they boot.
    fn kernel_bytes(&self) -> Option<u64> {
        None
    }

    /// Bytes that an instance takes on disk, beside what all share.
    fn instance_bytes(&self, _spawner: &Spawner, _instance: &Instance) -> Option<u64> {
        None
    }
}

/// A program in `$PATH` or where system programs are.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories =
        std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// A process and all that descend from it.
pub fn descendants(root: u32) -> Vec<u32> {
    let mut parents = vec![];
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent(pid) {
            parents.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        found.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| *child));
    }
    found
}

/// The process that started a process.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// A process's name.
pub fn process_name(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// Waits until a line with `wanted` comes from the command that stays with an instance.
pub(super) fn line_of_running(instance: &mut Instance, wanted: &str) -> Result<String, Error> {
    let Some(running) = &mut instance.running else {
        return Err(Error::Unable("the instance does not run".into()));
    };
    let found = running.line(PATIENCE, |line| line.contains(wanted).then(|| line.to_owned()));
    Ok(found.map_err(doing("wait for the instance"))?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_is_found_and_nonsense_is_not() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-anywhere"), None);
    }

    #[test]
    fn own_child_is_a_descendant() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let found = descendants(std::process::id());
        assert!(found.contains(&child.id()));
        assert_eq!(parent(child.id()), Some(std::process::id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
