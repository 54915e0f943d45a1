//! Tokens of sessions: when they end, with a code that only this process can make.
//!
//! A token is the base64 of a number that no other token of this key has, of the milliseconds at which the token ends, and
//! of HMAC-SHA256 over both. Nothing is kept of it, so a guest that asks for many costs nothing. The key is made before
//! the walls, since there are no random numbers behind them, and is never saved: a VM that was restored asks anew.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

/// How long a token may last, in seconds; EC2's six hours.
const SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;
const SIGNED_BYTES: usize = 16;
const CODE_BYTES: usize = 32;

/// Makes tokens, and knows its own.
#[derive(Debug)]
pub struct Tokens {
    key: hmac::Key,
    made: AtomicU64,
    began: Instant,
}

impl Tokens {
    /// A maker with a key of its own.
    pub fn new() -> Result<Self, getrandom::Error> {
        let mut key = [0; CODE_BYTES];
        getrandom::fill(&mut key)?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        Ok(Self { key, made: AtomicU64::new(0), began: Instant::now() })
    }

    /// A token for so many seconds; `None` if that is no time for one.
    pub fn make(&self, seconds: u32) -> Option<String> {
        self.make_at(seconds, self.began.elapsed())
    }

    fn make_at(&self, seconds: u32, now: Duration) -> Option<String> {
        SECONDS.contains(&seconds).then(|| {
            let end = millis(now).saturating_add(u64::from(seconds) * 1000);
            let number = self.made.fetch_add(1, Ordering::Relaxed);
            let mut token = Vec::with_capacity(SIGNED_BYTES + CODE_BYTES);
            token.extend(number.to_le_bytes());
            token.extend(end.to_le_bytes());
            let code = hmac::sign(&self.key, &token);
            token.extend(code.as_ref());
            STANDARD.encode(token)
        })
    }

    /// Whether a token was made here and still holds.
    pub fn holds(&self, token: &[u8]) -> bool {
        self.holds_at(token, self.began.elapsed())
    }

    fn holds_at(&self, token: &[u8], now: Duration) -> bool {
        let mut bytes = [0; SIGNED_BYTES + CODE_BYTES];
        if STANDARD.decode_slice(token, &mut bytes) != Ok(bytes.len()) {
            return false;
        }
        let (signed, code) = bytes.split_at(SIGNED_BYTES);
        let end = signed.last_chunk().map_or(0, |end| u64::from_le_bytes(*end));
        hmac::verify(&self.key, signed, code).is_ok() && millis(now) < end
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_holds_for_its_time() {
        let tokens = Tokens::new().unwrap();
        let start = Duration::from_secs(1000);
        let token = tokens.make_at(60, start).unwrap();
        assert!(tokens.holds_at(token.as_bytes(), start));
        assert!(tokens.holds_at(token.as_bytes(), start + Duration::from_millis(59_999)));
        assert!(!tokens.holds_at(token.as_bytes(), start + Duration::from_secs(60)));
        assert_ne!(tokens.make_at(60, start), Some(token.clone()));
        assert!(!Tokens::new().unwrap().holds_at(token.as_bytes(), start), "another key");
        for seconds in [0, 21_601, u32::MAX] {
            assert_eq!(tokens.make(seconds), None);
        }
        assert!(tokens.holds(tokens.make(21_600).unwrap().as_bytes()));
    }

    #[test]
    fn altered_tokens_do_not_hold() {
        let tokens = Tokens::new().unwrap();
        let token = STANDARD.decode(tokens.make(60).unwrap()).unwrap();
        for at in 0..token.len() {
            let mut altered = token.clone();
            altered[at] ^= 1;
            assert!(!tokens.holds(STANDARD.encode(altered).as_bytes()), "byte {at}");
        }
        assert!(!tokens.holds(STANDARD.encode(&token[1..]).as_bytes()));
        assert!(!tokens.holds(STANDARD.encode([&token[..], &[0]].concat()).as_bytes()));
        for nonsense in ["", "=", "TOKEN", "ä", &"A".repeat(64), &"A".repeat(100_000)] {
            assert!(!tokens.holds(nonsense.as_bytes()), "{nonsense:.20}");
        }
    }
}
