//! Control of a running VM from other threads: typed commands, which the main loop carries out one after the other.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::config::{Size, VmConfig};
use super::devices::Handles;
use super::pause;
use super::snapshot::{CreateError, Layer, Overrides, Place};
use crate::disk;
use crate::sandbox::keeper::{Found, Keeper};
use crate::virtio::balloon::{BalloonHandle, PAGE_BYTES, Statistics};
use crate::virtio::mmio::Transport;
pub use crate::virtio::rate::{Bucket, Limits, LimitsChange};

/// Commands that wait at most. Who sends more is told to come back later.
const WAITING_MAX: usize = 256;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM is at its end.
    #[error("the VM has ended")]
    Ended,
    /// Too many commands wait.
    #[error("too many commands wait to be carried out")]
    Busy,
    /// Bringing the VM to rest failed.
    #[error("the VM cannot be paused")]
    Pause(#[source] pause::Error),
    /// Saving the VM failed. It goes on as before.
    #[error("the VM cannot be saved")]
    Save(#[source] CreateError),
    /// The VM has no balloon.
    #[error("the VM has no balloon; --balloon gives it one")]
    NoBalloon,
    /// The balloon was made without statistics.
    #[error(
        "the balloon has no statistics, and they cannot be turned on or off while the VM runs; \
         --balloon stats-interval=SECONDS turns them on"
    )]
    NoStatistics,
    /// The balloon is to hold more memory than there is.
    #[error("a balloon of {wanted}: the guest has {memory} of memory")]
    BalloonTooLarge {
        /// What was asked for.
        wanted: Size,
        /// What the guest has.
        memory: Size,
    },
    /// There is no such disk.
    #[error("the VM has no disk {0:?}")]
    NoDisk(String),
    /// There is no such network device.
    #[error("the VM has no network interface {0:?}")]
    NoNet(String),
    /// The disk's new image, as the keeper tells.
    #[error("{0}")]
    Image(String),
    /// The disk's new image.
    #[error(transparent)]
    Disk(#[from] disk::Error),
}

/// What a VM is asked to do or tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Tell the state: [`Reply::State`].
    State,
    /// Tell the configuration, with the changes since the start: [`Reply::Config`].
    Config,
    /// Come to rest; nothing happens if the VM rests.
    Pause,
    /// Go on; nothing happens if the VM runs.
    Resume,
    /// Press the power button and Ctrl-Alt-Del, of which a guest hears one.
    PressPower,
    /// Write metrics out.
    FlushMetrics,
    /// Save the VM, which rests meanwhile if it runs.
    Save(Place),
    /// Save the VM with only the memory that has changed since it was saved last, if that is known.
    SaveChanges(Place),
    /// Tell how the balloon stands: [`Reply::Balloon`].
    Balloon,
    /// Ask the guest for so much memory.
    SetBalloon(Size),
    /// Set how often the guest tells of its memory.
    SetStatsInterval(Duration),
    /// Change a disk.
    ChangeDisk {
        /// The disk's id.
        disk: String,
        /// Another image, or the same one, whose size is looked at again.
        path: Option<PathBuf>,
        /// Its limits.
        limits: LimitsChange,
    },
    /// Change a network device.
    ChangeNet {
        /// The device's id.
        net: String,
        /// Limits on what the guest receives.
        receive: LimitsChange,
        /// Limits on what the guest sends.
        transmit: LimitsChange,
    },
}

/// Which snapshot to make a VM from, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Where it is.
    pub place: Place,
    /// What is other than it was.
    pub overrides: Overrides,
    /// Whether the VM goes on at once.
    pub resume: bool,
}

/// Whether the VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Running,
    /// It rests.
    Paused,
}

/// How a balloon stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonReport {
    /// Pages of 4 KiB that the guest is asked for.
    pub target_pages: u32,
    /// Pages that the guest has given.
    pub actual_pages: u32,
    /// What the guest told of its memory last; `None` if it is not asked.
    pub statistics: Option<Statistics>,
}

/// What comes of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// The VM's state.
    State(State),
    /// The VM's configuration.
    Config(Box<VmConfig>),
    /// The balloon.
    Balloon(Box<BalloonReport>),
}

