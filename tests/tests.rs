//! Tests of the product, one module for each topic.
//!
//! What a test needs and does not find (KVM, a kernel, root, a tool) it names in a line `skipped: …`. `scripts/test`
//! builds what is needed and runs everything twice: on this host, and what needs a complete KVM in `nested-host`.

mod agent;
mod api;
mod balloon;
mod block;
mod boot;
mod cli;
mod compare;
mod console;
mod container;
mod firecracker;
mod fs;
mod image;
mod linux;
mod metrics;
mod mmds;
mod native;
mod nested_host;
mod net;
mod network;
mod report;
mod resets;
mod rng;
mod rootless;
mod sandbox;
mod services;
mod snapshot;
mod soak;
mod support;
mod templates;
mod terminal;
mod tidy;
mod vectors;
mod verbs;
mod vsock;
