//! Tables and JSON of listings.

use clap::ValueEnum;

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns
    #[default]
    Table,
    /// One JSON object a line
    Json,
}

/// Prints columns as wide as their widest cell.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> =
            cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        cells.join("   ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut header.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// A size as Docker words it: powers of ten, three digits.
pub fn decimal_size(bytes: u64) -> String {
    size(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB"])
}

/// A size in powers of two.
pub fn binary_size(bytes: u64) -> String {
    size(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

fn size(bytes: u64, base: f64, units: &[&str]) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{bytes}{}", units[0]),
        _ if value < 10.0 => format!("{value:.2}{}", units[unit]),
        _ if value < 100.0 => format!("{value:.1}{}", units[unit]),
        _ => format!("{value:.0}{}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "bb".into()], vec!["ccc".into(), String::new()]];
        assert_eq!(table(&["ONE", "T"], &rows), "ONE   T\na     bb\nccc\n");
    }

    #[test]
    fn sizes_have_three_digits() {
        assert_eq!(decimal_size(999), "999B");
        assert_eq!(decimal_size(1500), "1.50kB");
        assert_eq!(decimal_size(12_345_678), "12.3MB");
        assert_eq!(binary_size(128 << 20), "128MiB");
    }
}