/// Called once, with what came of the command: by the main loop, so it must not wait for anything.
pub type Answer = Box<dyn FnOnce(Result<Reply, Error>) + Send>;

#[derive(Default)]
struct Waiting {
    commands: VecDeque<(Command, Answer)>,
    closed: bool,
}

struct Inbox {
    waiting: Mutex<Waiting>,
    event: EventFd,
}

/// Sends commands to a VM.
#[derive(Clone)]
pub struct Control(Arc<Inbox>);

impl Control {
    /// A control whose commands nobody has taken yet.
    pub fn new() -> io::Result<Control> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Control(Arc::new(Inbox { waiting: Mutex::default(), event })))
    }

    /// Has a command carried out; `answer` is called from the main loop, or at once if that cannot be.
    pub fn send(&self, command: Command, answer: Answer) {
        let mut waiting = self.lock();
        let refused = if waiting.closed {
            Error::Ended
        } else if waiting.commands.len() >= WAITING_MAX {
            Error::Busy
        } else {
            waiting.commands.push_back((command, answer));
            drop(waiting);
            // Fails only when the main loop has been called 2^64 - 2 times in vain.
            let _ = self.0.event.write(1);
            return;
        };
        drop(waiting);
        answer(Err(refused));
    }

    /// Has a command carried out, and waits for it. Not for the main loop's own thread.
    pub fn call(&self, command: Command) -> Result<Reply, Error> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.send(command, Box::new(move |result| drop(sender.send(result))));
        receiver.recv().unwrap_or(Err(Error::Ended))
    }

    /// Readable when commands wait.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// The next command that waits.
    pub fn take(&self) -> Option<(Command, Answer)> {
        let mut waiting = self.lock();
        let next = waiting.commands.pop_front();
        if next.is_none() {
            let _ = self.0.event.read();
        }
        next
    }

    /// Refuses all commands, those that wait too.
    pub fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        let commands = std::mem::take(&mut waiting.commands);
        drop(waiting);
        commands.into_iter().for_each(|(_, answer)| answer(Err(Error::Ended)));
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What commands change or tell of devices and configuration; the main loop's own.
pub(super) struct Controlled {
    /// As the VM was built, with what was changed since.
    pub(super) config: VmConfig,
    pub(super) handles: Handles,
    pub(super) state: State,
    /// Opens images and makes snapshots' files behind the walls.
    pub(super) keeper: Option<Arc<Keeper>>,
    /// The snapshot that the next differential one can build upon: the one that was made or restored last.
    pub(super) base: Option<Vec<Layer>>,
}

