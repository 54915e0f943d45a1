//! What host and guest say to each other, and the host's side of it. The guest's is the program `rvmm-init`;
//! docs/agent.md describes both.

pub mod client;
pub mod devices;
pub mod frame;
pub mod protocol;
pub mod spec;
pub mod user;
