//! The keeper: a process that is forked before the walls go up, and does what the monitor may not do behind them.
//!
//! It opens images for drives that a client of the control socket changes, locks them, and hands over the descriptors;
//! it makes the files of a snapshot, which have no names until the monitor has written them; and it removes the monitor's
//! sockets when the monitor has ended, however it did and whenever: it hears of them before they are made. It opens nothing but regular files and block devices, and has a
//! filter of its own. The monitor's guest cannot reach it but through the
//! monitor; in a jail it opens only what is in the jail.
//!
//! In a jail the keeper is the process that was started, and the monitor its child and the first process of a PID
//! namespace: the keeper hands signals on and ends with the monitor's exit code.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::fork::{Fork, fork};
use super::jail::Jail;
use super::{Error, Kind, Step, privileges, violation};
use crate::disk;
use crate::snapshot_files::{self, Place, Writing};

/// Bytes of a request: a page with the metrics of many disks is the longest.
const MESSAGE_BYTES: usize = 192 << 10;
/// Bytes of an answer.
const ANSWER_BYTES: usize = 8 << 10;
/// Sockets that are remembered.
const FILES_MAX: usize = 16;
/// How many milliseconds a monitor may take to die after it has let go of the keeper.
const DYING_TRIES: usize = 2000;

/// Numbers of a file: device and inode.
type Numbers = (u64, u64);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// There will be a socket here, which is to be removed if the monitor ends before it says more.
    Expect(PathBuf),
    /// Remove this file at the end, if it is the same then.
    Remember(PathBuf),
    /// Pages are written to this file.
    PageAt(PathBuf),
    /// Replace the page by this one.
    Page(String),
    /// The walls go up: nothing more to remember. Whether a client may ask for images and snapshots.
    Seal { controlled: bool },
    /// Open an image, unless it is the one with these numbers.
    Open { path: PathBuf, read_only: bool, have: Option<Numbers> },
    /// Make the files of a snapshot, and hand over the one for memory.
    Save { place: Place, id: snapshot_files::Id },
    /// Hand over the one for the state.
    SavedState,
    /// Put them in their places; both are written. Beside them lie files that they need.
    Saved { keep: Vec<String> },
    /// Let go of them.
    NotSaved,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Same,
    Opened,
    Failed(String),
}

/// What an image turned out to be.
#[derive(Debug)]
pub enum Found {
    /// The one that is open already.
    Same,
    /// Another one, opened and locked.
    File(OwnedFd),
}

/// The monitor's end.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    /// Whether the monitor ends when the keeper does.
    followed: bool,
}

/// Which process this is after [`start`].
pub enum Side {
    /// The monitor.
    Monitor(Keeper),
    /// The keeper, whose work is done: the code that the process ends with.
    Keeper(ExitCode),
}

/// Starts the keeper. Called while there is one thread and as little as possible is open. The monitor is about to make
/// `socket`.
pub fn start(jail: Option<&Jail>, socket: Option<&Path>) -> Result<Side, Error> {
    // Where there is no such directory there will be no socket.
    let expected = socket.and_then(|path| expect(path).ok()).into_iter().collect();
    let (ours, its) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .step("make a socket for the keeper")?;
    if let Some(jail) = jail {
        jail.begin()?;
    }
    match (fork().step("start the keeper")?, jail) {
        // A jail's monitor is the first process of its PID namespace, so it is the child.
        (Fork::Child, Some(_)) | (Fork::Parent(_), None) => {
            Ok(Side::Monitor(Keeper { socket: ours, followed: jail.is_some() }))
        }
        (Fork::Parent(child), Some(jail)) => {
            drop(ours);
            Ok(Side::Keeper(serve(&its, Some((child, jail)), expected)?))
        }
        (Fork::Child, None) => {
            drop(ours);
            // Job control and Ctrl-C are the monitor's.
            let _ = rustix::process::setpgid(None, None);
            Ok(Side::Keeper(serve(&its, None, expected)?))
        }
    }
}

impl Keeper {
    /// Tells of a socket that will be made.
    pub fn expect(&self, path: &Path) -> io::Result<()> {
        match self.ask(&Request::Expect(path.to_owned()))? {
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
            _ => Ok(()),
        }
    }

    /// Has a file removed at the end.
    pub fn remember(&self, path: &Path) -> io::Result<()> {
        match self.ask(&Request::Remember(path.to_owned()))? {
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
            _ => Ok(()),
        }
    }

