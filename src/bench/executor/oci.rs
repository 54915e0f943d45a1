//! OCI runtimes: crun, runc, youki. They get a bundle whose root file system is the unpacked image.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::plain::end;
use super::{Error, Executor, Image, Instance, Job, Network, PATIENCE, Process, Role};
use super::{descendants, doing, find, line_of_running};
use crate::bench::process::{Invocation, Spawner};
use crate::bench::results::Isolation;

/// Capabilities that Docker leaves to a container's root; rvmm does the same.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// An OCI runtime.
pub struct Oci {
    name: &'static str,
    program: Option<PathBuf>,
    /// Where bundles, and the runtime's own state, are.
    directory: PathBuf,
    rootfs: PathBuf,
    env: Vec<String>,
    command: Vec<String>,
    without_unified: bool,
}

impl Oci {
    /// A runtime of that name, if it is there; its files go below `directory`.
    pub fn new(name: &'static str, directory: &Path, hybrid: bool) -> Oci {
        Oci {
            name,
            program: find(name),
            directory: directory.join(name),
            rootfs: PathBuf::new(),
            env: vec![],
            command: vec![],
            without_unified: hybrid && name == "crun",
        }
    }

    fn command(&self, words: &[&str]) -> Invocation {
        let program = self.program.as_deref().unwrap_or(Path::new(self.name)).to_string_lossy().into_owned();
        let root = self.directory.join("state").to_string_lossy().into_owned();
        let mut invocation = Invocation::new([program, "--root".to_owned(), root]).and(words.iter().copied());
        invocation.without_unified = self.without_unified;
        invocation
    }

    fn spec(&self, job: &Job) -> Value {
        let mount = |kind: &str, to: &str, options: &[&str]| json!({"destination": to, "type": kind, "source": kind, "options": options});
        let plain = ["nosuid", "noexec", "nodev"];
        let mut mounts = vec![
            mount("proc", "/proc", &plain),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        ];
        for (host, inside) in &job.volumes {
            mounts.push(
                json!({"destination": inside, "type": "bind", "source": host, "options": ["rbind", "rw"]}),
            );
        }
        let capabilities = json!(CAPABILITIES);
        let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
        if let Some(bytes) = job.memory {
            resources["memory"] = json!({"limit": bytes});
        }
        if let Some(count) = job.processes {
            resources["pids"] = json!({"limit": count});
        }
        if let Some(cpus) = job.cpus {
            resources["cpu"] = json!({"period": 100_000, "quota": i64::from(cpus) * 100_000});
        }
        let argv = if job.argv.is_empty() { &self.command } else { &job.argv };
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": argv,
                "env": self.env,
                "cwd": "/",
                "noNewPrivileges": false,
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "root": {"path": self.rootfs, "readonly": false},
            "hostname": "compare",
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/rvmm-compare/{}", job.name),
                "resources": resources,
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
                ],
                "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                    "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }

    fn delete(&self, spawner: &Spawner, name: &str) {
        let _ = spawner.output(&self.command(&["delete", "--force", name]), Duration::from_secs(30));
        let _ = std::fs::remove_dir_all(self.directory.join(name));
    }
}

impl Executor for Oci {
    fn name(&self) -> &str {
        self.name
    }

    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn version(&mut self, spawner: &Spawner) -> Result<String, String> {
        let Some(program) = &self.program else {
            return Err(format!("there is no program {:?} on this host", self.name));
        };
        let ask = Invocation::new([program.to_string_lossy(), "--version".into()]);
        let said = spawner.output(&ask, Duration::from_secs(30)).map_err(|error| error.to_string())?;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    }

    fn prepare(&mut self, _: &Spawner, image: &Image) -> Result<(), Error> {
        self.rootfs = image.rootfs.clone();
        self.env = image.env.clone();
        self.command = image.command.clone();
        let state = self.directory.join("state");
        std::fs::create_dir_all(&state).map_err(|source| Error::File { path: state, source })
    }

