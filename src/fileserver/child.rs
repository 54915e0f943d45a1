//! The file server's process: shuts itself in, and answers until the monitor is gone.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::process::READY;
use super::sandbox;
use super::{FileServer, Options};
use crate::fuse;

/// Room for requests that are read at once; longer ones get as much as they need.
const ROOM_BYTES: usize = 64 << 10;

/// Why the process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was not started by a monitor.
    #[error("this is started by rvmm itself, with a socket and a folder")]
    Descriptors(#[source] io::Error),
    /// It cannot shut itself in.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The folder cannot be looked at.
    #[error("cannot look at the folder")]
    Folder(#[source] rustix::io::Errno),
    /// The monitor cannot be reached, or makes no sense.
    #[error("cannot talk to the monitor")]
    Socket(#[source] io::Error),
}

/// The whole life of the process, whose standard input is the socket and whose standard output is the folder.
pub fn run(options: &Options) -> Result<(), Error> {
    sandbox::close_inherited();
    let (mut socket, folder) = take_descriptors().map_err(Error::Descriptors)?;
    let served = prepare(folder, options);
    let mut server = match served {
        Ok(server) => server,
        Err(error) => {
            let _ = socket.write_all(crate::error_chain(&error).as_bytes());
            return Err(error);
        }
    };
    socket.write_all(&[READY]).and_then(|()| serve(&mut server, &mut socket)).map_err(Error::Socket)
}

fn prepare(folder: OwnedFd, options: &Options) -> Result<FileServer, Error> {
    let inside = sandbox::enter(folder, options)?;
    let server =
        FileServer::with_proc(inside.root, inside.proc, *options, inside.many_owners, inside.fds_max);
    let server = server.map_err(Error::Folder)?;
    sandbox::filter_system_calls()?;
    Ok(server)
}

/// Takes socket and folder from where they are, and leaves nothing there.
fn take_descriptors() -> io::Result<(UnixStream, OwnedFd)> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let folder = io::stdout().as_fd().try_clone_to_owned()?;
    socket.peer_addr()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok((socket, folder))
}

/// Answers requests, one after the other, until the other end closes the socket.
fn serve(server: &mut FileServer, socket: &mut UnixStream) -> io::Result<()> {
    let mut room = vec![0; ROOM_BYTES];
    let mut reply = Vec::with_capacity(ROOM_BYTES);
    let mut filled = 0;
    loop {
        let mut start = 0;
        while let Some(request) = next_request(room.get(start..filled).unwrap_or_default())? {
            start += request.len();
            if server.answer(request, &mut reply) {
                socket.write_all(&reply)?;
            }
        }
        room.copy_within(start..filled, 0);
        filled -= start;
        let needed = request_len(room.get(..filled).unwrap_or_default())?.unwrap_or(0).max(ROOM_BYTES);
        if room.len() < needed {
            room.resize(needed, 0);
        }
        match socket.read(room.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => return Ok(()),
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What the monitor left unread when it ended.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Length of the request at the start of `bytes`, as it says itself; `None` if too little of it is there.
fn request_len(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(len) = bytes.first_chunk().map(|len| u32::from_le_bytes(*len) as usize) else { return Ok(None) };
    if !(fuse::IN_HEADER_BYTES..=fuse::REQUEST_BYTES_MAX).contains(&len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a request of {len} bytes")));
    }
    Ok(Some(len))
}

/// The request at the start of `bytes`, if it is whole.
fn next_request(bytes: &[u8]) -> io::Result<Option<&[u8]>> {
    Ok(request_len(bytes)?.and_then(|len| bytes.get(..len)))
}