    /// Has pages written to the file at `path`.
    pub fn write_pages_to(&self, path: &Path) -> io::Result<()> {
        match self.ask(&Request::PageAt(path.to_owned()))? {
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
            _ => Ok(()),
        }
    }

    /// Replaces the page.
    pub fn write_page(&self, text: &str) -> io::Result<()> {
        match self.ask(&Request::Page(text.to_owned()))? {
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
            _ => Ok(()),
        }
    }

    /// Nothing more is to be remembered. Images and snapshots are only for a VM that clients control.
    pub fn seal(&self, controlled: bool) -> io::Result<()> {
        match self.ask(&Request::Seal { controlled })? {
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
            _ => Ok(()),
        }
    }

    /// Opens and locks an image, unless it is the one with the numbers `have`.
    pub fn open(&self, path: &Path, read_only: bool, have: Option<(u64, u64)>) -> Result<Found, String> {
        let request = Request::Open { path: path.to_owned(), read_only, have };
        match self.ask(&request).map_err(no_answer)? {
            (Answer::Same, _) => Ok(Found::Same),
            (Answer::Opened, Some(file)) => Ok(Found::File(file)),
            (Answer::Failed(why), _) => Err(why),
            _ => Err(NONSENSE.into()),
        }
    }

    /// Makes the files of a snapshot, which is in its place after [`Saving::finish`].
    pub fn begin_to_save(self: &Arc<Self>, place: &Place, id: &snapshot_files::Id) -> Result<Saving, String> {
        let memory = self.file(&Request::Save { place: place.clone(), id: *id })?;
        // From here on they are let go of, whatever happens.
        let files = Unsaved(Arc::clone(self));
        let state = self.file(&Request::SavedState)?;
        Ok(Saving { memory, state, files })
    }

    fn file(&self, request: &Request) -> Result<File, String> {
        match self.ask(request).map_err(no_answer)? {
            (Answer::Opened, Some(file)) => Ok(file.into()),
            (Answer::Failed(why), _) => Err(why),
            _ => Err(NONSENSE.into()),
        }
    }

    /// A descriptor that hangs up when the keeper has ended, if the monitor is to end with it.
    pub fn followed_fd(&self) -> Option<RawFd> {
        self.followed.then(|| self.socket.as_raw_fd())
    }

    fn ask(&self, request: &Request) -> io::Result<(Answer, Option<OwnedFd>)> {
        send(&self.socket, &serde_json::to_vec(request)?, None)?;
        let mut room = vec![0; ANSWER_BYTES];
        let (bytes, file) = receive(&self.socket, &mut room)?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(bytes)?, file))
    }
}

const NONSENSE: &str = "the keeper makes no sense";

fn no_answer(error: io::Error) -> String {
    format!("the keeper does not answer: {error}")
}

/// A snapshot's files that the keeper has made and the monitor writes.
#[derive(Debug)]
pub struct Saving {
    memory: File,
    state: File,
    files: Unsaved,
}

impl Saving {
    /// The memory file.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// The state file.
    pub fn state(&self) -> &File {
        &self.state
    }

    /// Has them made durable and put in their places.
    pub fn finish(self, keep: Vec<String>) -> Result<(), String> {
        match self.files.0.ask(&Request::Saved { keep }).map_err(no_answer)? {
            (Answer::Done, _) => Ok(()),
            (Answer::Failed(why), _) => Err(why),
            _ => Err(NONSENSE.into()),
        }
    }
}

/// Has the keeper let go of files that are not in their places.
#[derive(Debug)]
struct Unsaved(Arc<Keeper>);

impl Drop for Unsaved {
    fn drop(&mut self) {
        // After a keeper that has ended there is nothing left.
        let _ = self.0.ask(&Request::NotSaved);
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = file.map(|file| [file]);
    if let Some(files) = &files {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

fn receive<'a>(socket: &OwnedFd, room: &'a mut [u8]) -> io::Result<(&'a [u8], Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(room)];
        match rustix::net::recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut file = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message {
            file = files.next();
        }
    }
    Ok((room.get(..received.bytes).unwrap_or_default(), file))
}

/// A file to be removed.
struct Remembered {
    directory: OwnedFd,
    name: std::ffi::OsString,
    numbers: Numbers,
}

fn remember(path: &Path) -> io::Result<Remembered> {
    let mut file = remember_parent(path)?;
    let stat = rustix::fs::statat(&file.directory, &file.name, AtFlags::SYMLINK_NOFOLLOW)?;
    file.numbers = (stat.st_dev, stat.st_ino);
    Ok(file)
}

/// A file that need not be there.
fn remember_parent(path: &Path) -> io::Result<Remembered> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
    Ok(Remembered { directory, name, numbers: (0, 0) })
}

