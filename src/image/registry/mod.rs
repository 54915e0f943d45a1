//! Registries: pull and push over HTTP, by the specification of the OCI for distribution.
//!
//! What a registry sends is hostile: every body has a limit, every blob is compared with its digest, and credentials go
//! to no other host than the one that they are for or that it names for tokens.

mod challenge;
mod client;
mod credentials;
mod login;
mod progress;
mod pull;
mod push;
mod upload;

use std::fmt;
use std::io;

use super::reference::Reference;

pub use credentials::{AuthFile, Credentials};
pub use login::{login, logout};
pub use progress::{Bar, Progress};
pub use pull::{Pulled, pull};
pub use push::push;

/// How a registry is talked to.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether certificates have to be right. Without, and for registries on this host, plain HTTP is tried too.
    pub tls_verify: bool,
    /// Credentials; `None` for those in [`Options::auth_file`].
    pub credentials: Option<Credentials>,
    /// Where credentials are kept.
    pub auth_file: AuthFile,
}

impl Default for Options {
    fn default() -> Self {
        Self { tls_verify: true, credentials: None, auth_file: AuthFile::default() }
    }
}

/// What a registry, or the way to it, does wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not answer.
    #[error("cannot reach {host}")]
    Connect {
        /// Host and port.
        host: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It breaks off.
    #[error("{host} broke off")]
    Broken {
        /// Host and port.
        host: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// A body ended before it should.
    #[error("{what} ended after {found} of {expected} bytes")]
    Short {
        /// What.
        what: String,
        /// Bytes that came.
        found: u64,
        /// Bytes that should have.
        expected: u64,
    },
    /// It refuses for want of rights.
    #[error("{host} asks for credentials{}", said(.message))]
    Unauthorized {
        /// Host and port.
        host: String,
        /// What it said.
        message: String,
    },
    /// It does not have it.
    #[error("{host} does not have it{}", said(.message))]
    NotFound {
        /// Host and port.
        host: String,
        /// What it said.
        message: String,
    },
    /// It answers something else than it should.
    #[error("{host} answered {status}{}", said(.message))]
    Status {
        /// Host and port.
        host: String,
        /// The status.
        status: reqwest::StatusCode,
        /// What it said.
        message: String,
    },
    /// It breaks the protocol.
    #[error("{host} {why}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What is wrong.
        why: String,
    },
    /// Credentials cannot be read or kept.
    #[error("{what}: {why}")]
    Credentials {
        /// The file or program.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The HTTP client or its runtime cannot be set up.
    #[error("cannot set up an HTTP client")]
    SetUp(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store refuses.
    #[error(transparent)]
    Store(Box<super::Error>),
}

impl Error {
    /// Whether another attempt may do better.
    fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken { .. } | Self::Short { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || matches!(status.as_u16(), 408 | 416 | 429)
            }
            _ => false,
        }
    }
}

impl From<super::Error> for Error {
    fn from(error: super::Error) -> Self {
        Self::Store(Box::new(error))
    }
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

/// Where requests for a registry go.
fn api_host(reference: &Reference) -> &str {
    match reference.registry() {
        super::reference::DEFAULT_REGISTRY => "registry-1.docker.io",
        other => other,
    }
}

/// Runs a task to its end, on this thread.
fn run<T>(task: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    // The only provider that is built in; it may be there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::SetUp(error.into()))?.block_on(task)
}

/// Does something with the store that takes its time, beside the downloads.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, super::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(Error::SetUp(Box::new(io::Error::other(error)))),
    }
}

/// Wraps what went wrong for those who asked.
fn failed(doing: &'static str, reference: impl fmt::Display) -> impl FnOnce(Error) -> super::Error {
    let reference = reference.to_string();
    move |error| match error {
        Error::Store(error) => *error,
        source => super::Error::Registry { doing, reference, source: Box::new(source) },
    }
}
