//! The measuring itself: rounds in random order, noise beside each sample, everything written down at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;

use super::executor::Executor;
use super::probe::{Context, Found, Probe};
use super::results::{self, CommandLine, End, Metric, Noise, Plan, Sample, Unit, Value, line, write_one};

/// Why measuring stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody wants it to end.
    #[error("interrupted")]
    Interrupted,
    /// What was found cannot be written down.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The plan cannot be written down.
    #[error(transparent)]
    Results(#[from] results::Error),
}

/// How far a run has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// What is being measured.
    pub probe: String,
    /// In which executor.
    pub executor: String,
    /// What is done, as a share of all.
    pub done: f64,
    /// How long it will take.
    pub left: Option<Duration>,
}

/// Appends to a result folder, line by line.
pub struct Writer {
    directory: PathBuf,
    samples: File,
    commands: File,
    known_commands: Vec<(String, String, usize)>,
}

impl Writer {
    /// In a folder that has no samples yet.
    pub fn new(directory: &Path) -> Result<Writer, Error> {
        let open = |name: &str| {
            let path = directory.join(name);
            let opened = OpenOptions::new().create_new(true).append(true).open(&path);
            opened.map_err(|source| Error::Write { path, source })
        };
        Ok(Writer {
            samples: open("samples.jsonl")?,
            commands: open("commands.jsonl")?,
            directory: directory.into(),
            known_commands: vec![],
        })
    }

    fn sample(&mut self, sample: &Sample) -> Result<(), Error> {
        let written = self.samples.write_all(line(sample).as_bytes());
        written.map_err(|source| Error::Write { path: self.directory.join("samples.jsonl"), source })
    }

    /// A command line, unless one like it has been noted for that probe and executor: they differ in names and ports only.
    fn command(&mut self, probe: &str, executor: &str, argv: Vec<String>) -> Result<(), Error> {
        // Alike are those that the helper, or whatever runs, has the same verb in.
        let shape = shape(&argv);
        let key = (probe.to_owned(), executor.to_owned(), shape);
        if self.known_commands.contains(&key) {
            return Ok(());
        }
        self.known_commands.push(key);
        let command = CommandLine { probe: probe.into(), executor: executor.into(), argv };
        let written = self.commands.write_all(line(&command).as_bytes());
        written.map_err(|source| Error::Write { path: self.directory.join("commands.jsonl"), source })
    }

    /// Says how the run ended.
    pub fn end(&self, end: &End) -> Result<(), Error> {
        Ok(write_one(&self.directory.join("end.json"), end)?)
    }
}

fn shape(argv: &[String]) -> usize {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    for word in argv {
        let without_numbers: String = word.chars().filter(|c| !c.is_ascii_digit()).collect();
        without_numbers.hash(&mut hasher);
    }
    hasher.finish() as usize
}

/// Processor time of the whole host, in ticks: all, busy, stolen.
#[derive(Clone, Copy, Debug, Default)]
struct Ticks {
    all: f64,
    busy: f64,
    stolen: f64,
}

impl Ticks {
    fn now() -> Ticks {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = text.lines().next().unwrap_or_default();
        // user nice system idle iowait irq softirq steal; what follows is counted in user and nice already.
        let numbers: Vec<f64> =
            line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0.0);
        let all: f64 = numbers.iter().sum();
        Ticks { all, stolen: at(7), busy: all - at(3) - at(4) - at(7) }
    }

    fn since(self, before: Ticks) -> Noise {
        let all = self.all - before.all;
        let share = |part: f64| if all > 0.0 { (part / all).clamp(0.0, 1.0) } else { 0.0 };
        Noise { steal: share(self.stolen - before.stolen), busy: share(self.busy - before.busy) }
    }
}

/// One executor in one probe.
#[derive(Clone, Debug, Default)]
struct Cell {
    used: Duration,
    taken: u32,
    target: u32,
    given_up: bool,
}

impl Cell {
    fn cost(&self) -> f64 {
        self.used.as_secs_f64() / f64::from(self.taken.max(1))
    }
}

