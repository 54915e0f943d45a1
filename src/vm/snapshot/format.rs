//! The state file: a header that says what it is, and the state, postcard-encoded.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `RVMMSNAP` |
//! | 8..12 | version of the format, little-endian |
//! | 12..16 | 0 |
//! | 16..24 | length of the state |
//! | 24..56 | SHA-256 of bytes 0 to 23 and of the state |
//! | 56.. | the state |

use sha2::{Digest, Sha256};

use super::error::FormatError;
use super::state::MachineState;

/// Version of the format. It grows with every change of what is saved: a state that is half understood is worse than
/// none.
pub const FORMAT_VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"RVMMSNAP";
const VERSION_AT: usize = 8;
const LENGTH_AT: usize = 16;
const CHECKSUM_AT: usize = 24;
pub(super) const HEADER_BYTES: usize = 56;
/// Bytes of a state file at most; that of a VM with 32 vCPUs and 18 devices has less than 1 MiB.
pub(super) const BYTES_MAX: u64 = 8 << 20;

/// The bytes of a state file.
pub(super) fn encode(state: &MachineState) -> Result<Vec<u8>, postcard::Error> {
    let body = postcard::to_allocvec(state)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(MAGIC);
    bytes.extend(FORMAT_VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((body.len() as u64).to_le_bytes());
    let checksum = checksum(&bytes, &body);
    bytes.extend(checksum);
    bytes.extend(body);
    Ok(bytes)
}

/// Reads them. What it allocates is bounded by their length.
pub fn decode(bytes: &[u8]) -> Result<MachineState, FormatError> {
    let found = bytes.len() as u64;
    if !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Magic);
    }
    if found > BYTES_MAX {
        return Err(FormatError::TooLong(found));
    }
    let short = FormatError::Length { found, expected: HEADER_BYTES as u64 };
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(short)?;
    let number = |at: usize, len: usize| {
        let field = header.get(at..at + len).unwrap_or_default();
        field.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let version = number(VERSION_AT, 4) as u32;
    if version != FORMAT_VERSION {
        return Err(FormatError::Version { found: version, known: FORMAT_VERSION });
    }
    let expected = number(LENGTH_AT, 8).saturating_add(HEADER_BYTES as u64);
    if found != expected {
        return Err(FormatError::Length { found, expected });
    }
    let (described, sum) = header.split_at(CHECKSUM_AT);
    if checksum(described, body) != sum {
        return Err(FormatError::Checksum);
    }
    decode_body(body)
}

/// Reads what stands behind the header, whose checksum tells mishaps and not malice.
pub fn decode_body(body: &[u8]) -> Result<MachineState, FormatError> {
    let (state, rest): (MachineState, _) =
        postcard::take_from_bytes(body).map_err(|error| FormatError::Contents(error.to_string()))?;
    if !rest.is_empty() {
        return Err(FormatError::Contents(format!("{} bytes too many", rest.len())));
    }
    state.configuration()?;
    Ok(state)
}

fn checksum(described: &[u8], body: &[u8]) -> Vec<u8> {
    let mut sum = Sha256::new();
    sum.update(described);
    sum.update(body);
    sum.finalize().to_vec()
}
