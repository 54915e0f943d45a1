//! The thread that serves a running device's queues, written once for all devices.
//!
//! For each queue: suppress notifications, pop, handle, complete, until nothing is left; then ask for notifications
//! and look again; then at most one interrupt. A batch is bounded and ends early when the thread is wanted elsewhere,
//! so that no guest can keep it from pausing or stopping.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, Completions, Device, Handled};
use super::queue::{self, Queue};
use super::spec::{interrupt, status};
use super::state::{DeviceState, QueuePosition};
use crate::{metrics, sandbox};

/// Chains that are handled before other queues and events get their turn.
const BATCH: usize = 128;
/// Enough for what a device does; pages that it does not touch cost nothing.
const STACK_BYTES: usize = 256 << 10;
/// Configuration writes that wait for a running device; a driver that sends more loses them.
const CONFIG_WRITES_MAX: usize = 64;

/// Event data: a queue's index, or one of these.
const WAKE: u32 = 1 << 31;
const SOURCE: u32 = 1 << 30;

/// What the registers and the worker both touch.
#[derive(Debug)]
pub(super) struct Shared {
    irq: EventFd,
    interrupt_status: AtomicU32,
    /// [`status::DEVICE_NEEDS_RESET`] or 0.
    device_status: AtomicU32,
    config: Mutex<Config>,
    counters: Arc<metrics::Device>,
}

/// The configuration space as the driver reads it.
#[derive(Clone, Debug, Default)]
pub(super) struct Config {
    pub(super) bytes: Vec<u8>,
    pub(super) generation: u32,
}

impl Shared {
    pub(super) fn new(irq: EventFd, config: Vec<u8>, counters: Arc<metrics::Device>) -> Self {
        Self {
            irq,
            interrupt_status: AtomicU32::new(0),
            device_status: AtomicU32::new(0),
            config: Mutex::new(Config { bytes: config, generation: 0 }),
            counters,
        }
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Interrupts the driver for these reasons (virtio 1.2 §4.2.2: the status says which).
    pub(super) fn interrupt(&self, reasons: u32) {
        self.interrupt_status.fetch_or(reasons, Ordering::AcqRel);
        self.counters.interrupts.add(1);
        // Fails only when 2^64 - 2 interrupts are pending already.
        let _ = self.irq.write(1);
    }

    pub(super) fn device_status(&self) -> u32 {
        self.device_status.load(Ordering::Acquire)
    }

    /// The device cannot go on (virtio 1.2 §2.1.2: said by a configuration interrupt).
    pub(super) fn needs_reset(&self) {
        self.device_status.store(status::DEVICE_NEEDS_RESET, Ordering::Release);
        self.counters.failures.add(1);
        self.interrupt(interrupt::CONFIG);
    }

    pub(super) fn reset(&self) {
        self.device_status.store(0, Ordering::Release);
        self.interrupt_status.store(0, Ordering::Release);
    }

    /// Takes over what the driver saw of a device that is restored.
    pub(super) fn restore(&self, interrupt_status: u32, device_status: u32, config: Config) {
        self.interrupt_status.store(interrupt_status, Ordering::Release);
        self.device_status.store(device_status & status::DEVICE_NEEDS_RESET, Ordering::Release);
        *self.config() = config;
    }

    pub(super) fn config(&self) -> MutexGuard<'_, Config> {
        lock(&self.config)
    }

    /// Shows the driver a configuration space; true if that changes it.
    pub(super) fn publish(&self, bytes: Vec<u8>) -> bool {
        let mut config = self.config();
        let changed = config.bytes != bytes;
        if changed {
            config.bytes = bytes;
            config.generation = config.generation.wrapping_add(1);
        }
        changed
    }

    /// The same; and tells the driver, if there is something to tell.
    pub(super) fn publish_and_tell(&self, bytes: Vec<u8>) {
        if self.publish(bytes) {
            self.interrupt(interrupt::CONFIG);
        }
    }
}

/// Nothing here leaves what it locks half changed, so a panic elsewhere does not matter.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the worker is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Order {
    Run,
    Pause,
    Stop,
}

