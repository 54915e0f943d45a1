//! SHA-256 digests, by which everything in the store is named.
//!
//! Only SHA-256: it is what registries and archives use. Other algorithms that the specification names are refused.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Digits of an identifier as people see it.
const SHORT: usize = 12;

/// The SHA-256 of something.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text that is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: sha256: and 64 hexadecimal digits in lower case")]
pub struct NotADigest(String);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// From 64 hexadecimal digits in lower case, without `sha256:`.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let &[high, low] = pair else { return None };
            *byte = value(high)? << 4 | value(low)?;
        }
        Some(Self(bytes))
    }

    /// The digits, without `sha256:`.
    pub fn hex(&self) -> String {
        let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }

    /// The first twelve digits.
    pub fn short(&self) -> String {
        self.hex().chars().take(SHORT).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let digest = text.strip_prefix("sha256:").and_then(Self::from_hex);
        digest.ok_or_else(|| NotADigest(text.chars().take(100).collect()))
    }
}

impl TryFrom<String> for Digest {
    type Error = NotADigest;

    fn try_from(text: String) -> Result<Self, NotADigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A reader or writer that remembers how many bytes went through it, and their digest.
pub struct Hashing<T> {
    inner: T,
    hasher: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    /// Nothing has gone through yet.
    pub fn new(inner: T) -> Self {
        Self { inner, hasher: Sha256::new(), bytes: 0 }
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.bytes
    }

    /// What is read from or written to.
    pub fn get_mut(&mut self) -> &mut T {
        &mut self.inner
    }

    /// What was read from or written to, the digest and the number of bytes.
    pub fn finish(self) -> (T, Digest, u64) {
        (self.inner, Digest(self.hasher.finalize().into()), self.bytes)
    }

    /// Takes bytes into account that went another way.
    pub fn count(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.count(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digest_of_nothing_is_the_known_one_and_parses_back() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(EMPTY.parse(), Ok(digest));
        assert_eq!(digest.short(), "e3b0c44298fc");
    }

    #[test]
    fn texts_that_are_no_digests_are_refused() {
        let upper = EMPTY.replace("b0c", "B0C");
        let long = format!("{EMPTY}0");
        for text in ["", "sha256:", &EMPTY[..70], &upper, &long, &EMPTY[7..], "sha512:00", "sha256:../../etc"]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn hashing_sees_what_is_read_and_written() {
        let mut reader = Hashing::new(&b"hello"[..]);
        let mut copy = Hashing::new(Vec::new());
        io::copy(&mut reader, &mut copy).unwrap();
        assert_eq!(reader.length(), 5);
        let (bytes, digest, count) = copy.finish();
        assert_eq!((bytes.as_slice(), digest, count), (&b"hello"[..], Digest::of(b"hello"), 5));
        assert_eq!(reader.finish().1, digest);
    }
}