/// How many samples each may take, so that all together stay within the time: what the cheap ones do not need is for the dear.
/// Each has at least one.
fn allocate(costs: &[f64], runs: u32, budget: f64) -> Vec<u32> {
    let wanted: Vec<f64> = costs.iter().map(|cost| cost * f64::from(runs)).collect();
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let mut left = budget;
    let mut targets = vec![0; costs.len()];
    for (done, index) in order.iter().enumerate() {
        let share = left / (costs.len() - done) as f64;
        let given = wanted[*index].min(share.max(0.0));
        let runs_given =
            if costs[*index] > 0.0 { (given / costs[*index] + 1e-9).floor() } else { f64::from(runs) };
        targets[*index] = (runs_given as u32).clamp(1, runs.max(1));
        left -= f64::from(targets[*index]) * costs[*index];
    }
    targets
}

/// A run under way.
pub struct Session<'a> {
    /// What probes are given.
    pub context: &'a Context,
    /// What is to be done. Metrics that only a probe knows are added as they are found.
    pub plan: Plan,
    /// Where everything goes.
    pub writer: Writer,
    /// The result folder.
    pub directory: PathBuf,
    /// When the run began.
    pub started: Instant,
    /// How long all measuring may take; `None`: as long as it takes.
    pub budget: Option<Duration>,
    /// When measuring began.
    pub measuring: Instant,
    /// Counts measurements.
    pub order: u32,
}

