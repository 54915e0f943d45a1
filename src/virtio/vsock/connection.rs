//! One connection between guest and host: who has said what, and how much may still be sent.
//!
//! Plain data, apart from rings and descriptors. Bytes for the guest never wait here: they are read from the host's
//! stream when the guest has room for them. Bytes from the guest wait here when the host's stream does not take them,
//! up to the window that the guest was promised.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::packet::Header;
use crate::virtio::Reader;
use crate::virtio::spec::vsock::{op, shutdown};

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The host asked for it; the guest has to agree.
    Requested,
    /// The guest asked for it; the host's program has too many callers at the moment.
    Waiting,
    /// Both have agreed.
    Open,
    /// The guest has forgotten it, and the host still gets what the guest sent before.
    Orphaned,
}

/// What a connection has to say to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Say {
    /// A packet without data: operation and flags.
    Control(u16, u32),
    /// At most so many bytes of data, if the host has any.
    Data(u32),
}

/// The guest does what no driver may do.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Violation {
    /// More bytes than it was given room for.
    #[error("{0} bytes are more than the guest has room for")]
    Window(u32),
    /// Data after it said that no more would come.
    #[error("data after the end of data")]
    AfterEnd,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    phase: Phase,
    /// Room that the guest was promised, in bytes.
    window: u32,
    /// Bytes that have come from the guest; this and the next four wrap.
    received: u32,
    /// Of these, what has left the window: the host has it, or nobody wants it.
    forwarded: u32,
    /// What the guest knows of that.
    told: u32,
    /// Bytes that were sent to the guest.
    sent: u32,
    /// Of these, what has left its buffer, as the guest said last.
    guest_forwarded: u32,
    /// Size of the guest's buffer, as it said last.
    guest_window: u32,
    /// [`shutdown`] flags that the guest has sent.
    guest_shut: u32,
    /// Those that the guest has to be told.
    host_shut: u32,
    /// Those that it was told.
    host_shut_told: u32,
    owes_request: bool,
    owes_response: bool,
    owes_credit: bool,
    /// It was asked for room and has not answered.
    asked_for_credit: bool,
    /// Bytes from the guest that the host has not taken.
    backlog: VecDeque<u8>,
}

impl Connection {
    fn new(phase: Phase, window: u32) -> Self {
        Self {
            phase,
            window,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_forwarded: 0,
            guest_window: 0,
            guest_shut: 0,
            host_shut: 0,
            host_shut_told: 0,
            owes_request: false,
            owes_response: false,
            owes_credit: false,
            asked_for_credit: false,
            backlog: VecDeque::new(),
        }
    }

    /// The host wants it.
    pub fn requested(window: u32) -> Self {
        Self { owes_request: true, ..Self::new(Phase::Requested, window) }
    }

