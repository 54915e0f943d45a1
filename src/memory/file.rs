//! Guest memory as a file: written when a VM is saved, mapped when it is restored.
//!
//! The file holds the ranges of guest memory one behind the other, with holes for pages of zeroes, and at its end a
//! page that says which snapshot it belongs to. So a file that was cut off, or is another snapshot's, is known without
//! reading it all. Mapped privately, it costs a VM nothing but the pages that its guest touches, and many VMs share
//! those that none of them has changed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::SeekFrom;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
};

use super::{PAGE_SIZE, Ram, release};

/// Names a snapshot's memory: a number that was given once.
pub type Id = [u8; 16];

/// How the last page begins; the identity and the size of memory follow.
const MAGIC: [u8; 16] = *b"rvmm memory 1\n\0\0";
/// Bytes that are looked at and written at once.
const CHUNK: usize = 64 * PAGE_SIZE as usize;
const PAGE: usize = PAGE_SIZE as usize;
/// Bits of an entry in `/proc/self/pagemap`: in memory, in swap space.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
pub(super) const PAGEMAP_ENTRY_BYTES: usize = 8;
/// Pages that are asked about at once.
const WINDOW_PAGES: usize = 8192;

/// Why memory could not be written or mapped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot {0} the memory file")]
    File(&'static str, #[source] io::Error),
    /// Guest memory itself.
    #[error("cannot read guest memory")]
    Read(#[source] GuestMemoryError),
    /// The file's length is not what it must be.
    #[error(
        "the memory file has {found} bytes and must have {expected}: it was cut off, or is no memory of this VM"
    )]
    Length {
        /// What it has.
        found: u64,
        /// What it must have.
        expected: u64,
    },
    /// The last page is another's.
    #[error("the memory file belongs to another snapshot, or to none")]
    Foreign,
    /// It cannot be mapped.
    #[error("cannot map the memory file")]
    Map(#[source] super::Error),
    /// A list of pages that cannot be.
    #[error("the memory file's list of changed pages is wrong")]
    Changes,
    /// Memory of a size that no VM has.
    #[error("{0} bytes of guest memory cannot be")]
    Size(u64),
}

/// Tells which pages of this process have been touched.
static PAGEMAP: OnceLock<Option<File>> = OnceLock::new();

/// Opens what [`write()`] wants to know and may not be able to open behind the walls. In the process that calls that.
pub fn prepare_to_write() {
    pagemap();
}

pub(super) fn pagemap() -> Option<&'static File> {
    let open = || match File::open("/proc/self/pagemap") {
        Ok(file) => Some(file),
        Err(error) => {
            tracing::debug!("all pages are looked at, touched or not: {error}");
            None
        }
    };
    PAGEMAP.get_or_init(open).as_ref()
}

/// Writes all guest memory, which must not change meanwhile. Returns how many bytes were not zero.
pub fn write(ram: &Ram, file: &File, id: &Id) -> Result<u64, Error> {
    let fail = |source| Error::File("write", source);
    let size: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(size.checked_add(PAGE_SIZE).ok_or(Error::Size(size))?).map_err(fail)?;
    let mut pages = Pages::open();
    let mut writer = Writer { file, buffer: vec![0; CHUNK], written: 0 };
    let mut base = 0;
    for region in ram.iter() {
        let host = region.as_ptr() as usize;
        let mut at = 0;
        while at < region.len() {
            let len = (region.len() - at).min(CHUNK as u64) as usize;
            if may_have_contents(&mut pages, host + at as usize, len) {
                let chunk = writer.buffer.get_mut(..len).unwrap_or_default();
                region.read_slice(chunk, MemoryRegionAddress(at)).map_err(Error::Read)?;
                writer.put(base + at, len).map_err(fail)?;
            }
            at += len as u64;
        }
        base += region.len();
    }
    file.write_all_at(&last_page(id, size), size).map_err(fail)?;
    Ok(writer.written)
}

/// Whether a range of host memory can hold anything but zeroes.
fn may_have_contents(pages: &mut Pages, start: usize, len: usize) -> bool {
    if pages.any_touched(start, len) {
        return true;
    }
    // What a file is mapped to has its contents before it is touched.
    release::is_file_mapped(start, start + len) && !is_hole(start, len)
}