/// A socket that was not there yet, and what was there in its place.
struct Expected {
    socket: Remembered,
    path: PathBuf,
}

fn expect(path: &Path) -> io::Result<Expected> {
    let socket = remember(path).or_else(|_| remember_parent(path))?;
    Ok(Expected { socket, path: path.to_owned() })
}

impl Expected {
    /// Removes a socket that was made since, and on which nobody listens any more.
    fn remove(&self) {
        let Remembered { directory, name, numbers } = &self.socket;
        let Ok(stat) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { return };
        let is_socket = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket();
        let is_new = (stat.st_dev, stat.st_ino) != *numbers;
        let is_dead = || {
            let connected = std::os::unix::net::UnixStream::connect(&self.path);
            connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        };
        // A process that dies closes one descriptor after the other.
        let dies = || {
            (0..DYING_TRIES).any(|_| {
                let dead = is_dead();
                if !dead {
                    std::thread::sleep(Duration::from_millis(1));
                }
                dead
            })
        };
        if is_socket && is_new && dies() {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
    }
}

/// A file that is replaced as a whole.
struct Page {
    directory: OwnedFd,
    name: std::ffi::OsString,
    next: std::ffi::OsString,
}

impl Page {
    fn at(path: &Path) -> io::Result<Page> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
        let mut next = name.clone();
        next.push(".next");
        Ok(Page { directory, name, next })
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let file = rustix::fs::openat(&self.directory, &self.next, flags, mode)?;
        std::io::Write::write_all(&mut std::fs::File::from(file), bytes)?;
        Ok(rustix::fs::renameat(&self.directory, &self.next, &self.directory, &self.name)?)
    }
}

impl Remembered {
    fn remove(&self) {
        let stat = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.numbers) {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// The whole life of the keeper.
fn serve(
    socket: &OwnedFd,
    child: Option<(Pid, &Jail)>,
    mut expected: Vec<Expected>,
) -> Result<ExitCode, Error> {
    let signals = child.is_some().then(take_signals).transpose().step("hand signals on")?;
    let _ = rustix::thread::set_name(c"rvmm-keeper");
    if child.is_none() {
        let null = rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty()).step("open /dev/null")?;
        rustix::stdio::dup2_stdin(&null).step("let go of the standard input")?;
        rustix::stdio::dup2_stdout(&null).step("let go of the standard output")?;
        let all = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGTSTP]);
        all.thread_block().step("ignore signals")?;
    }
    let mut files: Vec<Remembered> = Vec::new();
    let mut page: Option<Page> = None;
    let mut writing: Option<Writing> = None;
    let (mut sealed, mut controlled) = (false, false);
    let mut room = vec![0; MESSAGE_BYTES];
    let status = loop {
        if let Some(signals) = &signals {
            let mut fds = [
                PollFd::new(socket, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => break wait(child),
            }
            if fds[1].revents().contains(PollFlags::IN) {
                hand_on(signals, child);
            }
            if fds[0].revents().is_empty() {
                continue;
            }
        }
        let request = match receive(socket, &mut room) {
            Ok((bytes, _)) if !bytes.is_empty() => serde_json::from_slice(bytes),
            // The monitor has ended.
            _ => break wait(child),
        };
        let (answer, file) = match request {
            Ok(Request::Expect(path)) if !sealed && expected.len() < FILES_MAX => match expect(&path) {
                Ok(socket) => {
                    expected.push(socket);
                    (Answer::Done, None)
                }
                Err(error) => (Answer::Failed(error.to_string()), None),
            },
            Ok(Request::Remember(path)) if !sealed && files.len() < FILES_MAX => match remember(&path) {
                Ok(file) => {
                    files.push(file);
                    (Answer::Done, None)
                }
                Err(error) => (Answer::Failed(error.to_string()), None),
            },
            Ok(Request::PageAt(path)) if !sealed => match Page::at(&path) {
                Ok(place) => {
                    page = Some(place);
                    (Answer::Done, None)
                }
                Err(error) => (Answer::Failed(error.to_string()), None),
            },
            Ok(Request::Page(text)) if sealed => {
                let page = page.as_ref().ok_or(io::ErrorKind::NotFound.into());
                match page.and_then(|page| page.replace(text.as_bytes())) {
                    Ok(()) => (Answer::Done, None),
                    Err(error) => (Answer::Failed(error.to_string()), None),
                }
            }
            Ok(Request::Seal { controlled: by_clients }) if !sealed => {
                (sealed, controlled) = (true, by_clients);
                match seal(child.map(|(_, jail)| jail)) {
                    Ok(()) => (Answer::Done, None),
                    // The monitor says it, and ends.
                    Err(error) => (Answer::Failed(crate::error_chain(&error)), None),
                }
            }
            Ok(Request::Open { path, read_only, have }) if controlled => open(&path, read_only, have),
            Ok(
                request @ (Request::Save { .. }
                | Request::SavedState
                | Request::Saved { .. }
                | Request::NotSaved),
            ) if controlled => {
                let result = save(request, &mut writing);
                result.unwrap_or_else(|error| (Answer::Failed(crate::error_chain(&error)), None))
            }
            Ok(_) => (Answer::Failed("not now".into()), None),
            Err(error) => (Answer::Failed(error.to_string()), None),
        };
        let bytes = serde_json::to_vec(&answer).unwrap_or_default();
        if send(socket, &bytes, file.as_ref().map(AsFd::as_fd)).is_err() {
            break wait(child);
        }
    };
    files.iter().for_each(Remembered::remove);
    if !sealed {
        expected.iter().for_each(Expected::remove);
    }
    Ok(status)
}

