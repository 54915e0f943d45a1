//! A 16550A UART (National Semiconductor PC16550D data sheet), the console of most guests.
//!
//! Output never blocks a vCPU: while the sink is full the transmitter reports itself busy, as a slow line would make
//! it, and takes up again when the sink has drained.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Bytes that the receive FIFO holds. More than the chip's 16, since the guest reads until it is empty anyway, and
/// each interrupt is dear.
const RX_FIFO_BYTES: usize = 64;

// Register offsets.
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

// Interrupt enable.
const IER_RX: u8 = 1 << 0;
const IER_TX: u8 = 1 << 1;
const IER_MASK: u8 = 0x0f;

// Interrupt identification.
const IIR_NONE: u8 = 0x01;
const IIR_TX: u8 = 0x02;
const IIR_RX: u8 = 0x04;
const IIR_FIFO: u8 = 0xc0;

// FIFO control.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;

// Line control.
const LCR_DIVISOR: u8 = 1 << 7;

// Modem control.
const MCR_MASK: u8 = 0x1f;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

// Line status.
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TX_EMPTY: u8 = 0b0110_0000;

// Modem status: a line with clear-to-send, data-set-ready and carrier.
const MSR_CONNECTED: u8 = 0xb0;

/// Where a serial line's output goes.
pub trait SerialSink: Send + Sync {
    /// Takes a byte, or not when there is no room. Must not block.
    fn put(&self, byte: u8) -> bool;
    /// Whether the next [`SerialSink::put`] would be taken.
    fn has_room(&self) -> bool;
}

/// The registers and buffers of the UART.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SerialState {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    transmit_interrupt: bool,
    /// The feeder found the FIFO full and waits for room.
    feeder_waits: bool,
}

/// The device.
pub struct Serial {
    state: Mutex<SerialState>,
    sink: Arc<dyn SerialSink>,
    irq: EventFd,
    room: EventFd,
}

impl Serial {
    /// A UART that interrupts through `irq`, sends to `sink`, and signals `room` when a feeder that was turned away
    /// may try again.
    pub fn new(sink: Arc<dyn SerialSink>, irq: EventFd, room: EventFd) -> Serial {
        let state = SerialState {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0b11,
            modem_control: MCR_OUT2,
            scratch: 0,
            divisor: 12,
            received: VecDeque::with_capacity(RX_FIFO_BYTES),
            transmit_interrupt: false,
            feeder_waits: false,
        };
        Serial { state: Mutex::new(state), sink, irq, room }
    }

    /// Gives the guest input; returns how many bytes were taken. When not all were, the room event follows.
    ///
    /// Nothing is taken before the guest enables the receive interrupt: drivers clear the FIFO when they start, and
    /// input that was waiting in a pipe would be lost.
    pub fn feed(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let listens = state.interrupt_enable & IER_RX != 0;
        let room = if listens { RX_FIFO_BYTES.saturating_sub(state.received.len()) } else { 0 };
        let taken = bytes.len().min(room);
        state.received.extend(bytes.iter().take(taken));
        state.feeder_waits = taken < bytes.len();
        if taken > 0 {
            self.interrupt();
        }
        taken
    }

    /// Tells that the sink has room again after it had none.
    pub fn sink_drained(&self) {
        let mut state = self.lock();
        self.transmitter_empty(&mut state);
    }

    /// Registers and buffers, for a snapshot.
    pub fn save(&self) -> SerialState {
        self.lock().clone()
    }

    /// Takes over what another UART was like, and interrupts for what its guest may not have heard of.
    pub fn restore(&self, mut saved: SerialState) {
        saved.received.truncate(RX_FIFO_BYTES);
        // Whoever waited there does not wait here.
        saved.feeder_waits = false;
        let mut state = self.lock();
        *state = saved;
        if state.interrupt_enable & IER_RX != 0 && !state.received.is_empty() {
            self.interrupt();
        }
        // The line is free, whatever that of the other one was.
        self.transmitter_empty(&mut state);
    }

