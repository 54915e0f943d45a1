use proptest::prelude::*;

use super::*;
use crate::guest::protocol::{FromAgent, Reply, Request, ToAgent};

fn request(id: u32, text: &str) -> ToAgent {
    ToAgent { id, request: Request::MountShare { tag: text.to_owned() } }
}

#[test]
fn message_comes_back_as_it_was() {
    let frame = encode(&request(7, "share"), 100).unwrap();
    let mut assembler = Assembler::new(100);
    assembler.extend(&frame);
    assert_eq!(assembler.take::<ToAgent>().unwrap(), Some(request(7, "share")));
    assert_eq!(assembler.take::<ToAgent>().unwrap(), None);
    assert!(!assembler.is_within_frame());
}

#[test]
fn frames_in_pieces_and_in_one_piece_are_the_same() {
    let bytes: Vec<u8> = (0..50).flat_map(|id| encode(&request(id, "x"), 100).unwrap()).collect();
    for piece in [1, 3, 7, bytes.len()] {
        let mut assembler = Assembler::new(100);
        let mut ids = vec![];
        for part in bytes.chunks(piece) {
            assert!(assembler.fill(&mut &*part).unwrap() > 0);
            while let Some(message) = assembler.take::<ToAgent>().unwrap() {
                ids.push(message.id);
            }
        }
        assert_eq!(ids, (0..50).collect::<Vec<_>>());
    }
}

#[test]
fn frame_that_is_too_long_is_refused_before_it_is_there() {
    let mut assembler = Assembler::new(100);
    assembler.extend(&101u32.to_le_bytes());
    assert!(matches!(assembler.take::<ToAgent>(), Err(Error::TooLong { len: 101, max: 100 })));
    assert!(matches!(encode(&request(1, &"x".repeat(200)), 100), Err(Error::TooLong { .. })));
}

#[test]
fn promised_length_takes_no_memory() {
    let mut assembler = Assembler::new(REQUEST_BYTES_MAX);
    assembler.extend(&(REQUEST_BYTES_MAX as u32).to_le_bytes());
    assert!(assembler.take::<ToAgent>().unwrap().is_none());
    assert!(assembler.bytes.capacity() < 64 << 10);
}

#[test]
fn large_frame_leaves_no_large_buffer() {
    let mut assembler = Assembler::new(REQUEST_BYTES_MAX);
    assembler.extend(&encode(&request(1, &"x".repeat(1 << 20)), REQUEST_BYTES_MAX).unwrap());
    assert!(assembler.take::<ToAgent>().unwrap().is_some());
    assert!(assembler.bytes.capacity() <= CHUNK_BYTES);
}

#[test]
fn bytes_behind_a_message_are_an_error() {
    let mut frame = encode(&request(1, "x"), 100).unwrap().split_off(LENGTH_BYTES);
    frame.push(0);
    assert!(matches!(decode::<ToAgent>(&frame), Err(Error::Trailing(1))));
}

#[test]
fn list_beyond_its_bound_is_an_error() {
    // Reply number, `Ok`, the variant of processes, and a length.
    let mut frame = vec![0, 5, 0];
    let processes = Reply::Processes(vec![]);
    let variant = postcard::to_stdvec(&processes).unwrap()[0];
    frame.push(variant);
    frame.extend_from_slice(&[0xff, 0xff, 0xff, 0x07]);
    frame.extend(std::iter::repeat_n(0, 900_000));
    assert!(matches!(decode::<FromAgent>(&frame), Err(Error::Malformed { .. })));
}

#[test]
fn greeting_comes_back_as_it_was() {
    for greeting in [Greeting::Control, Greeting::Stream(0), Greeting::Stream(u64::MAX)] {
        assert_eq!(Greeting::from_bytes(&greeting.to_bytes()).unwrap(), greeting);
    }
}

#[test]
fn greeting_of_something_else_is_refused() {
    let right = Greeting::Control.to_bytes();
    for at in 0..GREETING_BYTES {
        let mut wrong = right;
        wrong[at] ^= 0x10;
        assert!(Greeting::from_bytes(&wrong).is_err(), "byte {at}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>) {
        let _ = decode::<ToAgent>(&bytes);
        let _ = decode::<FromAgent>(&bytes);
    }

    #[test]
    fn any_stream_ends_in_an_error_or_waits(bytes in prop::collection::vec(0u8..12, 0..400)) {
        let mut assembler = Assembler::new(64);
        for part in bytes.chunks(5) {
            assembler.extend(part);
            while let Ok(Some(_)) = assembler.take::<ToAgent>() {}
        }
    }

    #[test]
    fn one_wrong_bit_is_no_panic(at: prop::sample::Index, bit in 0u8..8, text in ".{0,20}") {
        let mut frame = encode(&request(9, &text), 1000).unwrap().split_off(LENGTH_BYTES);
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        let _ = decode::<ToAgent>(&frame);
    }
}
