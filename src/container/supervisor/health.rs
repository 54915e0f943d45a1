//! Health checks: a command in the container, again and again.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::process::Pipes;
use crate::container::backend::{Backend, Error, Execution};
use crate::container::config::{ContainerConfig, Health as Config};
use crate::container::log::Source;
use crate::container::records::Records;
use crate::container::state::{Health, HealthCheck, HealthStatus, now_ns};

/// Bytes of a check's output that are kept.
const OUTPUT_BYTES: usize = 4096;
/// Checks that are kept.
const LOG_LEN: usize = 5;
/// Exit code of a check that took too long.
const TIMED_OUT: i32 = -1;

/// What is known before the first check.
pub fn initial(config: &ContainerConfig) -> Option<Health> {
    config.health.as_ref().map(|_| Health { status: HealthStatus::Starting, failing_streak: 0, log: vec![] })
}

/// The checks of a container that runs.
pub struct Checks {
    config: Config,
    begun: Instant,
    due: Instant,
    running: Option<Check>,
}

struct Check {
    execution: Box<dyn Execution>,
    pipes: Pipes,
    output: Vec<u8>,
    deadline: Instant,
    started_ns: u64,
    killed: bool,
}

impl Checks {
    /// Checks of a container that begins to run now.
    pub fn new(config: &ContainerConfig) -> Option<Checks> {
        let config = config.health.clone()?;
        let now = Instant::now();
        Some(Checks { due: now + config.interval, config, begun: now, running: None })
    }

    /// When something is to be done at the latest.
    pub fn deadline(&self) -> Instant {
        self.running.as_ref().map_or(self.due, |check| check.deadline)
    }

    /// What to wait for: the check's end, and its output.
    pub fn events(&self) -> Vec<BorrowedFd<'_>> {
        let Some(check) = &self.running else { return vec![] };
        let output =
            [Source::Stdout, Source::Stderr].into_iter().filter_map(|source| check.pipes.output(source));
        output.chain([check.execution.exit_event()]).collect()
    }

    /// Does what is to be done; true if the verdict or its grounds have changed.
    pub fn step(
        &mut self,
        backend: &mut dyn Backend,
        records: &Records,
        config: &ContainerConfig,
        health: &mut Health,
    ) -> bool {
        let now = Instant::now();
        let Some(check) = &mut self.running else {
            if now < self.due {
                return false;
            }
            return match self.begin(backend, records, config) {
                Ok(check) => {
                    self.running = Some(check);
                    false
                }
                Err(error) => self.judge(health, now_ns(), 1, crate::error_chain(&error)),
            };
        };
        for source in [Source::Stdout, Source::Stderr] {
            while let Some(bytes) = check.pipes.read(source).filter(|bytes| !bytes.is_empty()) {
                let room = OUTPUT_BYTES.saturating_sub(check.output.len()).min(bytes.len());
                check.output.extend_from_slice(&bytes[..room]);
            }
        }
        let code = match check.execution.exit_status() {
            Ok(Some(_)) if check.killed => TIMED_OUT,
            Ok(Some(status)) => i32::from(status.docker_code()),
            Ok(None) if now >= check.deadline && !check.killed => {
                check.killed = true;
                check.deadline = now + Duration::from_secs(5);
                let _ = check.execution.signal(libc::SIGKILL);
                return false;
            }
            Ok(None) if now < check.deadline => return false,
            _ => TIMED_OUT,
        };
        let (started, output) = (check.started_ns, String::from_utf8_lossy(&check.output).into_owned());
        self.running = None;
        self.judge(health, started, code, output)
    }

    fn begin(
        &self,
        backend: &mut dyn Backend,
        records: &Records,
        config: &ContainerConfig,
    ) -> Result<Check, Error> {
        let args = match self.config.test.split_first() {
            Some((kind, line)) if kind == "CMD-SHELL" => {
                vec!["/bin/sh".into(), "-c".into(), line.join(" ")]
            }
            Some((kind, args)) if kind == "CMD" => args.to_vec(),
            _ => self.config.test.clone(),
        };
        let process = crate::container::prepare::check_process(records, config, args)
            .map_err(|error| Error::failed("cannot make a health check", error))?;
        let (execution, mut streams) = backend.exec(&process)?;
        streams.stdin = None;
        let pipes =
            Pipes::new(streams, false).map_err(|error| Error::failed("make a health check", error))?;
        Ok(Check {
            execution,
            pipes,
            output: vec![],
            deadline: Instant::now() + self.config.timeout,
            started_ns: now_ns(),
            killed: false,
        })
    }

    fn judge(&mut self, health: &mut Health, started_ns: u64, exit_code: i32, output: String) -> bool {
        self.due = Instant::now() + self.config.interval;
        health.log.push(HealthCheck { started_ns, ended_ns: now_ns(), exit_code, output });
        if health.log.len() > LOG_LEN {
            health.log.remove(0);
        }
        if exit_code == 0 {
            health.failing_streak = 0;
            health.status = HealthStatus::Healthy;
        } else if health.status == HealthStatus::Starting && self.begun.elapsed() < self.config.start_period {
            // Failures do not count yet.
        } else {
            health.failing_streak += 1;
            if health.failing_streak >= self.config.retries {
                health.status = HealthStatus::Unhealthy;
            }
        }
        true
    }
}
