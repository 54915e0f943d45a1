//! Pages of guest memory that have changed, as a file that lies over an earlier one.
//!
//! The file has each page in the place where it lies in a file of all memory, and holes between them; then a page that says
//! which snapshot it belongs to, and the list of the runs of pages that count. The list is needed since a hole may be
//! larger than a page on some file systems, and smaller than none on others.
//!
//! Which pages have changed is told by KVM and [`super::dirty`] where they follow a machine, or by the host's page tables:
//! a page of a file that was mapped privately, and has been written to since, is a page of no file any more.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::file::{self, Error, Id};
use super::{PAGE_SIZE, Ram, release};

/// How the last page begins; the identity, the size of memory and the number of runs follow.
const MAGIC: [u8; 16] = *b"rvmm changes 1\n\0";
/// Bytes of a run in the list.
const RUN_BYTES: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;
/// Bytes that are copied at once.
const CHUNK_PAGES: u64 = 64;
/// Runs of at least so many pages are mapped from the file, shorter ones are copied.
const MAPPED_PAGES: u64 = 16;
/// Mappings at most: the host kernel allows a process some 65,000, and finds one among few faster.
const MAPPED_MAX: usize = 1024;
/// Bits of an entry in `/proc/self/pagemap`: in memory, in swap space, of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Neighbouring pages, by their numbers in the file of all memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Collects pages, which come in order, into runs.
#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn add(&mut self, page: u64) {
        match self.0.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => self.0.push(Run { first: page, count: 1 }),
        }
    }
}

/// The pages that stand in one of two lists, each with a bit for each page of each region.
pub fn union(ram: &Ram, one: &[Vec<u64>], other: &[Vec<u64>]) -> Vec<Run> {
    let mut runs = Runs::default();
    let mut base = 0;
    for (index, region) in ram.iter().enumerate() {
        let pages = region.len() / PAGE_SIZE;
        let word = |list: &[Vec<u64>], at: usize| {
            list.get(index).and_then(|words| words.get(at)).copied().unwrap_or_default()
        };
        for at in 0..pages.div_ceil(64) {
            let mut bits = word(one, at as usize) | word(other, at as usize);
            while bits != 0 {
                let page = at * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if page < pages {
                    runs.add(base + page);
                }
            }
        }
        base += pages;
    }
    runs.0
}

/// The pages of memory that is mapped from files which are not those of the files any more; `None` if it cannot be known.
pub fn copied(ram: &Ram) -> Option<Vec<Run>> {
    let pagemap = file::pagemap()?;
    let mut runs = Runs::default();
    let mut base = 0;
    let mut entries = vec![0; 512 * file::PAGEMAP_ENTRY_BYTES];
    for region in ram.iter() {
        let host = region.as_ptr() as usize / PAGE;
        let pages = region.len() / PAGE_SIZE;
        let mut at = 0;
        while at < pages {
            let offset = (host as u64 + at) * file::PAGEMAP_ENTRY_BYTES as u64;
            let left = (pages - at).min(512) as usize;
            let wanted = entries.get_mut(..left * file::PAGEMAP_ENTRY_BYTES)?;
            pagemap.read_exact_at(wanted, offset).ok()?;
            for (page, entry) in (at..).zip(wanted.chunks_exact(file::PAGEMAP_ENTRY_BYTES)) {
                let entry = u64::from_ne_bytes(entry.try_into().ok()?);
                let own = entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT;
                let start = (host + page as usize) * PAGE;
                // What was given back reads as zeroes, whatever the file has.
                let is_nowhere = entry & (PRESENT | SWAPPED) == 0;
                if own || is_nowhere && !release::is_file_mapped(start, start + PAGE) {
                    runs.add(base + page);
                }
            }
            at += left as u64;
        }
        base += pages;
    }
    Some(runs.0)
}

fn size_of_memory(ram: &Ram) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

/// Writes the pages of `runs` of guest memory, which must not change meanwhile. Returns how many bytes they have.
pub fn write(ram: &Ram, file: &File, id: &Id, runs: &[Run]) -> Result<u64, Error> {
    let fail = |source| Error::File("write", source);
    let size = size_of_memory(ram);
    let end = size.checked_add(PAGE_SIZE).ok_or(Error::Size(size))?;
    file.set_len(end).map_err(fail)?;
    let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE];
    let mut written = 0;
    each_piece(ram, runs, CHUNK_PAGES, |region, addr, offset, len| {
        let piece = buffer.get_mut(..len as usize).unwrap_or_default();
        region.read_slice(piece, MemoryRegionAddress(addr)).map_err(Error::Read)?;
        file.write_all_at(piece, offset).map_err(fail)?;
        written += len;
        Ok(())
    })?;
    let list = runs.iter().flat_map(|run| run.first.to_le_bytes().into_iter().chain(run.count.to_le_bytes()));
    file.write_all_at(&list.collect::<Vec<_>>(), end).map_err(fail)?;
    file.write_all_at(&last_page(id, size, runs.len() as u64), size).map_err(fail)?;
    Ok(written)
}

