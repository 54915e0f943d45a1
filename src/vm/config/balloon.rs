//! The memory balloon's description.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Error, Size};

/// A virtio memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Balloon {
    /// Memory that the guest is asked to give back from the start.
    pub size: Size,
    /// Whether the guest may take memory back rather than kill a process.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages, which then go back to the host.
    pub free_page_reporting: bool,
    /// Seconds between two statistics of the guest's memory; 0 for none.
    pub stats_interval: u32,
}

impl Balloon {
    /// Checks it against the guest's memory.
    pub(super) fn check(&self, memory: Size) -> Result<(), Error> {
        if self.size > memory {
            return Err(Error::BalloonTooLarge { wanted: self.size, memory });
        }
        Ok(())
    }
}

/// `[size=SIZE][,deflate-on-oom][,free-page-reporting][,stats-interval=SECONDS]`.
impl FromStr for Balloon {
    type Err = String;

    fn from_str(text: &str) -> Result<Balloon, String> {
        let mut balloon = Balloon::default();
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            match (key, value) {
                ("size", Some(size)) => balloon.size = size.parse()?,
                ("deflate-on-oom", None) => balloon.deflate_on_oom = true,
                ("free-page-reporting", None) => balloon.free_page_reporting = true,
                ("stats-interval", Some(seconds)) => {
                    balloon.stats_interval = seconds.parse().map_err(|_| {
                        format!("balloon option {part:?}: stats-interval is a number of seconds")
                    })?;
                }
                _ => {
                    return Err(format!(
                        "unknown balloon option {part:?}: there are size=SIZE, deflate-on-oom, \
                         free-page-reporting and stats-interval=SECONDS"
                    ));
                }
            }
        }
        Ok(balloon)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloon_options_are_read() {
        let balloon: Balloon =
            "size=64M,deflate-on-oom,free-page-reporting,stats-interval=5".parse().unwrap();
        let expected = Balloon {
            size: Size(64 << 20),
            deflate_on_oom: true,
            free_page_reporting: true,
            stats_interval: 5,
        };
        assert_eq!(balloon, expected);
        assert_eq!("".parse(), Ok(Balloon::default()));
        assert!("inflate".parse::<Balloon>().unwrap_err().contains("unknown balloon option \"inflate\""));
        for text in ["size", "size=many", ",", "stats-interval=-1", "deflate-on-oom=maybe", "size=1M,"] {
            assert!(text.parse::<Balloon>().is_err(), "{text}");
        }
        assert!(balloon.check(Size(64 << 20)).is_ok());
        assert!(matches!(balloon.check(Size(32 << 20)), Err(Error::BalloonTooLarge { .. })));
    }
}
