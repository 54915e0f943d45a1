//! Signals by name and number.

use std::str::FromStr;

use nix::sys::signal::Signal;

/// First and last signal that have no name of their own, as containers' C libraries count them.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of a signal: `TERM`, `SIGTERM`, `15`, `RTMIN+3`.
pub fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = name
        .strip_prefix("RTMIN")
        .map(|offset| (RTMIN, offset))
        .or_else(|| Some((RTMAX, name.strip_prefix("RTMAX")?)));
    if let Some((base, offset)) = real_time {
        let offset = if offset.is_empty() { 0 } else { offset.parse::<i32>().ok()? };
        return base.checked_add(offset).filter(|number| (RTMIN..=RTMAX).contains(number));
    }
    Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (text, expected) in [
            ("TERM", Some(15)),
            ("sigkill", Some(9)),
            ("SIGUSR1", Some(10)),
            ("1", Some(1)),
            ("RTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("RTMIN", Some(34)),
            ("RTMIN+99", None),
            ("0", None),
            ("65", None),
            ("NOPE", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }
}