/// Calls `each` for pieces of `runs` of at most `max` pages, none of which lies in two regions: with the region, the place
/// in it, the place in the file, and the length, in bytes.
fn each_piece(
    ram: &Ram,
    runs: &[Run],
    max: u64,
    mut each: impl FnMut(&vm_memory::GuestRegionMmap, u64, u64, u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut base = 0;
    let mut rest = runs.iter().copied();
    let mut next = rest.next();
    for region in ram.iter() {
        let end = base + region.len() / PAGE_SIZE;
        while let Some(run) = next.filter(|run| run.first < end) {
            let count = run.count.min(end - run.first).min(max);
            each(region, (run.first - base) * PAGE_SIZE, run.first * PAGE_SIZE, count * PAGE_SIZE)?;
            next = match run.count - count {
                0 => rest.next(),
                left => Some(Run { first: run.first + count, count: left }),
            };
        }
        base = end;
    }
    Ok(())
}

fn last_page(id: &Id, size: u64, runs: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let fields = MAGIC.iter().chain(id).copied().chain(size.to_le_bytes()).chain(runs.to_le_bytes());
    for (to, from) in page.iter_mut().zip(fields) {
        *to = from;
    }
    page
}

/// Reads which pages of memory of `size` bytes a file has that [`write()`] made with `id`.
pub fn read(file: &File, id: &Id, size: u64) -> Result<Vec<Run>, Error> {
    let fail = |source| Error::File("read", source);
    let found = file.metadata().map_err(fail)?.len();
    let end = size.checked_add(PAGE_SIZE).ok_or(Error::Size(size))?;
    let listed = found.checked_sub(end).ok_or(Error::Length { found, expected: end })?;
    let count = listed / RUN_BYTES as u64;
    // At most every other page begins one.
    if listed % RUN_BYTES as u64 != 0 || count > (size / PAGE_SIZE).div_ceil(2) {
        return Err(Error::Changes);
    }
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, size).map_err(fail)?;
    if page != last_page(id, size, count) {
        return Err(Error::Foreign);
    }
    let mut list = vec![0; usize::try_from(listed).map_err(|_| Error::Changes)?];
    file.read_exact_at(&mut list, end).map_err(fail)?;
    let mut runs = Vec::with_capacity(list.len() / RUN_BYTES);
    let mut behind = 0;
    for entry in list.chunks_exact(RUN_BYTES) {
        let number = u128::from_le_bytes(entry.try_into().unwrap_or_default());
        let run = Run { first: number as u64, count: (number >> 64) as u64 };
        let run_end = run.first.checked_add(run.count).filter(|end| *end <= size / PAGE_SIZE);
        if run.count == 0 || run.first < behind {
            return Err(Error::Changes);
        }
        behind = run_end.ok_or(Error::Changes)?;
        runs.push(run);
    }
    Ok(runs)
}

