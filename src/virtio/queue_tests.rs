use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory;
use crate::virtio::spec::feature;
use crate::virtio::testing::{Desc, Ring};

const MIB: u64 = 1 << 20;
const RING: u64 = 0x1000;
const SIZE: u16 = 8;
const BUFFER: Desc = Desc { addr: 0x8000, len: 16, flags: 2, next: 0 };

fn ring() -> (Ram, Ring) {
    let ram = memory::allocate(MIB).unwrap();
    let ring = Ring::new(&ram, RING, SIZE);
    (ram, ring)
}

#[test]
fn chains_come_in_order_and_go_back_in_any() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(0);
    assert!(queue.pop().unwrap().is_none());
    let heads = [ring.send(&[BUFFER]), ring.send(&[BUFFER, BUFFER]), ring.send(&[BUFFER])];
    let [first, second, third] = [(); 3].map(|()| queue.pop().unwrap().unwrap());
    assert_eq!([&first, &second, &third].map(Chain::head), heads);
    assert!(queue.pop().unwrap().is_none());
    assert_eq!(queue.in_flight(), 3);
    queue.complete(second, 7).unwrap();
    queue.complete(third, 0).unwrap();
    queue.complete(first, 16).unwrap();
    assert_eq!(queue.in_flight(), 0);
    assert_eq!([(); 3].map(|()| ring.used().unwrap()), [(heads[1], 7), (heads[2], 0), (heads[0], 16)]);
    assert!(ring.used().is_none());
}

#[test]
fn indices_wrap_around() {
    for features in [0, feature::EVENT_IDX] {
        let (_ram, mut ring) = ring();
        let start = u16::MAX - 20;
        ring.start_at(start);
        let mut queue = ring.queue_at(features, start);
        for round in 0..100u16 {
            ring.set_used_event(start.wrapping_add(round));
            let head = ring.send(&[BUFFER]);
            assert!(queue.expect_notifications().unwrap());
            let chain = queue.pop().unwrap().unwrap();
            queue.complete(chain, round.into()).unwrap();
            assert!(queue.wants_interrupt().unwrap(), "{round}");
            assert_eq!(ring.used(), Some((head, round.into())));
            assert!(!queue.expect_notifications().unwrap());
        }
        assert_eq!(ring.used_index(), start.wrapping_add(100));
    }
}

#[test]
fn chain_that_is_put_back_comes_again() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(0);
    let heads = [ring.send(&[BUFFER]), ring.send(&[BUFFER])];
    let chain = queue.pop().unwrap().unwrap();
    queue.put_back(chain);
    assert_eq!(queue.in_flight(), 0);
    for head in heads {
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.head(), head);
        queue.complete(chain, 0).unwrap();
    }
}

#[test]
fn index_too_far_ahead_is_an_error() {
    let (_ram, ring) = ring();
    let mut queue = ring.queue(0);
    for ahead in [SIZE + 1, 0x8000, u16::MAX] {
        ring.publish(ahead);
        assert!(matches!(queue.pop(), Err(Error::Ring(_))), "{ahead}");
    }
}

#[test]
fn more_in_flight_than_descriptors_is_an_error() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(0);
    let head = ring.chain(&[BUFFER]);
    let mut popped = Vec::new();
    for _ in 0..SIZE {
        ring.offer(head);
        popped.push(queue.pop().unwrap().unwrap());
    }
    ring.offer(head);
    assert!(matches!(queue.pop(), Err(Error::TooMany)));
    drop(popped);
}

#[test]
fn malformed_chain_is_an_error_that_names_its_head() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(0);
    let head = ring.send(&[Desc::readable(MIB, 1)]);
    assert!(matches!(queue.pop(), Err(Error::Chain { head: found, .. }) if found == head));
    ring.offer(SIZE);
    assert!(matches!(queue.pop(), Err(Error::Chain { head: SIZE, .. })));
}

#[test]
fn indirect_table_needs_its_feature() {
    for (features, fine) in [(0, false), (feature::INDIRECT_DESC, true)] {
        let (ram, mut ring) = ring();
        ram.write_slice(&BUFFER.bytes(), GuestAddress(0x4000)).unwrap();
        ring.send(&[Desc::indirect(0x4000, 16)]);
        assert_eq!(ring.queue(features).pop().is_ok(), fine);
    }
}

