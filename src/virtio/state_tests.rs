//! Devices that are saved, and go on behind another transport.

use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::balloon::{Balloon, BalloonOptions};
use super::device::Device;
use super::mmio::Transport;
use super::rng::Rng;
use super::spec::{balloon, interrupt, register, status};
use super::state::{QueuePosition, RestoreError, SaveError, TransportState};
use super::testing::{Desc, Driver, Ring};
use super::vsock::Vsock;
use super::vsock::unix::UnixHost;
use crate::memory::{self, Ram};

const LONG: Duration = Duration::from_secs(20);
const RING: u64 = 0x1000;
const DATA: u64 = 0x10000;

fn ram() -> Ram {
    memory::allocate(16 << 20).unwrap()
}

fn transport(ram: &Ram, device: Box<dyn Device>) -> Transport {
    Transport::new(ram.clone(), device, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap()
}

fn rng(ram: &Ram) -> Transport {
    transport(ram, Box::<Rng>::default())
}

/// Saves a device that is at work, through bytes.
fn save(transport: &Transport) -> TransportState {
    transport.pause(LONG).unwrap();
    let bytes = postcard::to_allocvec(&transport.save().unwrap()).unwrap();
    postcard::from_bytes(&bytes).unwrap()
}

#[test]
fn restored_device_goes_on_in_its_queues() {
    let ram = ram();
    let first = rng(&ram);
    let mut ring = Ring::new(&ram, RING, 64);
    Driver(&first).bring_up(u64::MAX, &[&ring]);
    for _ in 0..100 {
        ring.send(&[Desc::writable(DATA, 16)]);
        Driver(&first).notify(0);
        assert_eq!(ring.wait_used().1, 16);
    }
    assert!(matches!(first.save(), Err(SaveError::AtWork(_))));
    let state = save(&first);
    // A chain that comes while nobody serves the queue, and whose notification is lost.
    ram.write_slice(&[0; 16], GuestAddress(DATA)).unwrap();
    ring.send(&[Desc::writable(DATA, 16)]);
    drop(first);

    let mut second = rng(&ram);
    second.restore(state.clone()).unwrap();
    assert_eq!(second.save().unwrap(), state, "it may be saved again before it goes on");
    std::thread::sleep(Duration::from_millis(20));
    assert!(ring.used().is_none(), "it must not go on by itself");
    let driver = Driver(&second);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::USED_RING);
    second.resume();
    assert_eq!(ring.wait_used().1, 16);
    let mut bytes = [0; 16];
    ram.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_ne!(bytes, [0; 16]);
    // A reset makes it a device like any other.
    driver.reset();
    let mut ring = Ring::new(&ram, RING, 64);
    driver.bring_up(0, &[&ring]);
    ring.send(&[Desc::writable(DATA, 8)]);
    driver.notify(0);
    assert_eq!(ring.wait_used().1, 8);
}

#[test]
fn device_that_had_no_driver_waits_for_one() {
    let ram = ram();
    let first = rng(&ram);
    Driver(&first).write(register::STATUS, status::ACKNOWLEDGE);
    let mut second = rng(&ram);
    second.restore(save(&first)).unwrap();
    second.resume();
    assert_eq!(Driver(&second).status(), status::ACKNOWLEDGE);
    let mut ring = Ring::new(&ram, RING, 64);
    Driver(&second).bring_up(0, &[&ring]);
    ring.send(&[Desc::writable(DATA, 8)]);
    Driver(&second).notify(0);
    assert_eq!(ring.wait_used().1, 8);
}

