use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Client;
use std::time::Instant;

use super::*;
use crate::vm::control::{Reply, State};

/// A server, and a thread in the VM's place that answers with the state, or nothing.
struct Rig {
    path: std::path::PathBuf,
    control: Control,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let control = Control::new().unwrap();
        let (served, answered) = (control.clone(), control.clone());
        let phase = Mutex::new(Phase::Running(served));
        let shared = Arc::new(Shared { id: "test".into(), phase, metadata: Arc::default() });
        std::thread::spawn(move || {
            let runtime = runtime().unwrap();
            listen(&runtime, listener, shared).unwrap();
            run(&runtime)
        });
        std::thread::spawn(move || {
            loop {
                match answered.take() {
                    Some((Command::State, answer)) => answer(Ok(Reply::State(State::Running))),
                    Some((_, answer)) => answer(Ok(Reply::Done)),
                    None => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        });
        Rig { path, control, _directory: directory }
    }

    fn connect(&self) -> Client {
        let client = Client::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        client
    }

    /// Sends bytes, and reads until the server ends the connection.
    fn exchange(&self, request: &[u8]) -> String {
        let mut client = self.connect();
        // A server that has seen enough may close first.
        let _ = client.write_all(request);
        let _ = client.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn state(&self) -> String {
        self.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    }
}

#[test]
fn requests_are_answered_on_one_connection() {
    let rig = Rig::new();
    let patch = "PATCH /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
    let get = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answers = rig.exchange(format!("{patch}{get}").as_bytes());
    assert!(answers.starts_with("HTTP/1.1 204 No Content\r\n"), "{answers}");
    assert!(answers.contains("HTTP/1.1 200 OK\r\n"), "{answers}");
    assert!(answers.contains("\"state\":\"Running\""), "{answers}");
    let chunked = "PATCH /vm HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
                   9\r\n{\"state\":\r\n9\r\n\"Paused\"}\r\n0\r\n\r\n";
    assert!(rig.exchange(chunked.as_bytes()).starts_with("HTTP/1.1 204 "));
    rig.control.close();
    assert!(rig.state().starts_with("HTTP/1.1 503 "));
}

#[test]
fn what_is_too_large_is_refused() {
    let rig = Rig::new();
    let patch = "PATCH /vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let body = "x".repeat(BODY_BYTES_MAX + 1);
    let long = rig.exchange(format!("{patch}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
    assert!(long.starts_with("HTTP/1.1 413 ") && long.contains("fault_message"), "{long}");
    let chunked = format!("{patch}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let long = rig.exchange(chunked.as_bytes());
    assert!(long.starts_with("HTTP/1.1 413 "), "{long}");
    let promised = rig.exchange(format!("{patch}Content-Length: 18446744073709551615\r\n\r\n").as_bytes());
    assert!(promised.starts_with("HTTP/1.1 4"), "{promised}");
    let header = rig.exchange(format!("{patch}X: {body}\r\n\r\n").as_bytes());
    assert!(header.starts_with("HTTP/1.1 431 "), "{header}");
    let many = "X: y\r\n".repeat(HEADERS_MAX + 1);
    let many = rig.exchange(format!("{patch}{many}\r\n").as_bytes());
    assert!(many.starts_with("HTTP/1.1 431 "), "{many}");
    assert!(rig.state().contains("Running"));
}

#[test]
fn what_is_no_http_does_no_harm() {
    let rig = Rig::new();
    let requests: [&[u8]; 6] = [
        b"",
        b"\r\n\r\n\r\n",
        b"hello\r\n\r\n",
        &[0xff; 4096],
        b"GET / HTTP/9.9\r\n\r\n",
        b"PATCH /vm HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    ];
    for request in requests {
        let answer = rig.exchange(request);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert!(rig.state().contains("Running"));
}

#[test]
fn client_that_stalls_holds_up_nobody_and_is_rid_of() {
    let rig = Rig::new();
    let stalled: Vec<Client> = (0..100)
        .map(|n| {
            let mut client = rig.connect();
            let part: &[u8] = match n % 3 {
                0 => b"",
                1 => b"GET / HT",
                _ => b"PATCH /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{\"sta",
            };
            client.write_all(part).unwrap();
            client
        })
        .collect();
    for _ in 0..20 {
        assert!(rig.state().contains("Running"));
    }
    // All of them are closed by the server, some with an answer that says why.
    let start = Instant::now();
    let mut timed_out = 0;
    for mut client in stalled {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        timed_out += usize::from(answer.starts_with("HTTP/1.1 408 "));
    }
    assert!(timed_out > 0);
    assert!(start.elapsed() < 3 * CLIENT_PATIENCE);
}

#[test]
fn more_clients_than_there_is_room_for_are_served_in_turn() {
    let rig = Rig::new();
    let clients: Vec<Client> = (0..CLIENTS_MAX + 50).map(|_| rig.connect()).collect();
    std::thread::scope(|scope| {
        let ask = |mut client: Client| {
            client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            answer
        };
        let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || ask(client))).collect();
        for thread in threads {
            assert!(thread.join().unwrap().contains("Running"));
        }
    });
}