#[test]
fn flags_suppress_without_event_index() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(0);
    queue.suppress_notifications().unwrap();
    assert_eq!(ring.used_flags(), 1);
    assert!(!queue.expect_notifications().unwrap());
    assert_eq!(ring.used_flags(), 0);
    ring.send(&[BUFFER]);
    assert!(queue.expect_notifications().unwrap());
    let chain = queue.pop().unwrap().unwrap();
    queue.complete(chain, 0).unwrap();
    assert!(queue.wants_interrupt().unwrap());
    ring.set_avail_flags(spec::AVAIL_F_NO_INTERRUPT);
    assert!(!queue.wants_interrupt().unwrap());
}

#[test]
fn event_index_suppresses_both_ways() {
    let (_ram, mut ring) = ring();
    let mut queue = ring.queue(feature::EVENT_IDX);
    // The driver wants to hear of the third completion, and not before.
    ring.set_used_event(2);
    let mut interrupts = Vec::new();
    for _ in 0..4 {
        ring.send(&[BUFFER]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(chain, 0).unwrap();
        interrupts.push(queue.wants_interrupt().unwrap());
    }
    assert_eq!(interrupts, [false, false, true, false]);
    // One look at several completions finds the one that the driver waits for.
    ring.set_used_event(4);
    for _ in 0..3 {
        ring.send(&[BUFFER]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(chain, 0).unwrap();
    }
    assert!(queue.wants_interrupt().unwrap());
    assert!(!queue.wants_interrupt().unwrap());
    assert!(!queue.expect_notifications().unwrap());
    assert_eq!(ring.avail_event(), 7);
}

/// What a driver, or somebody who is none, does to a queue.
#[derive(Clone, Debug)]
enum Act {
    WriteDesc(u16, Desc),
    Offer(u16),
    Publish(u16),
    Send(Vec<Desc>),
    Scribble(u64, u64),
    Pop,
    PutBack,
    Complete(u32),
    Notifications,
}

fn act() -> impl Strategy<Value = Act> {
    let desc = || {
        let addr = prop_oneof![4 => 0..MIB, 1 => any::<u64>(), 1 => Just(RING)];
        let len = prop_oneof![4 => 0..4096u32, 1 => any::<u32>(), 2 => Just(64u32)];
        (addr, len, 0..8u16, 0..SIZE + 1).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
    };
    prop_oneof![
        (0..SIZE, desc()).prop_map(|(index, desc)| Act::WriteDesc(index, desc)),
        (0..SIZE + 1).prop_map(Act::Offer),
        any::<u16>().prop_map(Act::Publish),
        proptest::collection::vec(desc(), 1..4).prop_map(Act::Send),
        (0..0x200u64, any::<u64>()).prop_map(|(at, value)| Act::Scribble(RING + at, value)),
        Just(Act::Pop),
        Just(Act::Pop),
        Just(Act::PutBack),
        any::<u32>().prop_map(Act::Complete),
        Just(Act::Notifications),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_does_the_queue_counts_right(
        acts in proptest::collection::vec(act(), 1..60),
        features in prop_oneof![Just(0), Just(feature::COMMON)],
        start: u16,
    ) {
        let (ram, mut ring) = ring();
        ring.start_at(start);
        let mut queue = ring.queue_at(features, start);
        let (mut popped, mut newest, mut completed) = (Vec::new(), false, start);
        for act in acts {
            match act {
                Act::WriteDesc(index, desc) => ring.write_desc(index, desc),
                Act::Offer(head) => ring.offer(head),
                Act::Publish(index) => ring.publish(index),
                Act::Send(descs) => {
                    ring.send(&descs);
                }
                Act::Scribble(at, value) => ram.write_obj(value, GuestAddress(at)).unwrap(),
                Act::Pop => {
                    if let Ok(Some(chain)) = queue.pop() {
                        popped.push(chain);
                        newest = true;
                    }
                }
                Act::PutBack if newest => {
                    queue.put_back(popped.pop().unwrap());
                    newest = false;
                }
                Act::PutBack => {}
                Act::Complete(len) => {
                    if let Some(chain) = (!popped.is_empty()).then(|| popped.remove(0)) {
                        queue.complete(chain, len).unwrap();
                        completed = completed.wrapping_add(1);
                        prop_assert_eq!(ring.used_index(), completed);
                    }
                    newest = false;
                }
                Act::Notifications => {
                    queue.suppress_notifications().unwrap();
                    queue.expect_notifications().unwrap();
                    queue.wants_interrupt().unwrap();
                }
            }
            prop_assert_eq!(usize::from(queue.in_flight()), popped.len());
            prop_assert!(popped.len() <= usize::from(SIZE));
        }
    }
}
