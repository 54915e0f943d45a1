//! Points in time as images have them: RFC 3339.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: i64 = 86_400;
/// Days from the first of March of year 0 to 1970.
const EPOCH: i64 = 719_468;
/// Days of 400 years.
const ERA: i64 = 146_097;

/// Days since 1970 of a date, by counting years from March, so that the day that comes and goes is the last one.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * ERA + of_era * 365 + of_era / 4 - of_era / 100 + of_year - EPOCH
}

/// Year, month and day of so many days since 1970.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days.saturating_add(EPOCH);
    let (era, of_era) = (days.div_euclid(ERA), days.rem_euclid(ERA));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / (ERA - 1)) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

/// A time as text, in UTC.
pub fn format(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let ((year, month, day), of_day) = (date(seconds.div_euclid(DAY)), seconds.rem_euclid(DAY));
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let mut fraction = format!(".{:09}", since.subsec_nanos());
    while fraction.ends_with(['0', '.']) && !fraction.is_empty() {
        fraction.pop();
    }
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// A text as time; `None` if it is none, or lies before 1970.
pub fn parse(text: &str) -> Option<SystemTime> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
    };
    let at = |index: usize| text.as_bytes().get(index).copied();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let separators = (at(4)?, at(7)?, at(10)?.to_ascii_uppercase(), at(13)?, at(16)?);
    let fits =
        (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second <= 60;
    if separators != (b'-', b'-', b'T', b':', b':') || !fits {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut nanoseconds = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|c: char| !c.is_ascii_digit()).unwrap_or(fraction.len());
        let (digits, after) = fraction.split_at(end);
        nanoseconds = format!("{digits:0<9}").get(..9)?.parse().ok()?;
        rest = after;
    }
    let offset = match rest {
        "Z" | "z" => 0,
        _ => {
            let sign = match rest.as_bytes().first()? {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (hours, minutes) = rest.get(1..)?.split_once(':')?;
            let (hours, minutes): (i64, i64) = (hours.parse().ok()?, minutes.parse().ok()?);
            if !(0..24).contains(&hours) || !(0..60).contains(&minutes) {
                return None;
            }
            sign * (hours * 3600 + minutes * 60)
        }
    };
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second - offset;
    UNIX_EPOCH.checked_add(Duration::new(u64::try_from(seconds).ok()?, nanoseconds))
}

/// How long ago something was, roughly, as Docker says it.
pub fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds.saturating_add(1800) / 3600, seconds / 86_400);
    match seconds {
        0 => "Less than a second ago".to_owned(),
        1 => "1 second ago".to_owned(),
        2..60 => format!("{seconds} seconds ago"),
        60..120 => "About a minute ago".to_owned(),
        120..3600 => format!("{minutes} minutes ago"),
        3600..5400 => "About an hour ago".to_owned(),
        5400..172_800 => format!("{hours} hours ago"),
        _ if days < 14 => format!("{days} days ago"),
        _ if days < 60 => format!("{} weeks ago", days / 7),
        _ if days < 730 => format!("{} months ago", days / 30),
        _ => format!("{} years ago", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_and_read_back() {
        for (seconds, nanoseconds, text) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (951_782_399, 0, "2000-02-28T23:59:59Z"),
            (951_782_400, 5, "2000-02-29T00:00:00.000000005Z"),
            (1_709_164_800, 0, "2024-02-29T00:00:00Z"),
            (1_735_689_599, 500_000_000, "2024-12-31T23:59:59.5Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
        ] {
            let time = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            assert_eq!((format(time).as_str(), parse(text)), (text, Some(time)));
        }
        assert_eq!(parse("2024-03-01T01:30:00+01:30"), parse("2024-03-01T00:00:00Z"));
        assert_eq!(parse("2024-02-29T22:00:00-02:00"), parse("2024-03-01T00:00:00Z"));
    }

    #[test]
    fn texts_that_are_no_times_are_refused() {
        for text in [
            "",
            "2024",
            "2024-13-01T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00",
            "0001-01-01T00:00:00Z",
            "2024-01-01T00:00:00+99:00",
            "2024/01/01T00:00:00Z",
            "+024-01-01T00:00:00Z",
            "2024-01-01T00:00:00é",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn ages_are_dockers() {
        let say = |seconds| ago(Duration::from_secs(seconds));
        assert_eq!(say(45), "45 seconds ago");
        assert_eq!(say(3 * 3600), "3 hours ago");
        assert_eq!(say(3 * 86_400), "3 days ago");
        assert_eq!(say(20 * 86_400), "2 weeks ago");
        assert_eq!(say(100 * 86_400), "3 months ago");
        assert_eq!(say(800 * 86_400), "2 years ago");
    }
}
