//! A whole run: what is there is looked for, made ready, measured, and cleared away.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{self, PipeWriter, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::catalogue::{self, BASELINE, EXECUTORS, PROBES};
use super::executor::engine::{Engine, Kind as EngineKind};
use super::executor::oci::Oci;
use super::executor::plain::Plain;
use super::executor::vm::{Kind as VmKind, Vm};
use super::executor::{Executor, Job};
use super::image;
use super::interrupt::Interrupt;
use super::probe::micro::Micro;
use super::probe::{self, Context, Probe};
use super::process::{RUN_VARIABLE, Spawner};
use super::results::{self, End, ExecutorInfo, FORMAT, Plan, PlannedProbe, Results, write_one};
use super::run::{self, Progress, Session, Writer};
use super::{host, results::Host};

/// The hidden subcommand that clears up after a run that was killed.
pub const GUARD: &str = "compare-guard";

/// When a quick run stops measuring, counted from its beginning: a measurement that has begun is ended, and clearing away
/// takes a while.
const QUICK_BUDGET: Duration = Duration::from_secs(255);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The image; `None`: busybox.
    pub image: Option<String>,
    /// A first look.
    pub quick: bool,
    /// Samples of each metric; `None`: as many as the kind of run has.
    pub runs: Option<u32>,
    /// From this follows the order.
    pub seed: u64,
    /// Bytes that idle instances take on purpose, for the check that they are found.
    pub memory_on_purpose: u64,
    /// Names of probes; empty: all.
    pub probes: Vec<String>,
    /// Names of executors; empty: all that are there.
    pub with: Vec<String>,
    /// The result folder, which is made.
    pub out: PathBuf,
    /// The `rvmm` to measure.
    pub rvmm: PathBuf,
    /// The program that the guard runs.
    pub engine: PathBuf,
    /// The helper.
    pub helper: PathBuf,
    /// Where guests' kernels and disks are.
    pub guest: PathBuf,
    /// Where this run may keep its own files.
    pub work: PathBuf,
    /// The command line itself, for the record.
    pub command: Vec<String>,
}