impl Session<'_> {
    /// Takes all samples. An executor that fails in a probe is not asked again in that probe.
    pub fn measure(
        &mut self,
        probes: &mut [Box<dyn Probe>],
        executors: &[Box<dyn Executor>],
        observe: &mut dyn FnMut(&Progress),
    ) -> Result<(), Error> {
        self.measuring = Instant::now();
        let begun = self.measuring;
        let weights: Vec<f64> = probes.iter().map(|probe| probe.weight()).collect();
        let all: f64 = weights.iter().sum();
        let mut random = Xoshiro256PlusPlus::seed_from_u64(self.plan.seed);
        let mut before = 0.0;
        for (index, probe) in probes.iter_mut().enumerate() {
            let rest: f64 = weights[index..].iter().sum();
            let budget = self.budget.map(|budget| {
                budget.saturating_sub(begun.elapsed()).as_secs_f64() * weights[index] / rest.max(1e-9)
            });
            let share = (before / all.max(1e-9), weights[index] / all.max(1e-9));
            self.probe(&mut **probe, executors, budget, &mut random, &mut |name, executor, done| {
                let done = share.0 + share.1 * done;
                let elapsed = begun.elapsed().as_secs_f64();
                let left = (done > 0.02).then(|| elapsed * (1.0 - done) / done);
                let left = left.and_then(|left| Duration::try_from_secs_f64(left).ok());
                observe(&Progress { probe: name.into(), executor: executor.into(), done, left });
            })?;
            before += weights[index];
        }
        Ok(())
    }

    fn probe(
        &mut self,
        probe: &mut dyn Probe,
        executors: &[Box<dyn Executor>],
        budget: Option<f64>,
        random: &mut Xoshiro256PlusPlus,
        observe: &mut dyn FnMut(&str, &str, f64),
    ) -> Result<(), Error> {
        let names = probe.names();
        let title = names.join(",");
        let planned =
            self.plan.probes.iter().find(|planned| Some(planned.name.as_str()) == names.first().copied());
        let (runs, warmups) = planned.map_or((1, 0), |planned| (planned.runs, planned.warmups));
        let begun = Instant::now();
        let mut cells = vec![Cell { target: runs, ..Cell::default() }; executors.len()];
        for round in 0..warmups + runs {
            let mut turn: Vec<usize> = (0..executors.len()).collect();
            turn.shuffle(random);
            let warm_up = round < warmups;
            let mut rested = true;
            for index in turn {
                let cell = &cells[index];
                let late =
                    budget.is_some_and(|budget| begun.elapsed().as_secs_f64() > budget) && cell.taken > 0;
                if cell.given_up || cell.taken >= cell.target + warmups || late {
                    continue;
                }
                if self.budget.is_some_and(|budget| self.measuring.elapsed() > budget) {
                    if cell.taken == 0 {
                        self.write_failures(
                            &names,
                            &*executors[index],
                            round,
                            "no time was left in a quick run",
                        )?;
                    }
                    cells[index].given_up = true;
                    continue;
                }
                rested = false;
                let done: f64 =
                    cells.iter().map(|cell| f64::from(cell.taken) / f64::from(cell.target.max(1))).sum();
                observe(&title, executors[index].name(), (done / cells.len().max(1) as f64).min(1.0));
                let sample_begun = Instant::now();
                let went_well = self.sample(probe, &*executors[index], round, warm_up)?;
                let cell = &mut cells[index];
                cell.used += sample_begun.elapsed();
                cell.taken += 1;
                cell.given_up = !went_well;
            }
            if rested {
                break;
            }
            if let Some(budget) = budget {
                let costs: Vec<f64> = cells.iter().map(Cell::cost).collect();
                for (cell, target) in cells.iter_mut().zip(allocate(&costs, runs + warmups, budget)) {
                    cell.target = target.saturating_sub(warmups).max(1);
                }
            }
        }
        Ok(())
    }

    /// One sample. Returns whether it is worth while to ask for another.
    fn sample(
        &mut self,
        probe: &mut dyn Probe,
        executor: &dyn Executor,
        round: u32,
        warm_up: bool,
    ) -> Result<bool, Error> {
        self.context.spawner.interrupt.check().map_err(|_| Error::Interrupted)?;
        let ticks = Ticks::now();
        let result = probe.sample(self.context, executor);
        let noise = Ticks::now().since(ticks);
        let names = probe.names();
        for argv in self.context.commands.take() {
            self.writer.command(names.first().copied().unwrap_or_default(), executor.name(), argv)?;
        }
        let (found, went_well) = match result {
            Ok(found) => (found, true),
            Err(error) if error.is_interruption() => return Err(Error::Interrupted),
            Err(error) => (self.failures(&names, &crate::error_chain(&error)), false),
        };
        // A warm-up's figures are of no use; what fails in it may not be tried again.
        let counts = |found: &(&'static str, Found)| !warm_up || matches!(found.1.value, Value::Failed(_));
        self.write(executor, round, noise, found.into_iter().filter(counts).collect())?;
        self.order += 1;
        Ok(went_well)
    }

    fn write(
        &mut self,
        executor: &dyn Executor,
        round: u32,
        noise: Noise,
        found: Vec<(&'static str, Found)>,
    ) -> Result<(), Error> {
        let at = self.started.elapsed().as_secs_f64();
        for (probe, found) in found {
            let metric = self.metric(probe, &found)?;
            self.writer.sample(&Sample {
                probe: probe.into(),
                executor: executor.name().into(),
                round,
                order: self.order,
                at,
                unit: metric.unit,
                better: metric.better,
                metric: found.metric,
                value: match found.value {
                    Value::Number(number) if !number.is_finite() => {
                        Value::Failed(format!("{number} is no figure"))
                    }
                    value => value,
                },
                noise,
            })?;
        }
        Ok(())
    }

    /// Says of each metric of a probe why there is none.
    fn write_failures(
        &mut self,
        names: &[&'static str],
        executor: &dyn Executor,
        round: u32,
        why: &str,
    ) -> Result<(), Error> {
        let failures = self.failures(names, why);
        self.write(executor, round, Noise::default(), failures)
    }

    /// What is said of each metric of a probe that could not be taken.
    fn failures(&self, names: &[&'static str], why: &str) -> Vec<(&'static str, Found)> {
        let metrics = self.plan.metrics.iter();
        metrics
            .filter_map(|metric| {
                let name = names.iter().find(|name| **name == metric.probe)?;
                Some((*name, Found::failed(&metric.name, why)))
            })
            .collect()
    }

    /// What a metric means. One that the plan does not have is added to it.
    fn metric(&mut self, probe: &str, found: &Found) -> Result<Metric, Error> {
        if let Some(metric) = self.plan.metric(probe, &found.metric) {
            return Ok(metric.clone());
        }
        let unit = if matches!(found.value, Value::Text(_)) { Unit::Text } else { Unit::Count };
        let metric = found.means.clone().unwrap_or_else(|| Metric {
            probe: probe.into(),
            name: found.metric.clone(),
            title: found.metric.clone(),
            unit,
            better: results::Better::None,
            exact: false,
        });
        self.plan.metrics.push(metric.clone());
        write_one(&self.directory.join("plan.json"), &self.plan)?;
        Ok(metric)
    }
}

#[cfg(test)]
mod tests;
