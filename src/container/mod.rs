//! Containers: one image and one configuration, natively or in a microVM.

pub mod config;
pub mod network;
mod store;
pub mod volume;

pub use store::Error as StoreError;
