//! The system calls that each kind of thread may make, with the reason for each: the text behind `//` is what
//! `docs/security.md` says, and a test holds the two together.
//!
//! The lists are what was measured (`scripts/benchmarks/syscalls.py`) and what the C library does in cases too rare to
//! be met there: a heap that grows, a wait that a stop and a continuation of the process interrupt, the end of a thread.

/// A system call, and with which arguments.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Its number.
    pub call: i64,
    /// What its arguments must be.
    pub arguments: Arguments,
}

/// What the arguments of a system call must be.
#[derive(Clone, Copy, Debug)]
pub enum Arguments {
    /// Anything.
    Any,
    /// The argument at this place is one of these numbers.
    OneOf(u8, &'static [u64]),
    /// The argument at this place has none of these bits.
    Without(u8, u64),
    /// The argument at this place has just these of the bits in the mask.
    Bits(u8, u64, u64),
    /// The first argument is this process.
    ThisProcess,
}

const fn any(call: i64) -> Rule {
    Rule { call, arguments: Arguments::Any }
}

const fn one_of(call: i64, place: u8, numbers: &'static [u64]) -> Rule {
    Rule { call, arguments: Arguments::OneOf(place, numbers) }
}

/// Memory that is no program.
const fn not_executable(call: i64) -> Rule {
    Rule { call, arguments: Arguments::Without(2, libc::PROT_EXEC as u64) }
}

const fn bits(call: i64, place: u8, mask: u64, value: u64) -> Rule {
    Rule { call, arguments: Arguments::Bits(place, mask, value) }
}

const fn this_process(call: i64) -> Rule {
    Rule { call, arguments: Arguments::ThisProcess }
}

/// The terminal goes back to what it was when a thread dies of a fault.
const TCSETS: u64 = 0x5402;

/// What is asked of a vCPU: to run, to show and take the registers that an instruction needs which rvmm carries out in
/// KVM's stead, to tell its guest that it was stopped, and to show its state when the VM is saved (`linux/kvm.h`).
const VCPU_IOCTLS: &[u64] = &[
    0xae80,      // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x8004_ae98, // KVM_GET_MP_STATE
    0x9000_aecf, // KVM_GET_XSAVE2
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x8400_ae8e, // KVM_GET_LAPIC
    0xc008_ae91, // KVM_GET_CPUID2
    0xaea3,      // KVM_GET_TSC_KHZ
    0x9000_aea4, // KVM_GET_XSAVE
    0x5000_aea5, // KVM_SET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0xaead,      // KVM_KVMCLOCK_CTRL
    TCSETS,
];

/// A thread that runs a vCPU.
pub const VCPU: &[Rule] = &[
    one_of(libc::SYS_ioctl, 1, VCPU_IOCTLS), // runs the guest; reads and sets the state of this vCPU
    any(libc::SYS_write),                    // interrupts, notifications of devices, the log
    any(libc::SYS_futex),                    // locks of devices; rests while the VM is paused
    any(libc::SYS_brk),                      // the heap
    not_executable(libc::SYS_mmap),          // the heap; a page of a kernel file that was truncated
    any(libc::SYS_munmap),                   // the heap
    any(libc::SYS_clock_gettime), // processor time of boot marks; all time where the host has no fast clock
    any(libc::SYS_rt_sigreturn),  // after the signal that interrupts the guest
    any(libc::SYS_restart_syscall), // goes on waiting after the process was stopped
    any(libc::SYS_exit_group),    // the end, where a call is not allowed
];

/// Every device thread.
const DEVICE: &[Rule] = &[
    one_of(libc::SYS_ioctl, 1, &[TCSETS]), // the terminal goes back to what it was when a thread dies of a fault
    any(libc::SYS_epoll_wait),             // waits for notifications and orders
    any(libc::SYS_epoll_ctl),              // watches what the device waits for
    any(libc::SYS_read),                   // event counters and timers
    any(libc::SYS_write),                  // interrupts, the log
    any(libc::SYS_futex),                  // orders and what became of them
    any(libc::SYS_close),                  // what the device has opened
    any(libc::SYS_brk),                    // the heap
    not_executable(libc::SYS_mmap),        // the heap; a page of a kernel file that was truncated
    any(libc::SYS_munmap),                 // the heap; the signal stack of a thread that ends
    one_of(libc::SYS_madvise, 2, &[libc::MADV_DONTNEED as u64]), // the stack of a thread that ends
    any(libc::SYS_clock_gettime),          // time, where the host has no fast clock
    any(libc::SYS_rt_sigreturn),           // after a page of a kernel file was replaced
    any(libc::SYS_restart_syscall),        // goes on waiting after the process was stopped
    any(libc::SYS_rt_sigprocmask),         // the end of the thread
    any(libc::SYS_sigaltstack),            // the end of the thread
    any(libc::SYS_exit),                   // the end of the thread
    any(libc::SYS_exit_group),             // the end, where a call is not allowed
];

/// Devices that need nothing more: random numbers aside, the console.
const CONSOLE_DEVICE: &[Rule] = &[];

const RNG: &[Rule] = &[
    any(libc::SYS_getrandom),       // what the guest asks for
    any(libc::SYS_timerfd_settime), // when a rate limit lets more pass
];

const BALLOON: &[Rule] = &[
    any(libc::SYS_timerfd_settime), // when to ask for statistics
];

/// `BLKDISCARD` of `linux/fs.h`.
const BLKDISCARD: u64 = 0x1277;

/// A disk whose host has io_uring.
const BLOCK_URING: &[Rule] = &[
    any(libc::SYS_io_uring_enter), // reads, writes, flushes, by a ring that was made before the walls
    one_of(libc::SYS_io_uring_register, 1, &[2, 3]), // another image; the ring is restricted to what disks need
    one_of(libc::SYS_ioctl, 1, &[BLKDISCARD]),       // discards on a block device
    any(libc::SYS_timerfd_settime),                  // when a rate limit lets more pass
    any(libc::SYS_clock_nanosleep),                  // a pause, where the host is short of memory
    any(libc::SYS_flock),                            // gives up the lock of an image that was replaced
];

/// A disk whose host has none.
const BLOCK_SYNC: &[Rule] = &[
    any(libc::SYS_preadv),                     // reads
    any(libc::SYS_pwritev),                    // writes
    any(libc::SYS_pwritev2),                   // writes of a driver without flushes
    any(libc::SYS_fdatasync),                  // flushes
    any(libc::SYS_fallocate),                  // discards and zeroes
    one_of(libc::SYS_ioctl, 1, &[BLKDISCARD]), // discards on a block device
    any(libc::SYS_timerfd_settime),            // when a rate limit lets more pass
    any(libc::SYS_flock),                      // gives up the lock of an image that was replaced
];

/// `linux/if_tun.h` and `linux/vhost.h`.
const NET_IOCTLS: &[u64] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d9, // TUNSETQUEUE
    0x4008_af00, // VHOST_SET_FEATURES
    0xaf01,      // VHOST_SET_OWNER
    0xaf02,      // VHOST_RESET_OWNER
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af30, // VHOST_NET_SET_BACKEND
];

