//! A hostile driver against the console, with a terminal that is slow and a user who types.
//!
//! Holds: no panic, no hang; output comes whole and in order, input too; no more input waits than may; each chain comes
//! back once, and a chain waits only for room or for input.
#![no_main]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::console::{Console, ConsoleHandle, ConsoleSink, Size};
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Chain, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: u64 = 1 << 20;
const RING: u64 = 0x1000;
/// Output lies from here on, and never changes.
const OUT: u64 = 0x1_0000;
const OUT_BYTES: u64 = 0x4_0000;
/// Input goes to here.
const IN: u64 = 0x8_0000;
const IN_BYTES: u64 = 0x1_0000;
const INPUT_MAX: usize = 4096;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

#[derive(Default)]
struct Terminal {
    room: usize,
    expected: VecDeque<u8>,
}

struct Sink(Mutex<Terminal>);

impl ConsoleSink for Sink {
    fn put(&self, bytes: &[u8]) -> usize {
        let mut terminal = self.0.lock().expect("no panic before");
        let taken = bytes.len().min(terminal.room);
        terminal.room -= taken;
        for byte in &bytes[..taken] {
            assert_eq!(terminal.expected.pop_front(), Some(*byte), "output in order");
        }
        taken
    }
}

#[derive(Arbitrary, Debug)]
enum Act {
    Write { descs: Vec<(u32, u16, bool)>, huge: bool },
    Read { descs: Vec<(u16, u16, bool)> },
    Type(Vec<u8>),
    Room(u32),
    Event,
    Resize(u16, u16),
    Config { offset: u32, data: Vec<u8> },
    Restart(u64),
}

struct Rig {
    ram: Ram,
    device: Console,
    handle: ConsoleHandle,
    sink: Arc<Sink>,
    running: bool,
    typed: VecDeque<u8>,
    /// Chains of each queue, the first of which may have been told to wait.
    queues: [VecDeque<Chain>; 2],
}

fn byte_at(addr: u64) -> u8 {
    (addr % 251) as u8
}

impl Rig {
    fn pop(&self, descs: &[Desc]) -> Option<Chain> {
        if descs.is_empty() {
            return None;
        }
        let mut ring = Ring::new(&self.ram, RING, 32);
        ring.send(descs);
        ring.queue(u64::MAX).pop().ok().flatten()
    }

    /// Offers chains until one has to wait.
    fn serve(&mut self, queue: u16) {
        while let Some(chain) = self.queues[usize::from(queue)].pop_front() {
            let ranges: Vec<_> = chain.writable_ranges().collect();
            match self.device.handle(queue, chain) {
                Handled::Done(_, written) => {
                    let mut left = written as usize;
                    assert!(queue == RECEIVE || left == 0);
                    for (addr, len) in ranges {
                        let mut bytes = vec![0; left.min(len as usize)];
                        self.ram.read_slice(&mut bytes, addr).expect("memory");
                        left -= bytes.len();
                        for byte in bytes {
                            assert_eq!(self.typed.pop_front(), Some(byte), "input in order");
                        }
                    }
                    assert_eq!(left, 0);
                }
                Handled::Wait(chain) => {
                    if queue == RECEIVE {
                        assert!(self.typed.is_empty(), "input waits although there is a buffer");
                    }
                    return self.queues[usize::from(queue)].push_front(chain);
                }
                Handled::Deferred => panic!("the console keeps nothing"),
            }
        }
    }

    fn event(&mut self) {
        let mut done = Completions::new();
        self.device.event(0);
        self.device.flush(&mut done);
        assert!(done.is_empty());
        self.serve(RECEIVE);
        self.serve(TRANSMIT);
    }

