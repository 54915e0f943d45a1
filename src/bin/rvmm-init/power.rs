//! The machine's power button.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use crate::system::key_bits;

/// How long processes may take to end when nobody has said.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Input devices that are looked at.
const DEVICES_MAX: usize = 8;
/// Bytes of `struct input_event`: a time of 16 bytes, then type, code and value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// The input device that is the power button, if there is one.
pub fn open_button() -> Option<File> {
    for index in 0..DEVICES_MAX {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(format!("/dev/input/event{index}")).ok()?;
        let bits = key_bits(&file).unwrap_or([0; 96]);
        let byte = bits.get(usize::from(KEY_POWER / 8)).copied().unwrap_or(0);
        if byte & 1 << (KEY_POWER % 8) != 0 {
            return Some(file);
        }
    }
    None
}

/// Whether the button was pressed.
pub fn was_pressed(button: &mut File) -> bool {
    let mut event = [0; EVENT_BYTES];
    let mut pressed = false;
    while button.read_exact(&mut event).is_ok() {
        let [.., t0, t1, c0, c1, v0, v1, v2, v3] = event;
        let kind = (u16::from_ne_bytes([t0, t1]), u16::from_ne_bytes([c0, c1]));
        pressed |= kind == (EV_KEY, KEY_POWER) && i32::from_ne_bytes([v0, v1, v2, v3]) == 1;
    }
    pressed
}
