//! The work as a plain process of the host: what everything else is an addition to.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::{
    Error, Executor, HELPER, Image, Instance, Job, Process, Role, descendants, doing, line_of_running,
};
use crate::bench::process::{Invocation, Spawner};
use crate::bench::results::Isolation;

/// Plain processes.
#[derive(Default)]
pub struct Plain {
    rootfs: PathBuf,
    env: Vec<String>,
    command: Vec<String>,
}

impl Executor for Plain {
    fn name(&self) -> &str {
        "process"
    }

    fn isolation(&self) -> Isolation {
        Isolation::None
    }

    fn version(&mut self, _: &Spawner) -> Result<String, String> {
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
        Ok(format!("Linux {}", release.trim()))
    }

    fn prepare(&mut self, _: &Spawner, image: &Image) -> Result<(), Error> {
        self.rootfs = image.rootfs.clone();
        self.env = image.env.clone();
        self.command = image.command.clone();
        Ok(())
    }

    fn run(&self, job: &Job) -> Result<Invocation, Error> {
        if !job.ports.is_empty() && job.argv.first().is_none_or(|program| program != HELPER) {
            // The port inside is the port outside.
            if job.ports.iter().any(|(host, inside)| host != inside) {
                return Err(Error::Unable(
                    "a process of the host has the host's ports, and none are mapped".into(),
                ));
            }
        }
        let argv = if job.argv.is_empty() { &self.command } else { &job.argv };
        // The helper is static and needs no files of the image; other programs do.
        let helper = argv.first().is_some_and(|program| program == HELPER);
        let mut words = match helper {
            true => vec![self.rootfs.join(HELPER.trim_start_matches('/')).to_string_lossy().into_owned()],
            false => vec!["chroot".to_owned(), self.rootfs.to_string_lossy().into_owned()],
        };
        words.extend(argv.iter().skip(usize::from(helper)).cloned());
        // A volume is the directory itself.
        for (host, inside) in &job.volumes {
            for word in &mut words {
                *word = word.replace(inside.as_str(), &host.to_string_lossy());
            }
        }
        let env = self.env.iter().filter_map(|line| line.split_once('='));
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Invocation { env, ..Invocation::new(words) })
    }

    fn wait_for_line(&self, _: &Spawner, instance: &mut Instance, wanted: &str) -> Result<String, Error> {
        line_of_running(instance, wanted)
    }

    fn exec(&self, instance: &Instance, argv: &[String]) -> Result<Invocation, Error> {
        self.run(&Job { argv: argv.to_vec(), ..instance.job.clone() })
    }

    fn stop(&self, _: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        end(instance, Signal::TERM)
    }

    fn kill(&self, _: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        end(instance, Signal::KILL)
    }

    fn restart(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        instance.running = self.start(spawner, &instance.job)?.running;
        Ok(())
    }

    fn remove(&self, _: &Spawner, mut instance: Instance) -> Result<(), Error> {
        end(&mut instance, Signal::KILL)
    }

    fn processes(&self, _: &Spawner, instance: &Instance) -> Result<Vec<Process>, Error> {
        let pid =
            instance.running.as_ref().ok_or_else(|| Error::Unable("the instance does not run".into()))?.pid();
        Ok(descendants(pid).into_iter().map(|pid| Process { pid, role: Role::Workload }).collect())
    }

    fn instance_bytes(&self, _: &Spawner, _: &Instance) -> Option<u64> {
        Some(0)
    }

    fn cleanup(&self, _: &Spawner, _: &str) {}

    fn address(&self, _: &Spawner, _: &Instance) -> Result<String, Error> {
        Ok("127.0.0.1".into())
    }
}

/// Ends the command that stays with an instance, and waits until it has ended.
pub(super) fn end(instance: &mut Instance, signal: Signal) -> Result<(), Error> {
    if let Some(mut running) = instance.running.take() {
        running.signal(signal);
        running.finish(Duration::from_secs(60)).map_err(doing("wait for an instance's end"))?;
    }
    Ok(())
}
