//! How a stream is compressed, which its first bytes tell better than the type that others wrote beside it.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// What zstd may take as window: what its own program takes unasked, 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// None.
    None,
    /// Gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// The compression that a stream with these first bytes has.
pub fn detect(start: &[u8]) -> io::Result<Compression> {
    let unsupported =
        |name| Err(io::Error::new(io::ErrorKind::Unsupported, format!("it is compressed with {name}")));
    match start {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
        // A skippable frame, with which zstd:chunked begins in places.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [b'B', b'Z', b'h', ..] => unsupported("bzip2; gzip and zstd are what rvmm reads"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => unsupported("xz; gzip and zstd are what rvmm reads"),
        _ => Ok(Compression::None),
    }
}

/// The stream without its compression.
pub fn decompress<'a>(stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut stream = BufReader::with_capacity(128 << 10, stream);
    Ok(match detect(stream.fill_buf()?)? {
        Compression::None => Box::new(stream),
        Compression::Gzip => Box::new(MultiGzDecoder::new(stream)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_recognised_by_their_first_bytes() {
        let text = b"some text that is long enough to be compressed".repeat(50);
        let gzip = {
            let mut encoder = flate2::read::GzEncoder::new(text.as_slice(), flate2::Compression::fast());
            let mut bytes = vec![];
            encoder.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let twice = [gzip.clone(), gzip.clone()].concat();
        let zstd = zstd::encode_all(text.as_slice(), 1).unwrap();
        let unpacked = |bytes: &[u8]| {
            let mut out = vec![];
            decompress(bytes).and_then(|mut stream| stream.read_to_end(&mut out)).map(|_| out)
        };
        assert_eq!(unpacked(&text).unwrap(), text);
        assert_eq!(unpacked(&gzip).unwrap(), text);
        assert_eq!(unpacked(&zstd).unwrap(), text);
        assert_eq!(unpacked(&twice).unwrap().len(), 2 * text.len());
        assert!(unpacked(b"BZh9").is_err() && unpacked(b"\xfd7zXZ\0").is_err());
        assert!(unpacked(&gzip[..gzip.len() - 4]).is_err() && unpacked(&zstd[..zstd.len() - 4]).is_err());
        assert!(unpacked(b"").unwrap().is_empty());
    }
}
