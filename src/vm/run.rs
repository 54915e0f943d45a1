//! The life of a built VM: start its vCPUs, serve the terminal and the process's signals, end it in good order.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::console::{ConsoleInput, ConsoleWriter, Drain, InputState, Line};
use super::control::{self, Command, Control, Controlled, Reply, State};
use super::pause;
use super::snapshot::{self, Place};
use super::timeline::Timeline;
use super::vcpu::{self, Failure, VcpuShared, VcpuThread};
use super::{End, Ended, Vm};
use crate::kvm;
use crate::legacy::{BootMark, GuestRequest};
use crate::metrics;
use crate::sandbox::{self, keeper::Keeper};
use crate::terminal::{self, RawTerminal};
use crate::virtio::console::Size;

/// How long a guest that panicked may go on to print and to reset itself.
const PANIC_GRACE: Duration = Duration::from_secs(10);
/// How long a device may take to finish what is in flight when the VM ends.
const DEVICE_PATIENCE: Duration = Duration::from_secs(30);
/// Distance between attempts to interrupt a vCPU that is to stop.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Why a VM could not be run. What goes wrong once it runs is an [`End`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A signal could not be routed.
    #[error("cannot prepare signal handling")]
    Signals(#[source] nix::Error),
    /// The terminal could not be switched.
    #[error("cannot put the terminal into raw mode")]
    Terminal(#[source] std::io::Error),
    /// A thread could not be started.
    #[error("cannot start the {0} thread")]
    Thread(&'static str, #[source] std::io::Error),
    /// The event loop failed.
    #[error("the event loop failed")]
    Events(#[source] event_manager::Error),
    /// The timer could not be made.
    #[error("cannot create a timer")]
    Timer(#[source] vmm_sys_util::errno::Error),
    /// The vCPU signal.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The main thread's walls.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
}

const REQUESTS: u32 = 0;
const FAILURE: u32 = 1;
const SIGNALS: u32 = 2;
const INPUT: u32 = 3;
const ROOM: u32 = 4;
const TIMER: u32 = 5;
const CONTROL: u32 = 6;
const KEEPER: u32 = 7;
const METRICS: u32 = 8;

/// How often the page for Prometheus is written.
const METRICS_INTERVAL: Duration = Duration::from_secs(10);
/// After so many pages comes a line of JSON.
const METRICS_TICKS: u32 = 6;

/// Metrics that are written by themselves.
struct KeptMetrics {
    timer: TimerFd,
    ticks: u32,
    page: Option<PathBuf>,
}

/// The subscriber of the main thread's event loop.
struct MainLoop {
    vm: Arc<VmHandles>,
    control: Control,
    controlled: Controlled,
    metrics: Option<KeptMetrics>,
    signals: SignalFd,
    timer: TimerFd,
    /// The first signal that asked for a shutdown.
    shutdown_signal: Option<i32>,
    terminal: Option<Arc<RawTerminal>>,
    /// The line that standard input leads to.
    line: Option<Arc<dyn Line>>,
    input: Option<ConsoleInput>,
    input_watched: bool,
    shutdown_timeout: Duration,
    end: Option<End>,
}

/// What the main loop needs of the VM.
struct VmHandles {
    shared: Arc<VcpuShared>,
    devices: super::Machine,
    requests_event: EventFd,
    room_event: EventFd,
    threads: Mutex<Vec<VcpuThread>>,
}

impl MainLoop {
    fn on_request(&mut self) {
        // The counter only says that there is something; what it is stands in the requests.
        let _ = self.vm.requests_event.read();
        let requests = &self.vm.shared.requests;
        let panicked = requests.has(GuestRequest::Panicked);
        if requests.stops() {
            self.end.get_or_insert(match () {
                () if panicked => End::Panic,
                () if requests.has(GuestRequest::PowerOff) => End::PowerOff,
                () => End::Reset,
            });
        } else if panicked {
            self.arm(PANIC_GRACE);
        }
    }

    fn on_failure(&mut self) {
        let _ = self.vm.shared.failed.read();
        let mut failure = self.vm.shared.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let panicked = self.vm.shared.requests.has(GuestRequest::Panicked);
        self.end.get_or_insert(match failure.take() {
            Some(Failure::TripleFault) if panicked => End::Panic,
            Some(Failure::TripleFault) => End::TripleFault,
            Some(Failure::Stuck(why)) => End::Stuck(why),
            None => return,
        });
    }

    fn on_timer(&mut self) {
        let _ = self.timer.wait();
        self.end.get_or_insert(if self.vm.shared.requests.has(GuestRequest::Panicked) {
            End::Panic
        } else {
            End::Killed { signal: self.shutdown_signal.unwrap_or(libc::SIGTERM) }
        });
    }

    fn arm(&mut self, after: Duration) {
        if let Err(error) = self.timer.reset(after, None) {
            tracing::error!("cannot arm the timer, so there is no waiting: {error}");
            self.end.get_or_insert(End::Killed { signal: self.shutdown_signal.unwrap_or(libc::SIGTERM) });
        }
    }

    fn on_signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = info.ssi_signo as i32;
            match Signal::try_from(number) {
                Ok(Signal::SIGINT) if self.terminal.is_some() => {
                    if let Some(line) = &self.line {
                        line.feed(&[0x03]);
                    }
                }
                Ok(Signal::SIGWINCH) => self.resize(),
                Ok(Signal::SIGTSTP) => {
                    crate::terminal::restore();
                    let _ = raise(Signal::SIGSTOP);
                    self.take_terminal();
                }
                Ok(Signal::SIGCONT) => self.take_terminal(),
                _ => self.shut_down(number),
            }
        }
    }

    /// Tells the guest the size of the terminal.
    fn resize(&self) {
        let (Some((index, console)), Some((columns, rows))) = (&self.vm.devices.sized, terminal::size())
        else {
            return;
        };
        console.set_size(Size { columns, rows });
        if let Some(transport) = self.vm.devices.transports.get(*index) {
            transport.reconfigure();
        }
    }

    fn take_terminal(&self) {
        if let Some(Err(error)) = self.terminal.as_ref().map(|terminal| terminal.make_raw()) {
            tracing::warn!("cannot put the terminal back into raw mode: {error}");
        }
    }

    /// Asks the guest to shut down; at the second call, does not ask any more.
    fn shut_down(&mut self, signal: i32) {
        if self.shutdown_signal.is_some() {
            self.end.get_or_insert(End::Killed { signal });
            return;
        }
        self.shutdown_signal = Some(signal);
        tracing::info!("signal {signal}: pressing the power button");
        // A guest that rests could not shut down.
        self.resume();
        self.press_power();
        self.arm(self.shutdown_timeout);
    }

    fn press_power(&self) {
        // A guest hears one of the two: with ACPI it is told that there is no keyboard, without it knows no button.
        self.vm.devices.i8042.press_ctrl_alt_del();
        if let Err(error) = self.vm.devices.power.press_button() {
            tracing::warn!("cannot press the power button: {error}");
        }
    }

    /// Writes metrics where they were asked for: the page for Prometheus, and at times a line of JSON.
    fn write_metrics(&self, line: bool) {
        let Some(kept) = &self.metrics else { return };
        if line && let Err(error) = metrics::flush() {
            tracing::warn!(%error, "metrics cannot be written");
        }
        if let Some(page) = &kept.page {
            let text = metrics::text();
            let written = match &self.controlled.keeper {
                Some(keeper) => keeper.write_page(&text),
                None => super::page::replace(page, text.as_bytes()),
            };
            if let Err(error) = written {
                tracing::warn!(%error, "metrics cannot be written to {page:?}");
            }
        }
    }

    fn on_metrics_timer(&mut self) {
        let Some(kept) = &mut self.metrics else { return };
        let _ = kept.timer.wait();
        kept.ticks = kept.ticks.wrapping_add(1);
        let line = kept.ticks.is_multiple_of(METRICS_TICKS);
        self.write_metrics(line);
    }

    fn pause(&mut self) -> Result<(), pause::Error> {
        if self.controlled.state == State::Running {
            let start = Instant::now();
            let threads = self.vm.threads.lock().unwrap_or_else(PoisonError::into_inner);
            pause::pause(&self.vm.shared.gate, &threads, self.vm.devices.transports())?;
            self.controlled.state = State::Paused;
            tracing::debug!("paused within {:?}", start.elapsed());
        }
        Ok(())
    }

    fn resume(&mut self) {
        if self.controlled.state == State::Paused {
            pause::resume(&self.vm.shared.gate, self.vm.devices.transports());
            self.controlled.state = State::Running;
        }
    }

    /// Saves the VM, which rests meanwhile. That the files are durable it need not wait for.
    fn save(&mut self, place: &Place, only_changes: bool) -> Result<(), control::Error> {
        let runs = self.controlled.state == State::Running;
        self.pause().map_err(control::Error::Pause)?;
        // Once more, so that devices tell what has been changed since they came to rest.
        let devices = pause::settle(self.vm.devices.transports()).map_err(control::Error::Pause);
        let tracked = self.controlled.config.track_dirty_pages;
        // What has changed since is told once: if this fails, the next one has all memory.
        let base =
            if tracked || !only_changes { self.controlled.base.take() } else { self.controlled.base.clone() };
        let source = snapshot::Source {
            shared: &self.vm.shared,
            machine: &self.vm.devices,
            config: &self.controlled.config,
            keeper: self.controlled.keeper.as_ref(),
            base: base.as_deref().filter(|_| only_changes),
        };
        let written = devices.and_then(|()| snapshot::create(&source, place).map_err(control::Error::Save));
        if runs {
            self.resume();
        }
        let layers = written?.finish().map_err(control::Error::Save)?;
        if tracked {
            self.controlled.base = Some(layers);
        }
        Ok(())
    }

    /// Carries out the commands that wait.
    fn on_control(&mut self) {
        while let Some((command, answer)) = self.control.take() {
            tracing::debug!(?command, "command");
            answer(match command {
                Command::Pause => self.pause().map(|()| Reply::Done).map_err(control::Error::Pause),
                Command::Resume => {
                    self.resume();
                    Ok(Reply::Done)
                }
                Command::PressPower => {
                    self.press_power();
                    Ok(Reply::Done)
                }
                Command::FlushMetrics => {
                    self.write_metrics(true);
                    Ok(Reply::Done)
                }
                Command::Save(place) => self.save(&place, false).map(|()| Reply::Done),
                Command::SaveChanges(place) => self.save(&place, true).map(|()| Reply::Done),
                other => self.controlled.carry_out(other, &self.vm.devices.transports),
            });
        }
    }

    fn on_input(&mut self, ops: &mut EventOps<'_>) {
        let Some(input) = &mut self.input else { return };
        let state = input.read();
        self.follow_input(state, ops);
    }

    fn on_room(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.vm.room_event.read();
        let Some(input) = &mut self.input else { return };
        let state = input.flush();
        self.follow_input(state, ops);
    }

    /// Watches standard input as long as the guest takes what it gives.
    fn follow_input(&mut self, mut state: InputState, ops: &mut EventOps<'_>) {
        loop {
            let Some(input) = &mut self.input else { return };
            let events = Events::with_data_raw(input.fd(), INPUT, EventSet::IN);
            match state {
                InputState::Quit => {
                    self.end.get_or_insert(End::Quit);
                    return;
                }
                InputState::WaitForInput if self.input_watched => return,
                InputState::WaitForInput => {
                    if ops.add(events).is_ok() {
                        self.input_watched = true;
                        return;
                    }
                    // A regular file cannot be watched, and is always ready.
                    state = input.read();
                }
                InputState::WaitForRoom | InputState::Ended => {
                    if std::mem::take(&mut self.input_watched) {
                        let _ = ops.remove(events);
                    }
                    if state == InputState::Ended {
                        self.input = None;
                    }
                    return;
                }
            }
        }
    }
}

impl MutEventSubscriber for MainLoop {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            REQUESTS => self.on_request(),
            FAILURE => self.on_failure(),
            SIGNALS => self.on_signal(),
            INPUT => self.on_input(ops),
            ROOM => self.on_room(ops),
            TIMER => self.on_timer(),
            CONTROL => self.on_control(),
            // The process that was started, and whose end is to be this one's.
            METRICS => self.on_metrics_timer(),
            KEEPER => {
                self.end.get_or_insert(End::Killed { signal: libc::SIGKILL });
            }
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fixed: [(RawFd, u32); 6] = [
            (self.vm.requests_event.as_raw_fd(), REQUESTS),
            (self.vm.shared.failed.as_raw_fd(), FAILURE),
            (self.signals.as_raw_fd(), SIGNALS),
            (self.vm.room_event.as_raw_fd(), ROOM),
            (self.timer.as_raw_fd(), TIMER),
            (self.control.event().as_raw_fd(), CONTROL),
        ];
        for (fd, data) in fixed {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                self.end.get_or_insert(End::Stuck(format!("cannot watch an event: {error:?}")));
            }
        }
        if let Some(kept) = &self.metrics {
            let _ = ops.add(Events::with_data_raw(kept.timer.as_raw_fd(), METRICS, EventSet::IN));
        }
        if let Some(fd) = self.controlled.keeper.as_deref().and_then(Keeper::followed_fd) {
            let ended = EventSet::HANG_UP | EventSet::READ_HANG_UP;
            let _ = ops.add(Events::with_data_raw(fd, KEEPER, ended));
        }
        self.follow_input(InputState::WaitForInput, ops);
    }
}

