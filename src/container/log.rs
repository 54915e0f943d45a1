//! A container's output, kept as Docker's json-file driver keeps it: one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::time;

/// Longest piece of output that is one entry, in bytes; as Docker cuts it.
const ENTRY_BYTES_MAX: usize = 16 << 10;
/// Longest line of a log file that is read.
const LINE_BYTES_MAX: u64 = 256 << 10;

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output: a line with its end, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The text; bytes that are no UTF-8 are replaced.
    pub log: String,
    /// Where it came from.
    pub stream: Source,
    /// When: RFC 3339 with nanoseconds, UTC.
    pub time: String,
}

/// Writes a log.
#[derive(Debug)]
pub struct Writer {
    file: File,
    /// What has come of lines that are not complete.
    partial: [Vec<u8>; 2],
    failed: bool,
}

impl Writer {
    /// Goes on with the log at `path`.
    pub fn open(path: &Path) -> io::Result<Writer> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        Ok(Writer { file, partial: Default::default(), failed: false })
    }

    /// Keeps output. If the host cannot, it is lost, with one warning: the container goes on.
    pub fn write(&mut self, source: Source, bytes: &[u8]) {
        let partial = &mut self.partial[source as usize];
        partial.extend_from_slice(bytes);
        let mut lines = Vec::new();
        let mut rest = partial.as_slice();
        while let Some(end) = entry_end(rest) {
            let (line, after) = rest.split_at(end);
            append(&mut lines, source, line);
            rest = after;
        }
        *partial = rest.to_vec();
        self.append(&lines);
    }

    /// Keeps what was not a whole line.
    pub fn finish(&mut self) {
        let mut lines = Vec::new();
        for source in [Source::Stdout, Source::Stderr] {
            let rest = std::mem::take(&mut self.partial[source as usize]);
            if !rest.is_empty() {
                append(&mut lines, source, &rest);
            }
        }
        self.append(&lines);
    }

    fn append(&mut self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        match self.file.write_all(lines) {
            Ok(()) => self.failed = false,
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!("output of the container is lost: cannot write its log: {error}");
                }
            }
        }
    }
}

fn entry_end(bytes: &[u8]) -> Option<usize> {
    let head = &bytes[..bytes.len().min(ENTRY_BYTES_MAX)];
    head.iter()
        .position(|byte| *byte == b'\n')
        .map(|at| at + 1)
        .or((bytes.len() >= ENTRY_BYTES_MAX).then_some(ENTRY_BYTES_MAX))
}

fn append(lines: &mut Vec<u8>, stream: Source, bytes: &[u8]) {
    let log = String::from_utf8_lossy(bytes).into_owned();
    let entry = Entry { log, stream, time: time::rfc3339(super::state::now_ns()) };
    if serde_json::to_writer(&mut *lines, &entry).is_ok() {
        lines.push(b'\n');
    }
}

/// Reads a log, and goes on as it grows.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
}

impl Reader {
    /// From the start of the log at `path`, which must be there.
    pub fn open(path: &Path) -> io::Result<Reader> {
        Ok(Reader { path: path.into(), file: BufReader::new(File::open(path)?) })
    }

    /// The next entry; `None` at the end, for now. Lines that are damaged are passed over.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let start = self.file.stream_position()?;
            let mut line = Vec::new();
            let len = io::Read::take(&mut self.file, LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                if (len as u64) < LINE_BYTES_MAX {
                    // Still being written.
                    self.file.seek(SeekFrom::Start(start))?;
                    return Ok(None);
                }
                continue;
            }
            if let Ok(entry) = serde_json::from_slice(&line) {
                return Ok(Some(entry));
            }
        }
    }

    /// Passes over all but the last `count` entries.
    pub fn skip_to_last(&mut self, count: usize) -> io::Result<()> {
        let mut starts = std::collections::VecDeque::new();
        loop {
            let start = self.file.stream_position()?;
            if self.next_entry()?.is_none() {
                break;
            }
            starts.push_back(start);
            if starts.len() > count {
                starts.pop_front();
            }
        }
        if let (Some(start), true) = (starts.front(), count > 0) {
            self.file.seek(SeekFrom::Start(*start))?;
        }
        Ok(())
    }

    /// The log's file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut Reader) -> Vec<(Source, String)> {
        std::iter::from_fn(|| reader.next_entry().unwrap()).map(|entry| (entry.stream, entry.log)).collect()
    }

    #[test]
    fn lines_are_entries_and_long_ones_are_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut writer = Writer::open(&path).unwrap();
        writer.write(Source::Stdout, b"one\ntw");
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(all(&mut reader), [(Source::Stdout, "one\n".into())]);
        writer.write(Source::Stderr, b"err\n");
        writer.write(Source::Stdout, b"o\n\xff");
        writer.finish();
        let expected = [
            (Source::Stderr, "err\n".into()),
            (Source::Stdout, "two\n".into()),
            (Source::Stdout, "\u{fffd}".into()),
        ];
        assert_eq!(all(&mut reader), expected);
        writer.write(Source::Stdout, &vec![b'x'; 2 * ENTRY_BYTES_MAX + 1]);
        assert_eq!(
            all(&mut reader).iter().map(|(_, log)| log.len()).collect::<Vec<_>>(),
            [ENTRY_BYTES_MAX; 2]
        );
        let mut last = Reader::open(&path).unwrap();
        last.skip_to_last(3).unwrap();
        assert_eq!(all(&mut last).len(), 3);
        last.skip_to_last(0).unwrap();
        assert_eq!(all(&mut last), []);
    }

    #[test]
    fn damaged_and_unfinished_lines_are_no_entries() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "nonsense\n{\"log\":\"a\",\"stream\":\"stdout\",\"time\":\"t\"}\n{\"log\":")
            .unwrap();
        assert_eq!(all(&mut Reader::open(&path).unwrap()), [(Source::Stdout, "a".into())]);
    }
}
