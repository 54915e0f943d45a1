//! Sizes with a unit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A size in bytes, written with a unit: `512M`, `2GiB`, `65536K`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let help = "a size is a whole number with a unit, such as 512M, 2G or 65536K";
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "" if !digits.is_empty() => return Err(format!("{text:?} has no unit: {help}")),
            _ => return Err(format!("{text:?} is not a size: {help}")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size: {help}"))?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))?;
        Ok(Size(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            // Exact where the unit allows it, else to a tenth of a unit that leaves two digits before the point.
            if self.0 >= 1 << shift && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            } else if self.0 >= 10 << shift {
                return write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}K", self.0 >> 10))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit() {
        for (text, bytes) in [("16M", 16 << 20), ("1GiB", 1 << 30), ("4096k", 4 << 20), ("1t", 1 << 40)] {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes);
        }
        assert!("512".parse::<Size>().unwrap_err().contains("no unit"));
        for text in ["", "M", "1.5G", "-1M", "1X", "99999999999999999999M", "18446744073709551615T", "1 M"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(
            [Size(16 << 20), Size((16 << 20) + 1), Size(5)].map(|s| s.to_string()),
            ["16 MiB", "16.0 MiB", "5 bytes"]
        );
    }
}
