//! Virtio devices on the virtio-mmio transport (virtio 1.2).
//!
//! A guest's register accesses reach a [`mmio::Transport`], which owns its [`Device`] while the driver sets it up. When
//! the driver is ready, the device moves into a worker thread together with guest memory, queues and interrupt, and
//! comes back when the driver resets it. The worker takes [`Chain`]s from the queues and hands them to the device one
//! by one; what the device says to them decides what goes back into the queue.
//!
//! Everything that a guest writes is hostile: a chain is validated whole before a device sees it, and a broken queue
//! costs the guest that device, not the VM.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod spec;
pub mod state;
pub mod vsock;
mod worker;

#[doc(hidden)]
pub mod testing;

pub use chain::{Chain, Reader, Writer};
pub use device::{Activation, Completion, Completions, Device, Handled, Handover, Source};

#[cfg(test)]
mod state_tests;