    fn restart(&mut self, features: u64) {
        self.device.stop();
        self.queues = Default::default();
        self.typed.clear();
        self.sink.0.lock().expect("no panic before").expected.clear();
        assert_eq!(self.handle.feed(b"x"), 0, "nobody listens");
        let activation = Activation { ram: self.ram.clone(), features };
        self.device.start(activation).expect("nothing to fail");
        self.running = true;
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Write { descs, huge } => {
                let mut chain = Vec::new();
                let mut expected = Vec::new();
                let most = if *huge { 3 } else { 16 };
                for (at, len, readable) in descs.iter().take(most) {
                    let at = u64::from(*at) % OUT_BYTES;
                    let len = if *huge { OUT_BYTES - at } else { u64::from(*len % 2000).min(OUT_BYTES - at) };
                    if *readable {
                        chain.push(Desc::readable(OUT + at, len as u32));
                        expected.extend((at..at + len).map(byte_at));
                    } else {
                        chain.push(Desc::writable(IN, len as u32));
                    }
                }
                let Some(chain) = self.pop(&chain) else { return };
                if self.running {
                    self.sink.0.lock().expect("no panic before").expected.extend(expected);
                }
                self.queues[usize::from(TRANSMIT)].push_back(chain);
                self.serve(TRANSMIT);
            }
            Act::Read { descs } => {
                let descs = descs.iter().take(16).map(|(at, len, writable)| {
                    let at = u64::from(*at) % IN_BYTES;
                    let len = u64::from(*len).min(IN_BYTES - at) as u32;
                    if *writable { Desc::writable(IN + at, len) } else { Desc::readable(OUT + at, len) }
                });
                // Buffers that overlap would show what was written last only.
                let mut next = IN;
                let descs: Vec<_> = descs
                    .map(|desc| {
                        if desc.flags == 0 || next + u64::from(desc.len) > IN + IN_BYTES {
                            return Desc { len: desc.len.min(16), flags: 0, addr: OUT, next: 0 };
                        }
                        next += u64::from(desc.len);
                        Desc { addr: next - u64::from(desc.len), ..desc }
                    })
                    .collect();
                let Some(chain) = self.pop(&descs) else { return };
                self.queues[usize::from(RECEIVE)].push_back(chain);
                self.serve(RECEIVE);
            }
            Act::Type(bytes) => {
                let taken = self.handle.feed(bytes);
                assert!(taken <= bytes.len());
                self.typed.extend(&bytes[..taken]);
                assert!(self.typed.len() <= INPUT_MAX);
                assert!(taken == bytes.len() || !self.running || self.typed.len() == INPUT_MAX);
            }
            Act::Room(bytes) => {
                self.sink.0.lock().expect("no panic before").room += *bytes as usize % (1 << 20);
                self.handle.sink_drained();
            }
            Act::Event => self.event(),
            Act::Resize(columns, rows) => {
                self.handle.set_size(Size { columns: *columns, rows: *rows });
                self.device.reconfigure(&mut Completions::new());
                assert_eq!(self.device.config()[..2], columns.to_le_bytes());
            }
            Act::Config { offset, data } => self.device.write_config(*offset, data),
            Act::Restart(features) => self.restart(*features),
        }
    }
}

thread_local! {
    static RAM: Ram = {
        let ram = memory::allocate(MEMORY).expect("memory");
        let bytes: Vec<u8> = (0..OUT_BYTES).map(byte_at).collect();
        ram.write_slice(&bytes, GuestAddress(OUT)).expect("memory");
        ram
    };
}

fuzz_target!(|acts: Vec<Act>| {
    let sink = Arc::new(Sink(Mutex::default()));
    let room = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
    let (device, handle) = Console::new(sink.clone(), Size::default(), room).expect("a descriptor");
    let queues = Default::default();
    let mut rig = Rig {
        ram: RAM.with(Clone::clone),
        device,
        handle,
        sink,
        running: false,
        typed: VecDeque::new(),
        queues,
    };
    acts.iter().take(100).for_each(|act| rig.act(act));
    // With room enough all output comes, in so many turns.
    if rig.running {
        rig.sink.0.lock().expect("no panic before").room = usize::MAX;
        for _ in 0..1000 {
            rig.event();
            if rig.queues[usize::from(TRANSMIT)].is_empty() {
                break;
            }
        }
        assert!(rig.sink.0.lock().expect("no panic before").expected.is_empty(), "output is lost");
    }
});
