//! A run of the rvmm binary, watched.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::PATIENCE;

/// A run that is being put together.
pub struct Monitor {
    command: Command,
}

impl Monitor {
    /// `rvmm` without arguments.
    pub fn new() -> Monitor {
        Self::from_command(Command::new(super::binary()))
    }

    /// `rvmm` behind something else, such as `unshare`.
    pub fn from_command(mut command: Command) -> Monitor {
        // A user's choice must not decide what tests see.
        command.env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
        Monitor { command }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Monitor {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Monitor {
        self.command.args(arguments);
        self
    }

    /// Runs to the end without input.
    pub fn run(self) -> Outcome {
        self.run_within(PATIENCE)
    }

    /// Runs to the end without input, within `patience`.
    pub fn run_within(mut self, patience: Duration) -> Outcome {
        self.command.stdin(Stdio::null());
        self.start().wait(patience)
    }

    /// Starts with standard input from a pipe.
    pub fn start_with_input(mut self) -> Running {
        self.command.stdin(Stdio::piped());
        self.start()
    }

    /// Starts without input.
    pub fn start_quiet(mut self) -> Running {
        self.command.stdin(Stdio::null());
        self.start()
    }

    fn start(mut self) -> Running {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = format!("{:?}", self.command);
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        let stdout = Stream::read(child.stdout.take().expect("a pipe"));
        let stderr = Stream::read(child.stderr.take().expect("a pipe"));
        let stdin = child.stdin.take();
        Running { line, child, stdin, stdout, stderr }
    }
}

#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

/// What has come through a pipe so far.
struct Stream {
    shared: Arc<(Mutex<Received>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    fn read(mut pipe: impl Read + Send + 'static) -> Stream {
        let shared: Arc<(Mutex<Received>, Condvar)> = Arc::default();
        let filled = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = pipe.read(&mut buffer).unwrap_or(0);
                let mut received = filled.0.lock().unwrap();
                received.bytes.extend_from_slice(&buffer[..count]);
                received.ended = count == 0;
                filled.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Stream { shared, thread: Some(thread) }
    }

    fn bytes(&self) -> Vec<u8> {
        self.shared.0.lock().unwrap().bytes.clone()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).replace('\r', "")
    }

    /// Waits for `text`; false if the stream ends or the time is over before it comes.
    fn wait_for(&self, text: &str, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut received = self.shared.0.lock().unwrap();
        loop {
            if String::from_utf8_lossy(&received.bytes).replace('\r', "").contains(text) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if received.ended || left.is_zero() {
                return false;
            }
            received = self.shared.1.wait_timeout(received, left).unwrap().0;
        }
    }

    fn finish(&mut self) -> Vec<u8> {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the reader");
        }
        self.bytes()
    }
}

/// A run that is going on. It is killed when the value is dropped.
pub struct Running {
    line: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
}

impl Running {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Threads of the monitor. The workers that the host's kernel adds for an io_uring come and go as it likes.
    pub fn threads(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a process");
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
        tasks.flatten().filter_map(name).filter(|name| !name.starts_with("iou-")).count()
    }

    /// Private dirty memory of rvmm outside of guest memory, in KiB. Needs `--log-level debug`, which tells where that is.
    pub fn own_kib(&self) -> u64 {
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number");
        let log = self.stderr.text();
        let places = log.lines().filter_map(|line| line.split_once(" at host ")?.1.split_once('+'));
        let guest: Vec<_> =
            places.map(|(start, len)| number(start)..number(start) + number(len.trim())).collect();
        assert!(!guest.is_empty(), "where is guest memory?\n{log}");
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).expect("a process");
        let (mut total, mut counts) = (0, false);
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if let Some((start, _)) = first.split_once('-') {
                counts = !guest.iter().any(|range| range.contains(&number(start)));
            } else if counts && first == "Private_Dirty:" {
                total += second.parse::<u64>().expect("a number");
            }
        }
        total
    }

    /// Whether the guest has printed `text`.
    pub fn has_shown(&self, text: &str) -> bool {
        self.stdout.text().contains(text)
    }

    /// Whether the guest's output is at its end.
    pub fn has_ended(&self) -> bool {
        self.stdout.shared.0.lock().unwrap().ended
    }

    /// Waits until the guest has printed `text`.
    pub fn expect(&self, text: &str) {
        self.expect_within(text, PATIENCE);
    }

    /// Waits until the guest has printed `text`, within `patience`.
    pub fn expect_within(&self, text: &str, patience: Duration) {
        if !self.stdout.wait_for(text, patience) {
            panic!("{text:?} did not come before the end or within {patience:?}\n{}", self.story());
        }
    }

    /// Sends input to the guest.
    pub fn send(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("started with input");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("input");
    }

    /// Ends the input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal to rvmm.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }

    /// Waits for the end.
    pub fn wait(mut self, patience: Duration) -> Outcome {
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if Instant::now() > deadline {
                panic!("no end within {patience:?}\n{}", self.story());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let bytes = self.stdout.finish();
        let errors = self.stderr.finish();
        let line = std::mem::take(&mut self.line);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\r', "");
        Outcome { line, status, stdout: text(&bytes), bytes, stderr: text(&errors) }
    }

    /// What is known of the run, for a failed assertion.
    pub fn story(&self) -> String {
        story(&self.line, &self.stdout.text(), &self.stderr.text())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn story(line: &str, stdout: &str, stderr: &str) -> String {
    format!("--- command\n{line}\n--- the guest's console\n{stdout}\n--- standard error\n{stderr}\n---")
}

/// A run that has ended.
pub struct Outcome {
    line: String,
    pub status: ExitStatus,
    /// Standard output, as bytes and as text without carriage returns.
    pub bytes: Vec<u8>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Fails with the whole story unless `holds`.
    #[track_caller]
    pub fn check(&self, holds: bool, what: &str) -> &Outcome {
        assert!(holds, "{what}\n{}\n{}", self.status, story(&self.line, &self.stdout, &self.stderr));
        self
    }

    /// The exit code must be `code`.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Outcome {
        self.check(self.status.code() == Some(code), &format!("the exit code is not {code}"))
    }

    /// The console must show `text`.
    #[track_caller]
    pub fn shows(&self, text: &str) -> &Outcome {
        self.check(self.stdout.contains(text), &format!("the console does not show {text:?}"))
    }

    /// Standard error must contain `text`.
    #[track_caller]
    pub fn says(&self, text: &str) -> &Outcome {
        self.check(self.stderr.contains(text), &format!("standard error does not say {text:?}"))
    }

    /// rvmm must have failed with one line that has all of `parts`.
    #[track_caller]
    pub fn fails_with(&self, parts: &[&str]) -> &Outcome {
        self.exits(125).check(self.stderr.starts_with("rvmm: "), "the error does not name rvmm");
        self.check(self.stderr.lines().count() == 1, "the error is not one line");
        parts.iter().fold(self, |outcome, part| outcome.says(part))
    }

    /// The value that a guest's script reported as `NAME=VALUE` on a line of its own.
    #[track_caller]
    pub fn value(&self, name: &str) -> &str {
        let found = self.stdout.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        self.check(found.is_some(), &format!("the guest did not report {name}"));
        found.unwrap_or_default()
    }

    /// The guest's script must have reported that value.
    #[track_caller]
    pub fn reports(&self, name: &str, value: &str) -> &Outcome {
        let found = self.value(name);
        self.check(found == value, &format!("the guest reported {name}={found}, not {value}"))
    }
}
