//! Child processes: started with a time stamp, read by the line with the time of each, and never outliving their welcome.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::interrupt::Interrupt;

/// The variable that every process of a run has, and all that come of it: by it they are found when the run is gone.
pub const RUN_VARIABLE: &str = "RVMM_COMPARE_RUN";

/// Bytes of a line, and of what is kept of an output, at most.
const MAX_OUTPUT: usize = 4 << 20;

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be started, or not be watched.
    #[error("cannot run {program:?}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended with an error.
    #[error("{program:?} failed ({status}): {said}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The last that it said.
        said: String,
    },
    /// It did not come to an end, or did not say anything, in time.
    #[error("{program:?} took longer than {} s", .after.as_secs())]
    Slow {
        /// The program.
        program: String,
        /// How long it was given.
        after: Duration,
    },
    /// It ended without having said what was waited for.
    #[error("{program:?} ended and had not said what it should: {said}")]
    Silent {
        /// The program.
        program: String,
        /// The last that it said.
        said: String,
    },
    /// Somebody wants the whole run to end.
    #[error("interrupted")]
    Interrupted,
}

/// A command line, not yet run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Invocation {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment in addition to this process's own.
    pub env: Vec<(String, String)>,
    /// To be run where the second hierarchy of a hybrid host is not to be seen: some runtimes refuse it.
    pub without_unified: bool,
}

impl Invocation {
    /// A command line of these words.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Invocation {
        Invocation { argv: argv.into_iter().map(Into::into).collect(), ..Invocation::default() }
    }

    /// The same with more words.
    pub fn and<S: Into<String>>(mut self, more: impl IntoIterator<Item = S>) -> Invocation {
        self.argv.extend(more.into_iter().map(Into::into));
        self
    }

    fn program(&self) -> String {
        self.argv.first().cloned().unwrap_or_default()
    }
}

/// What all commands of a run share.
#[derive(Clone, Debug)]
pub struct Spawner {
    /// The run's name.
    pub run: String,
    /// Tells when to end.
    pub interrupt: Interrupt,
}

impl Spawner {
    /// Starts a command. Its standard input stays open until it is closed, or the `Running` goes.
    pub fn spawn(&self, invocation: &Invocation) -> Result<Running, Error> {
        self.start(invocation, Stdio::piped())
    }

    /// Runs a command to its end, and returns what it wrote. One that fails is an error with the last that it said.
    pub fn output(&self, invocation: &Invocation, patience: Duration) -> Result<String, Error> {
        let mut running = self.start(invocation, Stdio::null())?;
        running.finish(patience)?.ok()
    }

    fn start(&self, invocation: &Invocation, stdin: Stdio) -> Result<Running, Error> {
        let failed = |source| Error::Spawn { program: invocation.program(), source };
        let (program, arguments) = invocation
            .argv
            .split_first()
            .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidInput, "an empty command line")))?;
        let (reader, writer) = io::pipe().map_err(failed)?;
        let mut command = Command::new(program);
        command.args(arguments).env(RUN_VARIABLE, &self.run).stdin(stdin).process_group(0);
        command.envs(invocation.env.iter().map(|(name, value)| (name, value)));
        command.stderr(writer.try_clone().map_err(failed)?);
        command.stdout(writer);
        let (started, mut child) = match invocation.without_unified {
            true => spawn_without_unified(&mut command).map_err(failed)?,
            false => (Instant::now(), command.spawn().map_err(failed)?),
        };
        // The writing ends are the child's alone from now on.
        drop(command);
        let stdin = child.stdin.take();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()));
        let mut running = Running {
            program: invocation.program(),
            child,
            stdin,
            pidfd: None,
            output: Some(OwnedFd::from(reader)),
            interrupt: self.interrupt.clone(),
            started,
            buffer: vec![],
            said: vec![],
            reaped: false,
        };
        running.pidfd = Some(pidfd?);
        Ok(running)
    }
}

/// A thread of its own has mounts of its own, and what it starts has them, too.
fn spawn_without_unified(command: &mut Command) -> io::Result<(Instant, Child)> {
    let spawn = move || {
        use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        unmount("/sys/fs/cgroup/unified", UnmountFlags::DETACH)?;
        Ok((Instant::now(), command.spawn()?))
    };
    std::thread::scope(|scope| {
        scope.spawn(spawn).join().unwrap_or_else(|_| Err(io::Error::other("the thread that starts it ended")))
    })
}

/// A command that runs.
pub struct Running {
    program: String,
    child: Child,
    stdin: Option<ChildStdin>,
    pidfd: Option<OwnedFd>,
    output: Option<OwnedFd>,
    interrupt: Interrupt,
    /// Just before it was started.
    pub started: Instant,
    /// Read and not yet a line.
    buffer: Vec<u8>,
    /// Everything that it has written.
    said: Vec<u8>,
    reaped: bool,
}

/// How a command ended, and what it had written.
#[derive(Debug)]
pub struct Finished {
    program: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output and standard error.
    pub output: String,
    /// When it was seen to have ended.
    pub at: Instant,
}