impl Controlled {
    /// Carries out a command that concerns only devices and configuration.
    pub(super) fn carry_out(
        &mut self,
        command: Command,
        transports: &[Arc<Transport>],
    ) -> Result<Reply, Error> {
        let reconfigure = |index: usize| {
            if let Some(transport) = transports.get(index) {
                transport.reconfigure();
            }
        };
        match command {
            Command::State => return Ok(Reply::State(self.state)),
            Command::Config => return Ok(Reply::Config(Box::new(self.config.clone()))),
            Command::Balloon => {
                let (_, balloon) = self.balloon()?;
                return Ok(Reply::Balloon(Box::new(BalloonReport {
                    target_pages: balloon.target_pages(),
                    actual_pages: balloon.actual_pages(),
                    statistics: balloon.stats_interval().map(|_| balloon.statistics()),
                })));
            }
            Command::SetBalloon(wanted) => {
                let (index, balloon) = self.balloon()?;
                let memory = self.config.memory;
                let pages = u32::try_from(wanted.bytes() / PAGE_BYTES).ok().filter(|_| wanted <= memory);
                balloon.set_target_pages(pages.ok_or(Error::BalloonTooLarge { wanted, memory })?);
                reconfigure(index);
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.size = wanted;
                }
            }
            Command::SetStatsInterval(interval) => {
                let (index, balloon) = self.balloon()?;
                if balloon.stats_interval().is_some() == interval.is_zero() {
                    return Err(Error::NoStatistics);
                }
                balloon.set_stats_interval(interval);
                reconfigure(index);
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.stats_interval = u32::try_from(interval.as_secs()).unwrap_or(u32::MAX);
                }
            }
            Command::ChangeDisk { disk, path, limits } => {
                if let Some(path) = path {
                    reconfigure(self.set_image(&disk, path)?);
                }
                self.limit_disk(&disk, limits)?;
            }
            Command::ChangeNet { net, receive, transmit } => self.limit_net(&net, receive, transmit)?,
            // The main loop's own.
            Command::Pause
            | Command::Resume
            | Command::PressPower
            | Command::FlushMetrics
            | Command::Save(_)
            | Command::SaveChanges(_) => {}
        }
        Ok(Reply::Done)
    }

    fn balloon(&self) -> Result<(usize, &BalloonHandle), Error> {
        self.handles.balloon.as_ref().map(|(index, handle)| (*index, handle)).ok_or(Error::NoBalloon)
    }

    fn limit_disk(&mut self, id: &str, change: LimitsChange) -> Result<(), Error> {
        let found =
            self.handles.disks.iter().zip(self.config.all_disks_mut()).find(|(disk, _)| disk.id == id);
        let (disk, config) = found.ok_or_else(|| Error::NoDisk(id.to_owned()))?;
        if !change.is_empty() {
            config.limits = change.apply(config.limits);
            disk.limits.set(config.limits);
        }
        Ok(())
    }

    fn limit_net(&mut self, id: &str, receive: LimitsChange, transmit: LimitsChange) -> Result<(), Error> {
        let found = self.handles.nets.iter().zip(&mut self.config.nets).find(|(net, _)| net.id == id);
        let (net, config) = found.ok_or_else(|| Error::NoNet(id.to_owned()))?;
        for (handle, limits, change) in [
            (&net.receive_limits, &mut config.rx_limits, receive),
            (&net.transmit_limits, &mut config.tx_limits, transmit),
        ] {
            if !change.is_empty() {
                *limits = change.apply(*limits);
                handle.set(*limits);
            }
        }
        Ok(())
    }

    /// Gives a disk its image; returns the disk's place among the devices.
    fn set_image(&mut self, id: &str, path: PathBuf) -> Result<usize, Error> {
        let found = self.handles.disks.iter().position(|disk| disk.id == id);
        let (index, disk) = found
            .and_then(|index| Some((index, self.handles.disks.get(index)?)))
            .ok_or_else(|| Error::NoDisk(id.to_owned()))?;
        let image = disk.handle.image();
        match &self.keeper {
            Some(keeper) => match keeper.open(&path, image.options().read_only, image.numbers()) {
                Ok(Found::Same) => image.measure_again(&path)?,
                Ok(Found::File(file)) => {
                    disk.handle.set_image(disk::adopt(file.into(), &path, &image.options())?);
                }
                Err(why) => return Err(Error::Image(why)),
            },
            None if image.is_at(&path) => image.measure_again(&path)?,
            None => disk.handle.set_image(disk::open(&path, &image.options())?),
        }
        if let Some(disk) = self.config.all_disks_mut().nth(index) {
            disk.set_path(path);
        }
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_answered_in_order_and_refused_after_the_end() {
        let control = Control::new().unwrap();
        let caller = control.clone();
        let thread = std::thread::spawn(move || {
            let state = caller.call(Command::State).unwrap();
            (state, caller.call(Command::Pause), caller.call(Command::Resume))
        });
        let mut taken = Vec::new();
        while taken.len() < 2 {
            if let Some((command, answer)) = control.take() {
                taken.push(command.clone());
                if command == Command::State {
                    answer(Ok(Reply::State(State::Paused)));
                } else {
                    // Dropped with the main loop.
                    drop(answer);
                }
            }
        }
        control.close();
        let (state, dropped, refused) = thread.join().unwrap();
        assert_eq!(taken, [Command::State, Command::Pause]);
        assert_eq!(state, Reply::State(State::Paused));
        assert!(matches!(dropped, Err(Error::Ended)));
        assert!(matches!(refused, Err(Error::Ended)));
    }

    #[test]
    fn commands_that_nobody_takes_are_bounded() {
        let control = Control::new().unwrap();
        (0..WAITING_MAX).for_each(|_| control.send(Command::State, Box::new(|_| {})));
        assert!(matches!(control.call(Command::State), Err(Error::Busy)));
        assert!(control.event().read().is_ok());
        control.close();
        assert!(control.take().is_none());
    }
}
