//! The kernel command line: what the user asked for, and what the monitor adds.

use super::layout;
use crate::platform::{MmioSlot, VIRTIO_MMIO_SIZE};

/// Why a command line is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// A byte that the kernel's parser or its log would choke on.
    #[error("kernel command line has {character:?} at byte {at}; only printable ASCII is allowed")]
    Character {
        /// What was found.
        character: char,
        /// Byte offset in the argument that was given.
        at: usize,
    },
    /// Longer than the kernel takes.
    #[error(
        "kernel command line is {len} bytes long; this kernel takes at most {max} (rvmm added {added} of them)"
    )]
    TooLong {
        /// Length of the whole, without the final zero.
        len: usize,
        /// What the kernel takes.
        max: usize,
        /// How much of it the monitor added.
        added: usize,
    },
}

/// A kernel command line under construction.
///
/// Additions come first, because a kernel takes the last value of a parameter: what the user typed wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cmdline {
    user: String,
    added: Vec<String>,
}

impl Cmdline {
    /// Starts with what the user asked for.
    pub fn new(user: &str) -> Result<Self, CmdlineError> {
        check(user)?;
        Ok(Self { user: user.trim().to_owned(), added: Vec::new() })
    }

    /// Adds `argument` on the monitor's behalf.
    pub fn add(&mut self, argument: &str) -> Result<(), CmdlineError> {
        check(argument)?;
        self.added.push(argument.trim().to_owned());
        Ok(())
    }

    /// Adds `virtio_mmio.device=` for the device in `slot`.
    pub fn add_virtio_mmio(&mut self, slot: MmioSlot) {
        let MmioSlot { addr, gsi } = slot;
        self.added.push(format!("virtio_mmio.device={}K@{addr:#x}:{gsi}", VIRTIO_MMIO_SIZE >> 10));
    }

    /// What the monitor added, in order.
    pub fn added(&self) -> &[String] {
        &self.added
    }

    /// What the user gave for parameter `name`: the last value, or the empty string for a bare name.
    ///
    /// Dashes and underscores are the same to the kernel, and what follows `--` is for init.
    pub fn user_value(&self, name: &str) -> Option<&str> {
        let same = |key: &str| {
            key.len() == name.len()
                && key
                    .bytes()
                    .zip(name.bytes())
                    .all(|(a, b)| a == b || matches!((a, b), (b'-', b'_') | (b'_', b'-')))
        };
        let arguments = self.user.split_ascii_whitespace().take_while(|argument| *argument != "--");
        arguments
            .map(|argument| argument.split_once('=').unwrap_or((argument, "")))
            .filter(|(key, _)| same(key))
            .map(|(_, value)| value)
            .last()
    }

    /// The whole line, for a kernel that takes `max` bytes without the final zero.
    pub fn render(&self, max: usize) -> Result<String, CmdlineError> {
        let max = max.min(layout::CMDLINE_SIZE as usize - 1);
        let mut line = self.added.join(" ");
        let added = line.len();
        if !line.is_empty() && !self.user.is_empty() {
            line.push(' ');
        }
        line.push_str(&self.user);
        if line.len() > max { Err(CmdlineError::TooLong { len: line.len(), max, added }) } else { Ok(line) }
    }
}

fn check(text: &str) -> Result<(), CmdlineError> {
    match text.char_indices().find(|(_, character)| !matches!(character, ' '..='~')) {
        Some((at, character)) => Err(CmdlineError::Character { character, at }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::mmio_slot;

    #[test]
    fn additions_precede_what_the_user_typed() {
        let mut line = Cmdline::new(" console=ttyS0 -- single ").unwrap();
        line.add("reboot=t").unwrap();
        line.add_virtio_mmio(mmio_slot(0).unwrap());
        assert_eq!(line.added(), ["reboot=t", "virtio_mmio.device=4K@0xd0000000:5"]);
        assert_eq!(
            line.render(2047).unwrap(),
            "reboot=t virtio_mmio.device=4K@0xd0000000:5 console=ttyS0 -- single"
        );
        assert_eq!(Cmdline::default().render(10).unwrap(), "");
    }

    #[test]
    fn control_and_non_ascii_characters_are_refused() {
        for (text, character, at) in
            [("a\nb", '\n', 1), ("\0", '\0', 0), ("ab\u{7f}", '\u{7f}', 2), ("é", 'é', 0)]
        {
            assert_eq!(Cmdline::new(text), Err(CmdlineError::Character { character, at }));
            assert!(Cmdline::default().add(text).is_err());
        }
    }

    #[test]
    fn length_limit_is_the_lower_of_kernel_and_layout() {
        let line = Cmdline::new(&"x".repeat(2047)).unwrap();
        assert_eq!(line.render(10_000).unwrap().len(), 2047);
        assert_eq!(line.render(255), Err(CmdlineError::TooLong { len: 2047, max: 255, added: 0 }));
        let line = Cmdline::new(&"x".repeat(2048)).unwrap();
        assert_eq!(line.render(usize::MAX), Err(CmdlineError::TooLong { len: 2048, max: 2047, added: 0 }));
    }

    #[test]
    fn user_values_follow_the_kernels_rules() {
        let line =
            Cmdline::new("acpi=off quiet virtio-mmio.device=1 acpi=ht root=/dev/vda rw -- pci=off").unwrap();
        assert_eq!(line.user_value("acpi"), Some("ht"));
        assert_eq!(line.user_value("quiet"), Some(""));
        assert_eq!(line.user_value("virtio_mmio.device"), Some("1"));
        assert_eq!(line.user_value("pci"), None);
        assert_eq!(line.user_value("roo"), None);
    }
}
