//! Commands in a guest, by its vsock shell.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::LINUX_PATIENCE;

/// Port of the guest's shell.
pub const SHELL: u32 = 1000;

/// Runs commands in the guest by its vsock shell, waiting until that answers. The last one must be
/// `echo end of output`, which is left out.
pub fn sh(socket: &Path, commands: &str) -> String {
    let end = Instant::now() + LINUX_PATIENCE;
    loop {
        if let Some(output) = try_sh(socket, commands) {
            return output;
        }
        assert!(Instant::now() < end, "the guest's shell does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn try_sh(socket: &Path, commands: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LINUX_PATIENCE)).ok()?;
    writeln!(stream, "CONNECT {SHELL}").ok()?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        line.extend(byte);
    }
    stream.write_all(commands.as_bytes()).and_then(|()| stream.write_all(b"\n")).ok()?;
    stream.shutdown(Shutdown::Write).ok()?;
    let mut output = String::new();
    stream.read_to_string(&mut output).ok()?;
    output.ends_with("end of output\n").then(|| output.replace("end of output\n", ""))
}

/// A number that the guest told.
pub fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}
