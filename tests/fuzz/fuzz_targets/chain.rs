//! A hostile driver against a queue: any descriptors, any ring contents, any order of calls.
//!
//! Holds: no panic, no hang; a chain lies in memory and has as many bytes as it says; what is popped and completed is
//! counted right, and the used index follows.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::Chain;
use rvmm::virtio::testing::{Desc, Ring};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 1 << 20;
const RING: u64 = 0x1000;
const SIZE: u16 = 8;

#[derive(Arbitrary, Debug)]
enum Addr {
    Near(u16),
    Page(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Len {
    Short(u8),
    Table(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
struct AnyDesc {
    addr: Addr,
    len: Len,
    flags: u8,
    next: u8,
}

impl AnyDesc {
    fn desc(&self) -> Desc {
        let addr = match self.addr {
            Addr::Near(addr) => addr.into(),
            Addr::Page(page) => u64::from(page) << 12,
            Addr::Any(addr) => addr,
        };
        let len = match self.len {
            Len::Short(len) => len.into(),
            Len::Table(entries) => u32::from(entries % 16) * 16,
            Len::Any(len) => len,
        };
        // Bits above the three that are defined mean nothing, but may be set.
        let flags = u16::from(self.flags & 7) | u16::from(self.flags & 0x80) << 8;
        let next = u16::from(self.next) % (SIZE + 2);
        Desc { addr, len, flags, next }
    }
}

#[derive(Arbitrary, Debug)]
enum Act {
    WriteDesc(u8, AnyDesc),
    WriteTable(u8, AnyDesc),
    Send(Vec<AnyDesc>),
    Offer(u8),
    Publish(u16),
    Scribble(u16, u64),
    Pop,
    PutBack,
    Complete(u32),
    Notifications,
}

#[derive(Arbitrary, Debug)]
struct Input {
    features: u64,
    start: u16,
    acts: Vec<Act>,
}

fn check(ram: &Ram, chain: &Chain) {
    let mut reader = chain.reader(ram);
    let mut bytes = [0; 64];
    let len = reader.remaining().min(64) as usize;
    reader.read_exact(&mut bytes[..len]).expect("the bytes are there");
    let mut sum = len as u64;
    reader.for_each_slice(|slice| sum += slice.len() as u64).expect("the bytes are in memory");
    assert_eq!(sum, u64::from(chain.readable_len()));
    let mut sum = 0;
    chain.writer(ram).for_each_slice(|slice| sum += slice.len() as u64).expect("the bytes are in memory");
    assert_eq!(sum, u64::from(chain.writable_len()));
    let middle = chain.writable_len() / 2;
    let (front, back) = chain.writer(ram).split_at(middle).expect("there is a middle");
    assert_eq!(front.remaining() + back.remaining(), chain.writable_len());
}

thread_local! {
    static RAM: Ram = memory::allocate(MEMORY).expect("memory for a guest");
}

fuzz_target!(|input: Input| {
    let ram = RAM.with(Clone::clone);
    ram.write_slice(&[0; 0x4000], GuestAddress(0)).expect("low memory");
    let mut ring = Ring::new(&ram, RING, SIZE);
    ring.start_at(input.start);
    let mut queue = ring.queue_at(input.features, input.start);
    let (mut popped, mut newest, mut completed) = (Vec::new(), false, input.start);
    for act in input.acts.iter().take(200) {
        match act {
            Act::WriteDesc(index, desc) => ring.write_desc(u16::from(*index) % SIZE, desc.desc()),
            Act::WriteTable(index, desc) => {
                let at = 0x2000 + u64::from(*index) * 16;
                ram.write_slice(&desc.desc().bytes(), GuestAddress(at)).expect("low memory");
            }
            Act::Send(descs) => {
                let descs: Vec<Desc> = descs.iter().take(16).map(AnyDesc::desc).collect();
                ring.send(&descs);
            }
            Act::Offer(head) => ring.offer(u16::from(*head) % (SIZE + 1)),
            Act::Publish(index) => ring.publish(*index),
            Act::Scribble(at, value) => {
                ram.write_obj(*value, GuestAddress(RING + u64::from(*at % 0x200))).expect("low memory");
            }
            Act::Pop => {
                if let Ok(Some(chain)) = queue.pop() {
                    check(&ram, &chain);
                    popped.push(chain);
                    newest = true;
                }
            }
            Act::PutBack => {
                if let Some(chain) = popped.pop_if(|_| newest) {
                    queue.put_back(chain);
                }
                newest = false;
            }
            Act::Complete(len) => {
                if !popped.is_empty() {
                    queue.complete(popped.remove(0), *len).expect("the rings are in memory");
                    completed = completed.wrapping_add(1);
                    assert_eq!(ring.used_index(), completed);
                }
                newest = false;
            }
            Act::Notifications => {
                queue.suppress_notifications().expect("the rings are in memory");
                queue.expect_notifications().expect("the rings are in memory");
                queue.wants_interrupt().expect("the rings are in memory");
            }
        }
        assert_eq!(usize::from(queue.in_flight()), popped.len());
        assert!(popped.len() <= usize::from(SIZE));
    }
});
