//! The monitor's own memory: its heap, and its program.
#![allow(unsafe_code)]

/// Makes all threads allocate from one arena.
///
/// glibc would give each thread one of its own at its first allocation: four system calls before a vCPU's first
/// entry, 64 MiB of address space, and pages that nobody else can use. Nothing here allocates often enough to gain by
/// it. To be called before there are threads.
pub fn use_one_arena() {
    // SAFETY: `mallopt` only sets a parameter of the allocator. It fails only for parameters that it does not know,
    // and then nothing changes.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back to the host what only the start needed. To be called once, when the guest runs already.
///
/// Parsing arguments and compiling filters need several times the heap that a running monitor needs. They are also most of
/// the program: its pages stay in the host's page cache, where other monitors find them, but no longer mapped here, and
/// come again one by one where they are needed.
pub fn give_back() {
    // SAFETY: `malloc_trim` touches only memory that is free, under the allocator's own lock.
    unsafe { libc::malloc_trim(0) };
    give_back_program();
}

/// Unmaps the pages of constants and code.
#[cfg(all(target_os = "linux", not(miri)))]
fn give_back_program() {
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    // The linker defines both; only their addresses mean something.
    let (start, end) = (&raw const __executable_start, &raw const etext);
    let len = (end.addr() & !(super::PAGE_SIZE as usize - 1)).saturating_sub(start.addr());
    // SAFETY: from the program's first page to the last that is code alone there are only private mappings of its file that
    // nobody can write, so they are read again as they were. The kernel refuses an address that is not a page's, and what
    // cannot be given back stays.
    unsafe { libc::madvise(start.cast_mut().cast(), len, libc::MADV_DONTNEED) };
}

#[cfg(any(not(target_os = "linux"), miri))]
fn give_back_program() {}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of this program that are mapped, and constants that must read as before.
    fn program_kib() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = std::env::current_exe().unwrap();
        let own = own.to_str().unwrap();
        let (mut is_own, mut sum) = (false, 0);
        for line in maps.lines() {
            if let Some(rest) = line.strip_prefix("Rss:") {
                let kib: u64 = rest.trim().trim_end_matches(" kB").parse().unwrap();
                sum += if is_own { kib } else { 0 };
            } else if line.split_ascii_whitespace().next().is_some_and(|first| first.contains('-')) {
                is_own = line.ends_with(own) && line.contains(" r");
            }
        }
        sum
    }

    #[test]
    fn program_goes_on_with_fewer_of_its_pages() {
        let text = include_str!("own.rs");
        let sum = |text: &str| text.bytes().map(u64::from).sum::<u64>();
        let (before, expected) = (program_kib(), sum(text));
        give_back();
        let after = program_kib();
        assert!(after < before, "{before} KiB became {after} KiB");
        assert_eq!(sum(text), expected);
    }
}
