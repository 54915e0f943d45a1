//! One native container, driven by lines of JSON: a request on standard input, its answer on standard output.
//!
//! The first line is what the container is made of. It is a program of its own because a process that makes containers has
//! one thread, and a test has several. `native bench …` starts containers in a loop and says how long each step took.

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvmm::container::backend::{Backend, Bundle, Error, Execution, ExitStatus, Streams, WindowSize};
use rvmm::container::config::{ContainerConfig, Process};
use rvmm::container::native::{Native, enter_user_namespace, protect_own_program};
use rvmm::container::spec::{self, Inputs, NetworkNamespace, Users};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a container is made of.
#[derive(Clone, Serialize, Deserialize)]
struct Setup {
    directory: PathBuf,
    layers: Vec<PathBuf>,
    /// A root file system that is there already; then there are no layers.
    #[serde(default)]
    rootfs: Option<PathBuf>,
    config: ContainerConfig,
    host_network: bool,
    volumes: BTreeMap<String, PathBuf>,
    /// Whether a user namespace is entered first.
    #[serde(default)]
    rootless: bool,
    #[serde(default)]
    cgroup: Option<PathBuf>,
    /// Where compiled filters are kept.
    #[serde(default)]
    filters: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Create,
    Start,
    Write(usize, String),
    Close(usize),
    /// Until there is such a text in a process's output.
    Expect(usize, String),
    Wait(usize),
    Output(usize),
    Signal(i32, bool),
    SignalExec(usize, i32),
    Resize(usize, u16, u16),
    Pause,
    Resume,
    Stats,
    Processes,
    OomKilled,
    Pid,
    Exec(Box<Process>),
    Delete,
}

/// A process and what came out of it. 0 is the container's first.
#[derive(Default)]
struct Running {
    streams: Option<Streams>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    stdout_open: bool,
    stderr_open: bool,
    execution: Option<Box<dyn Execution>>,
    status: Option<ExitStatus>,
}

/// No answer takes longer, but for a hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if std::env::var_os("RVMM_DRIVER_PROTECT").is_some() {
        protect_own_program(&[]).unwrap_or_else(|error| panic!("{}", rvmm::error_chain(&error)));
    }
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("bench") => bench(arguments.next().and_then(|count| count.parse().ok()).unwrap_or(20)),
        Some("bundle") => bundle_file(),
        _ => serve(),
    }
}

fn setup() -> Setup {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).expect("a line");
    serde_json::from_str(&line).expect("what the container is made of")
}

fn bundle(setup: &Setup) -> Result<Bundle, String> {
    let users = Users::in_layers(&setup.layers).map_err(|error| rvmm::error_chain(&error))?;
    let rootfs = setup.rootfs.clone().unwrap_or_else(|| setup.directory.join("rootfs"));
    let cgroup =
        setup.cgroup.clone().unwrap_or_else(|| PathBuf::from(format!("/rvmm-test/{}", setup.config.id)));
    let inputs = Inputs {
        config: &setup.config,
        users: &users,
        rootfs: &rootfs,
        network: if setup.host_network { NetworkNamespace::Host } else { NetworkNamespace::New },
        resolv_conf: None,
        hosts: None,
        hostname_file: None,
        volumes: &setup.volumes,
        secrets: Some(Native::secrets_directory(&setup.directory)),
        cgroup,
        available: spec::available_capabilities(),
        kernel: spec::kernel_version(),
    };
    let spec = spec::build(&inputs).map_err(|error| rvmm::error_chain(&error))?;
    Ok(Bundle {
        dir: setup.directory.clone(),
        spec,
        rootfs,
        layers: setup.layers.clone(),
        writable: setup.directory.join("rw"),
        config: setup.config.clone(),
    })
}

fn native(setup: &Setup) -> Native {
    let native = Native::new(&setup.directory);
    match &setup.filters {
        Some(filters) => native.keep_filters_in(filters),
        None => native,
    }
}

fn failure(error: &Error) -> Value {
    json!({ "error": rvmm::error_chain(error), "code": error.docker_code() })
}

