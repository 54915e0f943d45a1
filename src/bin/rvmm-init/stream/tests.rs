use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

/// A stream with its process's end and its host's end.
struct Rig {
    stream: Stream,
    scratch: Vec<u8>,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
}

impl Rig {
    fn output() -> (Self, OwnedFd) {
        let (reader, writer) = pipe();
        (Self::new(Kind::Output, reader), writer)
    }

    fn input() -> (Self, OwnedFd) {
        let (reader, writer) = pipe();
        (Self::new(Kind::Input, writer), reader)
    }

    fn new(kind: Kind, end: OwnedFd) -> Self {
        Self { stream: Stream::new(kind, ("a".into(), 0), end), scratch: vec![0; CHUNK_BYTES] }
    }

    fn attach(&mut self) -> UnixStream {
        let (host, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        assert!(self.stream.attach(agent.into()));
        self.stream.settle(&mut self.scratch);
        host
    }

    /// Serves until nothing is ready.
    fn serve(&mut self) {
        for _ in 0..10_000 {
            let mut interests: Vec<_> = self.stream.interests().collect();
            let mut fds: Vec<_> = interests
                .iter()
                .map(|(_, fd, flags)| rustix::event::PollFd::from_borrowed_fd(*fd, *flags))
                .collect();
            let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if fds.is_empty() || rustix::event::poll(&mut fds, Some(&none)).unwrap() == 0 {
                return;
            }
            let ready: Vec<_> = fds.iter().map(|fd| fd.revents()).collect();
            let sides: Vec<_> = interests.drain(..).map(|(side, ..)| side).collect();
            for (side, ready) in sides.into_iter().zip(ready).filter(|(_, ready)| !ready.is_empty()) {
                self.stream.serve(side, ready, &mut self.scratch);
            }
        }
        panic!("it does not come to rest");
    }
}

fn read_all(host: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let ended = host.read_to_end(&mut bytes).is_ok();
    (bytes, ended)
}

#[test]
fn output_that_comes_before_the_host_waits() {
    let (mut rig, writer) = Rig::output();
    rustix::io::write(&writer, b"early").unwrap();
    rig.serve();
    let mut host = rig.attach();
    rig.serve();
    assert_eq!(read_all(&mut host), (b"early".to_vec(), false));
}

#[test]
fn output_ends_with_the_pipe() {
    let (mut rig, writer) = Rig::output();
    let mut host = rig.attach();
    rustix::io::write(&writer, b"all").unwrap();
    drop(writer);
    rig.serve();
    assert_eq!(read_all(&mut host), (b"all".to_vec(), true));
    assert!(rig.stream.is_settled());
}

#[test]
fn host_that_does_not_read_holds_the_process_up() {
    let (mut rig, writer) = Rig::output();
    let mut host = rig.attach();
    let mut written = 0;
    // Everything fills up: the connection, the buffer, the pipe.
    loop {
        match rustix::io::write(&writer, &[7; 4096]) {
            Ok(len) => written += len,
            Err(Errno::AGAIN) => {
                let before = rig.stream.to_host.left().len();
                rig.serve();
                if rustix::io::write(&writer, &[7; 1]).is_err() {
                    assert_eq!(rig.stream.to_host.left().len(), before);
                    break;
                }
                written += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(written < 2 << 20, "{written}");
    assert!(rig.stream.to_host.bytes.len() <= CHUNK_BYTES);
    drop(writer);
    let mut got = 0;
    loop {
        let (bytes, ended) = read_all(&mut host);
        got += bytes.len();
        rig.serve();
        if ended {
            break;
        }
    }
    assert_eq!(got, written);
}

#[test]
fn process_that_ends_has_its_output_handed_over_first() {
    let (mut rig, writer) = Rig::output();
    let mut host = rig.attach();
    rustix::io::write(&writer, b"last words").unwrap();
    rig.stream.end_process();
    rig.stream.settle(&mut rig.scratch);
    assert!(rig.stream.is_settled());
    assert_eq!(read_all(&mut host), (b"last words".to_vec(), true));
    // Somebody else still has the pipe; what comes now is thrown away, and nobody is stopped.
    for _ in 0..100 {
        rustix::io::write(&writer, &[1; 4096]).unwrap();
        rig.serve();
    }
}

#[test]
fn output_of_an_ended_process_waits_for_a_late_host() {
    let (mut rig, writer) = Rig::output();
    rustix::io::write(&writer, b"late").unwrap();
    drop(writer);
    rig.stream.end_process();
    rig.stream.settle(&mut rig.scratch);
    assert!(rig.stream.is_settled());
    let mut host = rig.attach();
    rig.serve();
    assert_eq!(read_all(&mut host), (b"late".to_vec(), true));
}

#[test]
fn host_that_leaves_is_a_closed_pipe() {
    let (mut rig, writer) = Rig::output();
    drop(rig.attach());
    rig.serve();
    assert_eq!(rustix::io::write(&writer, b"x"), Err(Errno::PIPE));
    assert!(rig.stream.is_settled());
}

#[test]
fn input_ends_when_the_host_shuts_down() {
    let (mut rig, reader) = Rig::input();
    let mut host = rig.attach();
    host.write_all(b"input").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    rig.serve();
    let mut buffer = [0; 64];
    assert_eq!(read(&reader, &mut buffer), Ok(5));
    assert_eq!(read(&reader, &mut buffer), Ok(0));
}

#[test]
fn process_that_does_not_read_holds_the_host_up() {
    let (mut rig, reader) = Rig::input();
    let mut host = rig.attach();
    let mut written = 0;
    while let Ok(len) = host.write(&[3; 8192]) {
        written += len;
        rig.serve();
    }
    assert!(rig.stream.to_process.bytes.len() <= CHUNK_BYTES);
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 100_000];
    loop {
        match read(&reader, &mut *buffer) {
            Ok(0) => break,
            Ok(len) => got += len,
            Err(_) => rig.serve(),
        }
    }
    assert_eq!(got, written);
}

#[test]
fn stream_is_opened_once() {
    let (mut rig, _writer) = Rig::output();
    let _host = rig.attach();
    let (other, _) = UnixStream::pair().unwrap();
    assert!(!rig.stream.attach(other.into()));
}