const NET: &[Rule] = &[
    any(libc::SYS_readv),                   // packets from the tap
    any(libc::SYS_writev),                  // packets to the tap
    one_of(libc::SYS_ioctl, 1, NET_IOCTLS), // queues and offloads that the driver chooses; vhost-net
    any(libc::SYS_timerfd_settime),         // when a rate limit lets more pass
];

const VSOCK: &[Rule] = &[
    one_of(libc::SYS_socket, 0, &[libc::AF_UNIX as u64]), // a connection that the guest makes
    any(libc::SYS_connect),                               // the same
    any(libc::SYS_accept4),                               // a connection that a program makes
    one_of(libc::SYS_ioctl, 1, &[0x5421]),                // FIONBIO: it must not block
    any(libc::SYS_recvfrom),                              // the greeting
    any(libc::SYS_sendto),                                // the answer to it
    any(libc::SYS_shutdown),                              // one side has no more to say
    any(libc::SYS_timerfd_settime),                       // when to try again
];

const FS: &[Rule] = &[
    any(libc::SYS_recvfrom),               // replies of the file server
    any(libc::SYS_sendto),                 // requests to it
    one_of(libc::SYS_ioctl, 1, &[0x5421]), // FIONBIO: it must not block
    any(libc::SYS_poll),                   // waits for what is on its way when the VM is paused
];

