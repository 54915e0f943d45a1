//! Engines with Docker's command line: rvmm itself in both isolations, Docker, Podman.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Error, Executor, Image, Instance, Job, Network, PATIENCE, Process, Role, doing};
use super::{descendants, find, parent, process_name};
use crate::bench::process::{Invocation, Spawner};
use crate::bench::results::Isolation;

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// rvmm on the host's kernel.
    RvmmNative,
    /// rvmm with a virtual machine for each container, which boots.
    RvmmMicrovm,
    /// The same from a template: a snapshot of a guest that has booted.
    RvmmRestored,
    /// Docker.
    Docker,
    /// Podman.
    Podman,
}

/// An engine.
pub struct Engine {
    kind: Kind,
    program: PathBuf,
    image: String,
    /// Whether this rvmm can start a microVM from a template, and so has to be told which way is meant.
    templates: bool,
    /// Images that were loaded and were not there before.
    loaded: RefCell<Vec<String>>,
    /// Whether its runtime has to be kept from seeing that the host is a hybrid one.
    without_unified: bool,
}

/// How long the containers of a run may take to be gone, and how often that is looked at.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(60);
const CLEANUP_PAUSE: Duration = Duration::from_millis(100);

impl Engine {
    /// `rvmm` is the program to be measured; the others are looked for.
    pub fn new(kind: Kind, rvmm: &std::path::Path, without_unified: bool) -> Engine {
        let program = match kind {
            Kind::RvmmNative | Kind::RvmmMicrovm | Kind::RvmmRestored => rvmm.to_owned(),
            Kind::Docker => find("docker").unwrap_or_else(|| "docker".into()),
            Kind::Podman => find("podman").unwrap_or_else(|| "podman".into()),
        };
        Engine {
            kind,
            program,
            image: String::new(),
            templates: false,
            loaded: RefCell::default(),
            without_unified: without_unified && kind == Kind::Podman,
        }
    }

    fn command<S: Into<String>>(&self, words: impl IntoIterator<Item = S>) -> Invocation {
        let mut invocation = Invocation::new([self.program.to_string_lossy()]).and(words);
        invocation.without_unified = self.without_unified;
        invocation
    }

    /// Takes an image for made ready: for clearing away what another process made.
    pub fn assume_image(&mut self, name: &str) {
        self.image = name.into();
    }

    fn is_rvmm(&self) -> bool {
        matches!(self.kind, Kind::RvmmNative | Kind::RvmmMicrovm | Kind::RvmmRestored)
    }

    /// `run` and its flags, up to the image and what it runs.
    fn run_words(&self, job: &Job, detached: bool) -> Vec<String> {
        let mut words = vec!["run".to_owned()];
        words.extend(match detached {
            true => vec!["-d".to_owned()],
            false => vec!["--rm".to_owned(), "-i".to_owned()],
        });
        words.extend(["--name".to_owned(), job.name.clone()]);
        match self.kind {
            Kind::RvmmNative => words.extend(["--isolation", "native"].map(String::from)),
            Kind::RvmmMicrovm => {
                words.extend(["--isolation", "microvm"].map(String::from));
                if self.templates {
                    words.extend(["--template", "never"].map(String::from));
                }
            }
            Kind::RvmmRestored => {
                words.extend(["--isolation", "microvm", "--template", "require"].map(String::from));
            }
            // Its defaults ask for limits above those of this process, which needs a capability to grant.
            Kind::Podman => {
                words.extend(
                    ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"].map(String::from),
                );
            }
            Kind::Docker => {}
        }
        if job.network == Network::None {
            words.extend(["--network", "none"].map(String::from));
        }
        for (host, inside) in &job.ports {
            words.extend(["-p".to_owned(), format!("127.0.0.1:{host}:{inside}")]);
        }
        for (host, inside) in &job.volumes {
            words.extend(["-v".to_owned(), format!("{}:{inside}", host.display())]);
        }
        if let Some(bytes) = job.memory {
            words.extend(["--memory".to_owned(), bytes.to_string()]);
        }
        if let Some(count) = job.processes {
            words.extend(["--pids-limit".to_owned(), count.to_string()]);
        }
        if let Some(cpus) = job.cpus {
            words.extend(["--cpus".to_owned(), cpus.to_string()]);
        }
        if job.privileged {
            words.push("--privileged".to_owned());
        }
        words.push(job.image.clone().unwrap_or_else(|| self.image.clone()));
        words.extend(job.argv.iter().cloned());
        words
    }