/// Why there is no run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such probe.
    #[error("there is no probe {name:?}; there are: {known}")]
    NoProbe {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// There is no such executor.
    #[error("there is no executor {name:?}; there are: {known}")]
    NoExecutor {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// None of the executors can be used.
    #[error("nothing can be compared here: {0}")]
    Nothing(String),
    /// A directory or file cannot be made.
    #[error("cannot make {path:?}")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder has results already.
    #[error("{0:?} has results already; choose another folder with --out")]
    Taken(PathBuf),
    /// The image cannot be made ready.
    #[error("cannot make the image ready")]
    Image(#[source] image::Error),
    /// Measuring failed.
    #[error("cannot go on measuring")]
    Run(#[source] run::Error),
    /// The results cannot be written or read.
    #[error(transparent)]
    Results(#[from] results::Error),
}

/// Runs a comparison, and returns what was found: all of it, or what there was when it was interrupted.
pub fn run(
    request: &Request,
    interrupt: &Interrupt,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Results, Error> {
    let probes = probes(request)?;
    check_executors(request)?;
    let started = Instant::now();
    clear_dead_runs(request);
    let random = getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()));
    let run = format!("cmp-{:08x}", random as u32);
    let work = Work::new(request, &run)?;
    let spawner = Spawner { run: run.clone(), interrupt: interrupt.clone() };
    let mut host = host::describe(&spawner, &request.rvmm);
    let mut executors = executors(request, &host, &work.directory);
    let result =
        prepare_and_measure(request, &spawner, &work, &mut host, &mut executors, probes, started, observe);
    // What is cleared away now is cleared away whole, whatever signals come.
    interrupt.clear();
    for executor in &executors {
        executor.cleanup(&spawner, &run);
    }
    work.finish();
    result?;
    Ok(Results::open(&request.out)?)
}

#[allow(clippy::too_many_arguments)]
fn prepare_and_measure(
    request: &Request,
    spawner: &Spawner,
    work: &Work,
    host: &mut Host,
    executors: &mut Vec<Box<dyn Executor>>,
    mut probes: Vec<Box<dyn Probe>>,
    started: Instant,
    observe: &mut dyn FnMut(&Progress),
) -> Result<(), Error> {
    make_directory(&request.out)?;
    if request.out.join("plan.json").exists() {
        return Err(Error::Taken(request.out.clone()));
    }
    let mut prepare = |what: &str| {
        observe(&Progress { probe: "preparing".into(), executor: what.into(), done: 0.0, left: None });
    };
    prepare("the image");
    let made =
        image::prepare(spawner, &request.rvmm, request.image.as_deref(), &request.helper, &work.directory);
    let (image, source) = made.map_err(Error::Image)?;
    let context = Context {
        spawner: spawner.clone(),
        image,
        source,
        helper: request.helper.clone(),
        rvmm: request.rvmm.clone(),
        guest: request.guest.clone(),
        directory: work.directory.clone(),
        quick: request.quick,
        memory_on_purpose: request.memory_on_purpose,
        starts: RefCell::new(vec![]),
        instances: Cell::new(0),
        commands: RefCell::new(vec![]),
    };
    host.executors = look_for(request, &context, executors, &mut prepare);
    if executors.is_empty() {
        let reasons = host.executors.iter().filter_map(|info| info.left_out.as_ref());
        return Err(Error::Nothing(reasons.cloned().collect::<Vec<_>>().join("; ")));
    }
    let plan = plan(request, &context, executors, &probes);
    write_one(&request.out.join("host.json"), host)?;
    write_one(&request.out.join("plan.json"), &plan)?;
    let mut session = Session {
        context: &context,
        plan,
        writer: Writer::new(&request.out).map_err(Error::Run)?,
        directory: request.out.clone(),
        started,
        budget: (request.quick && request.runs.is_none())
            .then(|| QUICK_BUDGET.saturating_sub(started.elapsed())),
        measuring: Instant::now(),
        order: 0,
    };
    let result = session.measure(&mut probes, executors, observe);
    let why = match &result {
        Ok(()) => None,
        Err(error) => Some(crate::error_chain(error)),
    };
    let end = End { complete: result.is_ok(), at: started.elapsed().as_secs_f64(), why };
    session.writer.end(&end).map_err(Error::Run)?;
    match result {
        // What there is, is the result.
        Ok(()) | Err(run::Error::Interrupted) => Ok(()),
        Err(error) => Err(Error::Run(error)),
    }
}

fn probes(request: &Request) -> Result<Vec<Box<dyn Probe>>, Error> {
    let mut available: Vec<&str> = probe::all().iter().flat_map(|probe| probe.names()).collect();
    available.dedup();
    if let Some(name) = request.probes.iter().find(|name| !available.contains(&name.as_str())) {
        return Err(Error::NoProbe { name: name.clone(), known: available.join(", ") });
    }
    if request.probes.is_empty() {
        return Ok(probe::all().into_iter().filter(|probe| probe.is_quick() || !request.quick).collect());
    }
    let wanted = |name: &&str| request.probes.iter().any(|wanted| wanted == name);
    // A first look has the quick part of a probe that has one.
    let has_quick =
        |names: &[&str]| probe::all().iter().any(|other| other.is_quick() && other.names() == names);
    let chosen = probe::all()
        .into_iter()
        .filter(|probe| probe.names().iter().any(&wanted))
        .filter(|probe| !request.quick || probe.is_quick() || !has_quick(&probe.names()));
    // The groups of one helper's run are probes of their own, and only those asked for are run.
    let narrowed = chosen.map(|probe| match probe.names().len() {
        1 => probe,
        _ => Box::new(Micro::only(&request.probes)) as Box<dyn Probe>,
    });
    Ok(narrowed.collect())
}

fn check_executors(request: &Request) -> Result<(), Error> {
    let known = || EXECUTORS.iter().map(|(name, _, _)| *name);
    match request.with.iter().find(|name| !known().any(|known| known == name.as_str())) {
        Some(name) => {
            Err(Error::NoExecutor { name: name.clone(), known: known().collect::<Vec<_>>().join(", ") })
        }
        None => Ok(()),
    }
}

/// Every executor that this version has, in the order in which they are shown.
fn executors(request: &Request, host: &Host, directory: &Path) -> Vec<Box<dyn Executor>> {
    let hybrid = host.cgroups == "hybrid";
    let engine = |kind| Box::new(Engine::new(kind, &request.rvmm, hybrid)) as Box<dyn Executor>;
    let oci = |name| Box::new(Oci::new(name, directory, hybrid)) as Box<dyn Executor>;
    let vm = |kind| {
        Box::new(Vm::new(kind, &request.rvmm, &request.guest, directory, &host.kvm)) as Box<dyn Executor>
    };
    vec![
        Box::new(Plain::default()),
        engine(EngineKind::RvmmNative),
        oci("crun"),
        oci("runc"),
        oci("youki"),
        engine(EngineKind::Docker),
        engine(EngineKind::Podman),
        engine(EngineKind::RvmmMicrovm),
        engine(EngineKind::RvmmRestored),
        vm(VmKind::QemuMicrovm),
        vm(VmKind::FullRvmm),
        vm(VmKind::FullQemu),
    ]
}

/// Finds out which executors can be used, has them make the image ready, and starts each once: that is the first warm-up.
fn look_for(
    request: &Request,
    context: &Context,
    executors: &mut Vec<Box<dyn Executor>>,
    prepare: &mut dyn FnMut(&str),
) -> Vec<ExecutorInfo> {
    let mut infos = vec![];
    let mut usable = vec![];
    let mut found: Vec<Option<Box<dyn Executor>>> = std::mem::take(executors).into_iter().map(Some).collect();
    for (name, title, isolation) in EXECUTORS {
        let mut info = ExecutorInfo {
            name: (*name).into(),
            title: (*title).into(),
            isolation: *isolation,
            version: None,
            left_out: None,
        };
        let place =
            found.iter().position(|found| found.as_ref().is_some_and(|executor| executor.name() == *name));
        let executor = place.and_then(|place| found[place].take());
        match executor {
            _ if !request.with.is_empty() && !request.with.iter().any(|wanted| wanted == name) => {
                info.left_out = Some("not asked for".into());
            }
            None => info.left_out = Some(absent(name).into()),
            Some(mut executor) => {
                prepare(title);
                match executor.version(&context.spawner) {
                    Err(why) => info.left_out = Some(why),
                    Ok(version) => {
                        info.version = Some(version);
                        match try_once(context, &mut *executor) {
                            Ok(took) => {
                                context.starts.borrow_mut().push(((*name).into(), took));
                                usable.push(executor);
                            }
                            Err(error) => info.left_out = Some(crate::error_chain(&error)),
                        }
                    }
                }
            }
        }
        infos.push(info);
    }
    *executors = usable;
    infos
}

/// Makes an executor ready and runs something in it. Returns how long that took once it was ready.
fn try_once(context: &Context, executor: &mut dyn Executor) -> Result<Duration, probe::Error> {
    executor.prepare(&context.spawner, &context.image)?;
    let begun = Instant::now();
    let job: Job = context.helper(["micro", "syscall", "1"]);
    context.run_helper(executor, &job)?;
    context.commands.take();
    Ok(begun.elapsed())
}

/// Why an executor of the catalogue is none of this version's.
fn absent(name: &str) -> &'static str {
    match name {
        "firecracker" if super::executor::find("firecracker").is_some() => {
            "this version does not drive Firecracker, which is on this host"
        }
        "firecracker" => "there is no program \"firecracker\" on this host",
        _ => "this version does not have it",
    }
}

fn plan(
    request: &Request,
    context: &Context,
    executors: &[Box<dyn Executor>],
    probes: &[Box<dyn Probe>],
) -> Plan {
    let names: Vec<String> = executors.iter().map(|executor| executor.name().to_owned()).collect();
    let usual = if request.quick { 20 } else { 30 };
    let runs = request.runs.unwrap_or(usual);
    let mut planned = vec![];
    let mut metrics = vec![];
    for info in PROBES {
        let Some(probe) = probes.iter().find(|probe| probe.names().contains(&info.name)) else { continue };
        let exact = probe.is_exact();
        planned.push(PlannedProbe {
            name: info.name.into(),
            title: info.title.into(),
            runs: if exact { 1 } else { runs },
            warmups: u32::from(!exact),
            left_out: None,
        });
        metrics.extend(catalogue::metrics(info));
    }
    let baseline = names.iter().find(|name| *name == BASELINE).or(names.first()).cloned().unwrap_or_default();
    Plan {
        format: FORMAT,
        run: context.spawner.run.clone(),
        command: request.command.clone(),
        kind: match (request.runs, request.quick) {
            (Some(_), _) => "custom".into(),
            (None, true) => "quick".into(),
            (None, false) => "normal".into(),
        },
        image: context.source.name.clone(),
        image_id: context.source.id.clone(),
        seed: request.seed,
        confidence: 0.95,
        executors: names,
        baseline,
        probes: planned,
        metrics,
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Make { path: path.into(), source })
}

/// A run's own files, and the guard that removes them if this process is killed.
struct Work {
    directory: PathBuf,
    /// Held as long as the run lives.
    _lock: File,
    /// The guard waits for its other end to be closed.
    guard: Option<PipeWriter>,
}

impl Work {
    fn new(request: &Request, run: &str) -> Result<Work, Error> {
        let directory = request.work.join(run);
        make_directory(&directory)?;
        let path = directory.join("lock");
        let make = || {
            let lock = File::create(&path)?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            let (reader, writer) = io::pipe()?;
            Command::new(&request.engine)
                .arg(GUARD)
                .arg(run)
                .arg(&request.work)
                .arg(&request.rvmm)
                .stdin(reader)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()?;
            Ok((lock, writer))
        };
        let (lock, writer) = make().map_err(|source| Error::Make { path: path.clone(), source })?;
        Ok(Work { directory, _lock: lock, guard: Some(writer) })
    }

    fn finish(mut self) {
        let _ = fs::remove_dir_all(&self.directory);
        // The guard finds nothing to do, and ends.
        self.guard = None;
    }
}

/// What the guard does: waits until the run is over, and clears away what it left.
pub fn guard(run: &str, work: &Path, rvmm: &Path) {
    let mut nothing = vec![];
    let _ = io::stdin().lock().read_to_end(&mut nothing);
    if work.join(run).exists() {
        clear(run, work, rvmm);
    }
}

/// Clears away what runs left that were killed together with their guards.
fn clear_dead_runs(request: &Request) {
    for entry in fs::read_dir(&request.work).into_iter().flatten().flatten() {
        let Ok(run) = entry.file_name().into_string() else { continue };
        let free = File::open(entry.path().join("lock"))
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        if run.starts_with("cmp-") && free {
            clear(&run, &request.work, &request.rvmm);
        }
    }
}

/// Removes all instances of a run, its processes and its files.
fn clear(run: &str, work: &Path, rvmm: &Path) {
    let directory = work.join(run);
    let spawner = Spawner { run: format!("{run}-clear"), interrupt: Interrupt::never() };
    let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists();
    let mut engines = vec![];
    for kind in [EngineKind::RvmmNative, EngineKind::Docker, EngineKind::Podman] {
        let mut engine = Engine::new(kind, rvmm, hybrid);
        if engine.version(&spawner).is_ok() {
            engine.assume_image(&image::name_of(run));
            engines.push(engine);
        }
    }
    // First in the engines' own way; then whatever was under way; and what that has left.
    let remove = || {
        for engine in &engines {
            engine.cleanup(&spawner, run);
        }
        for name in ["crun", "runc", "youki"] {
            Oci::new(name, &directory, hybrid).cleanup(&spawner, run);
        }
    };
    remove();
    kill_processes(run);
    remove();
    let _ = fs::remove_dir_all(&directory);
}

/// Kills what still runs and has the run's name in its environment.
fn kill_processes(run: &str) {
    use rustix::process::{Pid, Signal, kill_process};
    let mark = format!("{RUN_VARIABLE}={run}");
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
            && let Some(pid) = Pid::from_raw(pid)
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
