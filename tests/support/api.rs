//! A client of the control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{LINUX_PATIENCE, PATIENCE};

/// A control socket.
pub struct Api {
    pub path: PathBuf,
}

/// An answer: its status, and its body where there is one.
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Api {
    /// The socket at `path`, which rvmm is about to make.
    pub fn new(path: &Path) -> Api {
        Api { path: path.to_owned() }
    }

    /// Connects, waiting for the socket to be there.
    pub fn connect(&self) -> UnixStream {
        let end = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&self.path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
                    return stream;
                }
                Err(error) => assert!(Instant::now() < end, "{:?}: {error}", self.path),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a request and waits for its answer.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}Connection: close\r\n\r\n");
        // A monitor that has seen enough may answer first.
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Answer { status: status.unwrap_or_else(|| panic!("{answer:?}")), body: body.to_owned() }
    }

    /// `GET`, whose answer must be JSON.
    pub fn get(&self, path: &str) -> Value {
        let answer = self.request("GET", path, "");
        assert_eq!(answer.status, 200, "GET {path}: {}", answer.body);
        serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}: {}", answer.body))
    }

    /// A number in the answer to `GET`.
    pub fn number(&self, path: &str, name: &str) -> u64 {
        let value = self.get(path);
        value.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: no {name} in {value}"))
    }

    /// A request that must succeed without an answer.
    pub fn change(&self, method: &str, path: &str, body: &str) {
        let answer = self.request(method, path, body);
        assert_eq!(answer.status, 204, "{method} {path} {body}: {}", answer.body);
    }

    /// `PATCH /vm`; returns how long it took.
    pub fn set_state(&self, state: &str) -> Duration {
        let start = Instant::now();
        self.change("PATCH", "/vm", &format!("{{\"state\":\"{state}\"}}"));
        start.elapsed()
    }

    /// A request that must be refused with this status and a message that has `says`.
    pub fn refuses(&self, method: &str, path: &str, body: &str, status: u16, says: &str) {
        let answer = self.request(method, path, body);
        let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let message = value.get("fault_message").and_then(Value::as_str).unwrap_or_default();
        assert_eq!(answer.status, status, "{method} {path} {body}: {}", answer.body);
        assert!(message.contains(says), "{method} {path} {body}: {message:?} does not say {says:?}");
    }

    /// Waits until `holds`.
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut(&Api) -> bool) {
        let end = Instant::now() + LINUX_PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < end, "{what} did not come");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Resident memory of a process, in KiB: all of it, and what is not of a file.
pub fn resident_kib(pid: u32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
        line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    };
    (field("VmRSS:"), field("RssAnon:"))
}
