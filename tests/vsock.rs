//! Sockets between host and a Linux guest, by the hundred, and what is left when one side is gone.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rvmm::boot::testing::Program;
use rvmm::kvm::kind::Kind;

use crate::support::api::Api;
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{
    LINUX_PATIENCE, Monitor, PATIENCE, Script, announce, directory, has_fast_kvm, kvm_kind, tiny,
};

const SHELL: u32 = 1000;
const ECHO: u32 = 1001;
const NOBODY: u32 = 1002;
const VSOCK: &str = "/usr/lib/rvmm/tests/vsock";

/// How long one read or write may take before something hangs.
const HANG: Duration = Duration::from_secs(120);

/// A guest that serves a shell and an echo.
struct Guest {
    running: Running,
    socket: PathBuf,
    api: Api,
    directory: tempfile::TempDir,
}

impl Guest {
    fn boot() -> Option<Guest> {
        let linux = linux_for_tests()?;
        let directory = directory();
        let socket = directory.path().join("vsock");
        let script = Script::new(&format!(
            "{VSOCK} echo {ECHO} &\n{VSOCK} shell {SHELL} &\necho guest is ready\nwait"
        ));
        let monitor = script.on(linux.monitor()).arg("--rng");
        let api = Api::new(&directory.path().join("api"));
        let monitor = monitor.args(["--log-level", "debug"]).arg("--api-socket").arg(&api.path);
        let running = monitor.args(["--vsock", &format!("cid=42,socket={}", socket.display())]).start_quiet();
        running.expect_within("guest is ready", LINUX_PATIENCE);
        let guest = Guest { running, socket, api, directory };
        // The servers were only just started.
        let end = Instant::now() + LINUX_PATIENCE;
        for port in [SHELL, ECHO] {
            while guest.try_call(port).is_none() {
                assert!(Instant::now() < end, "nobody listens at the guest's port {port}");
                thread::sleep(Duration::from_millis(100));
            }
        }
        Some(guest)
    }

    /// A connection to the guest's port, if somebody listens there.
    fn try_call(&self, port: u32) -> Option<UnixStream> {
        call(&self.socket, port)
    }

    fn call(&self, port: u32) -> UnixStream {
        self.try_call(port).unwrap_or_else(|| panic!("the guest's port {port} refuses the connection"))
    }

    /// Runs shell commands in the guest and returns what they print.
    fn sh(&self, commands: &str) -> String {
        let mut stream = self.call(SHELL);
        // Commands may take long before they print anything.
        stream.set_read_timeout(Some(10 * LINUX_PATIENCE)).unwrap();
        stream.write_all(commands.as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut output = String::new();
        stream.read_to_string(&mut output).unwrap();
        output
    }

    /// Listens for the guest at the host's port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.socket.display())).unwrap()
    }

    /// Takes `count` of the guest's connections.
    fn accept(&self, listener: &UnixListener, count: usize) -> Vec<UnixStream> {
        listener.set_nonblocking(true).unwrap();
        let end = Instant::now() + HANG;
        let mut streams = Vec::new();
        while streams.len() < count {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    streams.push(timed(stream));
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    assert!(Instant::now() < end, "{} of {count} connections came", streams.len());
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        streams
    }

    /// Descriptors of the monitor.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.running.pid())).unwrap().count()
    }

    /// Waits until the monitor has at most `count` descriptors again: what was still open when they were counted may be
    /// closed by now.
    fn expect_descriptors(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        while self.descriptors() > count {
            assert!(
                Instant::now() < end,
                "{} descriptors, and before there were {count}",
                self.descriptors()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the guest, which must leave no socket behind.
    fn end(self) {
        self.sh("killall vsock");
        self.running.wait(LINUX_PATIENCE).exits(0);
        assert!(!self.socket.exists(), "the socket is left");
    }
}

fn timed(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.set_write_timeout(Some(HANG)).unwrap();
    stream
}

/// Connects through the socket of a device; `None` if the guest refuses.
fn call(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = timed(UnixStream::connect(socket).expect("the device's socket"));
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).ok()?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => answer.extend(byte),
            Ok(_) => break,
            Err(error) => panic!("no answer to CONNECT {port}: {error}"),
        }
    }
    if answer.is_empty() {
        return None;
    }
    let answer = String::from_utf8(answer).unwrap();
    let host_port = answer.strip_prefix("OK ").and_then(|rest| rest.strip_suffix('\n'));
    assert!(host_port.is_some_and(|port| port.parse::<u32>().is_ok()), "{answer:?}");
    Some(stream)
}