    fn inspect(&self, spawner: &Spawner, name: &str) -> Result<Value, Error> {
        let said = spawner
            .output(&self.command(["container", "inspect", name]), PATIENCE)
            .map_err(doing("inspect an instance"))?;
        let unreadable = || Error::Unable(format!("what {} says of {name} is no JSON", self.name()));
        first_described(&said).ok_or_else(unreadable)
    }

    fn simple(&self, spawner: &Spawner, what: &'static str, words: &[&str]) -> Result<(), Error> {
        let invocation = self.command(words.iter().copied());
        spawner.output(&invocation, PATIENCE).map(drop).map_err(doing(what))
    }

    /// Removes what has the run's name.
    fn remove_containers(&self, spawner: &Spawner, run: &str) {
        let filter = format!("name={run}");
        let ids = spawner.output(&self.command(["ps", "-a", "-q", "--filter", &filter]), PATIENCE);
        for id in ids.unwrap_or_default().lines().map(str::trim) {
            if !id.is_empty() && id.chars().all(|c| c.is_ascii_hexdigit()) {
                let _ = spawner.output(&self.command(["rm", "-f", id]), PATIENCE);
            }
        }
    }
}

/// The first of a list of JSON. Engines write warnings before and behind it, for both of their outputs are read.
fn first_described(said: &str) -> Option<Value> {
    let starts = said.match_indices('[').map(|(at, _)| at);
    let mut line_starts = starts.filter(|at| *at == 0 || said.as_bytes().get(at - 1) == Some(&b'\n'));
    line_starts.find_map(|at| {
        let list = serde_json::Deserializer::from_str(&said[at..]).into_iter::<Value>().next()?.ok()?;
        list.get(0).cloned()
    })
}

impl Executor for Engine {
    fn name(&self) -> &str {
        match self.kind {
            Kind::RvmmNative => "rvmm-native",
            Kind::RvmmMicrovm => "rvmm-microvm",
            Kind::RvmmRestored => "rvmm-restored",
            Kind::Docker => "docker",
            Kind::Podman => "podman",
        }
    }

    fn isolation(&self) -> Isolation {
        match self.kind {
            Kind::RvmmMicrovm | Kind::RvmmRestored => Isolation::Microvm,
            _ => Isolation::Container,
        }
    }

    fn version(&mut self, spawner: &Spawner) -> Result<String, String> {
        let missing = || format!("there is no {:?} on this host", self.program);
        if !super::is_program(&self.program) {
            return Err(missing());
        }
        if matches!(self.kind, Kind::RvmmMicrovm | Kind::RvmmRestored)
            && !std::path::Path::new("/dev/kvm").exists()
        {
            return Err("there is no /dev/kvm on this host".into());
        }
        let patience = Duration::from_secs(30);
        if matches!(self.kind, Kind::RvmmMicrovm | Kind::RvmmRestored) {
            let help = spawner.output(&self.command(["run", "--help"]), patience).unwrap_or_default();
            self.templates = help.contains("--template");
            if self.kind == Kind::RvmmRestored && !self.templates {
                return Err("this version of rvmm does not start containers from snapshots".into());
            }
        }
        if self.kind == Kind::Docker {
            // Its client answers without a server, and that is of no use.
            let asked = self.command(["version", "--format", "server {{.Server.Version}}"]);
            let said =
                spawner.output(&asked, patience).map_err(|error| format!("no server answers: {error}"))?;
            return Ok(format!("Docker {}", said.lines().last().unwrap_or_default()));
        }
        let said =
            spawner.output(&self.command(["--version"]), patience).map_err(|error| error.to_string())?;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    }

    fn prepare(&mut self, spawner: &Spawner, image: &Image) -> Result<(), Error> {
        self.image = image.name.clone();
        if !self.is_rvmm() {
            let archive = image.archive.to_string_lossy().into_owned();
            let load = self.command(["load", "-i"]).and([archive]);
            spawner.output(&load, PATIENCE).map_err(doing("load the image"))?;
        }
        if self.kind == Kind::RvmmRestored {
            // The first makes the template.
            let first = self.run(&Job::helper(format!("{}-template", spawner.run), ["true"]))?;
            spawner.output(&first, PATIENCE).map_err(doing("make a template"))?;
        }
        Ok(())
    }