/// The thread that starts device threads. What it may not do, they may not do either, so its list holds theirs.
const LAUNCHER: &[Rule] = &[
    // CLONE_VM | CLONE_THREAD, and no flag of a namespace.
    bits(libc::SYS_clone, 0, 0x7e03_0100, 0x0001_0100), // starts device threads, and nothing but threads
    any(libc::SYS_clone3), // refused as unknown, since its flags cannot be looked at; the C library uses the other
    not_executable(libc::SYS_mprotect), // a new thread's stack
    any(libc::SYS_set_robust_list), // a new thread
    any(libc::SYS_rseq),   // a new thread
    any(libc::SYS_gettid), // a new thread
    any(libc::SYS_sched_getaffinity), // a new thread's stack
    one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64]), // a new thread's name and walls
    one_of(libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER as u64]), // a new thread's own walls
    any(libc::SYS_epoll_create1),                                          // a device that starts
    any(libc::SYS_timerfd_create),                                         // a device that starts
    any(libc::SYS_eventfd2),                                               // a device that starts
];

/// The thread that writes the guest's console.
const CONSOLE: &[Rule] = &[
    one_of(libc::SYS_ioctl, 1, &[TCSETS]), // the terminal goes back to what it was when a thread dies of a fault
    any(libc::SYS_write),                  // the guest's output
    any(libc::SYS_futex),                  // waits for it
    any(libc::SYS_poll),                   // waits for a reader that is slow
    any(libc::SYS_close),                  // the file
    any(libc::SYS_brk),                    // the heap
    not_executable(libc::SYS_mmap),        // the heap
    any(libc::SYS_munmap),                 // the heap; the signal stack of a thread that ends
    one_of(libc::SYS_madvise, 2, &[libc::MADV_DONTNEED as u64]), // the stack of a thread that ends
    any(libc::SYS_clock_gettime),          // time, where the host has no fast clock
    any(libc::SYS_rt_sigreturn),           // after a signal
    any(libc::SYS_restart_syscall),        // goes on waiting after the process was stopped
    any(libc::SYS_rt_sigprocmask),         // the end of the thread
    any(libc::SYS_sigaltstack),            // the end of the thread
    any(libc::SYS_exit),                   // the end of the thread
    any(libc::SYS_exit_group),             // the end, where a call is not allowed
];

/// The thread of the control socket.
const API: &[Rule] = &[
    any(libc::SYS_epoll_wait),                     // waits for clients
    any(libc::SYS_epoll_ctl),                      // watches them
    any(libc::SYS_accept4),                        // takes them
    any(libc::SYS_read),                           // an event counter
    any(libc::SYS_recvfrom),                       // requests
    any(libc::SYS_write),                          // an event counter, the log
    any(libc::SYS_sendto),                         // answers
    any(libc::SYS_writev),                         // answers
    any(libc::SYS_shutdown),                       // the end of a connection
    any(libc::SYS_getsockopt),                     // what is wrong with a connection
    one_of(libc::SYS_ioctl, 1, &[0x5421, TCSETS]), // FIONBIO: a client must not block; the terminal, after a fault
    any(libc::SYS_close),                          // a client that is done
    any(libc::SYS_futex),                          // hands commands to the main thread
    any(libc::SYS_brk),                            // the heap
    not_executable(libc::SYS_mmap),                // the heap
    any(libc::SYS_munmap),                         // the heap
    any(libc::SYS_mremap),                         // the heap
    any(libc::SYS_madvise),                        // the heap
    any(libc::SYS_getrandom),                      // keys of hash tables
    any(libc::SYS_clock_gettime),                  // time, where the host has no fast clock
    any(libc::SYS_rt_sigreturn),                   // after a signal
    any(libc::SYS_restart_syscall),                // goes on waiting after the process was stopped
    any(libc::SYS_exit_group),                     // the end, where a call is not allowed
];

