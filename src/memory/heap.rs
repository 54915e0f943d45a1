//! The monitor's own heap.
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

/// Gives free pages of the heap back to the host.
///
/// Parsing arguments and compiling filters need several times the memory that a running monitor needs, and the C
/// library keeps what was freed in the midst of the heap. Best called once, when the guest runs already.
pub fn give_back() {
    // SAFETY: `malloc_trim` touches only memory that is free, under the allocator's own lock.
    unsafe { libc::malloc_trim(0) };
}
