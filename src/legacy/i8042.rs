//! The keyboard controller: the reset line that `reboot=k` pulls, and a keyboard that can press Ctrl-Alt-Del for
//! guests without ACPI. There is no mouse, and nothing else is ever typed.
//!
//! After the command sets of the IBM PC/AT Technical Reference (8042 and keyboard, scan code set 2 translated to 1).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{GuestRequest, GuestRequests};
use crate::bus::BusDevice;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Bytes for the guest that are kept at most.
const OUTPUT_BYTES: usize = 32;

// Status register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_UNLOCKED: u8 = 1 << 4;

// Controller commands.
const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const ECHO_KEYBOARD: u8 = 0xd2;
const ECHO_AUX: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
const PULSE_RESET: u8 = 0xfe;

// Controller answers.
const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
const PORT_CLOCK_STUCK: u8 = 0x01;

// Control byte.
const CONTROL_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
/// As firmware leaves it: keyboard interrupt on, self test passed, scan codes translated.
const CONTROL_AFTER_FIRMWARE: u8 = 0x45;

/// Output port: not in reset, address line 20 open.
const OUTPUT_PORT_VALUE: u8 = 0x03;
/// Output port bit 0: low resets the machine.
const OUTPUT_PORT_RUN: u8 = 1 << 0;

// Keyboard commands and answers.
const KEYBOARD_LEDS: u8 = 0xed;
const KEYBOARD_ECHO: u8 = 0xee;
const KEYBOARD_SCAN_SET: u8 = 0xf0;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_RATE: u8 = 0xf3;
const KEYBOARD_RESET: u8 = 0xff;
const ACK: u8 = 0xfa;
const SELF_TEST_OK: u8 = 0xaa;
const KEYBOARD_ID: [u8; 2] = [0xab, 0x83];

/// Make codes of Ctrl, Alt and Delete (the last an extended key), then their break codes, in set 1.
const CTRL_ALT_DEL: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// The registers and buffers of the controller.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct I8042State {
    control: u8,
    output: VecDeque<u8>,
    /// A controller command that waits for its data byte.
    command: Option<u8>,
    /// A keyboard command that waits for its data byte.
    keyboard_command: Option<u8>,
}

/// The device.
pub struct I8042 {
    state: Mutex<I8042State>,
    requests: Arc<GuestRequests>,
    irq: EventFd,
}

impl I8042 {
    /// A controller that posts to `requests` and interrupts for the keyboard through `irq`.
    pub fn new(requests: Arc<GuestRequests>, irq: EventFd) -> I8042 {
        let state = I8042State { control: CONTROL_AFTER_FIRMWARE, ..I8042State::default() };
        I8042 { state: Mutex::new(state), requests, irq }
    }

    /// Presses Ctrl-Alt-Del. Returns whether a guest listens to the keyboard at all.
    pub fn press_ctrl_alt_del(&self) -> bool {
        let mut state = self.lock();
        let listens =
            state.control & CONTROL_KEYBOARD_INTERRUPT != 0 && state.control & CONTROL_KEYBOARD_OFF == 0;
        if listens {
            self.answer(&mut state, &CTRL_ALT_DEL);
        }
        listens
    }

    /// Registers and buffers, for a snapshot.
    pub fn save(&self) -> I8042State {
        self.lock().clone()
    }

    /// Takes over what another controller was like, and interrupts for what its guest may not have heard of.
    pub fn restore(&self, mut saved: I8042State) {
        saved.output.truncate(OUTPUT_BYTES);
        let mut state = self.lock();
        *state = saved;
        self.interrupt(&state);
    }

    fn lock(&self) -> MutexGuard<'_, I8042State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Queues bytes for the guest to read.
    fn answer(&self, state: &mut I8042State, bytes: &[u8]) {
        let room = OUTPUT_BYTES.saturating_sub(state.output.len());
        state.output.extend(bytes.iter().take(room));
        self.interrupt(state);
    }

    fn interrupt(&self, state: &I8042State) {
        if !state.output.is_empty() && state.control & CONTROL_KEYBOARD_INTERRUPT != 0 {
            // The counter can only be full of earlier interrupts that are still to be delivered.
            let _ = self.irq.write(1);
        }
    }

    fn controller_command(&self, state: &mut I8042State, command: u8) {
        state.command = None;
        match command {
            READ_CONTROL => self.answer(state, &[state.control]),
            SELF_TEST => {
                state.output.clear();
                self.answer(state, &[SELF_TEST_PASSED]);
            }
            TEST_KEYBOARD => self.answer(state, &[PORT_TEST_PASSED]),
            TEST_AUX => self.answer(state, &[PORT_CLOCK_STUCK]),
            DISABLE_KEYBOARD => state.control |= CONTROL_KEYBOARD_OFF,
            ENABLE_KEYBOARD => state.control &= !CONTROL_KEYBOARD_OFF,
            READ_OUTPUT_PORT => self.answer(state, &[OUTPUT_PORT_VALUE]),
            WRITE_CONTROL | WRITE_OUTPUT_PORT | ECHO_KEYBOARD | ECHO_AUX | WRITE_AUX => {
                state.command = Some(command)
            }
            PULSE_RESET => self.requests.post(GuestRequest::Reset),
            _ => {}
        }
    }