/// What the main thread asks of terminals and disks, and of KVM's own devices when the VM is saved.
const MAIN_IOCTLS: &[u64] = &[
    0x5401, // TCGETS
    TCSETS,
    0x540f,      // TIOCGPGRP
    0x5413,      // TIOCGWINSZ
    0x8008_1272, // BLKGETSIZE64
    BLKDISCARD,
    0xae03,      // KVM_CHECK_EXTENSION
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8070_ae9f, // KVM_GET_PIT2
    0x8030_ae7c, // KVM_GET_CLOCK
    0x4010_ae42, // KVM_GET_DIRTY_LOG
];

/// The main thread: the event loop, and the end.
const MAIN: &[Rule] = &[
    any(libc::SYS_epoll_wait),               // waits for what happens
    any(libc::SYS_epoll_ctl),                // watches standard input, or no more
    any(libc::SYS_epoll_create1),            // the event loop
    any(libc::SYS_read),                     // signals, input, counters
    any(libc::SYS_write),                    // counters, the log
    any(libc::SYS_close),                    // devices at the end
    any(libc::SYS_poll),                     // waits for the console's last output
    any(libc::SYS_timerfd_settime),          // time limits
    any(libc::SYS_signalfd4),                // signals at the end
    any(libc::SYS_rt_sigprocmask),           // the same
    any(libc::SYS_rt_sigaction),             // gives signals back at the end
    any(libc::SYS_rt_sigreturn),             // after a signal
    any(libc::SYS_sigaltstack),              // the end
    any(libc::SYS_getpid),                   // signals to its own threads
    this_process(libc::SYS_tgkill),          // interrupts vCPUs; stops itself when the user types Ctrl-Z
    any(libc::SYS_gettid),                   // the same
    any(libc::SYS_getpgrp),                  // whether the terminal is another's
    one_of(libc::SYS_ioctl, 1, MAIN_IOCTLS), // the terminal; the size of a disk; interrupt controllers and changed pages of a VM that is saved
    any(libc::SYS_fstat),                    // whether a disk's image has grown
    one_of(libc::SYS_fcntl, 1, &[libc::F_GETFL as u64, libc::F_SETFL as u64]), // an image that was handed in
    any(libc::SYS_statx),                    // whether a disk's image has grown
    any(libc::SYS_lseek),                    // standard input that is a file; holes of a memory file
    any(libc::SYS_pread64),                  // which pages a VM that is saved has touched
    any(libc::SYS_pwrite64),                 // memory of a VM that is saved
    any(libc::SYS_ftruncate),                // the size of its file
    any(libc::SYS_flock),                    // gives up the lock of an image
    one_of(libc::SYS_io_uring_register, 1, &[2, 3]), // another image for a drive that has no driver yet
    any(libc::SYS_sendmsg),                  // asks the keeper for an image, or a snapshot's files
    any(libc::SYS_recvmsg),                  // gets them
    any(libc::SYS_sendto),                   // asks the keeper
    any(libc::SYS_recvfrom),                 // hears what the keeper says
    any(libc::SYS_shutdown),                 // tells file servers the end
    one_of(libc::SYS_wait4, 2, &[libc::WNOHANG as u64]), // the end of file servers
    one_of(libc::SYS_waitid, 3, &[(libc::WNOHANG | libc::WEXITED) as u64, (libc::WEXITED) as u64]), // the same
    any(libc::SYS_clock_nanosleep), // waits for vCPUs and file servers to end
    any(libc::SYS_clock_gettime),   // the timeline
    any(libc::SYS_futex),           // locks; commands
    any(libc::SYS_getrandom),       // keys of hash tables
    any(libc::SYS_brk),             // the heap
    not_executable(libc::SYS_mmap), // the heap
    any(libc::SYS_munmap),          // the heap; guest memory at the end
    any(libc::SYS_mremap),          // the heap
    any(libc::SYS_madvise),         // the heap, stacks, what only the start needed
    any(libc::SYS_restart_syscall), // goes on waiting after the process was stopped
    any(libc::SYS_exit_group),      // the end
];

