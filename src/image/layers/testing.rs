//! Archives for tests, written by hand so that they can be wrong.

use tar::{EntryType, Header};

use super::pax;

/// A tar stream in the making.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    /// Without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// An entry of any type, with extended records before it.
    pub fn entry(
        self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
        records: &[(&str, &[u8])],
    ) -> Self {
        let body: Vec<u8> =
            records.iter().flat_map(|(key, value)| pax::encode(key.as_bytes(), value)).collect();
        let this =
            if body.is_empty() { self } else { self.add(EntryType::XHeader, b"pax", b"", &body, |_| {}) };
        this.add(kind, name, link, data, change)
    }

    fn add(
        mut self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1000);
        header.set_size(data.len() as u64);
        let bytes = header.as_mut_bytes();
        for (at, text) in [(0, name), (157, link)] {
            for (to, from) in bytes.iter_mut().skip(at).zip(text.iter().take(100)) {
                *to = *from;
            }
        }
        change(&mut header);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// A file.
    pub fn file(self, name: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, name.as_bytes(), b"", data.as_bytes(), |_| {}, &[])
    }

    /// A directory.
    pub fn directory(self, name: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, name.as_bytes(), b"", b"", |header| header.set_mode(mode), &[])
    }

    /// A symbolic link.
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"", |_| {}, &[])
    }

    /// A hard link.
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name.as_bytes(), target.as_bytes(), b"", |_| {}, &[])
    }

    /// Bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The stream.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }

    /// The stream without an end.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}
