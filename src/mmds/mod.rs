//! The metadata service: what its host tells a guest, by HTTP on an address of the guest's own network (MMDS).
//!
//! `store` holds the metadata, `token` the keys of its sessions, `http` turns requests into answers, and `stack` is the
//! end of the guest's connections. The network device asks a [`Stack`] about each frame that its guest sends, and hands
//! over those that are for it: they never leave the monitor. All that comes from the guest is hostile.

mod http;
mod stack;
mod store;
mod token;

use std::net::Ipv4Addr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use stack::{HEAD_BYTES, Stack};
pub use store::{Lookup, SIZE_LIMIT, Store, StoreError};
pub use token::Tokens;

/// Where guests look for it, unless told otherwise.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How a guest gets at metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// By asking.
    #[default]
    V1,
    /// With a token, which it has to ask for first.
    V2,
}

/// Answers requests, on all network devices alike.
#[derive(Debug)]
pub struct Service {
    store: Arc<Store>,
    version: Version,
    imds_compat: bool,
    tokens: Tokens,
}

impl Service {
    /// A service with keys of its own. With `imds_compat` it answers in text whatever the guest accepts, as EC2's does.
    pub fn new(store: Arc<Store>, version: Version, imds_compat: bool) -> Result<Self, getrandom::Error> {
        Ok(Self { store, version, imds_compat, tokens: Tokens::new()? })
    }
}
