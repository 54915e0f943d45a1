//! What a run leaves: a folder of plain files, read and written here.
//!
//! ```text
//! host.json        the machine, what was measured and what was left out        Host
//! plan.json        what was to be done                                         Plan
//! samples.jsonl    one line for each figure or fact, in the order of time      Sample
//! commands.jsonl   the exact command lines, each once                          CommandLine
//! end.json         that the run came to its end; not there if it was killed    End
//! ```
//!
//! Lines are appended whole. What a kill left of a last line is passed over when the folder is read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of the format, in `plan.json`.
pub const FORMAT: u32 = 1;

/// Bytes of one file of a result folder at most.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Why a result folder cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not there or cannot be read.
    #[error("cannot read {path:?}, which a folder of results has")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path:?}, line {line}, is not what a folder of results has there")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is too large to be one of ours.
    #[error("{path:?} has {bytes} bytes, more than {MAX_FILE_BYTES}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another version's.
    #[error("{path:?} has format {found}, and this program reads format {FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The format that it says it has.
        found: u32,
    },
    /// A file cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A run: what lies in its folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The machine.
    pub host: Host,
    /// What was to be done.
    pub plan: Plan,
    /// What was found, in the order of time.
    pub samples: Vec<Sample>,
    /// The command lines that were run.
    pub commands: Vec<CommandLine>,
    /// How the run ended. `None`: it was killed, or still runs.
    pub end: Option<End>,
}

/// The machine that the figures are from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// When the run began, in UTC, by RFC 3339.
    pub date: String,
    /// Its processors.
    pub cpu: Cpu,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Release of the host's kernel.
    pub kernel: String,
    /// The distribution's own name for itself.
    pub os: String,
    /// What `rvmm doctor` calls this KVM: `hardware`, `nested`, `pvm`, `none`, ….
    pub kvm: String,
    /// Under which hypervisor this host itself runs, if it does.
    pub virtualisation: Option<String>,
    /// `v1`, `v2` or `hybrid`.
    pub cgroups: String,
    /// rvmm itself.
    pub rvmm: Program,
    /// Commit of rvmm, where it runs in its source tree.
    pub commit: Option<String>,
    /// Every executor that was asked for or looked for, in the order in which they are shown.
    pub executors: Vec<ExecutorInfo>,
    /// Programs that probes use: load generators and the like.
    pub tools: Vec<Program>,
    /// Load average over 1, 5 and 15 minutes, before the run.
    pub load: [f64; 3],
    /// What makes figures of this host unrepresentative.
    pub warnings: Vec<Warning>,
}

/// The processors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// The model's name.
    pub model: String,
    /// How many.
    pub count: u32,
    /// MHz, where the kernel says.
    pub mhz: Option<f64>,
    /// The frequency governor, where there is one.
    pub governor: Option<String>,
}

/// A program and its version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// The line that it says about itself.
    pub version: String,
}

/// An executor: one way to run the work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecutorInfo {
    /// Its name, as in `--with`, and in samples.
    pub name: String,
    /// For people.
    pub title: String,
    /// What separates the work from the host.
    pub isolation: Isolation,
    /// What it says about itself.
    pub version: Option<String>,
    /// Why it is not in this run.
    pub left_out: Option<String>,
}

/// What separates the work from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Nothing: a process of the host.
    None,
    /// Namespaces and control groups on the host's kernel.
    Container,
    /// A small virtual machine with a kernel of its own, made for this work.
    Microvm,
    /// A virtual machine with a whole operating system.
    FullVm,
}

/// Something that makes figures unrepresentative.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// A short name: `pvm`, `governor`, `load`, ….
    pub code: String,
    /// A sentence.
    pub text: String,
    /// The probes whose figures it touches; empty: all.
    #[serde(default)]
    pub probes: Vec<String>,
    /// The executors whose figures it touches; empty: all.
    #[serde(default)]
    pub executors: Vec<String>,
}