const ORDER_MASK: u32 = 3;
const ORDER_STEP: u32 = 4;

/// What the worker has done.
enum Reached {
    Running,
    /// It rests, as the order with this number said.
    Paused(u32),
    /// It is over; without a device if it panicked.
    Ended(Option<Box<dyn Device>>),
}

struct Control {
    /// An [`Order`] in the low bits, and above them a number that grows with each order.
    order: AtomicU32,
    wake: Arc<EventFd>,
    reached: Mutex<Reached>,
    changed: Condvar,
    config_writes: Mutex<Vec<(u32, Vec<u8>)>>,
    reconfigure: AtomicBool,
    /// As the worker left it when it came to rest.
    saved: Mutex<Option<Saved>>,
}

/// The state of a device that rests.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    /// `None` if it cannot be saved.
    pub(super) device: Option<DeviceState>,
    pub(super) positions: Vec<Option<QueuePosition>>,
}

impl Control {
    /// The number of the last order, if it is this one.
    fn ordered(&self, order: Order) -> Option<u32> {
        let word = self.order.load(Ordering::Acquire);
        (word & ORDER_MASK == order as u32).then_some(word / ORDER_STEP)
    }

    /// Gives an order; returns its number.
    fn give(&self, order: Order) -> u32 {
        let next = |word: u32| Some((word & !ORDER_MASK).wrapping_add(ORDER_STEP) | order as u32);
        let before = self.order.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        let _ = self.wake.write(1);
        before.ok().and_then(next).map_or(0, |word| word / ORDER_STEP)
    }

    fn reach(&self, reached: Reached) {
        *lock(&self.reached) = reached;
        self.changed.notify_all();
    }

    /// Waits until `is` holds, for at most `limit`.
    fn wait(&self, limit: Duration, is: impl Fn(&Reached) -> bool) -> bool {
        let guard = lock(&self.reached);
        let result = self.changed.wait_timeout_while(guard, limit, |reached| !is(reached));
        is(&result.unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// A running device, as its transport sees it.
pub(super) struct Handle {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// A device with all that it needs to run.
pub(super) struct Parts {
    pub(super) device: Box<dyn Device>,
    pub(super) activation: Activation,
    /// `None` where the driver has not set the queue up.
    pub(super) queues: Vec<Option<Queue>>,
    pub(super) kicks: Arc<[EventFd]>,
    /// Wakes the worker up. Of the transport, since a vCPU that resets a device may neither open nor close anything.
    pub(super) wake: Arc<EventFd>,
    pub(super) shared: Arc<Shared>,
}

/// Starts a thread for a device; gives the device back if the host has no thread.
pub(super) fn spawn(parts: Parts) -> Result<Handle, (Box<dyn Device>, io::Error)> {
    let control = Arc::new(Control {
        order: AtomicU32::new(Order::Run as u32),
        wake: Arc::clone(&parts.wake),
        reached: Mutex::new(Reached::Running),
        changed: Condvar::new(),
        config_writes: Mutex::new(Vec::new()),
        reconfigure: AtomicBool::new(false),
        saved: Mutex::new(None),
    });
    // The closure of a thread that cannot be started is dropped, so the parts wait for the thread outside of it.
    let parts = Arc::new(Mutex::new(Some(parts)));
    let name = format!("virtio{}", lock(&parts).as_ref().map_or(0, |parts| parts.device.id()));
    let (for_thread, its_control) = (Arc::clone(&parts), Arc::clone(&control));
    let thread = sandbox::spawn_thread(name, STACK_BYTES, move || {
        let _ended = Ended(&its_control);
        if let Some(parts) = lock(&for_thread).take() {
            let device = serve(parts, &its_control);
            its_control.reach(Reached::Ended(Some(device)));
        }
    });
    match thread {
        Ok(thread) => Ok(Handle { control, thread: Some(thread) }),
        Err(error) => match lock(&parts).take() {
            Some(parts) => Err((parts.device, error)),
            None => unreachable!("no thread took the parts"),
        },
    }
}

/// Says that the worker is over even if it panics.
struct Ended<'a>(&'a Control);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut reached = lock(&self.0.reached);
        if !matches!(*reached, Reached::Ended(_)) {
            *reached = Reached::Ended(None);
        }
        drop(reached);
        self.0.changed.notify_all();
    }
}

impl Handle {
    /// Tells the worker to stop; does not wait.
    pub(super) fn stop(&self) {
        self.control.give(Order::Stop);
    }

