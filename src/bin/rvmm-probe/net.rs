//! A network: servers for the instance, and the client that measures them.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Failure, say};

const CHUNK: usize = 128 << 10;

/// Answers every HTTP request alike, one connection after the other, until it is killed.
pub fn serve_http(port: u16) -> Result<(), Failure> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    end_with_sigterm();
    say(&json!({ "ready": port }));
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { continue };
        let _ = connection.set_read_timeout(Some(Duration::from_secs(5)));
        let mut request = [0; 4096];
        // A request without a body, as the client's are, comes whole.
        if connection.read(&mut request).is_ok_and(|count| count > 0) {
            let _ = connection
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n");
        }
    }
    Ok(())
}

/// Process 1 has no default actions: a thread waits for SIGTERM and ends the program.
fn end_with_sigterm() {
    use nix::sys::signal::{SigSet, Signal};
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    if signals.thread_block().is_ok() {
        std::thread::spawn(move || {
            let _ = signals.wait();
            std::process::exit(0);
        });
    }
}

/// Serves what `client` asks for: the first byte of a connection says what.
pub fn serve(port: u16) -> Result<(), Failure> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    end_with_sigterm();
    say(&json!({ "ready": port }));
    for connection in listener.incoming() {
        let Ok(connection) = connection else { continue };
        let mut kind = [0];
        let _ = connection.set_nodelay(true);
        let mut connection = connection;
        if connection.read_exact(&mut kind).is_err() {
            continue;
        }
        // One at a time: the client never has two that carry data.
        let _ = match kind[0] {
            b's' => swallow(&mut connection),
            b'e' => echo(&mut connection),
            _ => connection.write_all(&kind),
        };
    }
    Ok(())
}

fn swallow(connection: &mut TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        match connection.read(&mut chunk)? {
            0 => break,
            count => total += count as u64,
        }
    }
    connection.write_all(&total.to_le_bytes())
}

fn echo(connection: &mut TcpStream) -> std::io::Result<()> {
    let mut byte = [0];
    while connection.read(&mut byte)? == 1 {
        connection.write_all(&byte)?;
    }
    Ok(())
}

/// Measures a server: throughput, latency, connections.
pub fn client(host: &str, port: u16, seconds: f64) -> Result<(), Failure> {
    let time = Duration::try_from_secs_f64(seconds)?;
    let connect = || -> Result<TcpStream, Failure> {
        let address = (host, port).to_socket_addrs()?.next().ok_or("the name has no address")?;
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(stream)
    };

    let mut stream = connect()?;
    stream.write_all(b"s")?;
    let chunk = vec![0x5a; CHUNK];
    let start = Instant::now();
    while start.elapsed() < time {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut total = [0; 8];
    // What the other side has read, when it has read all of it.
    stream.read_exact(&mut total)?;
    let throughput = u64::from_le_bytes(total) as f64 / start.elapsed().as_secs_f64();

    let mut stream = connect()?;
    stream.write_all(b"e")?;
    let mut times = vec![];
    let mut byte = [b'x'];
    let start = Instant::now();
    while start.elapsed() < time {
        let sent = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(sent.elapsed().as_secs_f64());
    }
    drop(stream);
    times.sort_by(f64::total_cmp);
    let latency = times.get(times.len() / 2).copied().ok_or("no byte came back")?;

    let start = Instant::now();
    let mut connections = 0_u32;
    while start.elapsed() < time {
        let mut stream = match connect() {
            Ok(stream) => stream,
            // All ports of this side are used up: what has been counted stands.
            Err(error) if is_exhausted(&error) && connections > 0 => break,
            Err(error) => return Err(error),
        };
        stream.write_all(b"c")?;
        stream.read_exact(&mut byte)?;
        connections += 1;
    }
    let connections = f64::from(connections) / start.elapsed().as_secs_f64();
    say(&json!({ "throughput": throughput, "latency": latency, "connections": connections }));
    Ok(())
}

fn is_exhausted(error: &Failure) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}

/// Says whether a name has an address.
pub fn resolve(name: &str) -> Result<(), Failure> {
    let found = (name, 1).to_socket_addrs().ok().and_then(|mut found| found.next());
    say(&json!({ "address": found.map(|address| address.ip().to_string()) }));
    Ok(())
}