/// Puts the pages of `runs` from `file` into guest memory that no guest has seen yet.
pub fn lay_over(ram: &Ram, file: &File, runs: &[Run]) -> Result<(), Error> {
    let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE];
    let mut mapped = 0;
    each_piece(ram, runs, u64::MAX, |region, addr, offset, len| {
        if len >= MAPPED_PAGES * PAGE_SIZE && mapped < MAPPED_MAX {
            mapped += 1;
            let at = GuestAddress(region.start_addr().0 + addr);
            return super::map_file_private(ram, file, offset, at, len).map_err(Error::Map);
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK_PAGES * PAGE_SIZE);
            let piece = buffer.get_mut(..part as usize).unwrap_or_default();
            file.read_exact_at(piece, offset + done).map_err(|source| Error::File("read", source))?;
            region.write_slice(piece, MemoryRegionAddress(addr + done)).map_err(Error::Read)?;
            done += part;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::allocate;

    const ID: Id = [7; 16];
    const NEXT: Id = [8; 16];
    const SIZE: u64 = 16 << 20;

    fn put(ram: &Ram, page: u64, value: u64) {
        ram.write_obj(value, GuestAddress(page * PAGE_SIZE + 8)).unwrap();
    }

    fn value(ram: &Ram, page: u64) -> u64 {
        ram.read_obj(GuestAddress(page * PAGE_SIZE + 8)).unwrap()
    }

    fn run(first: u64, count: u64) -> Run {
        Run { first, count }
    }

    #[test]
    fn pages_that_were_written_to_lie_over_the_earlier_file() {
        let first = allocate(SIZE).unwrap();
        (0..64).for_each(|page| put(&first, page, page + 1));
        let base = tempfile::tempfile().unwrap();
        file::write(&first, &base, &ID).unwrap();
        let second = file::map(&base, &ID, SIZE).unwrap();
        assert_eq!(value(&second, 9), 10);
        assert_eq!(copied(&second).unwrap(), [], "what was read has not changed");
        put(&second, 3, 0);
        (100..140).for_each(|page| put(&second, page, page));
        crate::memory::give_back(&second, GuestAddress(5 * PAGE_SIZE), PAGE_SIZE).unwrap();
        let runs = copied(&second).unwrap();
        assert_eq!(runs, [run(3, 1), run(5, 1), run(100, 40)]);
        let changes = tempfile::tempfile().unwrap();
        assert_eq!(write(&second, &changes, &NEXT, &runs).unwrap(), 42 * PAGE_SIZE);
        assert!(changes.metadata().unwrap().blocks() * 512 < 1 << 20);

        let third = file::map(&base, &ID, SIZE).unwrap();
        assert_eq!(read(&changes, &NEXT, SIZE).unwrap(), runs);
        lay_over(&third, &changes, &runs).unwrap();
        assert_eq!([2, 3, 4, 5, 100, 139].map(|page| value(&third, page)), [3, 0, 5, 0, 100, 139]);
        // All of it, from both files, is one file again.
        let whole = tempfile::tempfile().unwrap();
        assert_eq!(file::write(&third, &whole, &ID).unwrap(), (62 + 40) * PAGE_SIZE);
    }

    #[test]
    fn runs_do_not_cross_regions() {
        let size = (3 << 30) + (4 << 20);
        let ram = allocate(size).unwrap();
        let (low, high) = ((3 << 30) / PAGE_SIZE, (4 << 20) / PAGE_SIZE);
        let words = |pages: u64| vec![0; pages.div_ceil(64) as usize];
        let mut lists = [words(low), words(high)];
        *lists[0].last_mut().unwrap() = 1 << 63;
        lists[1][0] = 0b101;
        let other = [vec![0b10], vec![]];
        let runs = union(&ram, &lists, &other);
        assert_eq!(runs, [run(1, 1), run(low - 1, 2), run(low + 2, 1)]);
        ram.write_obj(5u64, GuestAddress(4 << 30)).unwrap();
        let changes = tempfile::tempfile().unwrap();
        write(&ram, &changes, &NEXT, &runs).unwrap();
        let other = allocate(size).unwrap();
        lay_over(&other, &changes, &read(&changes, &NEXT, size).unwrap()).unwrap();
        assert_eq!(other.read_obj::<u64>(GuestAddress(4 << 30)).unwrap(), 5);
    }

    #[test]
    fn lists_that_cannot_be_are_refused() {
        let ram = allocate(SIZE).unwrap();
        let pages = SIZE / PAGE_SIZE;
        let wrong: [&[Run]; 5] = [
            &[run(pages, 1)],
            &[run(0, pages + 1)],
            &[run(u64::MAX, 2)],
            &[run(5, 1), run(4, 1)],
            &[run(1, 0)],
        ];
        for runs in wrong {
            let changes = tempfile::tempfile().unwrap();
            write(&ram, &changes, &NEXT, &[]).unwrap();
            let list: Vec<u8> = runs
                .iter()
                .flat_map(|run| [run.first.to_le_bytes(), run.count.to_le_bytes()].concat())
                .collect();
            changes.write_all_at(&list, SIZE + PAGE_SIZE).unwrap();
            changes.write_all_at(&last_page(&NEXT, SIZE, runs.len() as u64), SIZE).unwrap();
            assert!(matches!(read(&changes, &NEXT, SIZE), Err(Error::Changes)), "{runs:?}");
        }
        let changes = tempfile::tempfile().unwrap();
        write(&ram, &changes, &NEXT, &[run(1, 1)]).unwrap();
        assert!(matches!(read(&changes, &ID, SIZE), Err(Error::Foreign)));
        changes.set_len(SIZE + PAGE_SIZE + 15).unwrap();
        assert!(matches!(read(&changes, &NEXT, SIZE), Err(Error::Changes)));
        changes.set_len(SIZE).unwrap();
        assert!(matches!(read(&changes, &NEXT, SIZE), Err(Error::Length { .. })));
        assert!(matches!(read(&changes, &NEXT, u64::MAX), Err(Error::Size(_))));
    }
}