/// Tells which pages of this process have been touched.
struct Pages {
    pagemap: Option<&'static File>,
    /// Entries of the window, and the number of its first page.
    entries: Vec<u8>,
    first: usize,
}

impl Pages {
    fn open() -> Pages {
        Pages { pagemap: pagemap(), entries: Vec::new(), first: 0 }
    }

    /// Whether any page of the range is in memory or swapped out, or it cannot be known.
    fn any_touched(&mut self, start: usize, len: usize) -> bool {
        let (page, count) = (start / PAGE, len / PAGE);
        if self.find(page, count).is_none() {
            self.first = page;
            self.entries.resize(WINDOW_PAGES * PAGEMAP_ENTRY_BYTES, 0);
            let offset = (page * PAGEMAP_ENTRY_BYTES) as u64;
            let read = self.pagemap.as_ref().map(|pagemap| pagemap.read_at(&mut self.entries, offset));
            self.entries.truncate(read.and_then(Result::ok).unwrap_or(0));
        }
        self.find(page, count).is_none_or(|entries| {
            entries
                .chunks_exact(PAGEMAP_ENTRY_BYTES)
                .any(|entry| entry.try_into().map_or(u64::MAX, u64::from_ne_bytes) & PRESENT_OR_SWAPPED != 0)
        })
    }

    /// The entries of these pages, if they are in the window.
    fn find(&self, page: usize, count: usize) -> Option<&[u8]> {
        let from = page.checked_sub(self.first)?.checked_mul(PAGEMAP_ENTRY_BYTES)?;
        self.entries.get(from..from.checked_add(count * PAGEMAP_ENTRY_BYTES)?)
    }
}

/// A memory file that is mapped, so that its holes need not be read to be known as such.
struct Source {
    file: File,
    host: usize,
    len: usize,
    offset: u64,
}

static SOURCES: Mutex<Vec<Source>> = Mutex::new(Vec::new());

/// Something else is mapped there from now on.
pub(super) fn forget(host: usize, len: usize) {
    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    sources.retain(|source| source.host + source.len <= host || host + len <= source.host);
}

/// Whether the memory file that was mapped there has a hole in this place.
fn is_hole(start: usize, len: usize) -> bool {
    let sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    let inside = |source: &&Source| source.host <= start && start + len <= source.host + source.len;
    sources.iter().find(inside).is_some_and(|source| {
        let offset = source.offset + (start - source.host) as u64;
        // The last page is no hole, so there always are data behind.
        rustix::fs::seek(&source.file, SeekFrom::Data(offset)).is_ok_and(|data| data >= offset + len as u64)
    })
}

struct Writer<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    written: u64,
}

impl Writer<'_> {
    /// Writes the first `len` bytes of the buffer at `offset`, but for pages of zeroes.
    fn put(&mut self, offset: u64, len: usize) -> io::Result<()> {
        let zeroes = [0; PAGE];
        let chunk = self.buffer.get(..len).unwrap_or_default();
        let pages: Vec<&[u8]> = chunk.chunks(PAGE).collect();
        let mut at = offset;
        for run in pages.chunk_by(|a, b| (**a == zeroes) == (**b == zeroes)) {
            let bytes = run.len() * PAGE;
            if run.first().is_some_and(|page| **page != zeroes) {
                let from = (at - offset) as usize;
                self.file.write_all_at(chunk.get(from..from + bytes).unwrap_or_default(), at)?;
                self.written += bytes as u64;
            }
            at += bytes as u64;
        }
        Ok(())
    }
}

fn last_page(id: &Id, size: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let fields = MAGIC.iter().chain(id).copied().chain(size.to_le_bytes());
    for (to, from) in page.iter_mut().zip(fields) {
        *to = from;
    }
    page
}

/// Checks that `file` is the memory of `size` bytes that was written with `id`.
pub fn check(file: &File, id: &Id, size: u64) -> Result<(), Error> {
    let fail = |source| Error::File("read", source);
    let found = file.metadata().map_err(fail)?.len();
    let expected = size.checked_add(PAGE_SIZE).ok_or(Error::Size(size))?;
    if found != expected {
        return Err(Error::Length { found, expected });
    }
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, size).map_err(fail)?;
    if page != last_page(id, size) { Err(Error::Foreign) } else { Ok(()) }
}

