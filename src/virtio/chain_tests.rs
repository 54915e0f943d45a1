use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory;
use crate::virtio::testing::{Desc, Ring};

const MIB: u64 = 1 << 20;
const RING: u64 = 0x1000;
const TABLE: u64 = 0x3000;
const SIZE: u16 = 8;

fn ram() -> Ram {
    memory::allocate(MIB).unwrap()
}

fn rules(ring: &Ring, indirect: bool) -> Rules {
    Rules { table: GuestAddress(ring.desc), size: ring.size, indirect }
}

/// Parses what `write` leaves in a fresh table, from descriptor 0 on.
fn parse(indirect: bool, write: impl FnOnce(&Ram, &mut Ring)) -> Result<Chain, Error> {
    let ram = ram();
    let mut ring = Ring::new(&ram, RING, SIZE);
    write(&ram, &mut ring);
    Chain::parse(&ram, rules(&ring, indirect), 0, Vec::new())
}

fn write_table(ram: &Ram, descs: &[Desc]) -> Desc {
    for (at, desc) in (TABLE..).step_by(16).zip(descs) {
        ram.write_slice(&desc.bytes(), GuestAddress(at)).unwrap();
    }
    Desc::indirect(TABLE, descs.len() as u32 * 16)
}

fn next(desc: Desc, next: u16) -> Desc {
    Desc { flags: desc.flags | descriptor::NEXT, next, ..desc }
}

#[test]
fn readable_and_writable_bytes_are_two_streams() {
    let ram = ram();
    let mut ring = Ring::new(&ram, RING, SIZE);
    ram.write_slice(b"abcdefgh", GuestAddress(0x8000)).unwrap();
    let head = ring.chain(&[
        Desc::readable(0x8000, 3),
        Desc::readable(0x8003, 0),
        Desc::readable(0x8003, 5),
        Desc::writable(0x9000, 1),
        Desc::writable(0x9100, 4),
    ]);
    let chain = Chain::parse(&ram, rules(&ring, false), head, Vec::new()).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 5));
    let mut reader = chain.reader(&ram);
    assert_eq!(reader.read_array(), Ok(*b"ab"));
    assert_eq!(reader.read_array(), Ok(*b"cdefg"));
    assert_eq!(reader.remaining(), 1);
    assert_eq!(reader.read_array::<2>(), Err(TooShort));
    assert_eq!(reader.read_array(), Ok(*b"h"));
    let mut writer = chain.writer(&ram);
    assert_eq!(writer.write_all(b"123456"), Err(TooShort));
    writer.write_all(b"12").unwrap();
    let (mut front, mut back) = writer.split_at(2).unwrap();
    back.write_all(b"5").unwrap();
    front.write_all(b"34").unwrap();
    assert_eq!((writer.written(), front.written(), back.written()), (2, 2, 1));
    assert_eq!(front.write_all(b"x"), Err(TooShort));
    assert!(writer.split_at(4).is_err());
    let mut bytes = [0; 5];
    ram.read_slice(&mut bytes[..1], GuestAddress(0x9000)).unwrap();
    ram.read_slice(&mut bytes[1..], GuestAddress(0x9100)).unwrap();
    assert_eq!(&bytes, b"12345");
}

#[test]
fn loop_is_an_error() {
    let one = parse(false, |_, ring| ring.write_desc(0, next(Desc::readable(0x8000, 1), 0)));
    assert_eq!(one.unwrap_err(), Error::TooLong);
    let empty = parse(false, |_, ring| ring.write_desc(0, next(Desc::readable(0x8000, 0), 0)));
    assert_eq!(empty.unwrap_err(), Error::TooLong);
    let two = parse(false, |_, ring| {
        ring.write_desc(0, next(Desc::readable(0x8000, 1), 5));
        ring.write_desc(5, next(Desc::readable(0x8000, 1), 0));
    });
    assert_eq!(two.unwrap_err(), Error::TooLong);
    let indirect = parse(true, |ram, ring| {
        let table =
            write_table(ram, &[next(Desc::readable(0x8000, 1), 1), next(Desc::readable(0x8000, 1), 0)]);
        ring.write_desc(0, table);
    });
    assert_eq!(indirect.unwrap_err(), Error::TooLong);
}