    fn run(&self, job: &Job) -> Result<Invocation, Error> {
        if job.network != Network::None || !job.ports.is_empty() {
            return Err(Error::Unable(format!("{} is a runtime and makes no networks", self.name)));
        }
        let bundle = self.directory.join(&job.name);
        let path = bundle.join("config.json");
        let write = || {
            std::fs::create_dir_all(&bundle)?;
            std::fs::write(&path, self.spec(job).to_string())
        };
        write().map_err(|source| Error::File { path: path.clone(), source })?;
        Ok(self.command(&["run", "--bundle", &bundle.to_string_lossy(), &job.name]))
    }

    fn wait_for_line(&self, _: &Spawner, instance: &mut Instance, wanted: &str) -> Result<String, Error> {
        line_of_running(instance, wanted)
    }

    fn exec(&self, instance: &Instance, argv: &[String]) -> Result<Invocation, Error> {
        Ok(self.command(&["exec", &instance.job.name]).and(argv.iter().cloned()))
    }

    fn stop(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        let kill = self.command(&["kill", &instance.job.name, "TERM"]);
        spawner.output(&kill, PATIENCE).map_err(doing("stop an instance"))?;
        wait(instance)
    }

    fn kill(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        let kill = self.command(&["kill", &instance.job.name, "KILL"]);
        spawner.output(&kill, PATIENCE).map_err(doing("kill an instance"))?;
        wait(instance)
    }

    fn restart(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        self.delete(spawner, &instance.job.name);
        instance.running = self.start(spawner, &instance.job)?.running;
        Ok(())
    }

    fn remove(&self, spawner: &Spawner, mut instance: Instance) -> Result<(), Error> {
        self.delete(spawner, &instance.job.name);
        end(&mut instance, Signal::KILL)
    }

    fn processes(&self, _: &Spawner, instance: &Instance) -> Result<Vec<Process>, Error> {
        let running = instance.running.as_ref();
        let pid = running.ok_or_else(|| Error::Unable("the instance does not run".into()))?.pid();
        let role = |found: u32| if found == pid { Role::Runtime } else { Role::Workload };
        Ok(descendants(pid).into_iter().map(|found| Process { pid: found, role: role(found) }).collect())
    }

    fn instance_bytes(&self, _: &Spawner, instance: &Instance) -> Option<u64> {
        crate::bench::probe::size::allocated(&self.directory.join(&instance.job.name))
    }

    fn cleanup(&self, spawner: &Spawner, run: &str) {
        if self.program.is_none() {
            return;
        }
        for entry in std::fs::read_dir(self.directory.join("state")).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| name.starts_with(run)) {
                self.delete(spawner, name);
            }
        }
    }
}

/// The command that stays with an instance ends when the instance does.
fn wait(instance: &mut Instance) -> Result<(), Error> {
    if let Some(mut running) = instance.running.take() {
        running.finish(Duration::from_secs(60)).map_err(doing("wait for an instance's end"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_has_what_the_job_asks_for() {
        let directory = tempfile::tempdir().unwrap();
        let oci = Oci { rootfs: "/r".into(), ..Oci::new("runc", directory.path(), false) };
        let job = Job { memory: Some(1 << 20), processes: Some(7), ..Job::helper("cmp-1", ["idle"]) };
        let words = oci.run(&job).unwrap().argv;
        assert_eq!(words[words.len() - 4..words.len() - 2], ["run", "--bundle"]);
        let text = std::fs::read_to_string(directory.path().join("runc/cmp-1/config.json")).unwrap();
        let spec: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 7);
        assert_eq!(spec["process"]["args"], json!(["/rvmm-probe", "idle"]));
    }

    #[test]
    fn networks_are_refused() {
        let oci = Oci::new("runc", Path::new("/nowhere"), false);
        let error = oci.run(&Job { network: Network::Bridge, ..Job::default() }).unwrap_err();
        assert!(error.to_string().contains("makes no networks"));
    }
}