/// The signals that ask for the end.
const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
/// The signals of a shell's job control and of its terminal.
const JOB_CONTROL: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGCONT, Signal::SIGWINCH];

/// A descriptor from which `signals` are read, which must be blocked.
fn read_signals(signals: &SigSet) -> Result<SignalFd, nix::Error> {
    SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Blocks the signals that the main loop reads from a descriptor, in this thread and all that it starts.
fn take_signals() -> Result<SignalFd, nix::Error> {
    let set = ENDING.into_iter().chain(JOB_CONTROL).collect();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    read_signals(&set)
}

/// Writes out what the console still holds. A guest that ended by itself is not told from one whose reader is slow,
/// so only a signal ends the wait, and then the VM counts as killed by it.
fn drain(writer: ConsoleWriter, end: End) -> Result<End, Error> {
    // The terminal is as before, and so are Ctrl-Z and its like.
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&JOB_CONTROL.into_iter().collect()), None)
        .map_err(Error::Signals)?;
    let signals = read_signals(&ENDING.into_iter().collect()).map_err(Error::Signals)?;
    let patience = match end {
        End::Killed { .. } | End::Quit => Drain::Brief,
        _ => Drain::Whole,
    };
    Ok(writer.finish(patience, &signals).map_or(end, |signal| End::Killed { signal }))
}

