//! A hostile driver against the entropy device: any buffers, in any order, with resets between.
//!
//! Holds: no panic; each chain comes back at once with as many bytes as it has room for, up to the device's limit; no
//! byte of memory changes but those.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::rng::Rng;
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Device, Handled};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 1 << 20;
const RING: u64 = 0x1000;
const DATA: usize = 0x4000;
const MOST: usize = 4096;
const MARK: u8 = 0xa5;

#[derive(Arbitrary, Debug)]
enum Act {
    Ask { queue: u16, descs: Vec<(u32, u16, bool)>, huge: bool },
    Restart(u64),
}

fuzz_target!(|acts: Vec<Act>| {
    thread_local! {
        static RAM: Ram = memory::allocate(MEMORY as u64).expect("memory");
    }
    let ram = RAM.with(Clone::clone);
    let mut device = Rng::default();
    assert_eq!((device.features(), device.config().len()), (0, 0));
    for act in acts.iter().take(40) {
        match act {
            Act::Ask { queue, descs, huge } => {
                let mut expected = vec![MARK; MEMORY - DATA];
                ram.write_slice(&expected, GuestAddress(DATA as u64)).expect("memory");
                let mut chain = Vec::new();
                for (at, len, writable) in descs.iter().take(16) {
                    let at = DATA + *at as usize % (MEMORY - DATA);
                    let len = if *huge { MEMORY - at } else { usize::from(*len).min(MEMORY - at) };
                    let make = if *writable { Desc::writable } else { Desc::readable };
                    chain.push(make(at as u64, len as u32));
                }
                let mut ring = Ring::new(&ram, RING, 32);
                if chain.is_empty() {
                    continue;
                }
                ring.send(&chain);
                let Ok(Some(popped)) = ring.queue(u64::MAX).pop() else { continue };
                let room = popped.writable_len() as usize;
                let ranges: Vec<_> = popped.writable_ranges().collect();
                let Handled::Done(_, written) = device.handle(*queue, popped) else {
                    panic!("random bytes are there at once");
                };
                let written = written as usize;
                assert!(written == room.min(MOST) || written == 0);
                // What may have changed is taken over; all else must be as it was.
                let mut found = vec![0; MEMORY - DATA];
                ram.read_slice(&mut found, GuestAddress(DATA as u64)).expect("memory");
                let mut left = written;
                for (addr, len) in ranges {
                    let (from, len) = (addr.0 as usize - DATA, left.min(len as usize));
                    expected[from..from + len].copy_from_slice(&found[from..from + len]);
                    left -= len;
                }
                assert!(found == expected, "memory outside of the buffers has changed");
            }
            Act::Restart(features) => {
                device.stop();
                device.start(Activation { ram: ram.clone(), features: *features }).expect("nothing to fail");
            }
        }
    }
});
