//! What is done with containers from outside: start, stop, remove, mend.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::backend::WindowSize;
use super::client::{self, Connection};
use super::config::ContainerConfig;
use super::files::Lock;
use super::records::{self, Records, short};
use super::supervisor::protocol::{Event, Request};
use super::{fork, namespace, prepare, supervisor};

/// How long removing waits for a supervisor's last steps.
const LAST_STEPS: Duration = Duration::from_secs(60);
/// How long it waits by force before the supervisor is killed.
const FORCE_PATIENCE: Duration = Duration::from_secs(5);

/// Why something could not be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its directories.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// Its supervisor.
    #[error("container {id}", id = short(.id))]
    Client {
        /// The container.
        id: String,
        /// What went wrong.
        #[source]
        source: client::Error,
    },
    /// Clearing away.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// It runs.
    #[error("container {id} is running: stop it first, or use --force", id = short(.0))]
    Running(String),
    /// It does not run.
    #[error("container {id} is not running", id = short(.0))]
    NotRunning(String),
    /// Its files are not what rvmm writes.
    #[error("container {id} is damaged; rm --force removes it", id = short(.id))]
    Damaged {
        /// The container.
        id: String,
        /// What could not be read.
        #[source]
        source: records::Error,
    },
    /// The supervisor could not be started.
    #[error("cannot start a supervisor")]
    Fork(#[source] io::Error),
}

/// A container that is being started.
#[derive(Debug)]
pub struct Starting {
    /// To its supervisor, which says next that the container runs or why it does not.
    pub connection: Connection,
}

/// Starts a container under a supervisor of its own. With `attach` its output comes over the connection, and its input ends
/// with the connection's if that is true.
pub fn start(
    records: &Records,
    id: &str,
    attach: Option<bool>,
    window: Option<WindowSize>,
) -> Result<Starting, Error> {
    let life = records.take_life(id)?.ok_or_else(|| Error::Running(id.into()))?;
    let mut record = records.read(id)?;
    if record.state.status.is_live() || prepare::has_machine(records, id) {
        prepare::clear(records, &record.config)?;
        records.bury(&mut record)?;
    }
    let (ours, its) = UnixStream::pair().map_err(Error::Fork)?;
    let connection = Connection::over(ours);
    let log = records.roots().container_run(id).join("supervisor.log");
    let config = record.config;
    fork::detach(&log, || {
        // Before anything else, so that the next command comes to where this one's mounts are.
        if let Err(error) = namespace::note(records.roots()) {
            tracing::error!("{}", crate::error_chain(&error));
        }
        let first = supervisor::First { stream: its, attach, window };
        supervisor::supervise(records, config, life, first);
        namespace::leave(records.roots());
    })
    .map_err(Error::Fork)?;
    Ok(Starting { connection })
}

impl Starting {
    /// Waits until the container runs, or has failed to: its exit code for that, and why.
    pub fn wait(&mut self) -> Result<Result<(), (u8, String)>, client::Error> {
        loop {
            match self.connection.next_event()? {
                Event::Started | Event::Exited(_) => return Ok(Ok(())),
                Event::Failed { code, message } => return Ok(Err((code, message))),
                _ => {}
            }
        }
    }
}

/// Connects to the supervisor of a container that must run.
pub fn connect(records: &Records, id: &str) -> Result<Connection, Error> {
    let failed = |source| Error::Client { id: id.into(), source };
    Connection::open(records.roots(), id).map_err(failed)?.ok_or_else(|| Error::NotRunning(id.into()))
}

/// Has a supervisor do something.
pub fn call(records: &Records, id: &str, request: &Request) -> Result<(), Error> {
    connect(records, id)?.call(request).map_err(|source| Error::Client { id: id.into(), source })
}

/// Ends a container: `signal`, and SIGKILL after `timeout`. Returns when it has ended; nothing happens if it has already.
pub fn stop(records: &Records, id: &str, signal: i32, timeout: Option<Duration>) -> Result<(), Error> {
    let failed = |source| Error::Client { id: id.into(), source };
    let Some(mut connection) = Connection::open(records.roots(), id).map_err(failed)? else {
        return mend(records, id).map(|_| ());
    };
    let timeout_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
    connection.send(&Request::Stop { signal, timeout_ms }).map_err(failed)?;
    match connection.wait() {
        Ok(_) => {}
        // Killed in the middle: what it has left is for us.
        Err(client::Error::Gone) => drop(mend(records, id)?),
        Err(error) => return Err(failed(error)),
    }
    Ok(())
}