/// Bytes that differ from stream to stream and from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| {
        let x = (seed << 40 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes()
    };
    (0..len.div_ceil(8) as u64).flat_map(word).take(len).collect()
}

/// Sends `len` bytes to an echo and their end, while what comes back is read: it must be the same.
fn converse(stream: &UnixStream, seed: u64, len: usize) {
    let data = pattern(seed, len);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::with_capacity(len);
        let mut stream = stream;
        stream.read_to_end(&mut back).unwrap();
        assert!(back == data, "stream {seed}: {} of {len} bytes came back, or other ones", back.len());
    });
}

/// Sends back what comes, and its end.
fn echo(mut stream: UnixStream) {
    let mut part = vec![0; 64 << 10];
    loop {
        match stream.read(&mut part).unwrap() {
            0 => return stream.shutdown(Shutdown::Write).unwrap(),
            len => stream.write_all(&part[..len]).unwrap(),
        }
    }
}

/// Many connections at once in both directions, each with so many bytes both ways.
fn crowd(guest: &Guest, count: usize, bytes: usize) {
    let calls: Vec<_> = (0..count).map(|_| guest.call(ECHO)).collect();
    thread::scope(|scope| {
        for (seed, stream) in calls.iter().enumerate() {
            scope.spawn(move || converse(stream, seed as u64, bytes));
        }
    });
    drop(calls);
    let listener = guest.listen(5000);
    thread::scope(|scope| {
        let talk = scope.spawn(|| guest.sh(&format!("{VSOCK} talk 5000 {count} {bytes}")));
        for stream in guest.accept(&listener, count) {
            scope.spawn(move || echo(stream));
        }
        assert_eq!(talk.join().unwrap(), format!("right {count} wrong 0\n"));
    });
    fs::remove_file(format!("{}_5000", guest.socket.display())).unwrap();
}

/// One side has no more to say, and hears the whole answer.
fn half_close(guest: &Guest) {
    let mut stream = guest.call(ECHO);
    let data = pattern(7, 100_000);
    stream.write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == data);

    let listener = guest.listen(5001);
    thread::scope(|scope| {
        let talk = scope.spawn(|| guest.sh(&format!("{VSOCK} talk 5001 1 150000")));
        let mut stream = guest.accept(&listener, 1).remove(0);
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 150_000);
        stream.write_all(&all).unwrap();
        drop(stream);
        assert_eq!(talk.join().unwrap(), "right 1 wrong 0\n");
    });
}

/// The side that is left notices at once, whoever is killed.
fn kill_either_side(guest: &Guest, count: usize) {
    let listener = guest.listen(5002);
    thread::scope(|scope| {
        // The guest's process is killed with SIGKILL.
        let held = scope.spawn(|| {
            guest.sh(&format!(
                "{VSOCK} hold 5002 {count} & while ! [ -e /tmp/die ]; do sleep 0.1; done; kill -9 $!; wait"
            ))
        });
        let streams = guest.accept(&listener, count);
        guest.sh("touch /tmp/die");
        for mut stream in streams {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).unwrap();
            assert!(rest.is_empty());
        }
        held.join().unwrap();
        // The host's side is closed, as the kernel does for a process that is killed.
        let held = scope.spawn(|| guest.sh(&format!("{VSOCK} hold 5002 {count}")));
        drop(guest.accept(&listener, count));
        assert_eq!(held.join().unwrap(), "held\nended\n");
    });
    // With bytes under way in both directions.
    for _ in 0..count {
        let stream = guest.call(ECHO);
        stream.set_nonblocking(true).unwrap();
        while (&stream).write(&[0; 4096]).is_ok() {}
    }
    converse(&guest.call(ECHO), 1, 10_000);
}