    /// Waits at most `limit` for a worker that was told to stop; true if it is over.
    pub(super) fn wait_ended(&self, limit: Duration) -> bool {
        self.control.wait(limit, |reached| matches!(reached, Reached::Ended(_)))
    }

    /// Takes the device from a worker that is over; `None` if it panicked.
    pub(super) fn finish(mut self) -> Option<Box<dyn Device>> {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        match std::mem::replace(&mut *lock(&self.control.reached), Reached::Ended(None)) {
            Reached::Ended(device) => device,
            Reached::Running | Reached::Paused(_) => None,
        }
    }

    /// Tells the worker to rest; what is returned can be waited for with no lock held.
    pub(super) fn pause(&self) -> Pausing {
        let order = self.control.give(Order::Pause);
        Pausing { control: Arc::clone(&self.control), order }
    }

    pub(super) fn resume(&self) {
        self.control.give(Order::Run);
    }

    /// The state of a worker that rests, as of its last order to do so.
    pub(super) fn saved(&self) -> Option<Saved> {
        let rests = matches!(*lock(&self.control.reached), Reached::Paused(_));
        lock(&self.control.saved).clone().filter(|_| rests)
    }

    /// Hands a configuration write to the worker.
    pub(super) fn write_config(&self, offset: u32, data: &[u8]) {
        let mut writes = lock(&self.control.config_writes);
        if writes.len() < CONFIG_WRITES_MAX {
            writes.push((offset, data.to_vec()));
            drop(writes);
            let _ = self.control.wake.write(1);
        }
    }

    /// Has the device take over what was changed through its handle.
    pub(super) fn reconfigure(&self) {
        self.control.reconfigure.store(true, Ordering::Release);
        let _ = self.control.wake.write(1);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A worker on its way to rest.
pub(super) struct Pausing {
    control: Arc<Control>,
    order: u32,
}

impl Pausing {
    /// Waits at most `limit`; true if the worker rests, or is over.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        self.control.wait(limit, |reached| match reached {
            Reached::Running => false,
            Reached::Paused(order) => *order == self.order,
            Reached::Ended(_) => true,
        })
    }
}

