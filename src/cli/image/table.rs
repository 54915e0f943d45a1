//! Columns and numbers as Docker prints them.

/// Between columns.
const GAP: usize = 3;

/// Rows below their headings, each column as wide as its widest cell.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heading.get(column).map(|cell| cell.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let line = |row: &Vec<String>| {
        let last = row.len().saturating_sub(1);
        let cells = row.iter().zip(&widths).enumerate();
        let cell = |(at, (cell, width)): (usize, (&String, &usize))| {
            if at == last { cell.clone() } else { format!("{cell:0$}", width + GAP) }
        };
        cells.map(cell).collect::<String>().trim_end().to_owned()
    };
    std::iter::once(&heading).chain(rows).map(line).collect::<Vec<_>>().join("\n")
}

/// Bytes in decimal units with three digits: `7.81MB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        _ if unit == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let short = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{short}{}", UNITS.get(unit).unwrap_or(&"B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (1234, "1.23kB"),
            (7_812_345, "7.81MB"),
            (74_800_000, "74.8MB"),
            (999_600, "1MB"),
            (123_456_789, "123MB"),
            (1_500_000_000, "1.5GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_blanks_at_the_end() {
        let rows = [
            vec!["a".to_owned(), "bb".to_owned(), String::new()],
            vec!["long".to_owned(), "é".to_owned(), "c".to_owned()],
        ];
        assert_eq!(table(&["X", "Y", "Z"], &rows), "X      Y    Z\na      bb\nlong   é    c");
    }
}
