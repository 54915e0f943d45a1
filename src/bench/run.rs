//! The measuring itself: rounds in random order, noise beside each sample, everything written down at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

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

/// Beneath this many seconds for a sample, an executor has a warm-up where time is short.
const WARM_SECONDS: f64 = 1.0;

/// One executor in one probe.
#[derive(Clone, Debug)]
struct Cell {
    /// Seconds that a sample was expected to take before there was one.
    expected: f64,
    used: Duration,
    /// Samples, warm-ups with them.
    done: u32,
    /// Samples that count.
    taken: u32,
    /// Samples that it is to have.
    target: u32,
    /// Where in the rounds it begins, if it has its turn in some only.
    phase: f64,
    given_up: bool,
}

impl Cell {
    fn cost(&self, correction: f64) -> f64 {
        match self.done {
            0 => self.expected * correction,
            done => self.used.as_secs_f64() / f64::from(done),
        }
    }
}

/// The cells of a probe, in the order of the executors, and what they have in common.
#[derive(Clone, Debug, Default)]
struct Row {
    cells: Vec<Cell>,
    weight: f64,
    runs: u32,
    warmups: u32,
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
        let mut random = Xoshiro256PlusPlus::seed_from_u64(self.plan.seed);
        let mut rows: Vec<Row> =
            probes.iter().map(|probe| self.row(&**probe, executors, &mut random)).collect();
        for (index, probe) in probes.iter_mut().enumerate() {
            self.probe(&mut **probe, executors, &mut rows, index, &mut random, observe)?;
        }
        Ok(())
    }

    fn row(
        &self,
        probe: &dyn Probe,
        executors: &[Box<dyn Executor>],
        random: &mut Xoshiro256PlusPlus,
    ) -> Row {
        let names = probe.names();
        let planned =
            self.plan.probes.iter().find(|planned| Some(planned.name.as_str()) == names.first().copied());
        let (runs, warmups) = planned.map_or((1, 0), |planned| (planned.runs, planned.warmups));
        let cells = executors.iter().map(|executor| Cell {
            expected: probe.seconds() + probe.starts() * self.context.start_of(executor.name()).as_secs_f64(),
            used: Duration::ZERO,
            done: 0,
            taken: 0,
            target: runs,
            phase: random.random(),
            given_up: false,
        });
        Row { cells: cells.collect(), weight: probe.weight(), runs, warmups }
    }

    /// Divides what is left of the time among everything that is still to be measured, from one probe on. Returns the seconds that it
    /// will take.
    fn replan(&self, rows: &mut [Row], from: usize) -> f64 {
        // What an executor took where it was measured says how far expectations are off elsewhere.
        let executors = rows.first().map_or(0, |row| row.cells.len());
        let corrections: Vec<f64> = (0..executors)
            .map(|index| {
                let measured = rows.iter().map(|row| &row.cells[index]).filter(|cell| cell.done > 0);
                let (used, expected) = measured.fold((0.0, 0.0), |(used, expected), cell| {
                    (used + cell.used.as_secs_f64(), expected + cell.expected * f64::from(cell.done))
                });
                if expected > 0.0 { (used / expected).clamp(0.2, 5.0) } else { 1.0 }
            })
            .collect();
        let mut cells = vec![];
        for row in &rows[from..] {
            for (cell, correction) in row.cells.iter().zip(&corrections) {
                let most = if cell.given_up { cell.taken } else { row.runs };
                let cost = cell.cost(*correction);
                cells.push(schedule::Cell { cost, weight: row.weight, taken: cell.taken, most });
            }
        }
        let targets: Vec<u32> = match self.budget {
            Some(budget) => {
                schedule::allocate(&cells, budget.saturating_sub(self.measuring.elapsed()).as_secs_f64())
            }
            None => cells.iter().map(|cell| cell.most).collect(),
        };
        let all = rows[from..].iter_mut().flat_map(|row| &mut row.cells);
        for (cell, target) in all.zip(&targets) {
            cell.target = *target;
        }
        cells
            .iter()
            .zip(&targets)
            .map(|(cell, target)| f64::from(target - cell.taken.min(*target)) * cell.cost)
            .sum()
    }

    fn probe(
        &mut self,
        probe: &mut dyn Probe,
        executors: &[Box<dyn Executor>],
        rows: &mut [Row],
        index: usize,
        random: &mut Xoshiro256PlusPlus,
        observe: &mut dyn FnMut(&Progress),
    ) -> Result<(), Error> {
        let title = probe.names().join(",");
        let warmups = rows[index].warmups;
        for round in 0.. {
            let mut left = self.replan(rows, index);
            let rounds = rows[index].cells.iter().map(|cell| cell.target).max().unwrap_or(0);
            let warm_up = round < warmups;
            if round >= rounds + warmups {
                break;
            }
            let mut turn: Vec<usize> = (0..executors.len()).collect();
            turn.shuffle(random);
            for executor in turn {
                let cell = &rows[index].cells[executor];
                let cost = cell.cost(1.0);
                let due = match warm_up {
                    // Where time is short, only what takes little of it is done without being of use.
                    true => {
                        cell.target > 1 && self.fits(cost) && (self.budget.is_none() || cost < WARM_SECONDS)
                    }
                    false => {
                        schedule::is_due(cell.taken, cell.target, round - warmups, rounds, cell.phase)
                            && self.fits(cost)
                    }
                };
                if cell.given_up || !due {
                    continue;
                }
                let elapsed = self.measuring.elapsed().as_secs_f64();
                observe(&Progress {
                    probe: title.clone(),
                    executor: executors[executor].name().into(),
                    done: elapsed / (elapsed + left).max(1e-9),
                    left: Duration::try_from_secs_f64(left).ok(),
                });
                let begun = Instant::now();
                let went_well = self.sample(probe, &*executors[executor], round, warm_up)?;
                let cell = &mut rows[index].cells[executor];
                cell.used += begun.elapsed();
                cell.done += 1;
                cell.taken += u32::from(!warm_up);
                cell.given_up = !went_well;
                left = (left - begun.elapsed().as_secs_f64()).max(0.0);
            }
        }
        for (executor, cell) in executors.iter().zip(&rows[index].cells) {
            if cell.taken == 0 && !cell.given_up {
                let why = match cell.cost(1.0) {
                    cost if cost < 2.0 => "no time was left in a quick run".into(),
                    cost => format!("no time was left in a quick run: a sample takes some {cost:.0} s"),
                };
                self.write_failures(probe, &**executor, 0, &why)?;
            }
        }
        Ok(())
    }

    /// Whether there is time for a sample that takes so long.
    fn fits(&self, cost: f64) -> bool {
        let left = self.budget.map(|budget| budget.saturating_sub(self.measuring.elapsed()).as_secs_f64());
        left.is_none_or(|left| left > 0.0 && cost <= left.max(WARM_SECONDS))
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
            Err(error) => (self.failures(probe, &crate::error_chain(&error)), false),
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
        probe: &dyn Probe,
        executor: &dyn Executor,
        round: u32,
        why: &str,
    ) -> Result<(), Error> {
        let failures = self.failures(probe, why);
        self.write(executor, round, Noise::default(), failures)
    }

    /// What is said of each metric of a probe that could not be taken.
    fn failures(&self, probe: &dyn Probe, why: &str) -> Vec<(&'static str, Found)> {
        let names = probe.names();
        let metrics = self.plan.metrics.iter().filter(|metric| probe.covers(&metric.name));
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

mod schedule;
#[cfg(test)]
mod tests;