fn serve() {
    let setup = setup();
    if setup.rootless {
        enter_user_namespace().unwrap_or_else(|error| panic!("{}", rvmm::error_chain(&error)));
    }
    let mut native = native(&setup);
    let mut running = vec![Running::default()];
    for line in std::io::stdin().lines() {
        let request: Request = serde_json::from_str(&line.expect("a line")).expect("a request");
        let answer = answer(&setup, &mut native, &mut running, request);
        println!("{answer}");
        std::io::stdout().flush().expect("an answer is taken");
    }
}

fn answer(setup: &Setup, native: &mut Native, running: &mut Vec<Running>, request: Request) -> Value {
    let done = |result: Result<(), Error>| result.map_or_else(|error| failure(&error), |()| json!({}));
    match request {
        Request::Create => match bundle(setup) {
            Err(error) => json!({ "error": error, "code": 125 }),
            Ok(bundle) => match native.create(&bundle) {
                Ok(()) => {
                    let streams = native.take_streams().expect("streams");
                    running[0] = Running::of(streams, None);
                    json!({})
                }
                Err(error) => failure(&error),
            },
        },
        Request::Start => done(native.start().map(drop).or_else(|error| match error {
            // The streams were taken before, and that was the last step.
            Error::NotRunning => Ok(()),
            error => Err(error),
        })),
        Request::Write(process, text) => {
            running[process].write(text.as_bytes());
            json!({})
        }
        Request::Close(process) => {
            running[process].streams.as_mut().expect("streams").stdin = None;
            json!({})
        }
        Request::Expect(process, text) => {
            let deadline = Instant::now() + PATIENCE;
            while !contains(&running[process].stdout, text.as_bytes()) {
                if Instant::now() > deadline || !running[process].pump(200) {
                    return json!({ "error": format!("no {text:?} in {}", running[process].output()), "code": 0 });
                }
            }
            json!({})
        }
        Request::Wait(process) => wait(native, running, process),
        Request::Output(process) => running[process].output(),
        Request::Signal(signal, all) => done(native.signal(signal, all)),
        Request::SignalExec(process, signal) => {
            done(running[process].execution.as_mut().expect("an exec").signal(signal))
        }
        Request::Resize(process, columns, rows) => {
            let size = WindowSize { columns, rows };
            done(match running[process].execution.as_mut() {
                Some(execution) => execution.resize(size),
                None => native.resize(size),
            })
        }
        Request::Pause => done(native.pause()),
        Request::Resume => done(native.resume()),
        Request::Stats => native.stats().map_or_else(|error| failure(&error), |stats| json!(stats)),
        Request::Processes => native.processes().map_or_else(|error| failure(&error), |list| json!(list)),
        Request::OomKilled => {
            native.oom_killed().map_or_else(|error| failure(&error), |killed| json!(killed))
        }
        Request::Pid => json!(native.pid()),
        Request::Exec(process) => exec(setup, native, running, &process),
        Request::Delete => done(native.delete()),
    }
}

fn exec(setup: &Setup, native: &mut Native, running: &mut Vec<Running>, process: &Process) -> Value {
    let users = Users::in_layers(&setup.layers).expect("users");
    let available = spec::available_capabilities();
    let process = match spec::exec_process(&setup.config, process, false, &users, available) {
        Ok(process) => process,
        Err(error) => return json!({ "error": rvmm::error_chain(&error), "code": 125 }),
    };
    match native.exec(&process) {
        Ok((execution, streams)) => {
            running.push(Running::of(streams, Some(execution)));
            json!(running.len() - 1)
        }
        Err(error) => failure(&error),
    }
}

