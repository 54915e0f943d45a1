//! Containers: one image and one configuration, natively or in a microVM.

pub mod backend;
pub mod config;
pub mod native;
pub mod spec;