#[test]
fn chain_may_be_as_long_as_the_queue_and_no_longer() {
    let descs = vec![Desc::writable(0x8000, 1); usize::from(SIZE)];
    let whole = parse(false, |_, ring| assert_eq!(ring.chain(&descs), 0));
    assert_eq!(whole.unwrap().writable_len(), u32::from(SIZE));
    for (direct, indirect, fits) in [(0, 8, true), (0, 9, false), (3, 5, true), (3, 6, false)] {
        let result = parse(true, |ram, ring| {
            let entries: Vec<Desc> = (1..=indirect)
                .map(|at| {
                    let desc = Desc::writable(0x8000, 1);
                    if at < indirect { next(desc, at) } else { desc }
                })
                .collect();
            let mut descs = vec![Desc::writable(0x8000, 1); direct];
            descs.push(write_table(ram, &entries));
            ring.chain(&descs);
        });
        assert_eq!(result.is_ok(), fits, "{direct}+{indirect}: {result:?}");
    }
}

#[test]
fn successor_outside_its_table_is_an_error() {
    let direct = parse(false, |_, ring| ring.write_desc(0, next(Desc::readable(0x8000, 1), SIZE)));
    assert_eq!(direct.unwrap_err(), Error::Index { index: SIZE, size: SIZE.into() });
    let indirect = parse(true, |ram, ring| {
        let table = write_table(ram, &[next(Desc::readable(0x8000, 1), 2), Desc::readable(0x8000, 1)]);
        ring.write_desc(0, table);
    });
    assert_eq!(indirect.unwrap_err(), Error::Index { index: 2, size: 2 });
    let (ram, head) = (ram(), SIZE);
    let ring = Ring::new(&ram, RING, SIZE);
    let result = Chain::parse(&ram, rules(&ring, false), head, Vec::new());
    assert_eq!(result.unwrap_err(), Error::Index { index: SIZE, size: SIZE.into() });
}

#[test]
fn readable_after_writable_is_an_error() {
    let result = parse(false, |_, ring| {
        ring.chain(&[Desc::writable(0x8000, 1), Desc::readable(0x8000, 1)]);
    });
    assert_eq!(result.unwrap_err(), Error::Order);
}

#[test]
fn buffer_outside_memory_is_an_error() {
    for (addr, len) in
        [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4), (u64::MAX, u32::MAX), (0, u32::MAX)]
    {
        let result = parse(false, |_, ring| {
            ring.chain(&[Desc::readable(0x8000, 1), Desc::writable(addr, len)]);
        });
        assert_eq!(result.unwrap_err(), Error::Outside { addr, len });
    }
    let _ = parse(false, |_, ring| assert_eq!(ring.chain(&[Desc::writable(MIB - 1, 1)]), 0)).unwrap();
}

#[test]
fn more_than_four_gigabytes_are_an_error() {
    let big = memory::allocate(2 << 30).unwrap();
    let mut ring = Ring::new(&big, RING, SIZE);
    let half = Desc::readable(0, 1 << 31);
    let head = ring.chain(&[half, half]);
    let result = Chain::parse(&big, rules(&ring, false), head, Vec::new());
    assert_eq!(result.unwrap_err(), Error::TooManyBytes);
    let head = ring.chain(&[half, Desc { len: (1 << 31) - 1, ..half }]);
    let chain = Chain::parse(&big, rules(&ring, false), head, Vec::new()).unwrap();
    assert_eq!(chain.readable_len(), u32::MAX);
}

