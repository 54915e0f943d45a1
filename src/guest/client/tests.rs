use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use super::*;
use crate::guest::frame::GREETING_BYTES;
use crate::guest::protocol::ExitStatus;

const PATIENCE: Duration = Duration::from_secs(60);

/// A vsock device and an agent in one, which does as a test says.
struct Mock {
    directory: tempfile::TempDir,
}

impl Mock {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// Serves connections, one after the other; the thread ends with the last of `serve`.
    fn start(&self, serve: Vec<fn(UnixStream)>) -> JoinHandle<()> {
        let listener = UnixListener::bind(self.path()).unwrap();
        thread::spawn(move || {
            for serve in serve {
                serve(listener.accept().unwrap().0);
            }
        })
    }

    fn connect(&self) -> Result<Client, Error> {
        Client::connect(&self.path(), None, PATIENCE, true)
    }
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// What the device does.
fn accept(stream: &mut UnixStream) -> Greeting {
    assert_eq!(read_line(stream), "CONNECT 1024\n");
    stream.write_all(b"OK 1073741824\n").unwrap();
    let mut greeting = [0; GREETING_BYTES];
    stream.read_exact(&mut greeting).unwrap();
    Greeting::from_bytes(&greeting).unwrap()
}

fn next_request(stream: &mut UnixStream) -> ToAgent {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame::decode(&frame).unwrap()
}

fn send(stream: &mut UnixStream, message: &FromAgent) {
    stream.write_all(&encode(message, REPLY_BYTES_MAX).unwrap()).unwrap();
}

/// An agent that has answered the first request.
fn greet(mut stream: UnixStream) -> UnixStream {
    assert_eq!(accept(&mut stream), Greeting::Control);
    let hello = next_request(&mut stream);
    assert_eq!(hello.request, Request::Hello { version: VERSION, events: true });
    let info = AgentInfo { version: VERSION, kernel: "6.1".into(), ..AgentInfo::default() };
    send(&mut stream, &FromAgent::Reply(hello.id, Ok(Reply::Hello(info))));
    stream
}

fn exited(process: u32) -> Event {
    Event::Exited { container: "a".into(), process, status: ExitStatus::Code(0), out_of_memory: false }
}

#[test]
fn agent_that_does_not_listen_yet_is_called_again() {
    let mock = Mock::new();
    let path = mock.path();
    let client = thread::spawn(move || Client::connect(&path, None, PATIENCE, true));
    let agent =
        mock.start(vec![|stream| drop(stream), |mut stream| drop(read_line(&mut stream)), |stream| {
            drop(greet(stream))
        }]);
    assert_eq!(client.join().unwrap().unwrap().info().kernel, "6.1");
    agent.join().unwrap();
}

#[test]
fn vm_that_ends_ends_the_waiting() {
    let mock = Mock::new();
    let (ended, vm) = UnixStream::pair().unwrap();
    drop(vm);
    let result = Client::connect(&mock.path(), Some(ended.as_fd()), PATIENCE, false);
    assert!(matches!(result, Err(Error::Ended)), "{result:?}");
}

#[test]
fn nobody_there_ends_with_patience() {
    let mock = Mock::new();
    let result = Client::connect(&mock.path(), None, Duration::from_millis(30), false);
    assert!(matches!(result, Err(Error::Patience(_))), "{result:?}");
}

#[test]
fn events_in_front_of_an_answer_are_kept() {
    let mock = Mock::new();
    let agent = mock.start(vec![|stream| {
        let mut stream = greet(stream);
        let request = next_request(&mut stream);
        send(&mut stream, &FromAgent::Event(exited(1)));
        send(&mut stream, &FromAgent::Event(exited(2)));
        send(&mut stream, &FromAgent::Reply(request.id, Ok(Reply::Done)));
    }]);
    let mut client = mock.connect().unwrap();
    client.sync().unwrap();
    assert_eq!(client.next_event().unwrap(), Some(exited(1)));
    assert_eq!(client.wait_event().unwrap(), exited(2));
    agent.join().unwrap();
    assert!(matches!(client.wait_event(), Err(Error::Closed)));
}

#[test]
fn answers_in_another_order_find_their_requests() {
    let mock = Mock::new();
    let agent = mock.start(vec![|stream| {
        let mut stream = greet(stream);
        let (first, second) = (next_request(&mut stream), next_request(&mut stream));
        send(&mut stream, &FromAgent::Reply(second.id, Ok(Reply::Started(2))));
        send(&mut stream, &FromAgent::Reply(first.id, Err(Failure::NoContainer("a".into()))));
    }]);
    let mut client = mock.connect().unwrap();
    let first = client.begin(Request::Start { container: "a".into() }).unwrap();
    let second = client.begin(Request::Start { container: "b".into() }).unwrap();
    assert!(matches!(client.finish(first), Err(Error::Failed(Failure::NoContainer(_)))));
    assert_eq!(client.finish(second).unwrap(), Reply::Started(2));
    agent.join().unwrap();
}

#[test]
fn stream_begins_with_its_number() {
    let mock = Mock::new();
    let agent = mock.start(vec![|stream| drop(greet(stream)), |mut stream| {
        assert_eq!(accept(&mut stream), Greeting::Stream(77));
        stream.write_all(b"output").unwrap();
    }]);
    let client = mock.connect().unwrap();
    let mut output = String::new();
    client.open_stream(77).unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "output");
    agent.join().unwrap();
}

#[test]
fn hostile_agents_are_errors() {
    let cases: [fn(UnixStream); 5] = [
        // A length that is not allowed.
        |stream| greet(stream).write_all(&u32::MAX.to_le_bytes()).unwrap(),
        // No message.
        |stream| greet(stream).write_all(&[2, 0, 0, 0, 99, 99]).unwrap(),
        // An answer to nothing.
        |stream| send(&mut greet(stream), &FromAgent::Reply(9999, Ok(Reply::Done))),
        // A container that cannot be.
        |stream| {
            let container = "a".repeat(1000);
            send(&mut greet(stream), &FromAgent::Event(Event::OutOfMemory { container }));
        },
        // Half a frame.
        |stream| greet(stream).write_all(&[200, 0, 0, 0, 1]).unwrap(),
    ];
    for case in cases {
        let mock = Mock::new();
        let agent = mock.start(vec![case]);
        // Both messages may come at once.
        let result = mock.connect().and_then(|mut client| client.wait_event());
        assert!(matches!(result, Err(Error::Message(_) | Error::Unexpected(_))), "{result:?}");
        agent.join().unwrap();
    }
}

#[test]
fn flood_of_events_ends_at_its_bound() {
    let mock = Mock::new();
    let agent = mock.start(vec![|stream| {
        let mut stream = greet(stream);
        let frame = encode(&FromAgent::Event(exited(1)), REPLY_BYTES_MAX).unwrap();
        while stream.write_all(&frame).is_ok() {}
    }]);
    let result = mock.connect().and_then(|mut client| client.sync());
    assert!(matches!(result, Err(Error::Unexpected(_))), "{result:?}");
    agent.join().unwrap();
}

#[test]
fn something_else_behind_the_socket_is_an_error() {
    let mock = Mock::new();
    let agent = mock.start(vec![|mut stream| {
        let _ = stream.write_all(b"220 mail.example.org ESMTP\n");
        let _ = stream.read(&mut [0; 64]);
    }]);
    assert!(matches!(mock.connect(), Err(Error::Unexpected(_))));
    agent.join().unwrap();
}
