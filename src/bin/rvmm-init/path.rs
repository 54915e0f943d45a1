//! Paths in a buffer of their own, for a child that must not allocate.

use std::ffi::CStr;

use rustix::io::Errno;

/// A path of bounded length that can be cut.
#[derive(Clone, Copy)]
pub struct Path {
    bytes: [u8; Self::BYTES_MAX],
    /// Without the NUL.
    len: usize,
}

impl Path {
    /// Bytes with the NUL: PATH_MAX.
    pub const BYTES_MAX: usize = 4096;

    /// A copy.
    pub fn new(path: &CStr) -> Result<Self, Errno> {
        let mut copy = Self { bytes: [0; Self::BYTES_MAX], len: 0 };
        copy.push(path.to_bytes())?;
        Ok(copy)
    }

    /// Puts bytes behind it.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let end = self.len.checked_add(bytes.len()).filter(|end| *end < Self::BYTES_MAX);
        let end = end.ok_or(Errno::NAMETOOLONG)?;
        let place = self.bytes.get_mut(self.len..end).ok_or(Errno::NAMETOOLONG)?;
        place.copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }

    /// Takes away everything behind `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        if let Some(rest) = self.bytes.get_mut(len..self.len) {
            rest.fill(0);
            self.len = len;
        }
    }

    /// Its bytes, without the NUL.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// As a string with a NUL.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }

    /// Where the last component's slash is.
    pub fn last_slash(&self) -> Option<usize> {
        self.as_bytes().iter().rposition(|byte| *byte == b'/')
    }

    /// Runs `with` for each leading part that ends before a slash, the shortest first, and then the whole.
    pub fn each_part(&mut self, mut with: impl FnMut(&CStr) -> Result<(), Errno>) -> Result<(), Errno> {
        for at in 1..self.len {
            if self.bytes.get(at) == Some(&b'/') && self.bytes.get(at - 1) != Some(&b'/') {
                self.bytes[at] = 0;
                let result = with(self.as_c_str());
                self.bytes[at] = b'/';
                result?;
            }
        }
        with(self.as_c_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_from_the_shortest_to_the_whole() {
        let mut parts = vec![];
        let mut path = Path::new(c"/a//b/c").unwrap();
        path.each_part(|part| {
            parts.push(part.to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(parts, [c"/a".to_owned(), c"/a//b".into(), c"/a//b/c".into()]);
        assert_eq!(path.as_bytes(), b"/a//b/c");
    }

    #[test]
    fn path_that_is_too_long_is_refused() {
        let long = std::ffi::CString::new(vec![b'a'; Path::BYTES_MAX]).unwrap();
        assert!(matches!(Path::new(&long), Err(Errno::NAMETOOLONG)));
    }

    #[test]
    fn cut_path_is_shorter() {
        let mut path = Path::new(c"/a/bc").unwrap();
        assert_eq!(path.last_slash(), Some(2));
        path.truncate(2);
        assert_eq!(path.as_c_str(), c"/a");
        path.push(b"/d").unwrap();
        assert_eq!(path.as_c_str(), c"/a/d");
    }
}
