//! Starting, and being there.

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use rustix::termios;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::{Failure, say, system};

static ENTRY: OnceLock<u64> = OnceLock::new();

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Notes when this program began.
pub fn note_entry() {
    ENTRY.get_or_init(now);
}

/// On a guest's console: no echo, and bytes as they come.
pub fn prepare_terminal() {
    let stdin = std::io::stdin();
    if let Ok(mut settings) = termios::tcgetattr(stdin.as_fd()) {
        settings.make_raw();
        let _ = termios::tcsetattr(stdin.as_fd(), termios::OptionalActions::Now, &settings);
    }
}

/// Says when it began by its own clock, and for each byte that it is sent, what time it is: from how long the answers take, the
/// asker learns how its own clock goes.
pub fn answer_clock() -> Result<(), Failure> {
    say(&json!({ "entry": ENTRY.get(), "clock": now() }));
    let mut byte = [0];
    let mut stdin = std::io::stdin().lock();
    while stdin.read(&mut byte)? == 1 {
        if byte[0] == b'q' {
            break;
        }
        say(&json!({ "clock": now() }));
    }
    Ok(())
}

/// Takes so many bytes of memory, says that it is there, and waits for SIGTERM or SIGINT.
pub fn idle(bytes: usize) -> Result<(), Failure> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // Process 1 gets only signals that it waits for.
    signals.thread_block()?;
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
    say(&json!({ "ready": bytes }));
    signals.wait()?;
    Ok(())
}

/// Keeps a processor busy.
pub fn spend(seconds: f64) -> Result<(), Failure> {
    let steps = spin(Duration::try_from_secs_f64(seconds)?);
    say(&json!({ "steps": steps }));
    Ok(())
}

fn spin(time: Duration) -> u64 {
    let end = Instant::now() + time;
    let mut steps = 0_u64;
    while Instant::now() < end {
        steps += 1;
    }
    steps
}

/// Keeps as many processors busy as there are processes, for ten minutes at most.
pub fn burn(count: u32) -> Result<(), Failure> {
    let time = Duration::from_secs(600);
    for _ in 1..count {
        system::fork(|| {
            spin(time);
            0
        })?;
    }
    say(&json!({ "burning": count }));
    spin(time);
    Ok(())
}