    fn data(&self, state: &mut I8042State, value: u8) {
        match state.command.take() {
            Some(WRITE_CONTROL) => {
                state.control = value;
                self.interrupt(state);
            }
            Some(WRITE_OUTPUT_PORT) if value & OUTPUT_PORT_RUN == 0 => {
                self.requests.post(GuestRequest::Reset)
            }
            Some(ECHO_KEYBOARD) => self.answer(state, &[value]),
            // A wrong echo tells the guest at once that there is no mouse; silence would make it wait.
            Some(ECHO_AUX) => self.answer(state, &[!value]),
            Some(_) => {}
            None => self.keyboard(state, value),
        }
    }

    fn keyboard(&self, state: &mut I8042State, value: u8) {
        if state.keyboard_command.take().is_some() {
            return self.answer(state, &[ACK]);
        }
        match value {
            KEYBOARD_RESET => self.answer(state, &[ACK, SELF_TEST_OK]),
            KEYBOARD_IDENTIFY => self.answer(state, &[ACK, KEYBOARD_ID[0], KEYBOARD_ID[1]]),
            KEYBOARD_ECHO => self.answer(state, &[KEYBOARD_ECHO]),
            KEYBOARD_LEDS | KEYBOARD_RATE | KEYBOARD_SCAN_SET => {
                state.keyboard_command = Some(value);
                self.answer(state, &[ACK]);
            }
            _ => self.answer(state, &[ACK]),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [data] = data else { return };
        let mut state = self.lock();
        match offset {
            DATA => {
                *data = state.output.pop_front().unwrap_or(0);
                self.interrupt(&state);
            }
            COMMAND => {
                let full = if state.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
                *data = STATUS_SYSTEM | STATUS_UNLOCKED | full;
            }
            // Ports 0x61 to 0x63 belong to the timer and the speaker, which KVM has.
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut state = self.lock();
        match offset {
            DATA => self.data(&mut state, value),
            COMMAND => self.controller_command(&mut state, value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (Arc<GuestRequests>, I8042) {
        let requests = super::super::requests();
        (requests.clone(), I8042::new(requests, EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    fn read_all(device: &I8042) -> Vec<u8> {
        let read = |offset| {
            let mut data = [0xff];
            device.read(offset, &mut data);
            data[0]
        };
        let mut bytes = vec![];
        while read(COMMAND) & STATUS_OUTPUT_FULL != 0 {
            bytes.push(read(DATA));
        }
        bytes
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        for writes in [&[(COMMAND, PULSE_RESET)][..], &[(COMMAND, WRITE_OUTPUT_PORT), (DATA, 0x02)]] {
            let (requests, device) = controller();
            for &(offset, value) in writes {
                device.write(offset, &[value]);
            }
            assert!(requests.has(GuestRequest::Reset));
        }
    }

    #[test]
    fn driver_probe_finds_a_keyboard_and_no_mouse() {
        let (requests, device) = controller();
        let command = |value| device.write(COMMAND, &[value]);
        let data = |value| device.write(DATA, &[value]);
        command(SELF_TEST);
        assert_eq!(read_all(&device), [SELF_TEST_PASSED]);
        command(WRITE_CONTROL);
        data(0x45);
        command(READ_CONTROL);
        assert_eq!(read_all(&device), [0x45]);
        command(ECHO_AUX);
        data(0x5a);
        assert_ne!(read_all(&device), [0x5a]);
        command(TEST_AUX);
        assert_eq!(read_all(&device), [PORT_CLOCK_STUCK]);
        data(KEYBOARD_IDENTIFY);
        assert_eq!(read_all(&device), [ACK, 0xab, 0x83]);
        data(KEYBOARD_LEDS);
        data(0x02);
        assert_eq!(read_all(&device), [ACK, ACK]);
        assert!(!requests.stops());
    }

    #[test]
    fn ctrl_alt_del_is_typed_unless_the_keyboard_is_off() {
        let (_, device) = controller();
        device.press_ctrl_alt_del();
        assert_eq!(read_all(&device), CTRL_ALT_DEL);
        assert!(device.irq.read().unwrap() >= CTRL_ALT_DEL.len() as u64);
        device.write(COMMAND, &[DISABLE_KEYBOARD]);
        device.press_ctrl_alt_del();
        assert!(read_all(&device).is_empty());
    }

    #[test]
    fn flood_of_commands_stays_bounded() {
        let (_, device) = controller();
        for value in 0..=255 {
            for _ in 0..100 {
                device.write(DATA, &[value]);
            }
        }
        assert!(device.lock().output.len() <= OUTPUT_BYTES);
    }
}
