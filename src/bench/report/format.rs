//! Figures and foreign texts as people read them.

use crate::bench::results::Unit;
use crate::bench::stats::Interval;

/// Characters of a foreign text at most: what is longer belongs into the raw samples.
const MAX_TEXT: usize = 400;

/// A unit of a size that suits a figure, and the decimals that go with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    divisor: f64,
    /// With its space before it; empty for things.
    name: &'static str,
    decimals: usize,
}

impl Scale {
    /// The unit in which a figure has one to three digits before the point.
    pub fn of(unit: Unit, value: f64) -> Scale {
        let steps: &[(f64, &'static str)] = match unit {
            Unit::Seconds => {
                &[(1e-9, " ns"), (1e-6, " µs"), (1e-3, " ms"), (1.0, " s"), (60.0, " min"), (3600.0, " h")]
            }
            Unit::Bytes => &BYTES,
            Unit::BytesPerSecond => &BYTES_PER_SECOND,
            Unit::PerSecond => &[(1.0, "/s")],
            Unit::Share => &[(0.01, " %")],
            Unit::Count | Unit::Text => &[(1.0, "")],
        };
        let size = value.abs();
        // Minutes and hours are for what is several of them long.
        let reaches = |divisor: f64| {
            size >= if divisor >= 60.0 && unit == Unit::Seconds { 2.0 * divisor } else { divisor }
        };
        let (divisor, name) = steps
            .iter()
            .rev()
            .find(|(divisor, _)| reaches(*divisor))
            .or(steps.first())
            .copied()
            .unwrap_or((1.0, ""));
        let whole = matches!(unit, Unit::Count | Unit::Text) || divisor == 1.0 && unit == Unit::Bytes;
        let decimals = if whole && value.fract() == 0.0 { 0 } else { decimals(size / divisor) };
        Scale { divisor, name, decimals }
    }

    /// What a figure is divided by.
    pub fn divisor(self) -> f64 {
        self.divisor
    }

    /// The digits alone.
    pub fn digits(self, value: f64) -> String {
        let value = value / self.divisor;
        match value.abs() {
            _ if value.is_nan() => "not a number".into(),
            _ if value.is_infinite() => "without end".into(),
            0.0 => "0".into(),
            size if size >= 1e15 => format!("{value:.2e}"),
            size if size < 0.0005 => format!("{value:.1e}"),
            _ => grouped(&format!("{value:.*}", self.decimals)),
        }
    }

    /// Digits and unit.
    pub fn text(self, value: f64) -> String {
        match value.is_finite() {
            true => self.digits(value) + self.name,
            false => self.digits(value),
        }
    }
}

const KIB: f64 = 1024.0;
const BYTES: [(f64, &str); 5] = [
    (1.0, " B"),
    (KIB, " KiB"),
    (KIB * KIB, " MiB"),
    (KIB * KIB * KIB, " GiB"),
    (KIB * KIB * KIB * KIB, " TiB"),
];
const BYTES_PER_SECOND: [(f64, &str); 4] =
    [(1.0, " B/s"), (KIB, " KiB/s"), (KIB * KIB, " MiB/s"), (KIB * KIB * KIB, " GiB/s")];

/// Decimals for three digits in all.
fn decimals(size: f64) -> usize {
    match size {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 || size == 0.0 => 2,
        _ => 3,
    }
}

/// Thousands apart, by a narrow space that does not break.
fn grouped(digits: &str) -> String {
    let (sign, rest) = digits.strip_prefix('-').map_or(("", digits), |rest| ("-", rest));
    let (whole, fraction) =
        rest.split_once('.').map_or((rest, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut text = String::from(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && whole.len() > 4 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

/// A figure with its unit.
pub fn figure(unit: Unit, value: f64) -> String {
    Scale::of(unit, value).text(value)
}

/// An interval in the unit that its median has: `14.9 to 15.4 ms`.
pub fn interval(unit: Unit, median: f64, interval: Interval) -> String {
    let scale = Scale::of(unit, median);
    match scale.digits(interval.low) == scale.digits(interval.high) {
        true => scale.text(interval.high),
        false => format!("{} to {}", scale.digits(interval.low), scale.text(interval.high)),
    }
}

/// A ratio: two decimals near one, three digits further away. What is not one does not look like one.
pub fn factor(ratio: f64) -> String {
    let size = ratio.abs();
    let decimals = if size < 0.0995 { 3 } else { decimals(size).min(2) };
    let digits = |decimals| Scale { divisor: 1.0, name: "", decimals }.digits(ratio);
    match (digits(decimals), digits(3)) {
        (short, long) if short == "1.00" && long != "1.000" => long,
        (short, _) => short,
    }
}

/// The ends of a ratio's interval.
pub fn factors(interval: Interval) -> String {
    let (low, high) = (factor(interval.low), factor(interval.high));
    if low == high { low } else { format!("{low} to {high}") }
}

/// How many samples each of two has: once, if it is the same.
pub fn samples(ruling: &super::verdict::Ruling) -> String {
    let [a, b] = ruling.sides.each_ref().map(|side| side.samples);
    if a == b { a.to_string() } else { format!("{a}, {b}") }
}

/// How far a ratio is from one, in words that hold for both directions: `3.2 times`, or `4 %` where that says more.
pub fn times(ratio: f64) -> String {
    match ratio {
        ratio if (1.0..1.1).contains(&ratio) => format!("{:.1} %", (ratio - 1.0) * 100.0),
        ratio if (1.1..1.5).contains(&ratio) => format!("{:.0} %", (ratio - 1.0) * 100.0),
        _ => format!("{} times", factor(ratio)),
    }
}

/// A confidence: `95 %`.
pub fn percent(share: f64) -> String {
    let text = format!("{:.1}", share * 100.0);
    format!("{} %", text.strip_suffix(".0").unwrap_or(&text))
}

/// A duration of a run.
pub fn duration(seconds: f64) -> String {
    match seconds {
        seconds if !seconds.is_finite() || seconds < 0.0 => "unknown time".into(),
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => {
            format!("{:.0} min {:.0} s", (seconds / 60.0).floor(), (seconds % 60.0).floor())
        }
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

/// A text from results, which an image or a program may have worded: one line, no control characters, not endless.
pub fn clean(text: &str) -> String {
    let visible = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        // Marks that turn the direction of what stands behind them are control characters in all but name.
        c if c.is_control()
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}') =>
        {
            '\u{fffd}'
        }
        c => c,
    };
    let mut cleaned: String = text.chars().take(MAX_TEXT).map(visible).collect();
    if text.chars().nth(MAX_TEXT).is_some() {
        cleaned.push('…');
    }
    cleaned
}

/// A command line that can be pasted into a shell.
pub fn shell(argv: &[String]) -> String {
    let quoted = |word: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
        match !word.is_empty() && word.chars().all(plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    };
    argv.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// As the beginning of a sentence.
pub fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// `1 run`, `2 runs`.
pub fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figure_has_three_digits_and_a_sensible_unit() {
        let cases = [
            (Unit::Seconds, 0.42e-9, "0.420 ns"),
            (Unit::Seconds, 62e-9, "62.0 ns"),
            (Unit::Seconds, 0.0151, "15.1 ms"),
            (Unit::Seconds, 0.9999, "1000 ms"),
            (Unit::Seconds, 9.5, "9.50 s"),
            (Unit::Seconds, 90.0, "90.0 s"),
            (Unit::Seconds, 300.0, "5.00 min"),
            (Unit::Bytes, 512.0, "512 B"),
            (Unit::Bytes, 41.0 * KIB * KIB, "41.0 MiB"),
            (Unit::BytesPerSecond, 11.2e9, "10.4 GiB/s"),
            (Unit::PerSecond, 43100.0, "43\u{202f}100/s"),
            (Unit::Count, 311.0, "311"),
            (Unit::Count, 2.5, "2.50"),
            (Unit::Share, 0.123, "12.3 %"),
            (Unit::Seconds, 0.0, "0 ns"),
            (Unit::Seconds, f64::NAN, "not a number"),
            (Unit::Count, 1e300, "1.00e300"),
        ];
        for (unit, value, text) in cases {
            assert_eq!(figure(unit, value), text);
        }
    }

    #[test]
    fn interval_keeps_the_unit_of_its_median() {
        assert_eq!(interval(Unit::Seconds, 0.9, Interval { low: 0.8, high: 1.1 }), "800 to 1100 ms");
        assert_eq!(interval(Unit::Count, 5.0, Interval { low: 5.0, high: 5.0 }), "5");
    }

    #[test]
    fn factor_near_one_is_told_from_one() {
        assert_eq!(
            [1.0, 1.002, 0.998, 0.0789, 0.789, 10.04].map(factor),
            ["1.00", "1.002", "0.998", "0.079", "0.79", "10.0"]
        );
    }

    #[test]
    fn small_factor_is_a_percentage() {
        assert_eq!(times(1.034), "3.4 %");
        assert_eq!(times(1.25), "25 %");
        assert_eq!(times(10.04), "10.0 times");
        assert_eq!(times(1234.0), "1234 times");
    }

    #[test]
    fn foreign_text_cannot_move_the_cursor() {
        assert_eq!(clean("a\x1b[31mb\nc\u{202e}d"), "a\u{fffd}[31mb c\u{fffd}d");
        assert_eq!(clean(&"x".repeat(500)).chars().count(), MAX_TEXT + 1);
    }

    #[test]
    fn command_line_can_be_pasted() {
        assert_eq!(
            shell(&["sh".into(), "-c".into(), "echo 'a'".into(), String::new()]),
            r"sh -c 'echo '\''a'\''' ''"
        );
    }
}