/// Removes a container; with `force` also one that runs, or whose files are damaged. Returns what it was, as far as that can
/// be read.
pub fn remove(records: &Records, id: &str, force: bool) -> Result<Option<ContainerConfig>, Error> {
    let life = match records.take_life(id)? {
        Some(life) => life,
        None if force => take_by_force(records, id)?,
        None => {
            if records.read(id)?.state.status.is_live() {
                return Err(Error::Running(id.into()));
            }
            // One whose end was just reported may be about to let go.
            wait_for_life(records, id, LAST_STEPS)?.ok_or_else(|| Error::Running(id.into()))?
        }
    };
    let config = match records.read(id) {
        Ok(record) => Some(record.config),
        // Removed by itself meanwhile, with --rm.
        Err(error) if !records.roots().container(id).exists() => return Err(error.into()),
        Err(_) if force => records.salvage(id),
        Err(error) => return Err(Error::Damaged { id: id.into(), source: error }),
    };
    let removed = config.as_ref().map(|config| {
        prepare::clear(records, config)?;
        prepare::remove(records, config)
    });
    match removed {
        Some(Ok(())) => {}
        // A configuration that can be read may still name what is not there any more.
        Some(Err(error)) if !force => return Err(error.into()),
        _ => prepare::remove_damaged(records, id)?,
    }
    drop(life);
    Ok(config)
}

/// Ends a container with its supervisor, and takes its life.
fn take_by_force(records: &Records, id: &str) -> Result<Lock, Error> {
    let state = records.read(id).map(|record| record.state);
    // What cannot be read may run.
    if state.as_ref().map_or(true, |state| state.status.is_live()) {
        stop(records, id, libc::SIGKILL, None)?;
    }
    if let Some(life) = wait_for_life(records, id, FORCE_PATIENCE)? {
        return Ok(life);
    }
    // One that is still on its way to run, or that hangs. It holds the lock, so the number is its own.
    let supervisor = state.ok().and_then(|state| Pid::from_raw(i32::try_from(state.supervisor?).ok()?));
    if let Some(supervisor) = supervisor {
        let _ = kill_process(supervisor, Signal::KILL);
    }
    wait_for_life(records, id, LAST_STEPS)?.ok_or_else(|| Error::Running(id.into()))
}

fn wait_for_life(records: &Records, id: &str, patience: Duration) -> Result<Option<Lock>, Error> {
    let end = std::time::Instant::now() + patience;
    loop {
        match records.take_life(id)? {
            None if std::time::Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            life => return Ok(life),
        }
    }
}

/// Mends a container whose supervisor is gone although it ran; true if it was so.
pub fn mend(records: &Records, id: &str) -> Result<bool, Error> {
    let Some(_life) = records.take_life(id)? else { return Ok(false) };
    let mut record = records.read(id)?;
    if !record.state.status.is_live() {
        // A machine that was booted for a look at its disk.
        if prepare::has_machine(records, id) {
            prepare::clear(records, &record.config)?;
        }
        return Ok(false);
    }
    prepare::clear(records, &record.config)?;
    records.bury(&mut record)?;
    if record.config.auto_remove {
        prepare::remove(records, &record.config)?;
    }
    Ok(true)
}

/// Mends all containers, and what was left of those that are gone. Each failure is a warning: one container that cannot
/// be mended must not keep a user from the others.
pub fn mend_all(records: &Records) -> Result<(), Error> {
    let warn = |error: &dyn std::error::Error| tracing::warn!("{}", crate::error_chain(error));
    for record in records.all()? {
        let id = &record.config.id;
        if (record.state.status.is_live() || prepare::has_machine(records, id))
            && !records.is_supervised(id)
            && let Err(error) = mend(records, id)
        {
            warn(&error);
        }
    }
    if let Err(error) = prepare::sweep(records) {
        warn(&error);
    }
    Ok(())
}
