//! The serial console's description.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Where the guest's first serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// To standard input and output.
    #[default]
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<SerialConfig, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(SerialConfig::Stdio),
            ("none", _) => Ok(SerialConfig::None),
            (_, Some(path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
            _ => Err(format!("{text:?}: a serial port is stdio, file=PATH or none")),
        }
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialConfig::Stdio => f.write_str("stdio"),
            SerialConfig::File(path) => write!(f, "file={}", path.display()),
            SerialConfig::None => f.write_str("none"),
        }
    }
}

impl Serialize for SerialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SerialConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SerialConfig, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
