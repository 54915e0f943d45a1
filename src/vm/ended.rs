//! How a VM ended, and the exit code that tells it.

use std::fmt;

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest's kernel panicked, and could say so.
    Panic,
    /// The guest triple-faulted.
    TripleFault,
    /// The user typed Ctrl-A x.
    Quit,
    /// A signal asked for the end, and the guest did not switch itself off in time.
    Killed {
        /// Number of the signal.
        signal: i32,
    },
    /// KVM or the host could not go on.
    Stuck(String),
}

/// The end of a VM, with what the guest reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// The exit status that the guest reported through the guest-event port.
    pub exit_status: Option<u8>,
}

/// Exit code of a guest's panic.
pub const EXIT_PANIC: u8 = 120;
/// Exit code of a triple fault.
pub const EXIT_TRIPLE_FAULT: u8 = 121;
/// Exit code of a reset that the guest asked for.
pub const EXIT_RESET: u8 = 122;
/// Exit code when KVM or the host could not go on.
pub const EXIT_STUCK: u8 = 123;
/// Exit code when rvmm itself failed.
pub const EXIT_FAILED: u8 = 125;

impl Ended {
    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match &self.end {
            End::PowerOff => self.exit_status.unwrap_or(0),
            End::Quit => 0,
            End::Reset => EXIT_RESET,
            End::Panic => EXIT_PANIC,
            End::TripleFault => EXIT_TRIPLE_FAULT,
            End::Killed { signal } => 128u8.saturating_add(u8::try_from(*signal).unwrap_or(0)),
            End::Stuck(_) => EXIT_STUCK,
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            End::PowerOff => match self.exit_status {
                Some(status) => write!(f, "the guest powered off and reported status {status}"),
                None => f.write_str("the guest powered off"),
            },
            End::Reset => f.write_str("the guest reset the machine"),
            End::Panic => f.write_str("the guest's kernel panicked"),
            End::TripleFault => f.write_str("the guest triple-faulted"),
            End::Quit => f.write_str("ended from the terminal"),
            End::Killed { signal } => write!(f, "ended by signal {signal}"),
            End::Stuck(why) => write!(f, "the VM cannot go on: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_as_documented() {
        let code = |end, exit_status| Ended { end, exit_status }.exit_code();
        assert_eq!(code(End::PowerOff, None), 0);
        assert_eq!(code(End::PowerOff, Some(42)), 42);
        assert_eq!(code(End::Reset, Some(42)), 122);
        assert_eq!(code(End::Panic, Some(0)), 120);
        assert_eq!(code(End::TripleFault, None), 121);
        assert_eq!(code(End::Quit, None), 0);
        assert_eq!(code(End::Killed { signal: 15 }, Some(0)), 143);
        assert_eq!(code(End::Stuck("x".into()), None), 123);
    }
}
