//! Extended headers of the pax format: `LENGTH KEY=VALUE\n`, again and again.
//!
//! The `tar` crate splits them at newlines, which values of extended attributes may contain; here the length rules.

use super::Error;

/// Key and value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// The next record, and the bytes behind it.
fn record(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let length: usize = number(bytes.get(..space)?)?.try_into().ok()?;
    let record = bytes.get(space + 1..length)?;
    let (last, record) = record.split_last()?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let value = record.get(equals + 1..)?;
    (*last == b'\n' && equals > 0).then_some(((record.get(..equals)?, value), bytes.get(length..)?))
}

/// All records of a header.
pub(super) fn records(mut bytes: &[u8]) -> Result<Vec<Record<'_>>, Error> {
    let mut found = vec![];
    while !bytes.is_empty() {
        // Some writers fill the last block with zeroes and count them.
        if bytes.iter().all(|b| *b == 0) {
            break;
        }
        let (pair, rest) =
            record(bytes).ok_or(Error::Header("a record of an extended header is malformed"))?;
        found.push(pair);
        bytes = rest;
    }
    Ok(found)
}

/// One record, for writing.
pub(super) fn encode(key: &[u8], value: &[u8]) -> Vec<u8> {
    // Space, equals sign and newline; the length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest > length {
        length += 1;
    }
    let mut record = format!("{length} ").into_bytes();
    record.extend_from_slice(key);
    record.push(b'=');
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

/// Decimal digits.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds since 1970 with a fraction, `-1.5` being half a second before the last one of -2.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let nanoseconds: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    match (negative, nanoseconds) {
        (false, _) => Some((seconds, nanoseconds)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((seconds.checked_neg()?.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_with_newlines_in_values_come_back_as_written() {
        let long = vec![b'\n'; 1000];
        for value in [&b"x"[..], b"", b"a\nb=c", &[0, 10, 255], &long] {
            let bytes = [encode(b"SCHILY.xattr.user.a", value), encode(b"path", b"b")].concat();
            assert_eq!(records(&bytes).unwrap(), [(&b"SCHILY.xattr.user.a"[..], value), (b"path", b"b")]);
        }
        // Lengths around the step to one more digit.
        for size in 80..110 {
            let value = vec![b'v'; size];
            assert_eq!(records(&encode(b"k", &value)).unwrap(), [(&b"k"[..], value.as_slice())]);
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bytes in [
            &b"5"[..],
            b"5 a=b",
            b"6 a=b",
            b"99 a=b\n",
            b"0 a=b\n",
            b"-6 a=b\n",
            b"6 ab=\nx",
            b"5 =b\n",
            b"5 ab\n",
            b"18446744073709551615 a=b\n",
            b"99999999999999999999999 a=b\n",
            b" 6 a=b\n",
            b"1 a=b\n",
        ] {
            assert!(records(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
        assert!(records(b"6 a=b\n\0\0\0").is_ok());
    }

    #[test]
    fn times_have_fractions_and_signs() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        for text in [&b""[..], b".", b".5", b"x", b"1.x", b"--1", b"1.-5", b"99999999999999999999"] {
            assert_eq!(time(text), None);
        }
    }
}
