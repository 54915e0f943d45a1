//! Standard streams: the ends that the process gets, and those that stay here.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::pipe::{PipeFlags, pipe_with};

use crate::container::backend::Streams;

/// What a new process gets.
#[derive(Debug)]
pub(super) enum Ends {
    /// Standard input, output and error.
    Pipes([OwnedFd; 3]),
    /// A socket over which it sends the terminal that it makes for itself.
    Terminal(UnixStream),
}

/// What stays here until the process is made.
#[derive(Debug)]
pub(super) enum Pending {
    Pipes(Streams),
    Terminal(UnixStream),
}

/// Makes both. Without `stdin`, standard input is at its end from the start.
pub(super) fn make(terminal: bool, stdin: bool) -> io::Result<(Ends, Pending)> {
    if terminal {
        let (ours, its) = UnixStream::pair()?;
        return Ok((Ends::Terminal(its), Pending::Terminal(ours)));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let (its_input, our_input) = if stdin {
        let (its, ours) = pipe()?;
        (its, Some(ours))
    } else {
        (std::fs::File::open("/dev/null")?.into(), None)
    };
    let ((our_output, its_output), (our_error, its_error)) = (pipe()?, pipe()?);
    let streams = Streams { stdin: our_input, stdout: our_output, stderr: Some(our_error) };
    Ok((Ends::Pipes([its_input, its_output, its_error]), Pending::Pipes(streams)))
}

impl Ends {
    /// Numbers of the three streams, if they are not a terminal.
    pub(super) fn numbers(&self) -> Option<[RawFd; 3]> {
        match self {
            Ends::Pipes(ends) => Some([ends[0].as_raw_fd(), ends[1].as_raw_fd(), ends[2].as_raw_fd()]),
            Ends::Terminal(_) => None,
        }
    }

    /// Number of the socket for a terminal.
    pub(super) fn socket(&self) -> Option<RawFd> {
        match self {
            Ends::Pipes(_) => None,
            Ends::Terminal(socket) => Some(socket.as_raw_fd()),
        }
    }
}

/// Takes the terminal that the new process has sent.
pub(super) fn receive_terminal(socket: &UnixStream) -> io::Result<OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0u8; 64];
    recvmsg(socket, &mut [io::IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    descriptors.flatten().next().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