/// What was to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the run; it is in the names of all instances that the run made.
    pub run: String,
    /// The command line of `rvmm compare` itself.
    pub command: Vec<String>,
    /// `quick`, `normal`, or `custom`.
    pub kind: String,
    /// The image.
    pub image: String,
    /// Its digest.
    pub image_id: Option<String>,
    /// From this the order of all measurements follows.
    pub seed: u64,
    /// What is asked of intervals: 0.95.
    pub confidence: f64,
    /// Names of the executors, in the order in which they are shown. The first container is what others are set beside.
    pub executors: Vec<String>,
    /// The executor that the others are compared to first.
    pub baseline: String,
    /// What is measured, in the order in which it is shown.
    pub probes: Vec<PlannedProbe>,
    /// What the samples' metrics mean, in the order in which they are shown.
    pub metrics: Vec<Metric>,
}

/// A probe of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedProbe {
    /// Its name, as in `--probe`.
    pub name: String,
    /// For people.
    pub title: String,
    /// Rounds that count, in each of which every executor has its turn once.
    pub runs: u32,
    /// Rounds before, which do not count.
    pub warmups: u32,
    /// Why it is not done.
    #[serde(default)]
    pub left_out: Option<String>,
}

/// What a metric means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// The probe.
    pub probe: String,
    /// Its name, as in samples.
    pub name: String,
    /// For people, in a few words.
    pub title: String,
    /// What its numbers count; [`Unit::Text`] for facts.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
    /// The number is counted and not sampled: one is enough, and two that differ do differ.
    #[serde(default)]
    pub exact: bool,
}

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// Bytes in a second.
    BytesPerSecond,
    /// Operations, requests, … in a second.
    PerSecond,
    /// Things.
    Count,
    /// A part of a whole, where 1 is the whole.
    Share,
    /// No number: a fact.
    Text,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
    /// It is neither.
    None,
}

/// One figure or one fact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The probe.
    pub probe: String,
    /// What of it.
    pub metric: String,
    /// In which executor.
    pub executor: String,
    /// Which round of its probe, from zero.
    pub round: u32,
    /// Which measurement of the whole run, from zero: the order in which things happened.
    pub order: u32,
    /// Seconds since the run began, at the end of the measurement.
    pub at: f64,
    /// What its numbers count.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
    /// What was found: `"number": 1.5`, `"text": "…"` or `"failed": "…"`.
    #[serde(flatten)]
    pub value: Value,
    /// What else went on.
    pub noise: Noise,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// A figure.
    Number(f64),
    /// A fact.
    Text(String),
    /// Nothing, and why.
    Failed(String),
}

/// What went on beside a measurement, over its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// Processor time that the hypervisor below took, as a share of all processors' time.
    pub steal: f64,
    /// Processors that were busy, as a share of all: the measured work and everything beside it.
    pub busy: f64,
}

/// A command line that was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommandLine {
    /// For which probe.
    pub probe: String,
    /// In which executor.
    pub executor: String,
    /// Program and arguments.
    pub argv: Vec<String>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Everything that was planned has been done.
    pub complete: bool,
    /// Seconds since the run began.
    pub at: f64,
    /// Why it is not complete.
    #[serde(default)]
    pub why: Option<String>,
}

impl Results {
    /// Reads a result folder, whole or partial.
    pub fn open(directory: &Path) -> Result<Results, Error> {
        let plan: Plan = read_one(&directory.join("plan.json"))?;
        if plan.format != FORMAT {
            return Err(Error::Format { path: directory.join("plan.json"), found: plan.format });
        }
        let end = match read_one(&directory.join("end.json")) {
            Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        Ok(Results {
            host: read_one(&directory.join("host.json"))?,
            plan,
            samples: read_lines(&directory.join("samples.jsonl"))?,
            commands: read_lines(&directory.join("commands.jsonl"))?,
            end,
        })
    }

    /// Whether everything that was planned has been done.
    pub fn complete(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.complete)
    }

    /// Writes a whole result folder at once.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        let lines = |path: &Path, text: String| {
            fs::write(path, text).map_err(|source| Error::Write { path: path.into(), source })
        };
        fs::create_dir_all(directory).map_err(|source| Error::Write { path: directory.into(), source })?;
        write_one(&directory.join("host.json"), &self.host)?;
        write_one(&directory.join("plan.json"), &self.plan)?;
        lines(&directory.join("samples.jsonl"), self.samples.iter().map(line).collect())?;
        lines(&directory.join("commands.jsonl"), self.commands.iter().map(line).collect())?;
        match &self.end {
            Some(end) => write_one(&directory.join("end.json"), end),
            None => Ok(()),
        }
    }
}