/// Puts up the keeper's own walls.
fn seal(jail: Option<&Jail>) -> Result<(), Error> {
    if let Some(jail) = jail {
        jail.confine_keeper()?;
    }
    violation::install().step("catch system calls that are not allowed")?;
    // With these the user's files are the same to the keeper as to the user.
    let kept = CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::KILL;
    privileges::bound_if_possible(kept)?;
    privileges::keep(kept)?;
    violation::name_thread(Kind::Keeper);
    super::filter_calls(Kind::Keeper)
}

fn open(path: &Path, read_only: bool, have: Option<Numbers>) -> (Answer, Option<OwnedFd>) {
    let numbers = path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()));
    if have.is_some() && numbers == have {
        return (Answer::Same, None);
    }
    match disk::open_for_another(path, read_only) {
        Ok(file) => (Answer::Opened, Some(file.into())),
        Err(error) => (Answer::Failed(crate::error_chain(&error)), None),
    }
}

/// Does a part of what makes a snapshot's files.
fn save(
    request: Request,
    writing: &mut Option<Writing>,
) -> Result<(Answer, Option<OwnedFd>), snapshot_files::Error> {
    let hand_over = |file: &File| match file.try_clone() {
        Ok(file) => (Answer::Opened, Some(file.into())),
        Err(error) => (Answer::Failed(error.to_string()), None),
    };
    let none = || (Answer::Failed("no snapshot is being written".into()), None);
    Ok(match request {
        Request::Save { place, id } => {
            // The one before, if it was given up without a word.
            *writing = None;
            hand_over(writing.insert(Writing::begin(&place, &id)?).memory())
        }
        Request::SavedState => writing.as_ref().map_or_else(none, |writing| hand_over(writing.state())),
        Request::Saved { keep } => match writing.take() {
            Some(writing) => {
                writing.finish_keeping(&keep)?;
                (Answer::Done, None)
            }
            None => none(),
        },
        _ => {
            *writing = None;
            (Answer::Done, None)
        }
    })
}

/// Signals that somebody sends to the process that was started and means for the monitor.
const HANDED_ON: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGWINCH];

fn take_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::from_iter(HANDED_ON);
    set.add(Signal::SIGCHLD);
    set.add(Signal::SIGTSTP);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn hand_on(signals: &SignalFd, child: Option<(Pid, &Jail)>) {
    while let (Ok(Some(info)), Some((child, _))) = (signals.read_signal(), child) {
        let signal = Signal::try_from(info.ssi_signo as i32);
        // What a terminal sends, the monitor has got itself.
        let sent_by_somebody = info.ssi_code == libc::SI_USER;
        if let Ok(signal) = signal
            && HANDED_ON.contains(&signal)
            && sent_by_somebody
        {
            let _ = kill(child, signal);
        }
    }
}

/// Waits for the monitor in a jail, whose code is this process's too.
fn wait(child: Option<(Pid, &Jail)>) -> ExitCode {
    let Some((child, _)) = child else { return ExitCode::SUCCESS };
    loop {
        match waitpid(child, Some(WaitPidFlag::empty())) {
            Ok(WaitStatus::Exited(_, code)) => return ExitCode::from(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return ExitCode::from(128 + signal as u8),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}
