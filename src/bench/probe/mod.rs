//! What is measured. A probe takes one sample of one executor at a time; who calls it sees to order, noise and time.

pub mod density;
pub mod disk;
pub mod effort;
pub mod exits;
pub mod isolation;
pub mod memory;
pub mod micro;
pub mod neighbour;
pub mod network;
pub mod persistence;
pub mod service;
pub mod size;
pub mod start;
pub mod timeline;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::executor::{self, Executor, Image, Job, PATIENCE};
use super::image::Source;
use super::process::{self, Spawner};
use super::results::{Metric, Value};

/// What begins a line of the helper.
pub const MARKER: &str = "rvmm-probe ";

/// What probes are given.
pub struct Context {
    /// Starts commands.
    pub spawner: Spawner,
    /// The image, ready.
    pub image: Image,
    /// What is known of the image that was asked for.
    pub source: Source,
    /// The helper's file on the host.
    pub helper: PathBuf,
    /// rvmm's own program.
    pub rvmm: PathBuf,
    /// Where guests' kernels are.
    pub guest: PathBuf,
    /// For files of this run.
    pub directory: PathBuf,
    /// Short measurements, for a first look.
    pub quick: bool,
    /// Bytes that idle instances take on purpose, for the check that they are found.
    pub memory_on_purpose: u64,
    /// How long executors took to start one instance, run the helper in it and end it.
    pub starts: RefCell<Vec<(String, Duration)>>,
    /// Counts instances, for their names.
    pub instances: Cell<u32>,
    /// The command lines that were run, not yet written down.
    pub commands: RefCell<Vec<Vec<String>>>,
}

/// What was found of one metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The metric.
    pub metric: String,
    /// What was found.
    pub value: Value,
    /// What the metric means, if the catalogue does not know it.
    pub means: Option<Metric>,
}

impl Found {
    /// A figure.
    pub fn number(metric: &str, value: f64) -> Found {
        Found { metric: metric.into(), value: Value::Number(value), means: None }
    }

    /// A fact.
    pub fn text(metric: &str, value: impl Into<String>) -> Found {
        Found { metric: metric.into(), value: Value::Text(value.into()), means: None }
    }

    /// Nothing.
    pub fn failed(metric: &str, why: impl Into<String>) -> Found {
        Found { metric: metric.into(), value: Value::Failed(why.into()), means: None }
    }
}

/// Why there is no sample.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The executor cannot do it, or failed.
    #[error(transparent)]
    Executor(#[from] executor::Error),
    /// A command failed.
    #[error(transparent)]
    Process(#[from] process::Error),
    /// The helper failed, or something else was not as it should be.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// The whole run is to end.
    pub fn is_interruption(&self) -> bool {
        match self {
            Error::Executor(error) => error.is_interruption(),
            Error::Process(error) => matches!(error, process::Error::Interrupted),
            Error::Other(_) => false,
        }
    }
}

/// Something that is measured.
pub trait Probe {
    /// The names of the probes in the catalogue that its samples are for.
    fn names(&self) -> Vec<&'static str>;

    /// What it finds is counted, so one round is enough.
    fn is_exact(&self) -> bool {
        false
    }

    /// Whether a first look has it.
    fn is_quick(&self) -> bool {
        true
    }

    /// How much its samples are worth where time is short, beside others that have 1.
    fn weight(&self) -> f64 {
        1.0
    }

    /// How many instances a sample starts: what it is expected to take follows from it.
    fn starts(&self) -> f64 {
        1.0
    }

    /// Seconds that a sample takes beside the starts.
    fn seconds(&self) -> f64 {
        0.0
    }

    /// Whether it finds this metric of its probe. Several may share a probe.
    fn covers(&self, _metric: &str) -> bool {
        true
    }

    /// One sample. The name of the probe stands beside each metric.
    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error>;
}

impl Context {
    /// A name for a new instance.
    pub fn name(&self) -> String {
        self.instances.set(self.instances.get() + 1);
        format!("{}-{}", self.spawner.run, self.instances.get())
    }

    /// A job of the helper in a new instance.
    pub fn helper<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Job {
        Job::helper(self.name(), arguments)
    }

    /// How long an executor takes to run an instance, as far as is known.
    pub fn start_of(&self, executor: &str) -> Duration {
        let starts = self.starts.borrow();
        starts.iter().find(|(name, _)| name == executor).map_or(Duration::ZERO, |(_, took)| *took)
    }

    /// Notes a command line.
    pub fn note(&self, invocation: &process::Invocation) {
        self.commands.borrow_mut().push(invocation.argv.clone());
    }

    /// Runs a job of the helper to its end, and returns what it said, line by line.
    pub fn run_helper(&self, executor: &dyn Executor, job: &Job) -> Result<Vec<Json>, Error> {
        let invocation = executor.run(job)?;
        self.note(&invocation);
        let mut running = self.spawner.spawn(&invocation)?;
        running.close_stdin();
        let finished = running.finish(PATIENCE)?;
        let said: Vec<Json> = finished.output.lines().filter_map(spoken).collect();
        if let Some(error) = said.iter().find_map(|line| line.get("error")) {
            return Err(Error::Other(format!("the helper says: {error}")));
        }
        match said.is_empty() {
            // Its exit status says why, if anything does.
            true => match finished.ok() {
                Ok(_) => Err(Error::Other("the helper said nothing".into())),
                Err(error) => Err(error.into()),
            },
            false => Ok(said),
        }
    }

    /// Waits for a while, or until the run is to end.
    pub fn pause(&self, time: Duration) -> Result<(), Error> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.spawner.interrupt.check().map_err(|_| process::Error::Interrupted)?;
            std::thread::sleep(Duration::from_millis(20).min(end.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }
}

/// What the helper says in a line, if the line is one of its.
pub fn spoken(line: &str) -> Option<Json> {
    let at = line.find(MARKER)?;
    serde_json::from_str(line[at + MARKER.len()..].trim()).ok()
}

/// All probes that there are, in the order of the catalogue.
pub fn all() -> Vec<Box<dyn Probe>> {
    let starts = start::all().into_iter().map(|part| Box::new(part) as Box<dyn Probe>);
    let others: Vec<Box<dyn Probe>> = vec![
        Box::new(timeline::BootTimeline),
        Box::new(exits::Exits),
        Box::new(memory::Memory),
        Box::new(density::Density),
        Box::new(micro::Micro::all()),
        Box::new(disk::Disk),
        Box::new(network::Network),
        // Before the services, which leave their images until the end of the run.
        Box::new(effort::Effort),
        Box::new(service::Service::default()),
        Box::new(size::Size),
        Box::new(neighbour::Neighbour),
        Box::new(persistence::Persistence),
    ];
    let isolation = isolation::all().into_iter().map(|part| Box::new(part) as Box<dyn Probe>);
    starts.chain(others).chain(isolation).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_is_heard_in_a_noisy_console() {
        let line = "[    0.1] kernel says rvmm-probe {\"clock\":5}\r";
        assert_eq!(spoken(line), Some(serde_json::json!({"clock": 5})));
        assert_eq!(spoken("rvmm-probe {broken"), None);
        assert_eq!(spoken("nothing"), None);
    }

    #[test]
    fn every_probe_is_in_the_catalogue() {
        for probe in all() {
            for name in probe.names() {
                assert!(crate::bench::catalogue::probe(name).is_some(), "{name}");
            }
        }
    }
}
