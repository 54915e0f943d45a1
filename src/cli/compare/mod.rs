//! `rvmm compare`: the trade-off measured on this host.

mod progress;
mod reports;

use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::engine_program;
use crate::bench::compare::{self, Request};
use crate::bench::interrupt::Interrupt;
use crate::bench::{Results, host};
use crate::container::roots::Roots;
use crate::program;
use reports::DiffFormat;

/// Interrupted, but with what there was until then.
const EXIT_PARTIAL: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  rvmm compare --quick
      a first look, in a few minutes, with busybox and everything that is installed
  rvmm compare --probe start,memory --with rvmm-native,rvmm-microvm,docker --runs 50 debian
      start and memory of these three, 50 times each
  rvmm compare report compare-2026-11-27T18-00-00Z --format markdown
      the same results again, in another form
  rvmm compare diff compare-A compare-B
      what has changed between two runs

Probes: start, timeline, memory, cpu, syscall, fault, fork, switch, size, isolation, persistence, …; docs/probes says what each
measures. Executors: process, rvmm-native, crun, runc, youki, docker, podman, rvmm-microvm, qemu-microvm, full-vm-rvmm, full-vm-qemu.";

/// Compare containers, microVMs and virtual machines on this host, with figures
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct CompareArguments {
    #[command(subcommand)]
    command: Option<CompareCommand>,
    #[command(flatten)]
    measure: MeasureArguments,
}

#[derive(clap::Args)]
struct MeasureArguments {
    /// The image [default: busybox, as scripts/build-images makes it]
    image: Option<String>,
    /// A first look, in at most five minutes
    #[arg(long)]
    quick: bool,
    /// Samples of each figure [default: 30, and what time allows with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: Option<u32>,
    /// From this follows the order of all measurements [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What to measure [default: everything]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    probe: Vec<String>,
    /// In what to measure it [default: everything that is installed]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    with: Vec<String>,
    /// The folder for the results, which is made [default: compare-DATE]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Another rvmm than this one
    #[arg(long, value_name = "FILE", hide = true)]
    rvmm: Option<PathBuf>,
    /// Another helper than the one beside the guests' kernels
    #[arg(long, value_name = "FILE", hide = true)]
    helper: Option<PathBuf>,
    /// Memory that idle instances take on purpose, for checks
    #[arg(long, value_name = "BYTES", hide = true, default_value_t = 0)]
    memory_on_purpose: u64,
    #[command(flatten)]
    report: reports::ReportArguments,
}

/// What to do with results that are there.
#[derive(clap::Subcommand)]
enum CompareCommand {
    /// Print results again
    Report {
        /// A folder of results
        directory: PathBuf,
        #[command(flatten)]
        report: reports::ReportArguments,
    },
    /// Set two runs beside each other
    Diff {
        /// The first folder
        first: PathBuf,
        /// The second folder
        second: PathBuf,
        /// How to print
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: DiffFormat,
    },
}

/// Clears up after a comparison that was killed; for rvmm's own use
#[derive(clap::Args)]
#[command(hide = true)]
pub struct GuardArguments {
    run: String,
    work: PathBuf,
    rvmm: PathBuf,
}

/// Waits for the end of a run.
pub fn guard(arguments: &GuardArguments) -> anyhow::Result<ExitCode> {
    compare::guard(&arguments.run, &arguments.work, &arguments.rvmm);
    Ok(ExitCode::SUCCESS)
}

/// Measures, or prints what was measured.
pub fn run(arguments: &CompareArguments) -> anyhow::Result<ExitCode> {
    match &arguments.command {
        None => measure(&arguments.measure),
        Some(CompareCommand::Report { directory, report }) => {
            reports::print(&Results::open(directory)?, report)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(CompareCommand::Diff { first, second, format }) => {
            let (first, second) = (Results::open(first)?, Results::open(second)?);
            reports::print_diff(&first, &second, *format)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn measure(arguments: &MeasureArguments) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("comparing needs root: it reads other processes' memory and drives runtimes; run it with sudo");
    }
    let request = request(arguments)?;
    let interrupt = Interrupt::by_signals().context("cannot take signals")?;
    let mut bar = progress::Bar::new(stderr().is_terminal());
    let results = compare::run(&request, &interrupt, &mut |progress| bar.show(progress));
    bar.clear();
    let results = results?;
    reports::print(&results, &arguments.report)?;
    eprintln!("results: {}", request.out.display());
    Ok(match results.complete() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(EXIT_PARTIAL),
    })
}

fn request(arguments: &MeasureArguments) -> anyhow::Result<Request> {
    let directory = program::directory().context("cannot find out where rvmm is")?;
    let beside = |name: &str| directory.join(name);
    let date = host::date().replace(':', "-");
    let seed = match arguments.seed {
        Some(seed) => seed,
        // Short, for whoever wants to type it again.
        None => u64::from(getrandom::u32().context("there are no random numbers")?),
    };
    let guests: Vec<PathBuf> = [directory.parent().map(|target| target.join("guest"))]
        .into_iter()
        .flatten()
        .chain(["target/guest", "/usr/local/share/rvmm", "/usr/share/rvmm"].map(PathBuf::from))
        .collect();
    let with_file = |name: &str| guests.iter().find(|guest| guest.join(name).exists()).cloned();
    let guest = with_file("initrd.cpio").unwrap_or_else(|| "target/guest".into());
    let guest = std::fs::canonicalize(&guest).unwrap_or(guest);
    let helper = || match with_file("rvmm-probe") {
        Some(guest) => guest.join("rvmm-probe"),
        None => beside("rvmm-probe"),
    };
    let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("cannot find {path:?}"));
    Ok(Request {
        image: arguments.image.clone(),
        quick: arguments.quick,
        runs: arguments.runs,
        seed,
        memory_on_purpose: arguments.memory_on_purpose,
        probes: arguments.probe.clone(),
        with: arguments.with.clone(),
        out: absolute(&arguments.out.clone().unwrap_or_else(|| format!("compare-{date}").into()))?,
        rvmm: absolute(&arguments.rvmm.clone().unwrap_or_else(|| beside("rvmm")))?,
        engine: engine_program::path()?,
        helper: absolute(&arguments.helper.clone().unwrap_or_else(helper))?,
        guest,
        work: Roots::find()?.data.join("compare"),
        command: std::env::args().collect(),
    })
}
