//! Registries for tests: Debian's own, a proxy that cuts connections, and one that answers whatever a test wants.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{PATIENCE, directory, has_tool};

/// Debian's registry, on a port of this host.
pub struct Registry {
    child: Child,
    pub port: u16,
    _directory: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

impl Registry {
    /// Starts it; `None` if it is not installed, which is said. `htpasswd` makes it ask for passwords.
    pub fn start(htpasswd: Option<&str>) -> Option<Self> {
        Self::start_with(htpasswd, "127.0.0.1", "")
    }

    /// On this address, with further lines for `http` in its configuration.
    pub fn start_with(htpasswd: Option<&str>, address: &str, http: &str) -> Option<Self> {
        if !has_tool("docker-registry") {
            return None;
        }
        let directory = directory();
        let root = directory.path().display().to_string();
        let auth = htpasswd.map_or(String::new(), |text| {
            fs::write(directory.path().join("htpasswd"), text).expect("a file");
            format!("auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n")
        });
        // Somebody else may take the port meanwhile.
        for _ in 0..5 {
            let port = free_port();
            let config = format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: \
                 {{rootdirectory: {root}/data}}, delete: {{enabled: true}}}}\nhttp: {{addr: \"{address}:{port}\"{http}}}\n{auth}"
            );
            fs::write(directory.path().join("config.yml"), config).expect("a file");
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(directory.path().join("config.yml"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("docker-registry");
            let end = Instant::now() + PATIENCE;
            while Instant::now() < end && child.try_wait().expect("a child").is_none() {
                if TcpStream::connect((address, port)).is_ok() {
                    return Some(Self { child, port, _directory: directory });
                }
                thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry does not start");
    }

    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A proxy that lets so many bytes of answers through on each connection, and counts them.
pub struct Cutter {
    pub port: u16,
    /// Bytes of answers for one connection; `u64::MAX` for all.
    pub each: Arc<AtomicU64>,
    /// Bytes of answers so far.
    pub passed: Arc<AtomicU64>,
}

impl Cutter {
    pub fn before(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let each = Arc::new(AtomicU64::new(u64::MAX));
        let passed = Arc::new(AtomicU64::new(0));
        let this = Self { port, each: Arc::clone(&each), passed: Arc::clone(&passed) };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let (each, passed) = (Arc::clone(&each), Arc::clone(&passed));
                let (mut from_client, mut to_server) =
                    (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
                thread::spawn(move || {
                    let _ = io::copy(&mut from_client, &mut to_server);
                    let _ = to_server.shutdown(Shutdown::Write);
                });
                thread::spawn(move || answer(server, client, &each, &passed));
            }
        });
        this
    }

    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }
}

fn answer(mut server: TcpStream, mut client: TcpStream, each: &AtomicU64, passed: &AtomicU64) {
    let mut buffer = [0; 4096];
    let mut sent = 0;
    while let Ok(count) = server.read(&mut buffer) {
        if count == 0 || sent >= each.load(Ordering::Relaxed) || client.write_all(&buffer[..count]).is_err() {
            break;
        }
        sent += count as u64;
        passed.fetch_add(count as u64, Ordering::Relaxed);
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

/// A request, as far as tests look at it.
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let fits = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(fits).map(|(_, value)| value.as_str())
    }
}

/// An answer.
pub enum Answer {
    /// Status, headers, body.
    Plain(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// A body without end.
    Endless,
    /// These bytes, then nothing more.
    Raw(Vec<u8>),
}

/// A body with a status of 200.
pub fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer::Plain(200, vec![], body.into())
}

pub fn status(code: u16) -> Answer {
    Answer::Plain(code, vec![], vec![])
}

/// A server that answers what a function says.
pub struct Server {
    pub port: u16,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn start(handle: impl Fn(&Request, u16) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let handle = Arc::new(handle);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let (handle, stopped) = (Arc::clone(&handle), Arc::clone(&stopped));
                thread::spawn(move || {
                    let _ = serve(client, &*handle, port, &stopped);
                });
            }
        });
        Self { port, stop }
    }

    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// One request for each connection.
fn serve(
    client: TcpStream,
    handle: &(dyn Fn(&Request, u16) -> Answer + Send + Sync),
    port: u16,
    stopped: &AtomicBool,
) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut client = client;
    let mut line = String::new();
    // Whoever tries TLS first gets what other plain servers answer.
    if reader.fill_buf()?.first() == Some(&0x16) {
        return client.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
    }
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = vec![];
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((key, value)) = line.trim().split_once(':') else { break };
        headers.push((key.to_owned(), value.trim().to_owned()));
    }
    let request = Request { method, path, headers };
    match handle(&request, port) {
        Answer::Plain(code, headers, body) => {
            write!(client, "HTTP/1.1 {code} X\r\nConnection: close\r\n")?;
            if !headers.iter().any(|(name, _)| *name == "Content-Length") {
                write!(client, "Content-Length: {}\r\n", body.len())?;
            }
            for (name, value) in headers {
                write!(client, "{name}: {value}\r\n")?;
            }
            client.write_all(b"\r\n")?;
            client.write_all(&body)
        }
        Answer::Endless => {
            client.write_all(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n")?;
            while !stopped.load(Ordering::Relaxed) {
                client.write_all(&[b' '; 65536])?;
            }
            Ok(())
        }
        Answer::Raw(bytes) => client.write_all(&bytes),
    }
}
