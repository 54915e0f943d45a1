//! Bytes of a hostile agent, or host, and the users' files of a hostile image.
//!
//! Holds: no panic; what is read is what is written; a reader takes no more memory than has come, but for a factor.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::guest::frame::{Assembler, GREETING_BYTES, Greeting, REPLY_BYTES_MAX, decode, encode};
use rvmm::guest::protocol::{FromAgent, ToAgent};
use rvmm::guest::user;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    bytes: &'a [u8],
    piece: u8,
    max: u16,
    greeting: [u8; GREETING_BYTES],
    user: &'a str,
    groups: Vec<String>,
    passwd: &'a [u8],
    group: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    if let Ok(message) = decode::<FromAgent>(input.bytes) {
        let frame = encode(&message, usize::MAX).expect("a message");
        assert_eq!(decode::<FromAgent>(&frame[4..]).expect("the same"), message);
    }
    if let Ok(message) = decode::<ToAgent>(input.bytes) {
        let frame = encode(&message, usize::MAX).expect("a message");
        assert_eq!(decode::<ToAgent>(&frame[4..]).expect("the same"), message);
    }
    let mut assembler = Assembler::new(usize::from(input.max).min(REPLY_BYTES_MAX));
    'frames: for piece in input.bytes.chunks(usize::from(input.piece).max(1)) {
        assembler.extend(piece);
        loop {
            match assembler.take::<FromAgent>() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => break 'frames,
            }
        }
    }
    if let Ok(greeting) = Greeting::from_bytes(&input.greeting) {
        assert_eq!(greeting.to_bytes(), input.greeting);
    }
    if let Ok(identity) = user::resolve(input.user, &input.groups, input.passwd, input.group) {
        assert!(!identity.home.is_empty() && identity.uid != u32::MAX && identity.gid != u32::MAX);
    }
});
