//! The power button: an orderly end.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::report::{self, Report};

/// Bytes of one `struct input_event`, and where its type, code and value are.
const EVENT_BYTES: usize = 24;
const KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Waits for the button, lets the journals end, and powers the guest off.
pub(crate) fn wait_for_button(report: &Arc<Report>, journals: Vec<JoinHandle<()>>) -> ! {
    let (pressed, button) = channel();
    for number in 0..8 {
        if let Ok(device) = File::open(format!("/dev/input/event{number}")) {
            let pressed = pressed.clone();
            // Without it the guest can only be stopped by force.
            let _ = crate::spawn("button", move || watch(device, &pressed));
        }
    }
    // `pressed` stays here: without a device nobody presses, and the guest lives on.
    if button.recv().is_err() {
        report.fault("the power button is gone");
    }
    report.stop();
    for journal in journals {
        if journal.join().is_err() {
            report.fault("a journal panicked");
        }
    }
    report::say("LIMOSA-GUEST-DOWN");
    loop {
        // SAFETY: no pointers; sync before, so that nothing is lost.
        unsafe {
            libc::sync();
            libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF);
        }
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

fn watch(mut device: File, pressed: &Sender<()>) {
    let mut event = [0; EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        if is_press(&event) {
            // Pressed twice: the end is under way.
            let _ = pressed.send(());
        }
    }
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let field = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
    field(16) == KEY && field(18) == KEY_POWER && field(20) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only the button's way down counts.
    #[test]
    fn only_a_press_counts() {
        let mut event = [0; EVENT_BYTES];
        event[16] = 1;
        event[18] = 116;
        assert!(!is_press(&event));
        event[20] = 1;
        assert!(is_press(&event));
        event[18] = 30;
        assert!(!is_press(&event));
    }
}
