//! A hostile driver against a network device: any chains in any queue, any header, packets of any size from outside.
//!
//! Holds: no panic, no hang; each chain is completed once or held; what is completed as received has room for what was
//! written; what reaches the tap is what the guest sent; afterwards all held chains are given back.
#![no_main]

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::tap::Tap;
use rvmm::virtio::net::{Net, NetOptions};
use rvmm::virtio::queue::Queue;
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Completion, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};

const PAIRS: u16 = 2;
const SIZE: u16 = 64;
const HEADER: u32 = 12;

#[derive(Arbitrary, Debug)]
struct Piece {
    addr: u16,
    len: u16,
    large: bool,
    writable: bool,
}

#[derive(Arbitrary, Debug)]
enum Act {
    /// A chain into a queue.
    Send { queue: u8, pieces: Vec<Piece> },
    /// A command to the control queue.
    Command { bytes: Vec<u8>, room: u8 },
    /// A packet from outside.
    Arrive { pair: u8, len: u16, fill: u8 },
    /// An event, with any token.
    Event(u32),
    /// The tap's far end takes what was sent.
    Take,
    Pause,
    Restart(u64),
}

#[derive(Arbitrary, Debug)]
struct Input {
    features: u64,
    acts: Vec<Act>,
}

struct Rig {
    net: Net,
    ram: Ram,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
    far: Vec<UnixDatagram>,
    features: u64,
    /// How often a head is held: a driver may offer one again although it is.
    held: BTreeMap<(u16, u16), u32>,
    done: Completions,
}

impl Rig {
    fn release(&mut self, queue: u16, head: u16) {
        let count = self.held.get_mut(&(queue, head)).expect("a chain that is held");
        *count = count.checked_sub(1).expect("a chain that is held");
    }

    fn flush(&mut self) {
        self.net.flush(&mut self.done);
        self.finish();
    }

    fn finish(&mut self) {
        for Completion { queue, chain, written } in std::mem::take(&mut self.done) {
            self.release(queue, chain.head());
            assert!(written <= chain.writable_len());
            self.queues[usize::from(queue)].complete(chain, written).expect("the ring lies in memory");
        }
    }

    fn send(&mut self, queue: u16, descs: &[Desc]) {
        let index = usize::from(queue);
        self.rings[index].send(descs);
        self.serve(queue);
        self.flush();
    }

    fn serve(&mut self, queue: u16) {
        let index = usize::from(queue);
        loop {
            let chain = match self.queues[index].pop() {
                Ok(Some(chain)) => chain,
                Ok(None) => return,
                Err(_) => return self.restart(self.features),
            };
            let head = chain.head();
            match self.net.handle(queue, chain) {
                Handled::Done(chain, written) => {
                    assert!(written <= chain.writable_len());
                    self.queues[index].complete(chain, written).expect("the ring lies in memory");
                }
                Handled::Deferred => *self.held.entry((queue, head)).or_default() += 1,
                Handled::Wait(chain) => return self.queues[index].put_back(chain),
            }
        }
    }

    fn restart(&mut self, features: u64) {
        self.pause();
        self.net.stop();
        self.features = features;
        (self.rings, self.queues) = rings(&self.ram, features);
        self.net.start(Activation { ram: self.ram.clone(), features }).expect("a started device");
    }

    fn pause(&mut self) {
        self.net.drain(&mut self.done);
        self.finish();
        let mut untouched = Vec::new();
        self.net.give_back(&mut untouched);
        while let Some((queue, chain)) = untouched.pop() {
            self.release(queue, chain.head());
            self.queues[usize::from(queue)].put_back(chain);
        }
        assert!(self.held.values().all(|count| *count == 0), "{:?} is lost", self.held);
    }
}

fn rings(ram: &Ram, features: u64) -> (Vec<Ring>, Vec<Queue>) {
    (0..=PAIRS * 2)
        .map(|index| Ring::new(ram, 0x1000 + 0x2000 * u64::from(index), SIZE))
        .map(|ring| {
            let queue = ring.queue(features);
            (ring, queue)
        })
        .unzip()
}

thread_local! {
    static RAM: Ram = memory::allocate(16 << 20).expect("memory for a guest");
}

fuzz_target!(|input: Input| {
    let ram = RAM.with(Clone::clone);
    let (near, far): (Vec<_>, Vec<_>) =
        (0..PAIRS).map(|_| UnixDatagram::pair().expect("a pair of sockets")).unzip();
    for socket in near.iter().chain(&far) {
        socket.set_nonblocking(true).expect("sockets that do not block");
    }
    let tap = Tap::stand_in(near.into_iter().map(Into::into).collect(), 1500);
    let mut net = Net::new(tap, None, &NetOptions::new([2, 0, 0, 0, 0, 1]));
    net.start(Activation { ram: ram.clone(), features: input.features }).expect("a started device");
    let (rings, queues) = rings(&ram, input.features);
    let (features, held, done) = (input.features, BTreeMap::new(), Vec::new());
    let mut rig = Rig { net, ram, rings, queues, far, features, held, done };
    for act in input.acts.iter().take(200) {
        match act {
            Act::Send { queue, pieces } => {
                let mut descs: Vec<Desc> = pieces
                    .iter()
                    .take(20)
                    .map(|piece| Desc {
                        addr: 0x10_0000 + u64::from(piece.addr),
                        len: u32::from(piece.len) << if piece.large { 6 } else { 0 },
                        flags: if piece.writable { 2 } else { 0 },
                        next: 0,
                    })
                    .collect();
                descs.sort_by_key(|desc| desc.flags);
                if descs.is_empty() {
                    descs.push(Desc::readable(0x10_0000, 0));
                }
                rig.send(u16::from(*queue) % (PAIRS * 2 + 1), &descs);
            }
            Act::Command { bytes, room } => {
                let bytes = bytes.get(..64).unwrap_or(bytes);
                rig.ram.write_slice(bytes, GuestAddress(0x8_0000)).expect("memory");
                let descs =
                    [Desc::readable(0x8_0000, bytes.len() as u32), Desc::writable(0x8_1000, (*room).into())];
                rig.send(PAIRS * 2, &descs);
            }
            Act::Arrive { pair, len, fill } => {
                let pair = usize::from(*pair) % rig.far.len();
                let _ = rig.far[pair].send(&vec![*fill; usize::from(*len)]);
                rig.net.event(pair as u32);
                rig.flush();
            }
            Act::Event(token) => {
                rig.net.event(*token);
                for queue in 0..=PAIRS * 2 {
                    rig.serve(queue);
                }
                rig.flush();
            }
            Act::Take => {
                let mut packet = vec![0; 70_000];
                for far in &rig.far {
                    while let Ok(len) = far.recv(&mut packet) {
                        assert!(len >= HEADER as usize + 14, "{len} bytes are no packet");
                    }
                }
            }
            Act::Pause => rig.pause(),
            Act::Restart(features) => rig.restart(*features),
        }
    }
    rig.pause();
    rig.net.stop();
});
