//! Just enough of two protocols to ask the services.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use crate::support::LINUX_PATIENCE;

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LINUX_PATIENCE))?;
    Ok(stream)
}

/// The status line and the body of a GET.
pub fn get(port: u16, path: &str) -> io::Result<(String, String)> {
    let mut stream = connect(port)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((head.lines().next().unwrap_or_default().into(), body.into()))
}

/// The body of a GET that must succeed.
pub fn page(port: u16, path: &str) -> String {
    let (status, body) = get(port, path).expect("an answer");
    assert!(status.starts_with("HTTP/1.1 200"), "{path}: {status}");
    body
}

/// What redis answers to one command: a status, a number or a string.
pub fn redis(port: u16, words: &[&str]) -> io::Result<String> {
    let mut stream = BufReader::new(connect(port)?);
    let mut request = format!("*{}\r\n", words.len());
    words.iter().for_each(|word| request += &format!("${}\r\n{word}\r\n", word.len()));
    stream.get_mut().write_all(request.as_bytes())?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let line = line.trim_end();
    match line.strip_prefix('$') {
        Some("-1") | None => Ok(line.into()),
        Some(length) => {
            let mut bytes = vec![0; length.parse().map_err(io::Error::other)?];
            stream.read_exact(&mut bytes)?;
            String::from_utf8(bytes).map_err(io::Error::other)
        }
    }
}

/// Makes sure that nobody answers at a port.
pub fn refused(port: u16) {
    let mut byte = [0];
    let read = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| stream.read(&mut byte));
    assert!(read.as_ref().map_or(true, |count| *count == 0), "port {port} is still served");
}
