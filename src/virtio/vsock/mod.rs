//! The socket device (virtio 1.2 §5.10): stream connections between guest and host.
//!
//! [`packet`] is the format, [`connection`] what one connection knows, [`muxer`] all of them, [`unix`] the host's side.
//! Only this file knows of queues. One thread serves all connections.

pub mod connection;
pub mod muxer;
pub mod packet;
pub mod unix;

use std::io;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};

use self::muxer::Muxer;
use self::packet::Header;
use self::unix::{Event, UnixHost};
use super::Chain;
use super::device::{Activation, Device, Handled, Source};
use super::spec::vsock::{self, feature, queue};
use super::state::{DeviceState, RestoreError};
use crate::memory::Ram;
use crate::sandbox;

/// Sizes of the queues for packets to the guest, from the guest, and for events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// What a snapshot keeps of a socket device: not its connections, whose other ends are not in the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u64,
    /// A driver was ready, and is to be told that its connections are gone.
    had_driver: bool,
    next_port: u32,
}

/// A socket device.
pub struct Vsock {
    guest_cid: u64,
    host: UnixHost,
    muxer: Muxer<UnixStream>,
    /// The guest has to be told that its connections are gone.
    reset_due: bool,
    /// While the driver is ready.
    ram: Option<Ram>,
}

impl Vsock {
    /// A device whose guest has the address `guest_cid`.
    pub fn new(guest_cid: u32, host: UnixHost) -> Self {
        let guest_cid = guest_cid.into();
        Self { guest_cid, host, muxer: Muxer::new(guest_cid), reset_due: false, ram: None }
    }

    /// Tells the guest, when it next looks, that all its connections are gone: after a restore nobody is at their other
    /// ends.
    pub fn announce_reset(&mut self) {
        self.reset_due = true;
    }

    /// A packet from the guest. One that is malformed is dropped.
    fn take_packet(&mut self, ram: &Ram, chain: &Chain) {
        let mut reader = chain.reader(ram);
        match Header::read(&mut reader) {
            Ok(header) => self.muxer.from_guest(&mut self.host, &header, &reader),
            Err(error) => tracing::debug!(%error, "vsock packet without a header"),
        }
    }

    /// Room for an event (§5.10.6.7).
    fn event_for_guest(&mut self, ram: &Ram, chain: Chain) -> Handled {
        if !std::mem::take(&mut self.reset_due) {
            return Handled::Wait(chain);
        }
        let mut writer = chain.writer(ram);
        if writer.write_all(&vsock::EVENT_TRANSPORT_RESET.to_le_bytes()).is_err() {
            self.reset_due = true;
            return Handled::Done(chain, 0);
        }
        let written = writer.written();
        Handled::Done(chain, written)
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        vsock::ID
    }

    fn features(&self) -> u64 {
        feature::STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config`, §5.10.4.
    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::Vsock
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.host.start()?;
        self.ram = Some(activation.ram);
        Ok(())
    }

    /// One descriptor stands for all connections.
    fn sources(&self) -> Vec<Source> {
        let fd = self.host.fd();
        fd.map(|fd| Source { fd, token: 0, events: EventSet::IN }).into_iter().collect()
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        let Some(ram) = self.ram.clone() else { return Handled::Done(chain, 0) };
        match queue {
            queue::RX => match self.muxer.to_guest(&mut self.host, &chain.writer(&ram)) {
                Some(len) => Handled::Done(chain, len),
                None => Handled::Wait(chain),
            },
            queue::TX => {
                self.take_packet(&ram, &chain);
                Handled::Done(chain, 0)
            }
            _ => self.event_for_guest(&ram, chain),
        }
    }

    fn event(&mut self, _token: u32) {
        for event in self.host.take_events() {
            match event {
                Event::Ready(key, now) => self.muxer.ready(&mut self.host, key, now),
                Event::Call(stream, port) => self.muxer.from_host(&mut self.host, stream, port),
                Event::Retry => self.muxer.call_again(&mut self.host),
            }
        }
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Vsock(VsockState {
            guest_cid: self.guest_cid,
            had_driver: self.ram.is_some() || self.reset_due,
            next_port: self.muxer.next_port(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else { return Err(RestoreError::Nonsense(vsock::ID)) };
        self.guest_cid = state.guest_cid;
        self.muxer = Muxer::new(state.guest_cid);
        self.muxer.go_on_at(state.next_port);
        if state.had_driver {
            self.announce_reset();
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.reset_due = false;
        self.muxer.clear();
        self.host.stop();
        self.ram = None;
    }
}

#[cfg(test)]
mod tests;
