//! Costs of single operations: of the processor, of memory, of the kernel.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write, pipe};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::{Map, json};

use crate::system;
use crate::{Failure, say};

const MIB: usize = 1 << 20;

/// Pages touched at once for a page-fault measurement at most.
const MAX_TOUCHED: usize = 64 * MIB;

/// Runs the named groups, and says the cost of each operation in seconds.
pub fn run(names: &str, milliseconds: u64) -> Result<(), Failure> {
    let time = Duration::from_millis(milliseconds);
    for name in names.split(',') {
        let mut found = Map::new();
        let mut note = |metric: &str, value: f64| found.insert(metric.to_owned(), json!(value));
        match name {
            "cpu" => {
                note("integer", cost(time, integer)?);
                note("float", cost(time, float)?);
                let mut copy = Copy::new(32 * MIB);
                let seconds = cost(time, |count| copy.run(count))?;
                note("bandwidth", copy.bytes() as f64 / seconds);
                let chain = Chain::new(32 * MIB);
                note("random", cost(time, |count| chain.walk(count))?);
            }
            "syscall" => {
                note(
                    "getppid",
                    cost(time, |count| {
                        repeat(count, || {
                            black_box(system::getppid());
                            Ok(())
                        })
                    })?,
                );
                let mut zero = File::open("/dev/zero")?;
                let mut byte = [0];
                note("read", cost(time, |count| repeat(count, || Ok(zero.read_exact(&mut byte)?)))?);
                note(
                    "stat",
                    cost(time, |count| {
                        repeat(count, || {
                            black_box(std::fs::metadata("/")?);
                            Ok(())
                        })
                    })?,
                );
            }
            "fault" => {
                note("anonymous", cost(time, |count| touch(count, system::touch_memory))?);
                // This program's own file: it is in the page cache of whatever kernel runs it.
                let own = File::open("/proc/self/exe")?;
                let bytes = usize::try_from(own.metadata()?.len())? & !4095;
                note(
                    "file",
                    cost(time, |count| {
                        let pages = bytes / 4096;
                        let whole = count.div_ceil(pages as u64);
                        for _ in 0..whole {
                            system::touch_file(own.as_fd(), bytes)?;
                        }
                        Ok(whole * pages as u64)
                    })?,
                );
            }
            "fork" => {
                note(
                    "fork",
                    cost(time, |count| {
                        repeat(count, || system::fork_and_wait(|| 0).map(|_| ()).map_err(Into::into))
                    })?,
                );
                let exec = || {
                    system::fork_and_wait(|| {
                        let _ = system::exec("/proc/self/exe", &["true"]);
                        127
                    })
                };
                note(
                    "exec",
                    cost(time, |count| {
                        repeat(count, || match exec()? {
                            0 => Ok(()),
                            status => {
                                Err(format!("a child of this program ended with status {status}").into())
                            }
                        })
                    })?,
                );
            }
            "switch" => {
                note("pipe", ping_pong(time)?);
            }
            _ => return Err(format!("there is no group of measurements {name:?}").into()),
        }
        say(&json!({ "group": name, "found": found }));
    }
    Ok(())
}

/// Seconds for one operation. `work` does at least as many as it is told, and returns how many.
///
/// The count grows until it takes the time given. The first pass, which finds caches cold, does not count unless nothing
/// else fits.
fn cost(time: Duration, mut work: impl FnMut(u64) -> Result<u64, Failure>) -> Result<f64, Failure> {
    let mut count = 1_u64;
    loop {
        let start = Instant::now();
        let done = work(count)?;
        let taken = start.elapsed();
        if taken >= time {
            return Ok(taken.as_secs_f64() / done as f64);
        }
        let factor = time.as_secs_f64() / taken.as_secs_f64().max(1e-9) * 1.2;
        count = (done as f64 * factor.clamp(1.5, 20.0)).ceil() as u64;
    }
}

fn repeat(count: u64, mut one: impl FnMut() -> Result<(), Failure>) -> Result<u64, Failure> {
    for _ in 0..count {
        one()?;
    }
    Ok(count)
}

fn touch(count: u64, touch: impl Fn(usize) -> std::io::Result<usize>) -> Result<u64, Failure> {
    let mut done = 0;
    while done < count {
        let bytes = (usize::try_from(count - done)?.saturating_mul(4096)).clamp(4096, MAX_TOUCHED);
        done += touch(bytes)? as u64;
    }
    Ok(done)
}

/// A step is one round of a xorshift generator: three shifts and three exclusive-ors that wait for each other.
fn integer(count: u64) -> Result<u64, Failure> {
    let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    black_box(state);
    Ok(count)
}

/// A step is a multiplication and an addition that wait for each other.
fn float(count: u64) -> Result<u64, Failure> {
    let mut value = black_box(0.5_f64);
    for _ in 0..count {
        value = value * 0.999_999 + 1e-7;
    }
    black_box(value);
    Ok(count)
}

/// Copying from one large buffer into another.
struct Copy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copy {
    fn new(bytes: usize) -> Copy {
        // Not zeroes, which may all be one page of the kernel's.
        Copy { from: vec![1; bytes], to: vec![2; bytes] }
    }

    fn bytes(&self) -> usize {
        self.from.len()
    }

    fn run(&mut self, count: u64) -> Result<u64, Failure> {
        for _ in 0..count {
            self.to.copy_from_slice(black_box(&self.from));
            black_box(&self.to);
        }
        Ok(count)
    }
}

/// A buffer in which each place says where the next read is to be: each waits for the one before.
struct Chain {
    next: Vec<u32>,
}

impl Chain {
    fn new(bytes: usize) -> Chain {
        // Sattolo's shuffle makes one cycle through all places.
        let count = bytes / 64;
        let mut order: Vec<u32> = (0..count as u32).collect();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for last in (1..count).rev() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            order.swap(last, (state % last as u64) as usize);
        }
        // A place in each line of the cache.
        let mut next = vec![0; count * 16];
        for (at, to) in order.iter().enumerate() {
            next[at * 16] = to * 16;
        }
        Chain { next }
    }

    fn walk(&self, count: u64) -> Result<u64, Failure> {
        let mut at = 0;
        for _ in 0..count {
            at = self.next[at as usize];
        }
        black_box(at);
        Ok(count)
    }
}

/// Seconds for a byte to another process and back.
fn ping_pong(time: Duration) -> Result<f64, Failure> {
    let (mut there_out, mut there_in) = pipe()?;
    let (mut back_out, mut back_in) = pipe()?;
    let child = system::fork(|| {
        let mut byte = [0];
        while there_out.read_exact(&mut byte).is_ok() && byte[0] != b'q' {
            if back_in.write_all(&byte).is_err() {
                break;
            }
        }
        0
    })?;
    let result = cost(time, |count| {
        let mut byte = [b'x'];
        for _ in 0..count {
            there_in.write_all(&byte)?;
            back_out.read_exact(&mut byte)?;
        }
        Ok(count)
    });
    let _ = there_in.write_all(b"q");
    system::wait_for(child)?;
    result
}