/// The thread: runs the device until it is told to stop, and gives it back.
fn serve(parts: Parts, control: &Arc<Control>) -> Box<dyn Device> {
    let Parts { mut device, activation, queues, kicks, shared, .. } = parts;
    let manager = EventManager::new_with_capacity(8);
    // What a start takes is not in the list of a device that runs.
    let started = device.start(activation).and_then(|()| {
        sandbox::enter(device.walls()).map_err(|error| io::Error::other(crate::error_chain(&error)))
    });
    let service = Service::new(device, queues, Arc::clone(&kicks), shared);
    let mut worker = Worker { service, control: Arc::clone(control), watched: Vec::new(), over: false };
    match started {
        Ok(()) => {
            if worker.service.device.announces_config() {
                worker.service.shared.interrupt(interrupt::CONFIG);
            }
            worker.service.hand_over();
        }
        Err(error) => worker.service.fail(&"cannot start", &error),
    }
    let events = match manager {
        Ok(mut manager) => {
            let id = manager.add_subscriber(worker);
            while manager.subscriber_mut(id).is_ok_and(|worker| !worker.over) {
                if let Err(error) = manager.run()
                    && let Ok(worker) = manager.subscriber_mut(id)
                {
                    worker.service.fail(&"cannot wait for events", &error);
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            manager.remove_subscriber(id)
        }
        Err(error) => {
            worker.service.fail(&"cannot wait for events", &error);
            while control.ordered(Order::Stop).is_none() {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(worker)
        }
    };
    match events {
        Ok(worker) => worker.service.stop(),
        Err(_) => unreachable!("the subscriber was added above"),
    }
}

struct Worker {
    service: Service,
    control: Arc<Control>,
    /// Queues whose notifications come here.
    watched: Vec<bool>,
    over: bool,
}

impl Worker {
    /// Follows the orders that have come.
    fn obey(&mut self, ops: &mut EventOps) {
        let _ = self.control.wake.read();
        for (offset, data) in std::mem::take(&mut *lock(&self.control.config_writes)) {
            self.service.write_config(offset, &data);
        }
        if self.control.reconfigure.swap(false, Ordering::AcqRel) {
            self.reconfigure(ops);
        }
        if self.control.ordered(Order::Stop).is_some() {
            self.over = true;
        } else if let Some(order) = self.control.ordered(Order::Pause) {
            if !self.service.paused {
                // What they have to say would touch guest memory.
                self.unwatch_sources(ops);
                self.service.pause();
            }
            *lock(&self.control.saved) = Some(self.service.save());
            self.control.reach(Reached::Paused(order));
        } else if self.service.paused {
            self.service.paused = false;
            self.control.reach(Reached::Running);
            self.service.hand_over();
            self.watch(ops);
        }
    }

    fn reconfigure(&mut self, ops: &mut EventOps) {
        if self.service.paused {
            return self.service.reconfigure();
        }
        self.unwatch_sources(ops);
        self.service.reconfigure();
        if let Err(error) = self.watch_sources(ops) {
            self.service.fail(&"cannot watch its descriptors", &error);
        }
        self.service.serve_waiting(&self.wanted());
    }

    /// Watches what is to be watched now, and serves what has come meanwhile.
    fn watch(&mut self, ops: &mut EventOps) {
        if !self.service.broken
            && let Err(error) = self.watch_queues(ops).and_then(|()| self.watch_sources(ops))
        {
            self.service.fail(&"cannot watch its descriptors", &error);
        }
        self.service.serve_all(&self.wanted());
    }

    /// Whether an order waits, for use inside a batch.
    fn wanted(&self) -> impl Fn() -> bool + use<> {
        let control = Arc::clone(&self.control);
        move || control.ordered(Order::Run).is_none()
    }

    /// Watches the notifications of those queues that are served here.
    fn watch_queues(&mut self, ops: &mut EventOps) -> event_manager::Result<()> {
        let Service { kicks, queues, handed, .. } = &self.service;
        self.watched.resize(queues.len(), false);
        for (index, (kick, queue)) in kicks.iter().zip(queues).enumerate() {
            let Some(watched) = self.watched.get_mut(index) else { continue };
            let watch = queue.is_some() && index >= *handed;
            if watch != std::mem::replace(watched, watch) {
                // By edge: nobody needs to read the counter, which saves a system call for each notification.
                let events = Events::with_data(kick, index as u32, EventSet::IN | EventSet::EDGE_TRIGGERED);
                if watch { ops.add(events)? } else { ops.remove(events)? }
            }
        }
        Ok(())
    }

    fn unwatch_sources(&self, ops: &mut EventOps) {
        for source in self.service.device.sources() {
            let _ = ops.remove(Events::empty_raw(source.fd));
        }
    }

    fn watch_sources(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        for source in self.service.device.sources() {
            ops.add(Events::with_data_raw(source.fd, SOURCE | source.token, source.events))?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::with_data(&*self.control.wake, WAKE, EventSet::IN)) {
            self.service.fail(&"cannot watch its descriptors", &error);
        }
        // The driver may have made chains available before it said that it is ready.
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => self.obey(ops),
            data if data & SOURCE != 0 => self.service.event(data & !SOURCE, &self.wanted()),
            queue => self.service.kicked(queue as usize, &self.wanted()),
        }
        if self.service.handed > 0 && self.service.device.wants_back() {
            self.unwatch_sources(ops);
            self.service.take_back();
            self.watch(ops);
        }
    }
}

/// A started device and its queues, apart from thread and events.
pub(super) struct Service {
    device: Box<dyn Device>,
    queues: Vec<Option<Queue>>,
    /// So many of the first queues are served by the host's kernel.
    handed: usize,
    /// Queues whose device asked to wait, or that were left early.
    waiting: Vec<bool>,
    kicks: Arc<[EventFd]>,
    shared: Arc<Shared>,
    done: Completions,
    /// Queues that have completions the driver was not asked about yet.
    completed: Vec<bool>,
    /// Deferred chains were handed in, so a device that asked to wait may have room again.
    progress: bool,
    broken: bool,
    paused: bool,
}

impl Service {
    pub(super) fn new(
        device: Box<dyn Device>,
        queues: Vec<Option<Queue>>,
        kicks: Arc<[EventFd]>,
        shared: Arc<Shared>,
    ) -> Self {
        let count = queues.len();
        Self {
            device,
            queues,
            handed: 0,
            waiting: vec![false; count],
            kicks,
            shared,
            done: Vec::new(),
            completed: vec![false; count],
            progress: false,
            broken: false,
            paused: false,
        }
    }

    /// The device cannot go on; the VM does.
    fn fail(&mut self, what: &dyn std::fmt::Display, error: &dyn std::error::Error) {
        if !self.broken {
            self.broken = true;
            let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            tracing::warn!(device = self.device.id(), "virtio device needs a reset: {what}: {error}{cause}");
            self.shared.needs_reset();
        }
    }

    fn fail_queue(&mut self, index: usize, error: &queue::Error) {
        self.fail(&format_args!("queue {index}"), error);
    }

    /// Lets the device hand queues over to the host's kernel.
    fn hand_over(&mut self) {
        if self.broken {
            return;
        }
        let queues = self.queues.iter().zip(&*self.kicks).zip(0..);
        let queues: Vec<_> =
            queues.filter_map(|((queue, kick), index)| Some(queue.as_ref()?.handover(index, kick))).collect();
        self.handed = self.device.hand_over(&queues).into();
    }

    /// Serves those queues here again.
    fn take_back(&mut self) {
        if std::mem::take(&mut self.handed) == 0 {
            return;
        }
        for (index, next_avail) in self.device.take_back().into_iter().enumerate() {
            if let (Some(Some(queue)), Some(next_avail)) = (self.queues.get_mut(index), next_avail)
                && let Err(error) = queue.go_on(next_avail)
            {
                self.fail_queue(index, &error);
            }
        }
        // Whether it was interrupted for the last of them, nobody knows.
        self.shared.interrupt(interrupt::USED_RING);
    }

    /// The driver has notified queue `index`.
    pub(super) fn kicked(&mut self, index: usize, wanted: &dyn Fn() -> bool) {
        self.shared.counters.notifications.add(1);
        self.serve(index, wanted);
        self.serve_waiting(wanted);
    }

    fn event(&mut self, token: u32, wanted: &dyn Fn() -> bool) {
        self.device.event(token);
        self.settle();
        self.serve_waiting(wanted);
    }

    fn serve_all(&mut self, wanted: &dyn Fn() -> bool) {
        for index in 0..self.queues.len() {
            self.serve(index, wanted);
        }
        self.serve_waiting(wanted);
    }

    /// Offers chains to the device from those queues where it asked to wait.
    fn serve_waiting(&mut self, wanted: &dyn Fn() -> bool) {
        self.progress = false;
        for index in 0..self.queues.len() {
            if self.is_waiting(index) {
                self.serve(index, wanted);
            }
        }
        if !std::mem::take(&mut self.progress) {
            return;
        }
        // There may be room again, and no event to come that would say so.
        for index in 0..self.queues.len() {
            if self.is_waiting(index) {
                self.call_back(index);
            }
        }
    }

    fn is_waiting(&self, index: usize) -> bool {
        self.waiting.get(index).is_some_and(|waiting| *waiting)
    }

    /// Has this queue served again after others had their turn.
    fn call_back(&self, index: usize) {
        if let Some(kick) = self.kicks.get(index) {
            let _ = kick.write(1);
        }
    }

    fn serve(&mut self, index: usize, wanted: &dyn Fn() -> bool) {
        if self.broken || self.paused {
            return;
        }
        match self.serve_batches(index, wanted) {
            Ok(true) => {}
            Ok(false) => self.call_back(index),
            Err(error) => self.fail_queue(index, &error),
        }
        self.settle();
    }

    /// Serves a queue; false if it was left although there may be more.
    fn serve_batches(&mut self, index: usize, wanted: &dyn Fn() -> bool) -> Result<bool, queue::Error> {
        if index < self.handed {
            return Ok(true);
        }
        let (Some(queue), Some(waiting)) =
            (self.queues.get_mut(index).and_then(Option::as_mut), self.waiting.get_mut(index))
        else {
            return Ok(true);
        };
        *waiting = false;
        let mut budget = BATCH;
        loop {
            queue.suppress_notifications()?;
            loop {
                if budget == 0 || wanted() {
                    return Ok(false);
                }
                let Some(chain) = queue.pop()? else { break };
                budget -= 1;
                match self.device.handle(index as u16, chain) {
                    Handled::Done(chain, written) => {
                        queue.complete(chain, written)?;
                        self.shared.counters.chains.add(1);
                        self.shared.counters.written_bytes.add(written.into());
                        if let Some(completed) = self.completed.get_mut(index) {
                            *completed = true;
                        }
                    }
                    Handled::Deferred => {}
                    Handled::Wait(chain) => {
                        queue.put_back(chain);
                        *waiting = true;
                        return Ok(true);
                    }
                }
            }
            if !queue.expect_notifications()? {
                return Ok(true);
            }
        }
    }

    /// Lets the device start what it put off, completes what is done, and interrupts at most once.
    fn settle(&mut self) {
        self.device.flush(&mut self.done);
        self.complete_done();
        self.interrupt();
    }

    fn complete_done(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.progress |= !done.is_empty();
        for completion in done.drain(..) {
            let index = usize::from(completion.queue);
            // The chains of a broken device are nobody's any more.
            let (Some(Some(queue)), Some(completed), false) =
                (self.queues.get_mut(index), self.completed.get_mut(index), self.broken)
            else {
                continue;
            };
            *completed = true;
            self.shared.counters.chains.add(1);
            self.shared.counters.written_bytes.add(completion.written.into());
            if let Err(error) = queue.stage(completion.chain, completion.written) {
                self.fail_queue(index, &error);
            }
        }
        // Keeps the room that it has grown to.
        self.done = done;
        for index in 0..self.queues.len() {
            if let (Some(Some(queue)), Some(true)) = (self.queues.get_mut(index), self.completed.get(index))
                && let Err(error) = queue.publish()
            {
                self.fail_queue(index, &error);
            }
        }
    }

    fn interrupt(&mut self) {
        if self.broken {
            return;
        }
        let mut wanted = self.device.has_interrupt();
        for index in 0..self.queues.len() {
            let (Some(completed), Some(Some(queue))) =
                (self.completed.get_mut(index), self.queues.get_mut(index))
            else {
                continue;
            };
            if std::mem::take(completed) {
                match queue.wants_interrupt() {
                    Ok(wants) => wanted |= wants,
                    Err(error) => return self.fail_queue(index, &error),
                }
            }
        }
        if wanted {
            self.shared.interrupt(interrupt::USED_RING);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.device.write_config(offset, data);
        self.shared.publish(self.device.config());
    }

    fn reconfigure(&mut self) {
        self.device.reconfigure(&mut self.done);
        self.complete_done();
        self.interrupt();
        self.shared.publish_and_tell(self.device.config());
    }

    /// Comes to rest: nothing in flight, nothing popped.
    fn pause(&mut self) {
        self.paused = true;
        self.take_back();
        self.device.drain(&mut self.done);
        self.complete_done();
        let mut untouched = Vec::new();
        self.device.give_back(&mut untouched);
        while let Some((index, chain)) = untouched.pop() {
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                queue.put_back(chain);
            }
        }
        self.interrupt();
    }

    /// Its state, while it rests.
    fn save(&self) -> Saved {
        let positions = self.queues.iter().map(|queue| queue.as_ref().map(Queue::position));
        Saved { device: self.device.save(), positions: positions.collect() }
    }

    pub(super) fn stop(mut self) -> Box<dyn Device> {
        self.device.stop();
        self.device
    }
}
