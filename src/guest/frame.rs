//! Frames: a length and so many bytes of postcard, and the greeting with which every connection begins.
//!
//! Whoever reads trusts nothing. A frame longer than its reader allows is an error before it is read, a buffer grows with
//! the bytes that have come and not with those that were promised, and lists have a length of their own.

use std::fmt;
use std::io::{self, Read};
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Bytes of a frame from the host at most: a container's description with its filter and its small files.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Bytes of a frame from the agent at most.
pub const REPLY_BYTES_MAX: usize = 1 << 20;

/// Bytes of the length in front of a frame.
const LENGTH_BYTES: usize = 4;
/// Bytes that are asked for at once.
const CHUNK_BYTES: usize = 16 << 10;

/// What is wrong with bytes, or with a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The frame is too long.
    #[error("a frame of {len} bytes, and at most {max} are allowed")]
    TooLong {
        /// As it says.
        len: usize,
        /// As the reader allows.
        max: usize,
    },
    /// The bytes are no message.
    #[error("a frame of {len} bytes that is no message")]
    Malformed {
        /// The frame's length.
        len: usize,
        /// What postcard said.
        #[source]
        source: postcard::Error,
    },
    /// Behind the message there are more bytes.
    #[error("{0} bytes behind a message")]
    Trailing(usize),
    /// The message cannot be written down.
    #[error("a message that cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// The greeting is none.
    #[error("a connection that begins with something else than the greeting")]
    Greeting,
    /// The connection has ended within a frame.
    #[error("the connection ended within a frame")]
    Ended,
    /// The connection cannot be read.
    #[error("cannot read from the connection")]
    Read(#[source] io::Error),
}

/// A message as a frame of at most `max` bytes.
pub fn encode<T: Serialize>(message: &T, max: usize) -> Result<Vec<u8>, Error> {
    let mut frame = postcard::to_extend(message, vec![0; LENGTH_BYTES]).map_err(Error::Encode)?;
    let len = frame.len() - LENGTH_BYTES;
    let length = u32::try_from(len).ok().filter(|_| len <= max).ok_or(Error::TooLong { len, max })?;
    frame[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// The message that a frame's bytes are, without its length.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let malformed = |source| Error::Malformed { len: bytes.len(), source };
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(malformed)?;
    if rest.is_empty() { Ok(message) } else { Err(Error::Trailing(rest.len())) }
}

/// Takes a stream of bytes apart into frames.
#[derive(Debug)]
pub struct Assembler {
    bytes: Vec<u8>,
    /// Where the first frame begins that has not been taken.
    start: usize,
    max: usize,
}

impl Assembler {
    /// For frames of at most `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, max }
    }

    /// Reads what is there, once. Zero is the connection's end. A connection that has nothing and does not wait gives
    /// the error `WouldBlock`.
    pub fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let filled = self.bytes.len();
        self.bytes.resize(filled + CHUNK_BYTES, 0);
        let read = loop {
            match from.read(&mut self.bytes[filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.bytes.truncate(filled + read.as_ref().map_or(0, |read| (*read).min(CHUNK_BYTES)));
        read
    }

    /// Adds bytes that were read elsewhere.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next message, if it has come whole. After an error the stream has no more frames.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let left = self.bytes.get(self.start..).unwrap_or_default();
        let Some((length, rest)) = left.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let len = u32::from_le_bytes(*length) as usize;
        if len > self.max {
            return Err(Error::TooLong { len, max: self.max });
        }
        let Some(frame) = rest.get(..len) else { return Ok(None) };
        let message = decode(frame)?;
        self.start += LENGTH_BYTES + len;
        if self.start == self.bytes.len() {
            // A large frame leaves no large buffer behind.
            self.start = 0;
            self.bytes.clear();
            self.bytes.shrink_to(CHUNK_BYTES);
        }
        Ok(Some(message))
    }

    /// Whether a part of a frame has come.
    pub fn is_within_frame(&self) -> bool {
        self.start < self.bytes.len()
    }
}

/// Bytes of the [`Greeting`].
pub const GREETING_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"rvmm";
/// Version of greeting and frames. What is in them has a version of its own.
const FRAMING: u16 = 1;

/// What the host says first on each connection to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Frames follow, both ways.
    Control,
    /// The bytes of this stream follow.
    Stream(u64),
}

impl Greeting {
    /// As it is sent.
    pub fn to_bytes(self) -> [u8; GREETING_BYTES] {
        let (kind, stream) = match self {
            Self::Control => (1u16, 0),
            Self::Stream(stream) => (2, stream),
        };
        let mut bytes = [0; GREETING_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&FRAMING.to_le_bytes());
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&stream.to_le_bytes());
        bytes
    }

    /// What bytes say.
    pub fn from_bytes(bytes: &[u8; GREETING_BYTES]) -> Result<Self, Error> {
        let [m0, m1, m2, m3, f0, f1, k0, k1, stream @ ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC || u16::from_le_bytes([f0, f1]) != FRAMING {
            return Err(Error::Greeting);
        }
        match (u16::from_le_bytes([k0, k1]), u64::from_le_bytes(stream)) {
            (1, 0) => Ok(Self::Control),
            (2, stream) => Ok(Self::Stream(stream)),
            _ => Err(Error::Greeting),
        }
    }
}

/// Reads a list of at most `MAX` elements: without that, a frame could ask for many times its size in memory.
pub(super) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Bounded<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
            let mut elements = Vec::new();
            while let Some(element) = sequence.next_element()? {
                if elements.len() == MAX {
                    return Err(serde::de::Error::invalid_length(MAX + 1, &self));
                }
                elements.push(element);
            }
            Ok(elements)
        }
    }

    deserializer.deserialize_seq(Bounded::<T, MAX>(PhantomData))
}

/// Bytes as one piece instead of a list of numbers.
pub(super) mod bytes {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
mod tests;
