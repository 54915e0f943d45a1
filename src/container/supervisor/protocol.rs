//! What a supervisor and its clients say to each other, in frames over a unix socket.

use serde::{Deserialize, Serialize};

use crate::container::backend::WindowSize;

/// Bytes of input or output in one message at most.
pub const CHUNK_BYTES: usize = 32 << 10;
/// Bytes of a frame at most.
pub const FRAME_BYTES_MAX: usize = CHUNK_BYTES + 4096;

/// From a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Send the container's output from now on.
    Attach {
        /// Whether the container's input ends when this client's does.
        closes_stdin: bool,
    },
    /// Input for the container.
    Stdin(Vec<u8>),
    /// The end of the client's input.
    StdinEnd,
    /// The client's terminal has a new size.
    Resize(WindowSize),
    /// A signal for the container's process.
    Signal(i32),
    /// End the container: a signal, and after so many milliseconds SIGKILL. It is not started again.
    Stop {
        /// The signal.
        signal: i32,
        /// How long to wait; `None` for ever.
        timeout_ms: Option<u64>,
    },
    /// Stop all processes as they are.
    Pause,
    /// Let them go on.
    Resume,
}

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The container's process runs.
    Started,
    /// It could not be started, and will not be.
    Failed {
        /// Exit code for that.
        code: u8,
        /// Why.
        message: String,
    },
    /// Its standard output, or its terminal's.
    Stdout(Vec<u8>),
    /// Its standard error.
    Stderr(Vec<u8>),
    /// A request has been carried out.
    Done,
    /// A request could not be.
    Refused(String),
    /// The container has ended, and will not be started again. The last message.
    Exited(u8),
}
