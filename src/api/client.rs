//! A client of the control socket, for rvmm's own commands.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Bytes of an answer that are read at most.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("no VM listens at {path:?}; give its --api-socket")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the VM at {path:?} does not answer")]
    Exchange {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The VM does not do it.
    #[error("{0}")]
    Refused(String),
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// Sends a `PUT` and waits until it is done.
pub fn put(socket: &Path, place: &str, body: &str) -> Result<(), Error> {
    let path = socket.to_owned();
    let mut stream =
        UnixStream::connect(socket).map_err(|source| Error::Connect { path: path.clone(), source })?;
    let request = format!(
        "PUT {place} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    let mut answer = Vec::new();
    let exchanged = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer));
    exchanged.map_err(|source| Error::Exchange { path: path.clone(), source })?;
    read_answer(&answer).ok_or(Error::Exchange { path, source: io::ErrorKind::InvalidData.into() })?
}

/// What an answer says; `None` if it is none.
fn read_answer(answer: &[u8]) -> Option<Result<(), Error>> {
    let answer = String::from_utf8_lossy(answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status: u16 = head.strip_prefix("HTTP/1.1 ")?.split(' ').next()?.trim().parse().ok()?;
    if (200..300).contains(&status) {
        return Some(Ok(()));
    }
    let fault: Fault = serde_json::from_str(body).ok()?;
    Some(Err(Error::Refused(fault.fault_message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        assert!(matches!(read_answer(b"HTTP/1.1 204 No Content\r\nx: y\r\n\r\n"), Some(Ok(()))));
        let refused = read_answer(b"HTTP/1.1 400 Bad Request\r\n\r\n{\"fault_message\":\"no\"}");
        assert!(matches!(refused, Some(Err(Error::Refused(why))) if why == "no"));
        for answer in ["", "HTTP/1.1 204", "HTTP/1.1 x\r\n\r\n", "HTTP/1.1 500 E\r\n\r\nx", "SSH-2.0\r\n\r\n"]
        {
            assert!(read_answer(answer.as_bytes()).is_none(), "{answer}");
        }
    }
}
