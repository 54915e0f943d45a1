//! What listings have in common: their form, columns, and the question before much is removed.

use std::io::{self, BufRead, Write};

use clap::ValueEnum;

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Columns
    #[default]
    Table,
    /// One JSON object a line
    Json,
}

/// Columns, each as wide as its widest cell.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    text
}

/// Asks before something that cannot be undone; no answer is a no.
pub(super) fn confirm(warning: &str) -> io::Result<bool> {
    eprint!("WARNING! {warning}\nAre you sure you want to continue? [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

/// Does something to each name, and goes on after an error; tells whether all went well.
pub(super) fn each<E: std::error::Error>(
    names: &[String],
    mut work: impl FnMut(&str) -> Result<String, E>,
) -> bool {
    let mut good = true;
    for name in names {
        match work(name) {
            Ok(done) => println!("{done}"),
            Err(error) => {
                eprintln!("rvmm: {}", crate::error_chain(&error));
                good = false;
            }
        }
    }
    good
}

/// `KEY=VALUE`, or a key alone.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    match key {
        "" => Err("a label is KEY=VALUE".into()),
        _ => Ok((key.into(), value.into())),
    }
}

/// A time as listings of JSON have it: RFC 3339, in UTC.
pub(super) fn timestamp(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of the year 0, counted in cycles of 400 years of which each begins in March.
    let days = days + 719_468;
    let (cycle, day_of_cycle) = (days / 146_097, days % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z",
        nanoseconds % 1_000_000_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let text =
            columns(&[row(["NAME", "DRIVER", "X"]), row(["a", "bridge", ""]), row(["längeres", "b", "c"])]);
        assert_eq!(text, "NAME       DRIVER   X\na          bridge\nlängeres   b        c\n");
        assert_eq!(columns(&[]), "");
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(timestamp(seconds * 1_000_000_000 + 5), format!("{text}.000000005Z"));
        }
    }

    #[test]
    fn labels_have_a_key() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(label("a"), Ok(("a".into(), String::new())));
        assert!(label("=b").is_err());
    }
}
