//! Templates: snapshots of guests that have booted and wait for a container.
//!
//! There is one for each size class, made when a container first wants it, by whoever wants it: it boots what it would have
//! booted anyway, saves it, and goes on from there. What a template depends on is in its name ([`key`]), so one that does not
//! fit any more is not found, and goes when the new one comes. docs/templates.md describes it.

mod build;
mod key;
mod store;

use std::path::PathBuf;

use crate::api;
use crate::container::{backend, files, network};
use crate::kvm;

pub use self::key::Key;
pub use self::store::{Entry, Template, Templates};

/// Why a template cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest of it does not boot, or its parts are missing.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// There is no kernel.
    #[error("there is no guest kernel {0}")]
    NoKernel(&'static str),
    /// Its files.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// Something of it.
    #[error("cannot {what} {path:?}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The network namespace for its taps.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The guest cannot be saved.
    #[error("cannot save the guest")]
    Save(#[source] api::client::Error),
    /// The agent.
    #[error("cannot talk to the guest's agent")]
    Agent(#[source] crate::guest::client::Error),
    /// What it depends on cannot be written down.
    #[error("cannot tell what a template depends on")]
    Encode(#[source] serde_json::Error),
    /// Somebody has tried just before, in vain.
    #[error("the last attempt to make one has failed: {0}")]
    Failed(String),
}

fn host(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Host { what, path, source }
}
