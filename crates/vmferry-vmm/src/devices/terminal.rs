//! The terminal as a serial console: raw, and given back as it was.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::panic;
use std::sync::{Mutex, Once};

/// Settings that the terminal had before; None when they are in force.
static BEFORE: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Raw mode of the terminal on standard input, until dropped. The settings also come back when the process
/// exits or panics.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Switches to raw mode; None if standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let mut before = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills the structure that it is given.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, before.as_mut_ptr()) } != 0 {
            return Ok(None);
        }
        // SAFETY: tcgetattr has succeeded.
        let before = unsafe { before.assume_init() };
        let mut raw = before;
        // SAFETY: the argument is a valid termios.
        unsafe { libc::cfmakeraw(&mut raw) };
        // The guest sends line feeds alone; the user wants lines.
        raw.c_oflag = before.c_oflag;

        static AT_EXIT: Once = Once::new();
        AT_EXIT.call_once(|| {
            // SAFETY: the function is safe to run when the process exits: it takes a lock that nobody holds
            // for long and makes one system call.
            unsafe { libc::atexit(restore_at_exit) };
            let hook = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                hook(info);
            }));
        });
        if let Ok(mut saved) = BEFORE.lock() {
            saved.get_or_insert(before);
        }
        // SAFETY: `raw` is a valid termios.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

extern "C" fn restore_at_exit() {
    restore();
}

fn restore() {
    // The lock may be held by a thread that panics inside it: better no restoration than a deadlock.
    if let Ok(mut saved) = BEFORE.try_lock()
        && let Some(before) = saved.take()
    {
        // SAFETY: `before` came from tcgetattr.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &before) };
    }
}

/// Ctrl-a, the key that makes the next one a command.
const ESCAPE: u8 = 1;

/// Finds the user's commands among the keys for the guest.
#[derive(Debug, Default)]
pub(super) struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Passes `keys` on, without commands; whether the user wants to quit.
    pub fn filter(&mut self, keys: &[u8], to_guest: &mut VecDeque<u8>) -> bool {
        let mut quit = false;
        for &key in keys {
            if !self.escaped && key == ESCAPE {
                self.escaped = true;
                continue;
            }
            if self.escaped && key == b'x' {
                quit = true;
            } else {
                to_guest.push_back(key);
            }
            self.escaped = false;
        }
        quit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_a_prefix() {
        let mut filter = EscapeFilter::default();
        let mut out = VecDeque::new();
        assert!(!filter.filter(b"ls\x01", &mut out));
        assert!(!filter.filter(b"\x01x\x01b", &mut out));
        assert_eq!(out, b"ls\x01xb");
        assert!(filter.filter(b"\x01x", &mut out));
    }
}
