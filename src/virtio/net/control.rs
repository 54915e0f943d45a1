//! The control queue (virtio 1.2 §5.1.6.5).

use super::spec::{ack, command};
use crate::memory::Ram;
use crate::virtio::Chain;
use crate::virtio::chain::TooShort;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// To use so many pairs of queues.
    Pairs(u16),
    /// To be given packets that need these features and no others.
    Offloads(u64),
    /// Something that is not known.
    Unknown,
}

/// Decodes a command. A short one is as bad as an unknown one.
pub(super) fn decode(ram: &Ram, chain: &Chain) -> Command {
    try_decode(ram, chain).unwrap_or(Command::Unknown)
}

fn try_decode(ram: &Ram, chain: &Chain) -> Result<Command, TooShort> {
    let mut reader = chain.reader(ram);
    Ok(match reader.read_array()? {
        command::MQ_PAIRS_SET => Command::Pairs(u16::from_le_bytes(reader.read_array()?)),
        command::GUEST_OFFLOADS_SET => Command::Offloads(u64::from_le_bytes(reader.read_array()?)),
        _ => Command::Unknown,
    })
}

/// Answers a command; returns the number of bytes written.
pub(super) fn answer(ram: &Ram, chain: &Chain, accepted: bool) -> u32 {
    let code = if accepted { ack::OK } else { ack::ERR };
    let mut writer = chain.writer(ram);
    match writer.write_all(&[code]) {
        Ok(()) => writer.written(),
        Err(TooShort) => 0,
    }
}
