//! An executor for tests: the helper, or whatever stands for it, as a process of the host with a delay before it.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::plain::end;
use super::{Error, Executor, HELPER, Image, Instance, Job, Process, Role, descendants, line_of_running};
use crate::bench::process::{Invocation, Spawner};
use crate::bench::results::Isolation;

/// A process of the host that starts late.
pub struct Mock {
    name: String,
    helper: PathBuf,
    delay: Duration,
}

impl Mock {
    /// Runs `helper` after `delay`.
    pub fn new(name: &str, helper: impl Into<PathBuf>, delay: Duration) -> Mock {
        Mock { name: name.into(), helper: helper.into(), delay }
    }
}

impl Executor for Mock {
    fn name(&self) -> &str {
        &self.name
    }

    fn isolation(&self) -> Isolation {
        Isolation::None
    }

    fn version(&mut self, _: &Spawner) -> Result<String, String> {
        Ok("mock".into())
    }

    fn prepare(&mut self, _: &Spawner, _: &Image) -> Result<(), Error> {
        Ok(())
    }

    fn run(&self, job: &Job) -> Result<Invocation, Error> {
        let helper = self.helper.to_string_lossy();
        let words =
            job.argv.iter().map(|word| if word == HELPER { helper.to_string() } else { word.clone() });
        let delayed = format!("sleep {}; exec \"$@\"", self.delay.as_secs_f64());
        let first = match self.delay.is_zero() {
            true => vec![],
            false => vec!["/bin/sh".to_owned(), "-c".to_owned(), delayed, "sh".to_owned()],
        };
        Ok(Invocation::new(first).and(words))
    }

    fn wait_for_line(&self, _: &Spawner, instance: &mut Instance, wanted: &str) -> Result<String, Error> {
        line_of_running(instance, wanted)
    }

    fn exec(&self, _: &Instance, argv: &[String]) -> Result<Invocation, Error> {
        self.run(&Job { argv: argv.to_vec(), ..Job::default() })
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

    fn cleanup(&self, _: &Spawner, _: &str) {}
}