impl Plan {
    /// What a metric means; one that the plan does not know stands for itself.
    pub fn metric(&self, probe: &str, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.probe == probe && metric.name == name)
    }
}

impl Host {
    /// An executor's title, or its name if the host does not know it.
    pub fn title<'a>(&'a self, executor: &'a str) -> &'a str {
        self.executors.iter().find(|info| info.name == executor).map_or(executor, |info| &info.title)
    }
}

impl Sample {
    /// The figure, if it is one.
    pub fn number(&self) -> Option<f64> {
        match self.value {
            Value::Number(number) => Some(number),
            _ => None,
        }
    }
}

/// One line of a file of lines.
pub(super) fn line<T: Serialize>(value: &T) -> String {
    // Nothing in these types can fail to serialize: no maps, and numbers that are not finite become null.
    serde_json::to_string(value).unwrap_or_default() + "\n"
}

/// Replaces a file in one step.
pub(super) fn write_one<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let write = || {
        let temporary = path.with_extension("new");
        fs::write(&temporary, serde_json::to_string_pretty(value)? + "\n")?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| Error::Write { path: path.into(), source })
}

fn read(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read { path: path.into(), source };
    let bytes = fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(Error::TooLarge { path: path.into(), bytes });
    }
    let bytes = fs::read(path).map_err(failed)?;
    // A line that was cut may end within a character.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_one<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    serde_json::from_str(&read(path)?).map_err(|source| Error::Parse { path: path.into(), line: 1, source })
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, Error> {
    let text = match read(path) {
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        other => other?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(index, line)| {
        serde_json::from_str(line).map_err(|source| Error::Parse {
            path: path.into(),
            line: index + 1,
            source,
        })
    };
    whole.lines().enumerate().filter(|(_, line)| !line.is_empty()).map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing;

    #[test]
    fn saved_folder_is_read_back_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let results = testing::results(1);
        results.save(directory.path()).unwrap();
        assert_eq!(Results::open(directory.path()).unwrap(), results);
    }

    #[test]
    fn folder_of_a_killed_run_is_read_up_to_the_cut() {
        let directory = tempfile::tempdir().unwrap();
        let results = Results { end: None, ..testing::results(1) };
        results.save(directory.path()).unwrap();
        let path = directory.path().join("samples.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        let last_line = text.trim_end().rfind('\n').unwrap();
        for cut in [last_line + 1, last_line + 2, text.len() - 1] {
            fs::write(&path, &text[..cut]).unwrap();
            let partial = Results::open(directory.path()).unwrap();
            assert!(!partial.complete());
            assert_eq!(partial.samples[..], results.samples[..results.samples.len() - 1]);
        }
        fs::remove_file(&path).unwrap();
        assert!(Results::open(directory.path()).unwrap().samples.is_empty());
    }

    #[test]
    fn broken_line_is_an_error_that_says_where() {
        let directory = tempfile::tempdir().unwrap();
        testing::results(1).save(directory.path()).unwrap();
        let path = directory.path().join("samples.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen("\"probe\"", "\"prob\"", 1)).unwrap();
        assert!(matches!(Results::open(directory.path()), Err(Error::Parse { line: 1, .. })));
    }

    #[test]
    fn other_format_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut results = testing::results(1);
        results.plan.format = FORMAT + 1;
        results.save(directory.path()).unwrap();
        assert!(matches!(Results::open(directory.path()), Err(Error::Format { .. })));
    }

    #[test]
    fn value_is_a_member_of_its_line() {
        let sample = testing::results(1).samples[0].clone();
        let value: serde_json::Value = serde_json::from_str(&line(&sample)).unwrap();
        assert_eq!(value["number"].as_f64(), sample.number());
        let sample = Sample { value: Value::Failed("no".into()), ..sample };
        assert!(line(&sample).contains(r#""failed":"no""#));
    }
}