    fn load(&self, spawner: &Spawner, archive: &std::path::Path, name: &str) -> Result<(), Error> {
        // What was not there before goes at the end.
        if !self.has_image(spawner, name) {
            self.loaded.borrow_mut().push(name.into());
        }
        let load = self.command(["load", "-i"]).and([archive.to_string_lossy().into_owned()]);
        spawner.output(&load, PATIENCE).map(drop).map_err(doing("load an image"))
    }

    fn has_image(&self, spawner: &Spawner, name: &str) -> bool {
        spawner.output(&self.command(["image", "inspect", name]), PATIENCE).is_ok()
    }

    fn unload(&self, spawner: &Spawner, name: &str) {
        let _ = spawner.output(&self.command(["rmi", name]), PATIENCE);
        self.loaded.borrow_mut().retain(|loaded| loaded != name);
    }

    fn run(&self, job: &Job) -> Result<Invocation, Error> {
        Ok(self.command(self.run_words(job, false)))
    }

    fn start(&self, spawner: &Spawner, job: &Job) -> Result<Instance, Error> {
        let invocation = self.command(self.run_words(job, true));
        spawner.output(&invocation, PATIENCE).map_err(doing("start an instance"))?;
        Ok(Instance { job: job.clone(), running: None })
    }

    fn wait_for_line(
        &self,
        spawner: &Spawner,
        instance: &mut Instance,
        wanted: &str,
    ) -> Result<String, Error> {
        let logs = self.command(["logs", "-f", &instance.job.name]);
        let mut logs = spawner.spawn(&logs).map_err(doing("read an instance's output"))?;
        let found = logs.line(PATIENCE, |line| line.contains(wanted).then(|| line.to_owned()));
        Ok(found.map_err(doing("read an instance's output"))?.0)
    }

    fn lines(&self, spawner: &Spawner, instance: &Instance, wanted: &str) -> Result<Vec<String>, Error> {
        let logs = self.command(["logs", &instance.job.name]);
        let said = spawner.output(&logs, PATIENCE).map_err(doing("read an instance's output"))?;
        Ok(said.lines().filter(|line| line.contains(wanted)).map(String::from).collect())
    }

    fn exec(&self, instance: &Instance, argv: &[String]) -> Result<Invocation, Error> {
        Ok(self.command(["exec", "-i", &instance.job.name]).and(argv.iter().cloned()))
    }

    fn stop(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        self.simple(spawner, "stop an instance", &["stop", "-t", "30", &instance.job.name])
    }

    fn kill(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        self.simple(spawner, "kill an instance", &["kill", &instance.job.name])?;
        self.simple(spawner, "wait for an instance", &["wait", &instance.job.name])
    }

    fn restart(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        self.simple(spawner, "start an instance again", &["start", &instance.job.name])
    }

    fn remove(&self, spawner: &Spawner, instance: Instance) -> Result<(), Error> {
        self.simple(spawner, "remove an instance", &["rm", "-f", &instance.job.name])
    }