/// The keeper: opens images for drives that are changed, makes the files of snapshots, and removes sockets at the end.
const KEEPER: &[Rule] = &[
    any(libc::SYS_recvmsg),    // what the monitor asks for
    any(libc::SYS_recvfrom),   // the same
    any(libc::SYS_sendmsg),    // a file, or why there is none
    any(libc::SYS_openat),     // images; the next page of metrics; files and directory of a snapshot
    any(libc::SYS_renameat),   // a page of metrics takes the place of the one before
    any(libc::SYS_mkdir),      // a snapshot's directory
    any(libc::SYS_linkat),     // gives a snapshot's file a name when it is whole
    any(libc::SYS_rename),     // a snapshot takes the place of the one before
    any(libc::SYS_getdents64), // what is left of the one before
    any(libc::SYS_unlink),     // the same
    any(libc::SYS_fsync),      // a snapshot is durable
    any(libc::SYS_statx),      // whether they are images; whether sockets are the monitor's
    any(libc::SYS_fstat),      // the same
    any(libc::SYS_newfstatat), // the same
    any(libc::SYS_lseek),      // text files of /proc
    any(libc::SYS_read),       // who holds the lock of an image
    one_of(libc::SYS_fcntl, 1, &[libc::F_SETFL as u64, libc::F_GETFL as u64, libc::F_DUPFD_CLOEXEC as u64]), // an image that waits for nobody; a snapshot's file is handed over
    any(libc::SYS_flock), // the lock of an image, and of a snapshot's directory
    one_of(libc::SYS_ioctl, 1, &[0x8008_1272]), // BLKGETSIZE64: the size of a block device
    any(libc::SYS_unlinkat), // sockets at the end
    any(libc::SYS_close), // what was handed over
    any(libc::SYS_write), // a page of metrics, the log
    any(libc::SYS_futex), // locks
    any(libc::SYS_brk),   // the heap
    not_executable(libc::SYS_mmap), // the heap
    any(libc::SYS_munmap), // the heap
    any(libc::SYS_mremap), // the heap
    any(libc::SYS_clock_gettime), // time, where the host has no fast clock
    any(libc::SYS_clock_nanosleep), // waits for a dead process's lock
    any(libc::SYS_wait4), // the end of a monitor in a jail
    any(libc::SYS_ppoll), // waits for the monitor and for signals
    any(libc::SYS_kill),  // hands signals on to a monitor in a jail
    any(libc::SYS_sigaltstack), // the end
    any(libc::SYS_rt_sigreturn), // after a signal
    any(libc::SYS_restart_syscall), // goes on waiting after the process was stopped
    any(libc::SYS_exit_group), // the end
];

/// The lists that make up what a kind of thread may call.
pub fn lists(kind: super::Kind) -> &'static [&'static [Rule]] {
    use super::Kind;
    match kind {
        Kind::Main => &[MAIN],
        Kind::Vcpu => &[VCPU],
        Kind::Launcher => {
            &[LAUNCHER, DEVICE, CONSOLE_DEVICE, RNG, BALLOON, BLOCK_URING, BLOCK_SYNC, NET, VSOCK, FS]
        }
        Kind::Console => &[CONSOLE],
        Kind::Api => &[API],
        Kind::Keeper => &[KEEPER],
        Kind::ConsoleDevice => &[DEVICE, CONSOLE_DEVICE],
        Kind::Rng => &[DEVICE, RNG],
        Kind::Balloon => &[DEVICE, BALLOON],
        Kind::BlockUring => &[DEVICE, BLOCK_URING],
        Kind::BlockSync => &[DEVICE, BLOCK_SYNC],
        Kind::Net => &[DEVICE, NET],
        Kind::Vsock => &[DEVICE, VSOCK],
        Kind::Fs => &[DEVICE, FS],
    }
}
