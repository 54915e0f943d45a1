//! The guest's serial console: output to a descriptor by a thread of its own, input from standard input.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;

use crate::legacy::{Serial, SerialSink};
use crate::sandbox;
use crate::virtio::console::{ConsoleHandle, ConsoleSink};

/// Output that waits for a slow reader at most, in bytes.
const CAPACITY: usize = 64 << 10;
/// What a guest may send at once after it has seen room: the FIFO of the UART, in bytes.
const BURST: usize = 16;
/// How long output may stand still at the end before it is given up, where the user wants the end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

/// The host's end of a guest's line.
pub trait Line: Send + Sync {
    /// Gives the guest input; returns how many bytes were taken. When not all were, the room event follows.
    fn feed(&self, bytes: &[u8]) -> usize;
    /// Tells that the line's sink has room again after it had none.
    fn sink_drained(&self);
}

impl Line for Serial {
    fn feed(&self, bytes: &[u8]) -> usize {
        Serial::feed(self, bytes)
    }

    fn sink_drained(&self) {
        Serial::sink_drained(self);
    }
}

impl Line for ConsoleHandle {
    fn feed(&self, bytes: &[u8]) -> usize {
        ConsoleHandle::feed(self, bytes)
    }

    fn sink_drained(&self) {
        ConsoleHandle::sink_drained(self);
    }
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// The writer sleeps until there is something to do.
    writer_sleeps: bool,
    closed: bool,
}

/// Output on its way from the guest to the terminal or a file.
#[derive(Default)]
pub struct ConsoleOutput {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    /// Bytes that wait, readable without the lock.
    len: AtomicUsize,
    written: AtomicUsize,
    was_full: AtomicBool,
}

impl SerialSink for ConsoleOutput {
    fn put(&self, byte: u8) -> bool {
        let mut waiting = self.lock();
        if waiting.bytes.len() >= CAPACITY + BURST || waiting.closed {
            self.was_full.store(true, Ordering::Release);
            return waiting.closed;
        }
        waiting.bytes.push_back(byte);
        self.len.store(waiting.bytes.len(), Ordering::Release);
        if waiting.writer_sleeps {
            waiting.writer_sleeps = false;
            self.wake.notify_one();
        }
        true
    }

    fn has_room(&self) -> bool {
        let room = self.len.load(Ordering::Acquire) < CAPACITY;
        if !room {
            self.was_full.store(true, Ordering::Release);
        }
        room
    }
}

impl ConsoleSink for ConsoleOutput {
    fn put(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.lock();
        if waiting.closed {
            return bytes.len();
        }
        let taken = bytes.len().min(CAPACITY.saturating_sub(waiting.bytes.len()));
        if taken < bytes.len() {
            self.was_full.store(true, Ordering::Release);
        }
        waiting.bytes.extend(bytes.iter().take(taken));
        self.len.store(waiting.bytes.len(), Ordering::Release);
        if taken > 0 && std::mem::take(&mut waiting.writer_sleeps) {
            self.wake.notify_one();
        }
        taken
    }
}

impl ConsoleOutput {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes all that waits, or `None` when the output was closed and nothing is left.
    fn take(&self) -> Option<VecDeque<u8>> {
        let mut waiting = self.lock();
        while waiting.bytes.is_empty() {
            if waiting.closed {
                return None;
            }
            waiting.writer_sleeps = true;
            waiting = self.wake.wait(waiting).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Some(std::mem::take(&mut waiting.bytes))
    }

    fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        self.wake.notify_one();
    }
}

/// A sink for guests whose output nobody wants.
pub struct NoOutput;

impl SerialSink for NoOutput {
    fn put(&self, _byte: u8) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        true
    }
}

/// The thread that writes a guest's output.
pub struct ConsoleWriter {
    output: Arc<ConsoleOutput>,
    thread: JoinHandle<()>,
    finished: Arc<EventFd>,
}

/// Until when [`ConsoleWriter::finish`] waits for a reader that takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Until a signal comes: a pager may show the first page for an hour.
    Whole,
    /// For two seconds, since somebody asked for the end.
    Brief,
}

impl ConsoleWriter {
    /// Starts writing what `line` sends to `output` into `target`.
    pub fn start(output: Arc<ConsoleOutput>, line: Arc<dyn Line>, target: File) -> io::Result<ConsoleWriter> {
        let source = output.clone();
        let finished = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let tell = finished.clone();
        let thread =
            std::thread::Builder::new().name("console".into()).stack_size(64 << 10).spawn(move || {
                if let Err(error) = sandbox::enter(sandbox::Kind::Console) {
                    tracing::error!("{}", crate::error_chain(&error));
                    return;
                }
                write_out(&source, &*line, target);
                // Only an overflow could fail.
                let _ = tell.write(1);
            })?;
        Ok(ConsoleWriter { output, thread, finished })
    }