    fn processes(&self, spawner: &Spawner, instance: &Instance) -> Result<Vec<Process>, Error> {
        let facts = self.inspect(spawner, &instance.job.name)?;
        let pid = facts.pointer("/State/Pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
        let pid =
            pid.filter(|pid| *pid > 0).ok_or_else(|| Error::Unable("the instance does not run".into()))?;
        let (own, role) = match self.kind {
            // The keeper, and the monitor that it has started.
            Kind::RvmmMicrovm | Kind::RvmmRestored => (descendants(pid), Role::Monitor),
            _ => (descendants(pid), Role::Workload),
        };
        let mut found: Vec<Process> = own.iter().map(|pid| Process { pid: *pid, role }).collect();
        // What watches it is its parent: supervisor, shim, conmon. An ancestor that serves all is nobody's in particular.
        if let Some(keeper) = parent(pid).filter(|keeper| *keeper > 1) {
            let others = descendants(keeper).into_iter().filter(|pid| !own.contains(pid));
            found.extend(others.map(|pid| Process { pid, role: Role::Runtime }));
        }
        if self.kind == Kind::Docker {
            let proxies = descendants(1).into_iter().filter(|pid| process_name(*pid) == "docker-proxy");
            let of_instance = |pid: &u32| {
                let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                instance.job.ports.iter().any(|(host, _)| command.contains(&format!("\0{host}\0")))
            };
            found.extend(proxies.filter(of_instance).map(|pid| Process { pid, role: Role::Runtime }));
        }
        Ok(found)
    }

    fn cleanup(&self, spawner: &Spawner, run: &str) {
        let mut images = self.loaded.take();
        if !self.image.is_empty() || self.is_rvmm() {
            images.push(super::super::image::name_of(run));
        }
        // A container whose command was interrupted may still be on its way, in or out, and has its image until it is gone.
        let end = Instant::now() + CLEANUP_PATIENCE;
        loop {
            self.remove_containers(spawner, run);
            images.retain(|name| {
                spawner.output(&self.command(["rmi", name]), PATIENCE).is_err()
                    && self.has_image(spawner, name)
            });
            if images.is_empty() || Instant::now() > end {
                return;
            }
            std::thread::sleep(CLEANUP_PAUSE);
        }
    }

    fn instance_bytes(&self, spawner: &Spawner, instance: &Instance) -> Option<u64> {
        if self.is_rvmm() {
            let facts = self.inspect(spawner, &instance.job.name).ok()?;
            let id = facts.get("Id").and_then(Value::as_str)?;
            let data = std::env::var_os("RVMM_ROOT").map_or_else(|| "/var/lib/rvmm".into(), PathBuf::from);
            return crate::bench::probe::size::allocated(&data.join("containers").join(id));
        }
        let sized = self.command(["container", "inspect", "--size", &instance.job.name]);
        let said = spawner.output(&sized, PATIENCE).ok()?;
        first_described(&said)?.get("SizeRw").and_then(Value::as_u64)
    }

    fn address(&self, spawner: &Spawner, instance: &Instance) -> Result<String, Error> {
        let facts = self.inspect(spawner, &instance.job.name)?;
        let direct = facts.pointer("/NetworkSettings/IPAddress").and_then(Value::as_str).map(String::from);
        let networks = facts.pointer("/NetworkSettings/Networks").and_then(Value::as_object);
        let first =
            || networks?.values().find_map(|network| Some(network.get("IPAddress")?.as_str()?.to_owned()));
        let found =
            direct.filter(|address| !address.is_empty()).or_else(first).filter(|address| !address.is_empty());
        found.ok_or_else(|| Error::Unable(format!("{} says no address of its instance", self.name())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(kind: Kind) -> Engine {
        Engine { image: "i".into(), ..Engine::new(kind, std::path::Path::new("/bin/rvmm"), false) }
    }

    #[test]
    fn command_line_is_what_a_user_types() {
        let job = Job {
            network: Network::Bridge,
            ports: vec![(8080, 80)],
            volumes: vec![("/tmp/v".into(), "/data".into())],
            memory: Some(64 << 20),
            ..Job::helper("cmp-1", ["idle"])
        };
        let words = engine(Kind::RvmmMicrovm).run(&job).unwrap().argv.join(" ");
        assert_eq!(
            words,
            "/bin/rvmm run --rm -i --name cmp-1 --isolation microvm -p 127.0.0.1:8080:80 -v /tmp/v:/data \
             --memory 67108864 i /rvmm-probe idle"
        );
        let words = engine(Kind::RvmmNative).run_words(&Job::helper("n", ["idle"]), true).join(" ");
        assert_eq!(words, "run -d --name n --isolation native --network none i /rvmm-probe idle");
    }

    #[test]
    fn description_is_found_among_warnings() {
        let said =
            "time=\"x\" level=warning msg=\"[graph] y\"\n[\n {\"Id\": \"a\"}\n]\ntime=\"x\" level=error\n";
        assert_eq!(first_described(said), Some(serde_json::json!({"Id": "a"})));
        assert_eq!(first_described("[]"), None);
        assert_eq!(first_described("nothing [here]"), None);
    }

    #[test]
    fn engine_that_is_not_there_says_so() {
        let spawner = Spawner { run: "r".into(), interrupt: crate::bench::interrupt::Interrupt::never() };
        let why =
            Engine::new(Kind::RvmmNative, std::path::Path::new("/nowhere/rvmm"), false).version(&spawner);
        assert!(why.unwrap_err().contains("/nowhere/rvmm"));
    }
}
