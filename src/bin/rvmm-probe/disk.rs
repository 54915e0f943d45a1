//! A disk: sequential and random, reads and writes, and how long until a write is safe.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Failure, say};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Measures in a file of its own in `directory`. Reads go past the page cache where the file system can do that.
pub fn run(directory: &str, mebibytes: u64, milliseconds: u64) -> Result<(), Failure> {
    let time = Duration::from_millis(milliseconds);
    let path = Path::new(directory).join("rvmm-probe-disk");
    let result = measure(&path, mebibytes, time);
    let _ = std::fs::remove_file(&path);
    result
}

fn measure(path: &Path, mebibytes: u64, time: Duration) -> Result<(), Failure> {
    let mut chunk = Aligned::new(MIB);
    chunk.fill();
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).read(true).open(path)?;

    let start = Instant::now();
    let mut written = 0_u64;
    while written < mebibytes && (start.elapsed() < time || written == 0) {
        file.write_all(chunk.bytes())?;
        written += 1;
    }
    file.sync_all()?;
    let write = (written * MIB as u64) as f64 / start.elapsed().as_secs_f64();

    let blocks = written * (MIB / BLOCK) as u64;
    let (mut direct, is_direct) = match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
    {
        Ok(file) => (file, true),
        Err(_) => (File::open(path)?, false),
    };
    let start = Instant::now();
    let mut read = 0_u64;
    while read < written && (start.elapsed() < time || read == 0) {
        direct.read_exact(chunk.bytes_mut())?;
        read += 1;
    }
    let read = (read * MIB as u64) as f64 / start.elapsed().as_secs_f64();

    let mut block = Aligned::new(BLOCK);
    block.fill();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut place = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % blocks) * BLOCK as u64
    };
    let random_read = rate(time, || Ok(direct.read_exact_at(block.bytes_mut(), place())?))?;
    let mut writable = OpenOptions::new();
    writable.write(true);
    if is_direct {
        writable.custom_flags(libc::O_DIRECT);
    }
    let writable = writable.open(path)?;
    let random_write = rate(time, || Ok(writable.write_all_at(block.bytes(), place())?))?;

    file.seek(SeekFrom::Start(0))?;
    let fsync = rate(time, || {
        file.write_all(block.bytes())?;
        Ok(file.sync_all()?)
    })?;
    say(&json!({
        "write": write, "read": read, "random_read": random_read, "random_write": random_write, "fsync": 1.0 / fsync,
        "direct": is_direct,
    }));
    Ok(())
}

/// Operations in a second, one after the other.
fn rate(time: Duration, mut one: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let start = Instant::now();
    let mut count = 0_u32;
    while count == 0 || start.elapsed() < time {
        one()?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Memory that begins at a page, as direct reads and writes want it.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Aligned {
        let memory = vec![0; len + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK).min(BLOCK);
        Aligned { memory, start, len }
    }

    /// Bytes that no layer below can guess or leave out.
    fn fill(&mut self) {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for byte in self.bytes_mut() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
