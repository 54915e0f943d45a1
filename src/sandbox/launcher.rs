//! Threads for threads that may not start any: a vCPU whose guest activates a device needs a thread for it, and must not
//! be able to start one itself.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::{SigSet, Signal};

use super::{Kind, enter, is_on};

/// Signals that a thread raises by what it does itself.
const FAULTS: [Signal; 6] =
    [Signal::SIGSYS, Signal::SIGBUS, Signal::SIGSEGV, Signal::SIGFPE, Signal::SIGILL, Signal::SIGABRT];
/// Pages of it that are not touched cost nothing.
const STACK_BYTES: usize = 128 << 10;

type Work = Box<dyn FnOnce() + Send>;

/// A thread that is wanted, and what has come of it.
struct Wanted {
    name: String,
    stack_bytes: usize,
    work: Work,
    made: Arc<Made>,
}

#[derive(Default)]
struct Made {
    thread: Mutex<Option<io::Result<JoinHandle<()>>>>,
    changed: Condvar,
}

#[derive(Default)]
struct Launcher {
    wanted: Mutex<VecDeque<Wanted>>,
    changed: Condvar,
}

static LAUNCHER: OnceLock<Launcher> = OnceLock::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the launcher's thread.
pub(super) fn start() -> io::Result<()> {
    let launcher = LAUNCHER.get_or_init(Launcher::default);
    // Signals are for the main thread, but for those of a thread's own faults. Device threads inherit that.
    let before = SigSet::thread_get_mask()?;
    let mut blocked = SigSet::all();
    FAULTS.into_iter().for_each(|signal| blocked.remove(signal));
    blocked.thread_block()?;
    let thread = Builder::new().name("launcher".into()).stack_size(STACK_BYTES).spawn(|| run(launcher));
    before.thread_set_mask()?;
    thread.map(drop)
}

fn run(launcher: &Launcher) {
    let walls = enter(Kind::Launcher);
    loop {
        let mut wanted = lock(&launcher.wanted);
        let Wanted { name, stack_bytes, work, made } = loop {
            match wanted.pop_front() {
                Some(next) => break next,
                None => wanted = launcher.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(wanted);
        let thread = match &walls {
            Ok(()) => Builder::new().name(name).stack_size(stack_bytes).spawn(work),
            Err(error) => Err(io::Error::other(crate::error_chain(error))),
        };
        *lock(&made.thread) = Some(thread);
        made.changed.notify_all();
    }
}

/// Starts a thread, by way of the launcher if the sandbox is on.
pub fn spawn_thread(
    name: String,
    stack_bytes: usize,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let Some(launcher) = LAUNCHER.get().filter(|_| is_on()) else {
        return Builder::new().name(name).stack_size(stack_bytes).spawn(work);
    };
    let made = Arc::new(Made::default());
    let next = Wanted { name, stack_bytes, work: Box::new(work), made: Arc::clone(&made) };
    lock(&launcher.wanted).push_back(next);
    launcher.changed.notify_one();
    let mut thread = lock(&made.thread);
    loop {
        match thread.take() {
            Some(thread) => return thread,
            None => thread = made.changed.wait(thread).unwrap_or_else(PoisonError::into_inner),
        }
    }
}