/// Maps a file that [`write()`] made, privately, as the memory of a new VM.
pub fn map(file: &File, id: &Id, size: u64) -> Result<Ram, Error> {
    check(file, id, size)?;
    let ram = super::allocate(size).map_err(Error::Map)?;
    let mut offset = 0;
    for region in ram.iter() {
        super::map_file_private(&ram, file, offset, GuestAddress(region.start_addr().0), region.len())
            .map_err(Error::Map)?;
        if let Ok(file) = file.try_clone() {
            let (host, len) = (region.as_ptr() as usize, region.len() as usize);
            let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
            sources.push(Source { file, host, len, offset });
        }
        offset += region.len();
    }
    Ok(ram)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::allocate;

    const ID: Id = [7; 16];
    const SIZE: u64 = 64 << 20;

    fn fill(ram: &Ram, pages: &[u64]) {
        for page in pages {
            ram.write_obj(page + 1, GuestAddress(page * PAGE_SIZE + 8)).unwrap();
        }
    }

    fn value(ram: &Ram, page: u64) -> u64 {
        ram.read_obj(GuestAddress(page * PAGE_SIZE + 8)).unwrap()
    }

    #[test]
    fn memory_comes_back_and_pages_of_zeroes_take_no_room() {
        let ram = allocate(SIZE).unwrap();
        let touched = [0, 1, 63, 64, 200, SIZE / PAGE_SIZE - 1];
        fill(&ram, &touched);
        ram.write_slice(&[0; 3 * PAGE], GuestAddress(300 * PAGE_SIZE)).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write(&ram, &file, &ID).unwrap(), 6 * PAGE_SIZE);
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
        let restored = map(&file, &ID, SIZE).unwrap();
        assert!(touched.iter().all(|page| value(&restored, *page) == page + 1));
        assert_eq!((value(&restored, 2), value(&restored, 300)), (0, 0));
        // What one VM writes is neither in the file nor in the next VM.
        fill(&restored, &[2]);
        assert_eq!(value(&map(&file, &ID, SIZE).unwrap(), 2), 0);
    }

    #[test]
    fn memory_that_is_mapped_from_a_file_is_saved_touched_or_not() {
        let first = allocate(SIZE).unwrap();
        fill(&first, &[5, 6, 9000]);
        let file = tempfile::tempfile().unwrap();
        write(&first, &file, &ID).unwrap();
        let second = map(&file, &ID, SIZE).unwrap();
        fill(&second, &[7]);
        super::super::give_back(&second, GuestAddress(6 * PAGE_SIZE), PAGE_SIZE).unwrap();
        let again = tempfile::tempfile().unwrap();
        assert_eq!(write(&second, &again, &[8; 16]).unwrap(), 3 * PAGE_SIZE);
        let third = map(&again, &[8; 16], SIZE).unwrap();
        assert_eq!([5, 6, 7, 9000].map(|page| value(&third, page)), [6, 0, 8, 9001]);
    }

    #[test]
    fn other_files_are_refused() {
        let ram = allocate(SIZE).unwrap();
        let file = tempfile::tempfile().unwrap();
        write(&ram, &file, &ID).unwrap();
        assert!(matches!(map(&file, &[8; 16], SIZE), Err(Error::Foreign)));
        assert!(matches!(map(&file, &ID, SIZE - PAGE_SIZE), Err(Error::Length { .. })));
        assert!(matches!(map(&file, &ID, u64::MAX), Err(Error::Size(_))));
        file.set_len(SIZE).unwrap();
        assert!(matches!(map(&file, &ID, SIZE), Err(Error::Length { .. })));
        file.set_len(SIZE + PAGE_SIZE).unwrap();
        assert!(matches!(map(&file, &ID, SIZE), Err(Error::Foreign)));
    }

    #[test]
    fn memory_above_the_hole_lies_behind_that_below() {
        let size = (3 << 30) + (1 << 30);
        let ram = allocate(size).unwrap();
        let high = GuestAddress((4 << 30) + 12 * PAGE_SIZE);
        ram.write_obj(77u64, high).unwrap();
        fill(&ram, &[3]);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write(&ram, &file, &ID).unwrap(), 2 * PAGE_SIZE);
        let restored = map(&file, &ID, size).unwrap();
        assert_eq!((restored.read_obj::<u64>(high).unwrap(), value(&restored, 3)), (77, 4));
    }
}
