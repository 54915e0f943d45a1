//! A hostile driver against the registers of a transport: any access, any order, any memory contents.
//!
//! Holds: no panic, no hang; afterwards a reset brings the device back and it answers a well-behaved driver.
#![no_main]

use std::io;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::bus::BusDevice;
use rvmm::memory::{self, Ram};
use rvmm::virtio::mmio::Transport;
use rvmm::virtio::testing::{Desc, Driver, Ring};
use rvmm::virtio::{Activation, Chain, Completion, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: u64 = 1 << 20;
const SIZE: u16 = 8;

/// Answers at once on its first queue, and at the next flush on its second.
#[derive(Default)]
struct Mock {
    config: [u8; 16],
    ram: Option<Ram>,
    held: Vec<Chain>,
}

impl Mock {
    fn answer(&self, chain: &Chain) -> u32 {
        let Some(ram) = &self.ram else { return 0 };
        let mut writer = chain.writer(ram);
        let len = writer.remaining().min(64) as usize;
        writer.write_all(&[0x5a; 64][..len]).expect("the bytes are in memory");
        writer.written()
    }
}

impl Device for Mock {
    fn id(&self) -> u32 {
        4242
    }
    fn walls(&self) -> rvmm::sandbox::Kind {
        rvmm::sandbox::Kind::Rng
    }
    fn features(&self) -> u64 {
        0b1010
    }
    fn queue_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }
    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        for (to, from) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
    }
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.ram = Some(activation.ram);
        Ok(())
    }
    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        if queue == 1 {
            self.held.push(chain);
            return Handled::Deferred;
        }
        let written = self.answer(&chain);
        Handled::Done(chain, written)
    }
    fn flush(&mut self, done: &mut Completions) {
        for chain in std::mem::take(&mut self.held) {
            let written = self.answer(&chain);
            done.push(Completion { queue: 1, chain, written });
        }
    }
    fn stop(&mut self) {
        self.held.clear();
        self.ram = None;
    }
}

#[derive(Arbitrary, Debug)]
enum Value {
    /// What a driver writes to the status register.
    Status(u8),
    Small(u8),
    Page(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Act {
    Register(u8, Value),
    Read(u8),
    Access { offset: u16, len: u8, value: u64 },
    ReadAny { offset: u64, len: u8 },
    Negotiate(u64),
    SetQueue(u8),
    Ready,
    Scribble(u16, u64),
    Send { addr: u16, len: u16 },
}

#[derive(Arbitrary, Debug)]
struct Input {
    acts: Vec<Act>,
}

thread_local! {
    static RAM: Ram = memory::allocate(MEMORY).expect("memory for a guest");
}

fuzz_target!(|input: Input| {
    let ram = RAM.with(Clone::clone);
    let irq = EventFd::new(EFD_NONBLOCK).expect("an event descriptor");
    let transport = Transport::new(ram.clone(), Box::new(Mock::default()), irq).expect("a transport");
    let driver = Driver(&transport);
    let mut rings = [Ring::new(&ram, 0x1000, SIZE), Ring::new(&ram, 0x2000, SIZE)];
    for act in input.acts.iter().take(100) {
        match act {
            Act::Register(register, value) => {
                let value = match *value {
                    Value::Status(steps) => [0, 1, 3, 11, 15, 128][usize::from(steps) % 6],
                    Value::Small(value) => value.into(),
                    Value::Page(page) => u32::from(page) << 12,
                    Value::Any(value) => value,
                };
                driver.write(u64::from(*register) * 4, value);
            }
            Act::Read(register) => {
                driver.read(u64::from(*register) * 4);
            }
            Act::Access { offset, len, value } => {
                transport.write(u64::from(offset % 0x220), &value.to_le_bytes()[..usize::from(len % 9)]);
            }
            Act::ReadAny { offset, len } => transport.read(*offset, &mut [0; 16][..usize::from(len % 17)]),
            Act::Negotiate(features) => {
                driver.negotiate(*features);
            }
            Act::SetQueue(index) => {
                driver.set_queue(u32::from(index % 3), &rings[usize::from(index % 2)]);
            }
            Act::Ready => driver.ready(),
            Act::Scribble(at, value) => {
                ram.write_obj(*value, GuestAddress(0x1000 + u64::from(at % 0x1800))).expect("low memory");
            }
            Act::Send { addr, len } => {
                let head = rings[0].send(&[Desc::writable((*addr).into(), (*len).into())]);
                driver.notify(u32::from(head & 1));
            }
        }
    }
    let mut ring = Ring::new(&ram, 0x1000, SIZE);
    driver.bring_up(u64::MAX, &[&ring]);
    let head = ring.send(&[Desc::writable(0x8000, 5)]);
    driver.notify(0);
    assert_eq!(ring.wait_used(), (head, 5));
});