/// Whoever still asks something of a VM that has ended is told so.
struct ClosedAtEnd(Control);

impl Drop for ClosedAtEnd {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs a VM until it ends.
pub fn run(vm: Vm, timeline: &mut Timeline) -> Result<Ended, Error> {
    let signals = take_signals().map_err(Error::Signals)?;
    kvm::register_kick_signal()?;
    let Vm {
        shared,
        vcpus,
        machine,
        requests_event,
        room_event,
        consoles,
        control,
        controlled,
        metrics,
        shutdown_timeout,
    } = vm;
    let _closed = ClosedAtEnd(control.clone());

    let line = consoles.iter().find(|console| console.reads_stdin).map(|console| console.line.clone());
    let terminal = match line {
        Some(_) => RawTerminal::enter().map_err(Error::Terminal)?.map(Arc::new),
        None => None,
    };
    let input = line.clone().map(|line| ConsoleInput::new(line, terminal.is_some()));
    let input = input.transpose().map_err(|error| Error::Thread("input", error))?;
    let start_writer = |console: super::Console| -> Result<ConsoleWriter, Error> {
        let target: File = console.target;
        ConsoleWriter::start(console.output, console.line, target)
            .map_err(|error| Error::Thread("console", error))
    };
    let writers = consoles.into_iter().map(start_writer).collect::<Result<Vec<_>, _>>()?;

    let mut controlled = controlled;
    // A VM that was saved, unless it is to rest until it is told otherwise.
    if controlled.state == State::Paused && !shared.gate.is_closed() {
        machine.transports().for_each(|transport| transport.resume());
        controlled.state = State::Running;
    }
    let threads = Mutex::new(Vec::with_capacity(vcpus.len()));
    let vm = Arc::new(VmHandles { shared, devices: machine, requests_event, room_event, threads });
    timeline.kvm_calls = kvm::take_call_times();
    timeline.mark("first KVM_RUN");
    let moment = |moment: &super::Moment| (moment.name.clone(), moment.wall_us, moment.cpu_us);
    crate::metrics::set_timeline(timeline.moments.iter().map(moment).collect());
    for (vcpu, emulator) in vcpus {
        let thread = vcpu::spawn(vcpu, emulator, vm.shared.clone());
        match thread {
            Ok(thread) => vm.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread),
            Err(error) => {
                stop(&vm);
                return Err(Error::Thread("vCPU", error));
            }
        }
    }

