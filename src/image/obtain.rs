//! An image, from wherever it is.

use std::str::FromStr;

use super::archive::{self, Daemon};
use super::error::Error;
use super::reference::Reference;
use super::registry::{self, Options, Progress};
use super::store::{Image, Store};

/// When a registry is asked for an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// If it is not here.
    #[default]
    Missing,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl FromStr for PullPolicy {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "missing" => Ok(Self::Missing),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err("one of missing, always, never"),
        }
    }
}

/// The image with this name or id; from its registry, or from a Docker or Podman on this host (`docker-daemon:NAME`,
/// `podman:NAME`), if the policy says so.
pub fn obtain(
    store: &Store,
    name: &str,
    policy: PullPolicy,
    options: &Options,
    progress: &Progress,
) -> Result<Image, Error> {
    let daemon = Daemon::split(name);
    let local = daemon.map_or(name, |(_, name)| name);
    if policy != PullPolicy::Always {
        match store.resolve(local) {
            Err(Error::NotFound(_)) if policy == PullPolicy::Missing => {}
            result => return result,
        }
    }
    if let Some((daemon, name)) = daemon {
        return archive::import(store, daemon, name);
    }
    if policy == PullPolicy::Missing {
        progress.say(&format!(
            "Unable to find image '{}' locally",
            Reference::parse(name)?.or_latest().familiar()
        ));
    }
    Ok(registry::pull(store, &Reference::parse(name)?, options, progress)?.image)
}
