//! rvmm: a KVM microVM monitor.
//!
//! Dependencies between modules point down only:
//!
//! - `main -> cli -> {api, vm}`; `api -> {socket, vm}`
//! - `vm -> {boot, virtio, legacy, bus, kvm, memory, disk, tap, fileserver, socket}`
//! - `cli -> doctor -> {kvm, vm}`
//! - `cli -> bench`: drives public command lines and uses nothing else of the library
//! - `cli -> image`: images, registries and the store; it uses nothing else
//! - `fileserver -> {fuse, sandbox}`: a process of its own
//! - `virtio -> {memory, disk, tap, fuse, socket}`, never `kvm` or `vm`: it is handed event descriptors
//! - `boot -> memory`; `legacy`, `disk`, `tap`, `memory`, `bus`, `socket` -> crates only
//! - `metrics`: counters, which `api`, `virtio` and `vm` add to
//! - `mmds -> metrics`: the metadata service, which `virtio`'s network device hands frames to; `api` and `cli` fill it
//! - `sandbox -> {disk, terminal}`: the walls, which `api`, `cli`, `socket`, `virtio` and `vm` put up
//! - `platform` holds addresses and numbers, `program` where this program is, and every module may use them
//!
//! `tests/tidy.rs` holds these edges.

pub mod api;
pub mod bench;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod container;
pub mod disk;
pub mod doctor;
pub mod fileserver;
pub mod fuse;
pub mod guest;
pub mod image;
pub mod kvm;
pub mod legacy;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod platform;
pub mod program;
pub mod sandbox;
pub mod snapshot_files;
pub mod socket;
pub mod tap;
pub mod terminal;
pub mod virtio;
pub mod vm;

/// An error and its causes in one line, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