    let timer = TimerFd::new().map_err(Error::Timer)?;
    let metrics = match metrics {
        Some(page) => {
            let mut timer = TimerFd::new().map_err(Error::Timer)?;
            timer.reset(METRICS_INTERVAL, Some(METRICS_INTERVAL)).map_err(Error::Timer)?;
            Some(KeptMetrics { timer, ticks: 0, page })
        }
        None => None,
    };
    let events = EventManager::<MainLoop>::new_with_capacity(8).map_err(Error::Events)?;
    sandbox::enter(sandbox::Kind::Main)?;
    crate::memory::own::give_back();
    let main_loop = MainLoop {
        vm: vm.clone(),
        control,
        controlled,
        metrics,
        signals,
        timer,
        shutdown_signal: None,
        terminal,
        line,
        input,
        input_watched: false,
        shutdown_timeout,
        end: None,
    };
    let result = serve(main_loop, events);
    stop(&vm);
    let mut end = result?;
    for writer in writers {
        end = drain(writer, end)?;
    }
    for mark in vm.devices.guest_event.marks() {
        let name = match mark.value {
            value if value == BootMark::FirstProcess as u8 => "first process".to_owned(),
            value if value == BootMark::CommandStart as u8 => "command starts".to_owned(),
            value if value == BootMark::CommandEnd as u8 => "command ended".to_owned(),
            value => format!("guest mark {value}"),
        };
        timeline.mark_at(&name, mark.at, mark.cpu);
    }
    timeline.mark("ended");
    Ok(Ended { end, exit_status: vm.devices.guest_event.exit_status() })
}

/// Runs the event loop until it knows how the VM ends.
fn serve(main_loop: MainLoop, mut events: EventManager<MainLoop>) -> Result<End, Error> {
    let id = events.add_subscriber(main_loop);
    loop {
        let main_loop = events.subscriber_mut(id).map_err(Error::Events)?;
        if let Some(end) = main_loop.end.take() {
            main_loop.write_metrics(true);
            return Ok(end);
        }
        match events.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(Error::Events(error)),
        }
    }
}

/// Stops the vCPUs, then the devices, so that nothing is in flight any more.
fn stop(vm: &VmHandles) {
    vm.shared.stop.store(true, Ordering::Release);
    vm.shared.gate.open();
    let threads = std::mem::take(&mut *vm.threads.lock().unwrap_or_else(PoisonError::into_inner));
    while threads.iter().any(|thread| !thread.is_over()) {
        threads.iter().filter(|thread| !thread.is_over()).for_each(VcpuThread::kick);
        std::thread::sleep(KICK_INTERVAL);
    }
    for transport in &vm.devices.transports {
        if let Err(error) = transport.stop(DEVICE_PATIENCE) {
            tracing::warn!("{}", crate::error_chain(&error));
        }
    }
}