impl Finished {
    /// What it wrote, if it ended well.
    pub fn ok(self) -> Result<String, Error> {
        match self.status.success() {
            true => Ok(self.output),
            false => Err(Error::Failed {
                said: last_line(&self.output),
                status: self.status.to_string(),
                program: self.program,
            }),
        }
    }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that `wanted` takes, and when it came. Others are passed over.
    pub fn line<T>(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&str) -> Option<T>,
    ) -> Result<(T, Instant), Error> {
        let deadline = Instant::now() + patience;
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(found) = wanted(String::from_utf8_lossy(&line).trim_end()) {
                    return Ok((found, Instant::now()));
                }
            }
            if self.output.is_none() {
                return Err(Error::Silent { program: self.program.clone(), said: self.last_said() });
            }
            self.pump(deadline, patience)?;
        }
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Spawn { program: self.program.clone(), source };
        match &mut self.stdin {
            Some(stdin) => stdin.write_all(bytes).map_err(failed),
            None => Ok(()),
        }
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until it has ended.
    pub fn finish(&mut self, patience: Duration) -> Result<Finished, Error> {
        let deadline = Instant::now() + patience;
        while !self.has_ended() {
            self.pump(deadline, patience)?;
        }
        let at = Instant::now();
        let status =
            self.child.wait().map_err(|source| Error::Spawn { program: self.program.clone(), source })?;
        self.reaped = true;
        // What it left in the pipe; others of its kind may still hold the writing end, so nothing is waited for.
        while self.output.is_some() && self.readable() {
            self.read();
        }
        let output = String::from_utf8_lossy(&self.said).into_owned();
        Ok(Finished { program: self.program.clone(), status, output, at })
    }

    /// Asks it to end.
    pub fn signal(&self, signal: Signal) {
        if !self.reaped {
            let _ = kill_process_group(Pid::from_child(&self.child), signal);
        }
    }

    fn last_said(&self) -> String {
        last_line(&String::from_utf8_lossy(&self.said))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    fn readable(&self) -> bool {
        let Some(output) = &self.output else { return false };
        let mut fds = [PollFd::new(output, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Waits for output, the end, or an interruption, and reads what is there.
    fn pump(&mut self, deadline: Instant, patience: Duration) -> Result<(), Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Slow { program: self.program.clone(), after: patience });
        }
        self.interrupt.check().map_err(|_| Error::Interrupted)?;
        let mut fds = vec![];
        if let Some(output) = &self.output {
            fds.push(PollFd::new(output, PollFlags::IN));
        } else if let Some(pidfd) = &self.pidfd {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        let both = self.output.is_some();
        if let (true, Some(pidfd)) = (both, &self.pidfd) {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        let signals = self.interrupt.descriptor();
        if let Some(signals) = &signals {
            fds.push(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN));
        }
        let timeout = Timespec::try_from(left.min(Duration::from_secs(3600))).unwrap_or_default();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::Spawn { program: self.program.clone(), source: error.into() }),
        }
        if both {
            let has_output = !fds[0].revents().is_empty();
            let has_ended = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if has_output {
                self.read();
            } else if has_ended {
                // It has ended and nothing is left: others may hold the pipe open, but they are not waited for.
                self.output = None;
            }
        }
        Ok(())
    }

    fn read(&mut self) {
        let Some(output) = &self.output else { return };
        let mut chunk = [0; 16 << 10];
        match rustix::io::read(output, &mut chunk) {
            Ok(0) => self.output = None,
            Ok(count) => {
                let room = MAX_OUTPUT.saturating_sub(self.said.len()).min(count);
                self.said.extend_from_slice(&chunk[..room]);
                self.buffer.extend_from_slice(&chunk[..room]);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => self.output = None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn spawner() -> Spawner {
        Spawner { run: "cmp-test".into(), interrupt: Interrupt::never() }
    }

    fn shell(script: &str) -> Invocation {
        Invocation::new(["/bin/sh", "-c", script])
    }

    #[test]
    fn lines_come_with_their_times() {
        let mut running = spawner().spawn(&shell("echo one; read line; echo \"$line\"; echo end")).unwrap();
        let (_, one) = running.line(PATIENCE, |line| (line == "one").then_some(())).unwrap();
        assert!(one >= running.started);
        running.write(b"two\n").unwrap();
        let (line, two) =
            running.line(PATIENCE, |line| line.starts_with('t').then(|| line.to_owned())).unwrap();
        assert_eq!(line, "two");
        assert!(two >= one);
        let finished = running.finish(PATIENCE).unwrap();
        assert_eq!(finished.ok().unwrap(), "one\ntwo\nend\n");
    }

    #[test]
    fn failure_says_the_last_line() {
        let error = spawner().output(&shell("echo why >&2; exit 3"), PATIENCE).unwrap_err();
        assert!(error.to_string().contains("exit status: 3): why"), "{error}");
    }

    #[test]
    fn command_that_takes_too_long_is_ended() {
        let patience = Duration::from_millis(50);
        let error = spawner().output(&shell("sleep 100"), patience).unwrap_err();
        assert!(matches!(error, Error::Slow { .. }), "{error}");
    }

    #[test]
    fn end_without_the_wanted_line_is_an_error() {
        let mut running = spawner().spawn(&shell("echo other")).unwrap();
        let error = running.line(PATIENCE, |line| (line == "wanted").then_some(())).unwrap_err();
        assert!(matches!(error, Error::Silent { .. }), "{error}");
    }

    #[test]
    fn output_that_a_grandchild_holds_open_is_not_waited_for() {
        let output = spawner().output(&shell("sleep 1000 & echo $!"), PATIENCE).unwrap();
        let pid = Pid::from_raw(output.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }

    #[test]
    fn missing_program_is_an_error() {
        let error = spawner().output(&Invocation::new(["/nowhere/at-all"]), PATIENCE).unwrap_err();
        assert!(matches!(error, Error::Spawn { .. }), "{error}");
    }

    #[test]
    fn interruption_ends_a_wait() {
        let interrupt = Interrupt::never();
        let spawner = Spawner { run: "cmp-test".into(), interrupt: interrupt.clone() };
        interrupt.interrupt();
        let error = spawner.output(&shell("sleep 100"), PATIENCE).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
    }
}