#[test]
fn states_of_other_devices_are_refused() {
    let ram = ram();
    let balloon = |options: &BalloonOptions| transport(&ram, Box::new(Balloon::new(options).0));
    let plain = balloon(&BalloonOptions::default());
    let state = save(&plain);
    assert!(matches!(rng(&ram).restore(state.clone()), Err(RestoreError::Kind { saved: 5, device: 4 })));
    let mut reporting = balloon(&BalloonOptions { free_page_reporting: true, ..BalloonOptions::default() });
    assert!(matches!(reporting.restore(state), Err(RestoreError::Queues { saved: 2, device: 5, .. })));

    // A driver that uses what the device does not have here.
    let eager = balloon(&BalloonOptions { deflate_on_oom: true, ..BalloonOptions::default() });
    let rings = [Ring::new(&ram, RING, 64), Ring::new(&ram, 0x4000, 64)];
    Driver(&eager).bring_up(u64::MAX, &[&rings[0], &rings[1]]);
    let mut poor = balloon(&BalloonOptions::default());
    let refused = poor.restore(save(&eager));
    let missing = balloon::feature::DEFLATE_ON_OOM;
    assert!(matches!(refused, Err(RestoreError::Features { missing: found, .. }) if found == missing));
}

#[test]
fn balloon_keeps_what_the_guest_gave_and_tells_a_new_target() {
    let ram = ram();
    let options = BalloonOptions { target_pages: 100, ..BalloonOptions::default() };
    let (device, _) = Balloon::new(&options);
    let first = transport(&ram, Box::new(device));
    let rings = [Ring::new(&ram, RING, 64), Ring::new(&ram, 0x4000, 64)];
    Driver(&first).bring_up(u64::MAX, &[&rings[0], &rings[1]]);
    Driver(&first).write(register::CONFIG + 4, 60);
    let state = save(&first);
    let (device, handle) = Balloon::new(&BalloonOptions { target_pages: 500, ..options });
    let mut second = transport(&ram, Box::new(device));
    second.restore(state).unwrap();
    assert_eq!(handle.actual_pages(), 60);
    let target = || Driver(&second).read(register::CONFIG);
    assert_eq!(target(), 100);
    second.resume();
    let end = std::time::Instant::now() + LONG;
    while target() != 500 {
        assert!(std::time::Instant::now() < end, "the new target is not told");
        std::thread::yield_now();
    }
    while Driver(&second).read(register::INTERRUPT_STATUS) & interrupt::CONFIG == 0 {
        assert!(std::time::Instant::now() < end, "no interrupt for the new target");
    }
}

#[test]
fn guest_is_told_that_its_connections_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let ram = ram();
    let socket = |name: &str| transport(&ram, vsock(&directory.path().join(name)));
    let rings = || {
        let mut rings =
            [Ring::new(&ram, RING, 256), Ring::new(&ram, 0x4000, 256), Ring::new(&ram, 0x8000, 16)];
        rings[2].send(&[Desc::writable(DATA, 4)]);
        rings
    };
    let first = socket("a");
    let [rx, tx, mut event] = rings();
    Driver(&first).bring_up(u64::MAX, &[&rx, &tx, &event]);
    let state = save(&first);
    assert!(event.used().is_none());
    drop(first);
    let mut second = socket("b");
    second.restore(state).unwrap();
    second.resume();
    assert_eq!(event.wait_used().1, 4);
    let told: u32 = ram.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(told, super::spec::vsock::EVENT_TRANSPORT_RESET);
    // Once is enough.
    event.send(&[Desc::writable(DATA, 4)]);
    Driver(&second).notify(2);
    std::thread::sleep(Duration::from_millis(20));
    assert!(event.used().is_none());
}

fn vsock(path: &std::path::Path) -> Box<dyn Device> {
    Box::new(Vsock::new(9, UnixHost::listen(path).unwrap()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Positions that no driver's rings have break the queue at worst.
    #[test]
    fn positions_of_any_kind_cost_the_guest_its_device_at_worst(next_avail: u16, next_used: u16) {
        let ram = ram();
        let first = rng(&ram);
        let mut ring = Ring::new(&ram, RING, 64);
        Driver(&first).bring_up(u64::MAX, &[&ring]);
        let mut state = save(&first);
        state.positions = Some(vec![Some(QueuePosition { next_avail, next_used })]);
        let mut second = rng(&ram);
        second.restore(state).unwrap();
        ring.send(&[Desc::writable(DATA, 16)]);
        second.resume();
        Driver(&second).notify(0);
        second.pause(LONG).unwrap();
        second.save().unwrap();
        second.stop(LONG).unwrap();
    }
}
