//! Shorter grace periods for as long as somebody waits for one.
//!
//! Freezing a filesystem waits three times until every processor has passed a quiescent state
//! (`percpu_down_write` for each level, Linux `fs/super.c`), suspending a device waits at least once. At some 15 ms each
//! that is most of the time for which applications are held. `/sys/kernel/rcu_expedited` makes the kernel ask the
//! processors instead of waiting for them to come by (Linux `Documentation/admin-guide/kernel-parameters.txt`,
//! rcupdate.rcu_expedited): a millisecond, for an interrupt on each. Where an administrator has set
//! `rcu_normal`, as real-time systems do, that wins in the kernel itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;

/// The switch: "0" or "1".
pub const PATH: &str = "/sys/kernel/rcu_expedited";

/// The switch, open.
#[derive(Debug)]
pub struct Expedite {
    file: File,
}

impl Expedite {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel's, where it has no such switch, or it is not ours to turn.
    pub fn open() -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(PATH).map(|file| Self { file })
    }

    /// None where there is none for us, and where it is on already: then it is not ours to turn off.
    #[must_use]
    pub fn find_off() -> Option<Self> {
        Self::open().ok().filter(|switch| switch.is_on().is_ok_and(|on| !on))
    }

    /// Is it on?
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_on(&self) -> io::Result<bool> {
        let mut state = [0; 1];
        self.file.read_exact_at(&mut state, 0)?;
        Ok(state != *b"0")
    }

    /// Turns it on or off.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn(&self, on: bool) -> io::Result<()> {
        self.file.write_all_at(if on { b"1" } else { b"0" }, 0)
    }
}