    /// Writes out what is left. Returns the signal on whose arrival at `signals` it was given up, if one came.
    pub fn finish(self, drain: Drain, signals: &SignalFd) -> Option<i32> {
        self.output.close();
        let mut last = (self.output.written.load(Ordering::Acquire), Instant::now());
        loop {
            let mut fds = [
                PollFd::new(self.finished.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            let timeout = match drain {
                Drain::Whole => PollTimeout::NONE,
                Drain::Brief => PollTimeout::from(50u16),
            };
            let _ = poll(&mut fds, timeout);
            if self.finished.read().is_ok() {
                // The thread cannot have panicked on anything that the drain still needs.
                let _ = self.thread.join();
                return None;
            }
            if let Ok(Some(info)) = signals.read_signal() {
                return Some(info.ssi_signo as i32);
            }
            let written = self.output.written.load(Ordering::Acquire);
            if written != last.0 {
                last = (written, Instant::now());
            } else if drain == Drain::Brief && last.1.elapsed() >= DRAIN_PATIENCE {
                return None;
            }
        }
    }
}

fn write_out(output: &ConsoleOutput, line: &dyn Line, mut target: File) {
    let mut broken = false;
    while let Some(bytes) = output.take() {
        let (front, back) = bytes.as_slices();
        for mut part in [front, back] {
            while !broken && !part.is_empty() {
                match target.write(part) {
                    Ok(0) => broken = true,
                    Ok(count) => {
                        part = &part[count..];
                        output.written.fetch_add(count, Ordering::AcqRel);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_writable(&target),
                    Err(error) => {
                        tracing::warn!("the console's output is lost from here on: {error}");
                        broken = true;
                    }
                }
            }
        }
        output.len.store(output.lock().bytes.len(), Ordering::Release);
        if output.was_full.swap(false, Ordering::AcqRel) {
            line.sink_drained();
        }
    }
}

/// Waits until `file`, which somebody else made non-blocking, takes output again.
fn wait_writable(file: &File) {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
    let _ = poll(&mut fds, PollTimeout::from(100u16));
}

/// What became of a piece of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputState {
    /// All was handed on: wait for the descriptor to be readable.
    WaitForInput,
    /// The guest has no room: wait for the serial port's room event.
    WaitForRoom,
    /// The input has ended.
    Ended,
    /// The user typed Ctrl-A x.
    Quit,
}

/// Ctrl-A, which introduces a command to rvmm itself.
const ESCAPE: u8 = 0x01;

const ESCAPE_HELP: &str =
    "\r\nCtrl-A x  end the VM\r\nCtrl-A a  send Ctrl-A to the guest\r\nCtrl-A h  this help\r\n";

/// Input on its way from standard input to the guest.
pub struct ConsoleInput {
    source: File,
    line: Arc<dyn Line>,
    is_terminal: bool,
    escaped: bool,
    waiting: VecDeque<u8>,
}

impl ConsoleInput {
    /// Input from a duplicate of standard input; on a terminal Ctrl-A introduces commands.
    pub fn new(line: Arc<dyn Line>, is_terminal: bool) -> io::Result<ConsoleInput> {
        let source = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        Ok(ConsoleInput { source, line, is_terminal, escaped: false, waiting: VecDeque::new() })
    }

    /// The descriptor to wait on.
    pub fn fd(&self) -> RawFd {
        self.source.as_raw_fd()
    }

    /// Hands on what already was read.
    pub fn flush(&mut self) -> InputState {
        while !self.waiting.is_empty() {
            let taken = self.line.feed(self.waiting.make_contiguous());
            if taken == 0 {
                return InputState::WaitForRoom;
            }
            self.waiting.drain(..taken);
        }
        InputState::WaitForInput
    }

    /// Reads once, which blocks when the descriptor is not readable, and hands on what came.
    pub fn read(&mut self) -> InputState {
        let mut buffer = [0; 256];
        let count = match self.source.read(&mut buffer) {
            Ok(0) => return InputState::Ended,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return InputState::WaitForInput;
            }
            Err(error) => {
                tracing::warn!("the console's input is lost from here on: {error}");
                return InputState::Ended;
            }
        };
        for &byte in buffer.iter().take(count) {
            if self.is_terminal && self.filter(byte) {
                return InputState::Quit;
            } else if !self.is_terminal {
                self.waiting.push_back(byte);
            }
        }
        self.flush()
    }

    /// Takes a typed byte; returns whether the user wants to quit.
    fn filter(&mut self, byte: u8) -> bool {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => self.escaped = true,
            (false, byte) => self.waiting.push_back(byte),
            (true, b'x' | b'X') => return true,
            (true, b'a' | ESCAPE) => self.waiting.push_back(ESCAPE),
            (true, b'h' | b'?') => eprint!("{ESCAPE_HELP}"),
            (true, byte) => self.waiting.extend([ESCAPE, byte]),
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_of_a_fifo_fits_whenever_there_is_room() {
        let output = ConsoleOutput::default();
        let put = |byte| SerialSink::put(&output, byte);
        (0..CAPACITY - 1).for_each(|_| assert!(put(0)));
        assert!(output.has_room());
        (0..BURST).for_each(|_| assert!(put(0)));
        assert!(!output.has_room());
        let sent = (0..CAPACITY).take_while(|_| put(0)).count();
        assert!(sent <= BURST, "{sent} bytes more were taken");
    }
}
