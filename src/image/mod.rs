//! Images: from a reference to layers that a container can stand on.

pub mod digest;
mod error;
pub mod layers;
pub mod manifest;
pub mod reference;
pub mod registry;
pub mod store;

pub use error::Error;