    fn lock(&self) -> MutexGuard<'_, SerialState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn interrupt(&self) {
        // The counter can only be full of earlier interrupts that are still to be delivered.
        let _ = self.irq.write(1);
    }

    fn transmitter_empty(&self, state: &mut SerialState) {
        if state.interrupt_enable & IER_TX != 0 {
            state.transmit_interrupt = true;
            self.interrupt();
        }
    }

    fn transmit(&self, state: &mut SerialState, byte: u8) {
        state.transmit_interrupt = false;
        if state.modem_control & MCR_LOOP != 0 {
            if state.received.len() < RX_FIFO_BYTES {
                state.received.push_back(byte);
                if state.interrupt_enable & IER_RX != 0 {
                    self.interrupt();
                }
            }
        } else {
            // A guest that sends without waiting for the transmitter loses the byte, as on a real line.
            self.sink.put(byte);
        }
        if self.sink.has_room() {
            self.transmitter_empty(state);
        }
    }

    fn receive(&self, state: &mut SerialState) -> u8 {
        let byte = state.received.pop_front().unwrap_or(0);
        if state.received.is_empty() {
            self.call_feeder(state);
        }
        byte
    }

    fn call_feeder(&self, state: &mut SerialState) {
        if std::mem::take(&mut state.feeder_waits) {
            let _ = self.room.write(1);
        }
    }

    fn identify_interrupt(state: &mut SerialState) -> u8 {
        let fifo = if state.fifo_control & FCR_ENABLE != 0 { IIR_FIFO } else { 0 };
        let source = if state.interrupt_enable & IER_RX != 0 && !state.received.is_empty() {
            IIR_RX
        } else if state.interrupt_enable & IER_TX != 0 && std::mem::take(&mut state.transmit_interrupt) {
            IIR_TX
        } else {
            IIR_NONE
        };
        fifo | source
    }

    fn line_status(&self, state: &SerialState) -> u8 {
        let data = if state.received.is_empty() { 0 } else { LSR_DATA_READY };
        let transmitter = if self.sink.has_room() { LSR_TX_EMPTY } else { 0 };
        data | transmitter
    }

    fn modem_status(state: &SerialState) -> u8 {
        let control = state.modem_control;
        if control & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // In loop-back the four modem outputs appear as inputs: RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD.
        (control & 0b0010) << 3 | (control & 0b0001) << 5 | (control & 0b1100) << 4
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [data] = data else { return };
        let mut state = self.lock();
        let divisor = state.line_control & LCR_DIVISOR != 0;
        *data = match offset {
            DATA if divisor => state.divisor.to_le_bytes()[0],
            DATA => self.receive(&mut state),
            IER if divisor => state.divisor.to_le_bytes()[1],
            IER => state.interrupt_enable,
            IIR_FCR => Self::identify_interrupt(&mut state),
            LCR => state.line_control,
            MCR => state.modem_control,
            LSR => self.line_status(&state),
            MSR => Self::modem_status(&state),
            SCR => state.scratch,
            _ => return,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut state = self.lock();
        let divisor = state.line_control & LCR_DIVISOR != 0;
        match offset {
            DATA if divisor => state.divisor = state.divisor & 0xff00 | u16::from(value),
            DATA => self.transmit(&mut state, value),
            IER if divisor => state.divisor = state.divisor & 0x00ff | u16::from(value) << 8,
            IER => {
                let added = value & !state.interrupt_enable;
                state.interrupt_enable = value & IER_MASK;
                if added & IER_RX != 0 {
                    if !state.received.is_empty() {
                        self.interrupt();
                    }
                    self.call_feeder(&mut state);
                }
                if added & IER_TX != 0 && self.sink.has_room() {
                    self.transmitter_empty(&mut state);
                }
            }
            IIR_FCR => {
                state.fifo_control = value & FCR_ENABLE;
                if value & FCR_CLEAR_RX != 0 {
                    state.received.clear();
                    self.call_feeder(&mut state);
                }
            }
            LCR => state.line_control = value,
            MCR => state.modem_control = value & MCR_MASK,
            SCR => state.scratch = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Line {
        sent: Mutex<Vec<u8>>,
        full: AtomicBool,
    }

    impl SerialSink for Line {
        fn put(&self, byte: u8) -> bool {
            let room = self.has_room();
            if room {
                self.sent.lock().unwrap().push(byte);
            }
            room
        }
        fn has_room(&self) -> bool {
            !self.full.load(Ordering::Relaxed)
        }
    }

    fn serial() -> (Arc<Line>, Serial) {
        let line = Arc::new(Line::default());
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (line.clone(), Serial::new(line, event(), event()))
    }

    fn get(serial: &Serial, register: u64) -> u8 {
        let mut data = [0xff];
        serial.read(register, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_sink() {
        let (line, serial) = serial();
        for byte in *b"hello" {
            assert_eq!(get(&serial, LSR), LSR_TX_EMPTY);
            serial.write(DATA, &[byte]);
        }
        assert_eq!(*line.sent.lock().unwrap(), b"hello");
        assert!(serial.irq.read().is_err(), "no interrupt was enabled");
    }

    #[test]
    fn full_sink_makes_the_transmitter_busy_until_it_drains() {
        let (line, serial) = serial();
        serial.write(IER, &[IER_TX]);
        assert_eq!(serial.irq.read().unwrap(), 1, "the transmitter is empty at the start");
        assert_eq!([get(&serial, IIR_FCR), get(&serial, IIR_FCR)], [IIR_TX, IIR_NONE]);
        line.full.store(true, Ordering::Relaxed);
        assert_eq!(get(&serial, LSR), 0);
        serial.write(DATA, b"x");
        assert!(serial.irq.read().is_err());
        line.full.store(false, Ordering::Relaxed);
        serial.sink_drained();
        assert_eq!(serial.irq.read().unwrap(), 1);
        assert_eq!(get(&serial, IIR_FCR), IIR_TX);
        assert!(line.sent.lock().unwrap().is_empty());
    }

    #[test]
    fn input_beyond_the_fifo_waits_for_room() {
        let (_, serial) = serial();
        serial.write(IER, &[IER_RX]);
        let input: Vec<u8> = (0..100).collect();
        assert_eq!(serial.feed(&input), RX_FIFO_BYTES);
        assert_eq!(serial.feed(&input[RX_FIFO_BYTES..]), 0);
        assert_eq!(get(&serial, IIR_FCR), IIR_RX);
        let read: Vec<u8> = (0..RX_FIFO_BYTES)
            .map(|_| {
                assert!(serial.room.read().is_err());
                assert_eq!(get(&serial, LSR) & LSR_DATA_READY, LSR_DATA_READY);
                get(&serial, DATA)
            })
            .collect();
        assert_eq!(read, input[..RX_FIFO_BYTES]);
        assert_eq!(serial.room.read().unwrap(), 1);
        assert_eq!(get(&serial, LSR) & LSR_DATA_READY, 0);
        assert_eq!(serial.feed(&input[RX_FIFO_BYTES..]), 36);
        serial.write(IIR_FCR, &[FCR_ENABLE | FCR_CLEAR_RX]);
        assert_eq!(get(&serial, IIR_FCR), IIR_FIFO | IIR_NONE);
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let (_, serial) = serial();
        assert_eq!(serial.feed(b"early"), 0);
        serial.write(IIR_FCR, &[FCR_ENABLE | FCR_CLEAR_RX]);
        serial.room.read().unwrap();
        assert_eq!(serial.feed(b"early"), 0);
        serial.write(IER, &[IER_RX]);
        serial.room.read().unwrap();
        assert_eq!(serial.feed(b"early"), 5);
        assert_eq!(get(&serial, DATA), b'e');
    }

    #[test]
    fn probes_of_linux_find_a_16550a() {
        let (line, serial) = serial();
        serial.write(SCR, &[0x5a]);
        assert_eq!(get(&serial, SCR), 0x5a);
        serial.write(IER, &[0x0f]);
        assert_eq!(get(&serial, IER), 0x0f);
        serial.write(IER, &[0]);
        serial.write(MCR, &[MCR_LOOP | 0x0a]);
        assert_eq!(get(&serial, MSR) & 0xf0, 0x90);
        serial.write(DATA, b"l");
        assert_eq!(get(&serial, DATA), b'l');
        serial.write(MCR, &[0]);
        serial.write(IIR_FCR, &[FCR_ENABLE]);
        assert_eq!(get(&serial, IIR_FCR) >> 6, 3);
        serial.write(LCR, &[LCR_DIVISOR]);
        serial.write(DATA, &[1]);
        serial.write(IER, &[2]);
        assert_eq!([get(&serial, DATA), get(&serial, IER)], [1, 2]);
        assert!(line.sent.lock().unwrap().is_empty());
    }

    #[test]
    fn restored_line_goes_on_and_interrupts_for_what_waits() {
        let (_, first) = serial();
        first.write(IER, &[IER_RX | IER_TX]);
        first.write(SCR, &[0x77]);
        assert_eq!(first.feed(b"ab"), 2);
        assert_eq!(get(&first, DATA), b'a');
        let bytes = postcard::to_allocvec(&first.save()).unwrap();
        let (_, second) = serial();
        second.restore(postcard::from_bytes(&bytes).unwrap());
        assert!(second.irq.read().unwrap() >= 1);
        assert_eq!([get(&second, SCR), get(&second, IIR_FCR), get(&second, DATA)], [0x77, IIR_RX, b'b']);
        assert_eq!(get(&second, IIR_FCR), IIR_TX);
        let mut long = first.save();
        long.received.extend([0; 1000]);
        second.restore(long);
        assert_eq!(second.save().received.len(), RX_FIFO_BYTES);
    }

    #[test]
    fn wide_and_wild_accesses_are_harmless() {
        let (line, serial) = serial();
        let mut wide = [0xff; 4];
        serial.read(0, &mut wide);
        serial.write(0, &wide);
        serial.write(u64::MAX, &[1]);
        assert_eq!(get(&serial, 99), 0xff);
        assert!(line.sent.lock().unwrap().is_empty());
    }
}