/// Host programs that do not read hold up their own connections, neither others nor the monitor's memory.
fn stalled_peers(guest: &Guest, count: usize) {
    /// More than all buffers on the way there and back together.
    const PLENTY: usize = 8 << 20;
    let data = pattern(99, PLENTY);
    let before = guest.running.own_kib();
    let stalled: Vec<_> = (0..count).map(|_| guest.call(ECHO)).collect();
    let mut sent = vec![0; count];
    for stream in &stalled {
        stream.set_nonblocking(true).unwrap();
    }
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(1) {
        for (mut stream, sent) in stalled.iter().zip(&mut sent) {
            while let Ok(len) = stream.write(&data[*sent..]) {
                (*sent, quiet) = (*sent + len, Instant::now());
                assert!(*sent < PLENTY, "a program that never reads can write without end");
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    let after = guest.running.own_kib();
    // The window of each, and a little for what comes with it.
    let most = 300 * count as u64 + 1024;
    assert!(after < before + most, "{before} KiB became {after} KiB");
    converse(&guest.call(ECHO), 1, 300_000);
    announce(&format!(
        "figure: {count} stalled vsock connections took {} KiB each and {} KiB of the monitor's memory",
        sent.iter().sum::<usize>() / (count << 10),
        after.saturating_sub(before)
    ));
    // All that went in comes out.
    for (mut stream, sent) in stalled.iter().zip(&sent) {
        stream.set_nonblocking(false).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == data[..*sent], "{} of {sent} bytes came back, or other ones", back.len());
    }
}

/// A paused machine's sockets are still, and go on where they were.
fn pauses(guest: &Guest, count: usize, bytes: usize) {
    let streams: Vec<_> = (0..count).map(|_| guest.call(ECHO)).collect();
    thread::scope(|scope| {
        for (seed, stream) in streams.iter().enumerate() {
            scope.spawn(move || converse(stream, seed as u64, bytes));
        }
        for _ in 0..20 {
            guest.api.set_state("Paused");
            guest.api.set_state("Resumed");
        }
    });
    let mut known = guest.call(ECHO);
    guest.api.set_state("Paused");
    let mut caller = timed(UnixStream::connect(&guest.socket).unwrap());
    caller.write_all(format!("CONNECT {ECHO}\n").as_bytes()).unwrap();
    known.write_all(b"x").unwrap();
    for stream in [&mut caller, &mut known] {
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let error = stream.read(&mut [0]).expect_err("nobody answers while the machine is paused");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        stream.set_read_timeout(Some(HANG)).unwrap();
    }
    guest.api.set_state("Resumed");
    let mut answer = [0; 3];
    caller.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK ");
    known.read_exact(&mut answer[..1]).unwrap();
    assert_eq!(answer[0], b'x');
}

/// Nobody listens there.
fn refusals(guest: &Guest) {
    assert!(guest.try_call(NOBODY).is_none());
    assert_eq!(guest.sh(&format!("{VSOCK} try 5999")), "Connection reset by peer\n");
    for greeting in ["CONNECT\n", "CONNECT x\n", "GET / HTTP/1.1\r\n", "CONNECT 4294967295\n"] {
        let mut stream = timed(UnixStream::connect(&guest.socket).unwrap());
        stream.write_all(greeting.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // What it has not read makes the end a reset.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{greeting:?}");
    }
}

fn churn(guest: &Guest, count: usize) {
    for round in 0..count {
        let mut stream = guest.call(ECHO);
        let sent = [round as u8];
        let mut back = [0];
        stream.write_all(&sent).unwrap();
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, sent);
    }
    let listener = guest.listen(5003);
    thread::scope(|scope| {
        let churn = scope.spawn(|| guest.sh(&format!("{VSOCK} churn 5003 {count}")));
        for _ in 0..count {
            let mut stream = guest.accept(&listener, 1).remove(0);
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
        }
        assert_eq!(churn.join().unwrap(), format!("done {count}\n"));
    });
}

#[test]
fn connections_of_both_directions_work_and_leave_nothing_behind() {
    // Where guest kernels are emulated, a little of everything.
    let slow = kvm_kind() == Some(Kind::Pvm);
    let (many, bytes, some, rounds) = if slow { (3, 32 << 10, 2, 2) } else { (100, 256 << 10, 40, 500) };
    let Some(guest) = Guest::boot() else { return };
    assert_eq!(guest.sh("dd if=/dev/hwrng bs=16 count=4 2>/dev/null | wc -c"), "64\n");
    let before = guest.descriptors();
    refusals(&guest);
    let start = Instant::now();
    crowd(&guest, many, bytes);
    announce(&format!(
        "figure: {} vsock connections, {many} at once, moved {} MiB each way in {:.1} s",
        2 * many,
        (2 * many * bytes) as f64 / f64::from(1 << 20),
        start.elapsed().as_secs_f64()
    ));
    half_close(&guest);
    kill_either_side(&guest, some);
    stalled_peers(&guest, some / 2);
    pauses(&guest, some / 2, bytes);
    guest.expect_descriptors(before);
    churn(&guest, rounds);
    guest.expect_descriptors(before);
    guest.end();
}

#[test]
#[ignore = "long: scripts/test --long runs it"]
fn hundred_connections_move_ten_megabytes_each_and_five_hundred_work_at_once() {
    if !has_fast_kvm() {
        return;
    }
    let Some(guest) = Guest::boot() else { return };
    let before = guest.descriptors();
    let start = Instant::now();
    crowd(&guest, 100, 10 << 20);
    announce(&format!(
        "figure: 200 vsock connections, 100 at once, moved 10 MiB each way each in {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    // As many as the guest's program can have, in both directions one after the other.
    crowd(&guest, 500, 64 << 10);
    stalled_peers(&guest, 200);
    pauses(&guest, 100, 1 << 20);
    churn(&guest, 5000);
    guest.expect_descriptors(before);
    guest.end();
}

#[test]
fn killed_monitor_ends_the_streams_and_its_socket_is_removed_or_replaced() {
    if !has_fast_kvm() {
        return;
    }
    let Some(guest) = Guest::boot() else { return };
    let mut streams: Vec<_> = (0..20).map(|_| guest.call(ECHO)).collect();
    guest.running.signal(nix::sys::signal::Signal::SIGKILL);
    for stream in &mut streams {
        let mut rest = Vec::new();
        assert!(stream.read_to_end(&mut rest).is_ok_and(|len| len == 0));
    }
    let Guest { running, socket, directory, .. } = guest;
    running.wait(PATIENCE);
    // The monitor's keeper does it.
    let end = Instant::now() + PATIENCE;
    while socket.exists() {
        assert!(Instant::now() < end, "nobody removed it");
        std::thread::sleep(Duration::from_millis(10));
    }
    // As a monitor without a keeper leaves it.
    drop(UnixListener::bind(&socket).expect("a socket"));
    assert!(socket.exists());
    let vm = tiny(&Program::new().power_off());
    let vsock = format!("cid=3,socket={}", socket.display());
    vm.monitor().args(["--vsock", &vsock]).run().exits(0);
    assert!(!socket.exists());
    drop(directory);
}

#[test]
fn sockets_that_cannot_be_are_refused_with_one_line() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let run = |cid: &str, path: &Path| {
        let vsock = format!("cid={cid},socket={}", path.display());
        Monitor::new().args(["--kernel", "none", "--vsock", &vsock]).run()
    };
    run("2", &path("x")).fails_with(&["2 as the guest's vsock address", "3 to 4294967294"]);
    run("4294967295", &path("x")).fails_with(&["vsock address"]);
    run("3", &path(&"x".repeat(100))).fails_with(&["bytes, and the path may have"]);
    run("3", &path("no/such/directory"))
        .fails_with(&["cannot make the vsock device's socket", "No such file"]);
    fs::write(path("file"), "precious").unwrap();
    run("3", &path("file")).fails_with(&["is there already and is no socket"]);
    assert_eq!(fs::read(path("file")).unwrap(), b"precious");
    let listener = UnixListener::bind(path("live")).unwrap();
    run("3", &path("live")).fails_with(&["is in use by another process"]);
    assert!(path("live").exists());
    drop(listener);
    // Nobody listens there any more; that the kernel is missing comes after it.
    let outcome = run("3", &path("live"));
    outcome.fails_with(&["none"]).check(!outcome.stderr.contains("in use"), "a dead socket is not in use");
    assert!(!path("live").exists(), "a failed start leaves its socket");
}
