//! The power block: the fixed registers of hardware-reduced ACPI (sleep, reset), and the power button's event
//! register, which the DSDT's generic event device reads (ACPI 6.5 §4.8.3.6, §4.8.3.7, §5.6.9).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::{GuestRequest, GuestRequests};
use crate::bus::BusDevice;
use crate::platform::{POWER, POWER_EVENTS, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5};

/// SLP_EN of SLEEP_CONTROL_REG.
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYP of SLEEP_CONTROL_REG.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// The power button's bit in the event register.
const EVENT_POWER_BUTTON: u8 = 1 << 0;

/// The device at [`POWER`].
pub struct PowerBlock {
    requests: Arc<GuestRequests>,
    events: AtomicU8,
    irq: EventFd,
}

impl PowerBlock {
    /// A power block that posts to `requests` and announces events by `irq`.
    pub fn new(requests: Arc<GuestRequests>, irq: EventFd) -> PowerBlock {
        PowerBlock { requests, events: AtomicU8::new(0), irq }
    }

    /// Events that the guest has not fetched, for a snapshot.
    pub fn save(&self) -> u8 {
        self.events.load(Ordering::Acquire)
    }

    /// Takes over events of another power block, and announces them.
    pub fn restore(&self, events: u8) {
        let events = events & EVENT_POWER_BUTTON;
        self.events.store(events, Ordering::Release);
        if events != 0 {
            // The counter can only be full of earlier interrupts that are still to be delivered.
            let _ = self.irq.write(1);
        }
    }

    /// Presses the power button.
    pub fn press_button(&self) -> std::io::Result<()> {
        self.events.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        self.irq.write(1)
    }
}

impl BusDevice for PowerBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u16::try_from(offset) else { return };
        let value = match POWER.start + offset {
            POWER_EVENTS => self.events.swap(0, Ordering::AcqRel),
            SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
            _ => return,
        };
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(offset), Some(&value)) = (u16::try_from(offset), data.first()) else { return };
        match POWER.start + offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                self.requests.post(GuestRequest::PowerOff);
            }
            RESET if value == RESET_VALUE => self.requests.post(GuestRequest::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> (Arc<GuestRequests>, PowerBlock) {
        let requests = super::super::requests();
        (requests.clone(), PowerBlock::new(requests, EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    #[test]
    fn s5_powers_off_and_other_sleep_types_do_not() {
        let (requests, block) = block();
        for value in [0, 0x14, 0x20, 0x24, 0x30] {
            block.write(0, &[value]);
        }
        assert!(!requests.stops());
        block.write(0, &[0x34]);
        assert!(requests.has(GuestRequest::PowerOff));
    }

    #[test]
    fn reset_register_acts_on_its_value_only() {
        let (requests, block) = block();
        block.write(2, &[0]);
        block.write(7, &[1]);
        assert!(!requests.stops());
        block.write(2, &[RESET_VALUE]);
        assert!(requests.has(GuestRequest::Reset));
    }

    #[test]
    fn button_is_read_once() {
        let (_, block) = block();
        let read = || {
            let mut data = [0xff];
            block.read(4, &mut data);
            data[0]
        };
        assert_eq!(read(), 0);
        block.press_button().unwrap();
        assert_eq!(block.irq.read().unwrap(), 1);
        assert_eq!([read(), read()], [EVENT_POWER_BUTTON, 0]);
    }
}
