//! Rate limits among a device's options.

use super::Size;
use crate::virtio::rate::{Bucket, Limits};

/// Collects `bw=SIZE`, `bw-burst=SIZE`, `ops=N` and `ops-burst=N`: a rate for a second, and what may pass at once.
#[derive(Debug, Default)]
pub(super) struct Parser {
    bandwidth: Rate,
    operations: Rate,
}

#[derive(Debug, Default)]
struct Rate {
    rate: Option<u64>,
    burst: Option<u64>,
}

impl Rate {
    fn finish(self, prefix: &str, name: &str) -> Result<Option<Bucket>, String> {
        match (self.rate, self.burst) {
            (Some(rate), burst) => Ok(Some(Bucket::per_second(rate, burst))),
            (None, Some(_)) => Err(format!("{prefix}{name}-burst says nothing without {prefix}{name}")),
            (None, None) => Ok(None),
        }
    }
}

impl Parser {
    /// Takes an option whose name may start with `prefix`; false if it is none of these.
    pub(super) fn option(&mut self, prefix: &str, key: &str, value: &str) -> Result<bool, String> {
        let (to, bytes) = match key.strip_prefix(prefix) {
            Some("bw") => (&mut self.bandwidth.rate, true),
            Some("bw-burst") => (&mut self.bandwidth.burst, true),
            Some("ops") => (&mut self.operations.rate, false),
            Some("ops-burst") => (&mut self.operations.burst, false),
            _ => return Ok(false),
        };
        let number = if bytes {
            value.parse::<Size>().map_err(|error| format!("{key}: {error}"))?.bytes()
        } else {
            value.parse().map_err(|_| format!("{key}={value}: not a number"))?
        };
        if number == 0 {
            return Err(format!("{key}={value}: must be more than 0; without the option there is no limit"));
        }
        *to = Some(number);
        Ok(true)
    }

    /// The limits.
    pub(super) fn finish(self, prefix: &str) -> Result<Limits, String> {
        Ok(Limits {
            bandwidth: self.bandwidth.finish(prefix, "bw")?,
            operations: self.operations.finish(prefix, "ops")?,
        })
    }
}
