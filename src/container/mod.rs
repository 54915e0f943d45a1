//! Containers: one image and one configuration, natively or in a microVM.

pub mod archive;
pub mod backend;
pub mod changes;
pub mod client;
pub mod config;
mod files;
mod fork;
pub mod life;
pub mod log;
pub mod microvm;
pub mod namespace;
pub mod native;
pub mod network;
pub mod prepare;
pub mod records;
pub mod roots;
pub mod signal;
pub mod spec;
pub mod state;
pub mod supervisor;
pub mod time;
pub mod volume;

pub use files::Error as FileError;
