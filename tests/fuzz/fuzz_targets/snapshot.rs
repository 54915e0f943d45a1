//! A snapshot's state of any contents: read or refused; and the devices that take it over are as safe as with any driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::Device;
use rvmm::virtio::balloon::{Balloon, BalloonOptions};
use rvmm::virtio::mmio::Transport;
use rvmm::virtio::rng::Rng;
use rvmm::virtio::state::TransportState;
use rvmm::vm::snapshot::{decode, decode_body};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PATIENCE: Duration = Duration::from_secs(20);

fn restore(ram: &Ram, device: Box<dyn Device>, state: &TransportState) {
    let irq = EventFd::new(EFD_NONBLOCK).expect("an event");
    let mut transport = Transport::new(ram.clone(), device, irq).expect("a transport");
    if transport.restore(state.clone()).is_ok() {
        transport.save().expect("a state");
        transport.resume();
        transport.pause(PATIENCE).expect("rest");
        transport.save().expect("a state");
    }
    transport.stop(PATIENCE).expect("an end");
}

fuzz_target!(|bytes: &[u8]| {
    thread_local! {
        static RAM: Ram = memory::allocate(1 << 20).expect("memory");
    }
    let _ = decode(bytes);
    if let Ok(state) = decode_body(bytes) {
        state.configuration().expect("checked");
    }
    // A device's state by itself, which needs no whole machine around it to be found.
    if let Ok(state) = rvmm::virtio::testing::read_state(bytes) {
        let ram = RAM.with(Clone::clone);
        restore(&ram, Box::<Rng>::default(), &state);
        restore(&ram, Box::new(Balloon::new(&BalloonOptions::default()).0), &state);
    }
});