    /// The guest wants it, and said so with this header.
    pub fn waiting(window: u32, request: &Header) -> Self {
        let mut connection = Self::new(Phase::Waiting, window);
        connection.take_credit(request);
        connection
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The window that it was opened with.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// The host's program has taken the guest's call.
    pub fn accept(&mut self) {
        self.phase = Phase::Open;
        self.owes_response = true;
    }

    /// The guest has taken the host's call.
    pub fn accepted(&mut self) {
        self.phase = Phase::Open;
    }

    /// The guest has been told of the host's call, so it must be told of its end.
    pub fn is_known_to_guest(&self) -> bool {
        !self.owes_request
    }

    /// The guest knows it no more.
    pub fn orphan(&mut self) {
        self.phase = Phase::Orphaned;
    }

    /// Every packet says what room the guest has.
    pub fn take_credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        // A guest that answers "none" tells by itself when there is some; to ask again would be a loop.
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Bytes that the guest has room for. What makes no sense is no room.
    pub fn credit(&self) -> u32 {
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The guest wants to know its room.
    pub fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// `len` bytes come from the guest.
    pub fn receive(&mut self, len: u32) -> Result<(), Violation> {
        if self.guest_shut & shutdown::SEND != 0 {
            return Err(Violation::AfterEnd);
        }
        let waiting = self.received.wrapping_sub(self.forwarded);
        if waiting.checked_add(len).is_none_or(|total| total > self.window) {
            return Err(Violation::Window(len));
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// `len` of the received bytes need no room any more.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
        // Not for every few bytes; but as long as less than this is untold, the guest has room for more.
        if self.forwarded.wrapping_sub(self.told) >= self.window / 4 {
            self.owes_credit = true;
        }
    }

    /// The first bytes from the guest that the host has not taken.
    pub fn backlog(&self) -> &[u8] {
        self.backlog.as_slices().0
    }

    /// How many such bytes there are.
    pub fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    /// Whether there are such bytes.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Keeps bytes that were [received](Self::receive) for later; false if they cannot be read.
    pub fn keep(&mut self, from: &mut Reader<'_>) -> bool {
        let total = self.backlog.len() + from.remaining() as usize;
        if total > self.backlog.capacity() {
            // Grown by itself it could become larger than the window.
            let capacity = (2 * self.backlog.capacity()).min(self.window as usize).max(total);
            self.backlog.reserve_exact(capacity - self.backlog.len());
        }
        let mut part = [0; 4096];
        while from.remaining() > 0 {
            let len = part.len().min(from.remaining() as usize);
            let Some(part) = part.get_mut(..len) else { return false };
            if from.read_exact(part).is_err() {
                return false;
            }
            self.backlog.extend(&*part);
        }
        true
    }

    /// The host has taken `len` bytes of the backlog.
    pub fn drain(&mut self, len: usize) {
        let len = len.min(self.backlog.len());
        self.backlog.drain(..len);
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.forward(len as u32);
    }

    /// The guest will not receive, or send, any more.
    pub fn guest_shuts(&mut self, flags: u32) {
        self.guest_shut |= flags & shutdown::BOTH;
    }

    /// What the guest will not do any more.
    pub fn guest_shut(&self) -> u32 {
        self.guest_shut
    }

    /// The host will not receive, or send, any more.
    pub fn host_shuts(&mut self, flags: u32) {
        self.host_shut |= flags;
        if self.host_shut & shutdown::RECEIVE != 0 {
            self.drain(self.backlog.len());
        }
    }

    /// What the host will not do any more.
    pub fn host_shut(&self) -> u32 {
        self.host_shut
    }

    /// What is to be said to the guest next, if the host has data (`readable`) or not.
    pub fn next(&self, readable: bool) -> Option<Say> {
        match self.phase {
            Phase::Requested if self.owes_request => return Some(Say::Control(op::REQUEST, 0)),
            Phase::Requested | Phase::Waiting | Phase::Orphaned => return None,
            Phase::Open => {}
        }
        let readable =
            readable && self.host_shut & shutdown::SEND == 0 && self.guest_shut & shutdown::RECEIVE == 0;
        if self.owes_response {
            Some(Say::Control(op::RESPONSE, 0))
        } else if self.host_shut != self.host_shut_told {
            Some(Say::Control(op::SHUTDOWN, self.host_shut))
        } else if readable && self.credit() > 0 {
            Some(Say::Data(self.credit()))
        } else if readable && !self.asked_for_credit {
            Some(Say::Control(op::CREDIT_REQUEST, 0))
        } else if self.owes_credit {
            Some(Say::Control(op::CREDIT_UPDATE, 0))
        } else {
            None
        }
    }

    /// A packet goes to the guest: what it says is said, and its header is completed.
    pub fn said(&mut self, header: &mut Header) {
        match header.op {
            op::REQUEST => self.owes_request = false,
            op::RESPONSE => self.owes_response = false,
            op::SHUTDOWN => self.host_shut_told = header.flags,
            op::CREDIT_REQUEST => self.asked_for_credit = true,
            op::RW => self.sent = self.sent.wrapping_add(header.len),
            _ => {}
        }
        header.buf_alloc = self.window;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
        self.owes_credit = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credit(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    fn open(window: u32) -> Connection {
        let mut connection = Connection::waiting(window, &credit(1000, 0));
        connection.accept();
        assert_eq!(connection.next(false), Some(Say::Control(op::RESPONSE, 0)));
        say(&mut connection, op::RESPONSE, 0);
        connection
    }

    fn say(connection: &mut Connection, op: u16, len: u32) -> Header {
        let mut header = Header { op, len, ..Header::default() };
        connection.said(&mut header);
        header
    }

    #[test]
    fn guest_gets_no_more_than_it_has_room_for() {
        let mut connection = open(4096);
        assert_eq!(connection.next(true), Some(Say::Data(1000)));
        say(&mut connection, op::RW, 700);
        assert_eq!(connection.next(true), Some(Say::Data(300)));
        say(&mut connection, op::RW, 300);
        assert_eq!(connection.next(true), Some(Say::Control(op::CREDIT_REQUEST, 0)));
        say(&mut connection, op::CREDIT_REQUEST, 0);
        assert_eq!(connection.next(true), None, "asked once");
        connection.take_credit(&credit(1000, 0));
        assert_eq!(connection.next(true), None, "still full");
        connection.take_credit(&credit(1000, 1));
        assert_eq!(connection.next(true), Some(Say::Data(1)));
    }

    #[test]
    fn counters_wrap() {
        let mut connection = open(4096);
        connection.take_credit(&credit(u32::MAX, 0));
        say(&mut connection, op::RW, u32::MAX - 9);
        connection.take_credit(&credit(1000, u32::MAX - 9));
        assert_eq!(connection.credit(), 1000);
        say(&mut connection, op::RW, 20);
        assert_eq!(connection.credit(), 980);
        connection.take_credit(&credit(1000, 10));
        assert_eq!(connection.credit(), 1000);
        for _ in 0..(1 << 22) {
            connection.receive(4096).unwrap();
            connection.forward(4096);
        }
        assert_eq!(connection.receive(4096), Ok(()));
    }

    #[test]
    fn senseless_credit_is_no_room() {
        let mut connection = open(4096);
        for (alloc, forwarded) in [(0, 0), (100, 1), (u32::MAX - 1, 1), (0, u32::MAX)] {
            connection.take_credit(&credit(alloc, forwarded));
            assert_eq!(connection.credit(), 0, "{alloc} {forwarded}");
        }
    }

    #[test]
    fn more_than_the_window_is_refused() {
        let mut connection = open(4096);
        assert_eq!(connection.receive(4097), Err(Violation::Window(4097)));
        assert_eq!(connection.receive(u32::MAX), Err(Violation::Window(u32::MAX)));
        connection.receive(4096).unwrap();
        assert_eq!(connection.receive(1), Err(Violation::Window(1)));
        connection.forward(10);
        assert_eq!(connection.receive(10), Ok(()));
        connection.guest_shuts(shutdown::SEND);
        assert_eq!(connection.receive(0), Err(Violation::AfterEnd));
    }

    #[test]
    fn room_is_told_before_the_guest_has_none() {
        let mut connection = open(4096);
        let mut room = 4096;
        for len in [1, 10, 100, 1000, 1024, 3000, 1, 2500].into_iter().cycle().take(10_000) {
            assert!(room > 0, "the guest would wait for ever");
            let len = room.min(len);
            connection.receive(len).unwrap();
            connection.forward(len);
            room -= len;
            if connection.next(false) == Some(Say::Control(op::CREDIT_UPDATE, 0)) {
                let header = say(&mut connection, op::CREDIT_UPDATE, 0);
                assert_eq!(header.buf_alloc, 4096);
                room = 4096;
            }
        }
    }

    #[test]
    fn shutdown_comes_after_data_and_each_flag_is_told_once() {
        let mut connection = open(4096);
        connection.host_shuts(shutdown::SEND);
        assert_eq!(connection.next(true), Some(Say::Control(op::SHUTDOWN, shutdown::SEND)));
        let mut header = Header { op: op::SHUTDOWN, flags: shutdown::SEND, ..Header::default() };
        connection.said(&mut header);
        assert_eq!(connection.next(false), None);
        connection.backlog.extend([1, 2, 3]);
        connection.host_shuts(shutdown::RECEIVE);
        assert!(!connection.has_backlog(), "nobody wants it");
        assert_eq!(connection.next(false), Some(Say::Control(op::SHUTDOWN, shutdown::BOTH)));
    }

    #[test]
    fn state_survives_serialization() {
        let mut connection = open(4096);
        connection.receive(100).unwrap();
        connection.backlog.extend(0..100);
        let text = serde_json::to_string(&connection).unwrap();
        assert_eq!(serde_json::from_str::<Connection>(&text).unwrap(), connection);
    }
}