#[test]
fn indirect_table_stands_only_where_it_may() {
    let inner = Desc::readable(0x8000, 4);
    let fine = parse(true, |ram, ring| ring.write_desc(0, write_table(ram, &[inner])));
    assert_eq!(fine.unwrap().readable_len(), 4);
    // §2.7.5.3.2: the device ignores the write flag of the descriptor that leads to the table.
    let write_flag = parse(true, |ram, ring| {
        let table = write_table(ram, &[inner]);
        ring.write_desc(0, Desc { flags: table.flags | descriptor::WRITE, ..table });
    });
    assert_eq!(write_flag.unwrap().readable_len(), 4);
    let not_negotiated = parse(false, |ram, ring| ring.write_desc(0, write_table(ram, &[inner])));
    assert_eq!(not_negotiated.unwrap_err(), Error::Indirect);
    let with_successor = parse(true, |ram, ring| ring.write_desc(0, next(write_table(ram, &[inner]), 1)));
    assert_eq!(with_successor.unwrap_err(), Error::Indirect);
    let nested = parse(true, |ram, ring| {
        let table = write_table(ram, &[Desc::indirect(TABLE, 16)]);
        ring.write_desc(0, table);
    });
    assert_eq!(nested.unwrap_err(), Error::Indirect);
    for len in [0, 8, 17, 31] {
        let odd = parse(true, |_, ring| ring.write_desc(0, Desc::indirect(TABLE, len)));
        assert_eq!(odd.unwrap_err(), Error::IndirectLength { len });
    }
    for (addr, len) in [(MIB - 16, 32), (u64::MAX - 15, 16), (0, 0xffff_fff0)] {
        let outside = parse(true, |_, ring| ring.write_desc(0, Desc::indirect(addr, len)));
        assert_eq!(outside.unwrap_err(), Error::Outside { addr, len });
    }
}

#[test]
fn buffer_across_adjacent_regions_is_whole() {
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)]).unwrap();
    let mut ring = Ring::new(&ram, RING, SIZE);
    let head = ring.chain(&[Desc::writable(0xfffe, 4)]);
    let chain = Chain::parse(&ram, rules(&ring, false), head, Vec::new()).unwrap();
    chain.writer(&ram).write_all(b"abcd").unwrap();
    let mut pieces = Vec::new();
    chain.writer(&ram).for_each_slice(|slice| pieces.push(slice.len())).unwrap();
    assert_eq!(pieces, [2, 2]);
    let mut bytes = [0; 4];
    ram.read_slice(&mut bytes, GuestAddress(0xfffe)).unwrap();
    assert_eq!(&bytes, b"abcd");
}

/// Descriptors that are often nearly right.
fn desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![4 => 0..MIB, 1 => any::<u64>(), 2 => Just(RING), 1 => (MIB - 64)..(MIB + 64)];
    let len = prop_oneof![4 => 0..4096u32, 1 => any::<u32>(), 2 => (0..20u32).prop_map(|n| n * 16)];
    let flags = prop_oneof![8 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_table_ends_in_a_chain_within_memory_or_an_error(
        descs in proptest::collection::vec(desc(), usize::from(SIZE)),
        head in 0..SIZE + 2,
        indirect: bool,
    ) {
        let ram = ram();
        let ring = Ring::new(&ram, RING, SIZE);
        for (index, desc) in descs.iter().enumerate() {
            ring.write_desc(index as u16, *desc);
        }
        if let Ok(chain) = Chain::parse(&ram, rules(&ring, indirect), head, Vec::new()) {
            prop_assert!(chain.segments.len() <= usize::from(SIZE));
            let mut read = vec![0; chain.readable_len() as usize];
            let mut reader = chain.reader(&ram);
            reader.read_exact(&mut read).unwrap();
            prop_assert_eq!(reader.read_array::<1>(), Err(TooShort));
            let mut writer = chain.writer(&ram);
            writer.write_all(&vec![1; chain.writable_len() as usize]).unwrap();
            prop_assert_eq!(writer.written(), chain.writable_len());
            prop_assert_eq!(writer.remaining(), 0);
        }
    }
}
