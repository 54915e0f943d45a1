//! This terminal, or these pipes, as the standard streams of a container.

use std::io::{self, Write, stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::container::backend::WindowSize;
use crate::container::client::Connection;
use crate::container::supervisor::protocol::{Event, Request};
use crate::terminal::{self, RawTerminal};

/// Bytes of input that are read at once.
const BUFFER_BYTES: usize = 16 << 10;
/// Signals that are passed on to the container.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGURG,
];

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With the container, by this exit code.
    Exited(u8),
    /// The container could not be started.
    Failed {
        /// Exit code for that.
        code: u8,
        /// Why.
        message: String,
    },
    /// By the keys for that; the container goes on.
    Detached,
}

/// What a session has of this process.
#[derive(Clone, Debug)]
pub struct Options {
    /// Standard input is the container's.
    pub stdin: bool,
    /// The container has a terminal.
    pub terminal: bool,
    /// Signals are passed on.
    pub pass_signals: bool,
    /// Keys that end the session, as bytes; empty for none.
    pub detach_keys: Vec<u8>,
}

/// Keys as Docker writes them: `ctrl-p,ctrl-q`, `a,b`.
pub fn detach_keys(text: &str) -> Result<Vec<u8>, String> {
    let key = |key: &str| match (key.strip_prefix("ctrl-"), key.as_bytes()) {
        (Some("@"), _) => Ok(0),
        (Some(letter), _) if letter.len() == 1 && letter.bytes().all(|b| b.is_ascii_alphabetic()) => {
            Ok(letter.as_bytes()[0].to_ascii_lowercase() - b'a' + 1)
        }
        (Some("["), _) => Ok(27),
        (Some("\\"), _) => Ok(28),
        (Some("]"), _) => Ok(29),
        (Some("^"), _) => Ok(30),
        (Some("_"), _) => Ok(31),
        (None, [byte]) => Ok(*byte),
        _ => Err(format!("{key:?} is no key: a letter, or ctrl- and one of a-z @ [ \\ ] ^ _")),
    };
    text.split(',').filter(|text| !text.is_empty()).map(key).collect()
}

/// The size of this terminal.
pub fn window_size() -> Option<WindowSize> {
    terminal::size().map(|(columns, rows)| WindowSize { columns, rows })
}

/// Says what is wrong with a terminal for the container where there is none here, as Docker does.
pub fn check_terminal(wants_terminal: bool, stdin_open: bool) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    if wants_terminal && stdin_open && !stdin().is_terminal() {
        bail!("standard input is not a terminal: leave out -t, or run this in one");
    }
    Ok(())
}

/// Signals that come as something to read.
pub fn signals() -> anyhow::Result<SignalFd> {
    let mut mask = SigSet::empty();
    PASSED_ON.into_iter().chain([Signal::SIGWINCH]).for_each(|signal| mask.add(signal));
    mask.thread_block().context("cannot hold signals back")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot wait for signals")
}

/// Waits until one of these can be read, and says which.
pub fn wait_for(fds: &[Option<BorrowedFd<'_>>]) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd> =
        fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => break,
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut ready = polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
    Ok(fds.iter().map(|fd| fd.is_some() && ready.next().unwrap_or(false)).collect())
}

/// Input of this process, and the keys in it that end the session.
pub struct Input {
    buffer: Vec<u8>,
    keys: Vec<u8>,
    matched: usize,
    open: bool,
}

/// What came from standard input.
pub enum Typed {
    /// Bytes for the container.
    Bytes(Vec<u8>),
    /// Nothing more will come.
    End,
    /// The keys that end the session.
    Detach,
}

impl Input {
    /// Standard input, or none.
    pub fn new(open: bool, keys: &[u8]) -> Input {
        Input { buffer: vec![0; BUFFER_BYTES], keys: keys.to_vec(), matched: 0, open }
    }

    /// What to wait for.
    pub fn fd<'a>(&self, stdin: &'a io::Stdin) -> Option<BorrowedFd<'a>> {
        self.open.then(|| stdin.as_fd())
    }

    /// Reads once.
    pub fn read(&mut self) -> Typed {
        let len = loop {
            match nix::unistd::read(stdin(), &mut self.buffer) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other.unwrap_or(0),
            }
        };
        if len == 0 {
            self.open = false;
            return Typed::End;
        }
        let mut bytes = Vec::with_capacity(len);
        for byte in &self.buffer[..len] {
            if self.keys.get(self.matched) == Some(byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return Typed::Detach;
                }
                continue;
            }
            // What looked like the keys was not.
            bytes.extend_from_slice(&self.keys[..std::mem::take(&mut self.matched)]);
            if self.keys.first() == Some(byte) && self.keys.len() > 1 {
                self.matched = 1;
            } else {
                bytes.push(*byte);
            }
        }
        Typed::Bytes(bytes)
    }
}

/// Writes all of it; an error that says that nobody reads any more is none.
pub fn print(mut to: impl Write, bytes: &[u8]) -> anyhow::Result<bool> {
    match to.write_all(bytes).and_then(|()| to.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write the container's output"),
    }
}

/// Follows a container over a connection on which `Attach` was sent.
pub fn follow(connection: &mut Connection, options: &Options) -> anyhow::Result<Outcome> {
    let signals = signals()?;
    let _raw = if options.terminal && options.stdin {
        RawTerminal::enter_whole().context("cannot set up the terminal")?
    } else {
        None
    };
    let input_stream = stdin();
    let keys: &[u8] = if options.terminal { &options.detach_keys } else { &[] };
    let mut input = Input::new(options.stdin, keys);
    loop {
        while let Some(event) = connection.buffered_event()? {
            let read = match event {
                Event::Stdout(bytes) => print(stdout(), &bytes)?,
                Event::Stderr(bytes) => print(io::stderr(), &bytes)?,
                Event::Exited(code) => return Ok(Outcome::Exited(code)),
                Event::Failed { code, message } => return Ok(Outcome::Failed { code, message }),
                Event::Started | Event::Done | Event::Refused(_) => true,
            };
            if !read {
                return Ok(Outcome::Detached);
            }
        }
        let ready = wait_for(&[Some(signals.as_fd()), Some(connection.as_fd()), input.fd(&input_stream)])?;
        if ready[0] {
            while let Ok(Some(signal)) = signals.read_signal() {
                let signal = signal.ssi_signo as i32;
                if signal == Signal::SIGWINCH as i32 {
                    if let Some(size) = window_size().filter(|_| options.terminal) {
                        connection.send(&Request::Resize(size))?;
                    }
                } else if options.pass_signals {
                    connection.send(&Request::Signal(signal))?;
                } else if signal != Signal::SIGCONT as i32 && signal != Signal::SIGURG as i32 {
                    return Ok(Outcome::Detached);
                }
            }
        }
        if ready[1] {
            connection.fill()?;
        }
        if ready[2] {
            match input.read() {
                Typed::Bytes(bytes) => connection.send(&Request::Stdin(bytes))?,
                Typed::End => connection.send(&Request::StdinEnd)?,
                Typed::Detach => return Ok(Outcome::Detached),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_read() {
        assert_eq!(detach_keys("ctrl-p,ctrl-q"), Ok(vec![16, 17]));
        assert_eq!(detach_keys("a,ctrl-@,ctrl-]"), Ok(vec![b'a', 0, 29]));
        assert_eq!(detach_keys(""), Ok(vec![]));
        assert!(detach_keys("ctrl-1").is_err() && detach_keys("ab").is_err());
    }
}