/// Until a process has ended and its output is at its end.
fn wait(native: &mut Native, running: &mut [Running], process: usize) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let one = &mut running[process];
        let status = match one.execution.as_mut() {
            Some(execution) => execution.exit_status(),
            None => native.exit_status(),
        };
        match status {
            Ok(status) => one.status = status,
            Err(error) => return failure(&error),
        }
        if one.status.is_some() && !one.pump(0) {
            let status = one.status;
            let code = status.map(ExitStatus::docker_code);
            return json!({ "status": status, "docker": code, "output": one.output() });
        }
        if Instant::now() > deadline {
            return json!({ "error": format!("does not end: {}", one.output()), "code": 0 });
        }
        if !one.pump(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Running {
    fn of(streams: Streams, execution: Option<Box<dyn Execution>>) -> Running {
        let stderr_open = streams.stderr.is_some();
        Running { streams: Some(streams), execution, stdout_open: true, stderr_open, ..Running::default() }
    }

    fn output(&self) -> Value {
        json!([String::from_utf8_lossy(&self.stdout), String::from_utf8_lossy(&self.stderr)])
    }

    /// Reads what there is. Whether a stream is still open.
    fn pump(&mut self, timeout_ms: u16) -> bool {
        let Some(streams) = &self.streams else { return false };
        let mut polled = vec![];
        if self.stdout_open {
            polled.push((true, &streams.stdout));
        }
        if let Some(stderr) = streams.stderr.as_ref().filter(|_| self.stderr_open) {
            polled.push((false, stderr));
        }
        let mut list: Vec<PollFd> =
            polled.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut list, PollTimeout::from(timeout_ms));
        let ready: Vec<bool> = list.iter().map(|fd| fd.any() == Some(true)).collect();
        let mut ended = vec![];
        for ((is_stdout, fd), _) in polled.iter().zip(&ready).filter(|(_, ready)| **ready) {
            let mut bytes = [0; 65536];
            let mut file = std::fs::File::from(fd.try_clone().expect("a copy"));
            match file.read(&mut bytes) {
                // A terminal whose other side is closed gives an error.
                Ok(0) | Err(_) => ended.push(*is_stdout),
                Ok(len) if *is_stdout => self.stdout.extend(&bytes[..len]),
                Ok(len) => self.stderr.extend(&bytes[..len]),
            }
        }
        for is_stdout in ended {
            if is_stdout {
                self.stdout_open = false;
            } else {
                self.stderr_open = false;
            }
        }
        self.stdout_open || self.stderr_open
    }

    fn write(&mut self, bytes: &[u8]) {
        let streams = self.streams.as_ref().expect("streams");
        let to: &OwnedFd = streams.stdin.as_ref().unwrap_or(&streams.stdout);
        std::fs::File::from(to.try_clone().expect("a copy")).write_all(bytes).expect("input is taken");
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Writes `config.json` and mounts nothing: the same container for other runtimes.
fn bundle_file() {
    let setup = setup();
    let bundle = bundle(&setup).expect("a container");
    bundle.spec.save(setup.directory.join("config.json")).expect("a file");
}

/// Runs the container `count` times and prints the microseconds of each step, and of all.
fn bench(count: usize) {
    let setup = setup();
    println!("spec create start wait delete all");
    for _ in 0..count {
        let mut times = vec![Instant::now()];
        let bundle = bundle(&setup).expect("a container");
        times.push(Instant::now());
        let mut native = native(&setup);
        native.create(&bundle).unwrap_or_else(|error| panic!("{}", rvmm::error_chain(&error)));
        times.push(Instant::now());
        let streams = native.start().unwrap_or_else(|error| panic!("{}", rvmm::error_chain(&error)));
        times.push(Instant::now());
        while native.exit_status().expect("a status").is_none() {
            let event = native.exit_event().expect("a process");
            let _ = poll(&mut [PollFd::new(event, PollFlags::POLLIN)], PollTimeout::NONE);
        }
        times.push(Instant::now());
        native.delete().unwrap_or_else(|error| panic!("{}", rvmm::error_chain(&error)));
        times.push(Instant::now());
        drop(streams);
        let steps: Vec<String> =
            times.windows(2).map(|pair| (pair[1] - pair[0]).as_micros().to_string()).collect();
        println!("{} {}", steps.join(" "), (times[times.len() - 1] - times[0]).as_micros());
    }
}
