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

/// The switch, found off.
#[derive(Debug)]
pub struct Expedite {
    file: File,
}

impl Expedite {
    /// None where the kernel has no such switch, where it is not ours to turn, and where it is on already: then it is
    /// not ours to turn off.
    #[must_use]
    pub fn find() -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(PATH).ok()?;
        let mut state = [0; 1];
        let read = file.read_at(&mut state, 0).ok()?;
        (read == 1 && state == *b"0").then_some(Self { file })
    }

    /// Turns it on or off.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn(&self, on: bool) -> io::Result<()> {
        self.file.write_all_at(if on { b"1" } else { b"0" }, 0)
    }
}

/// True where it is on.
#[must_use]
pub fn is_on() -> bool {
    std::fs::read_to_string(PATH).is_ok_and(|text| text.trim() == "1")
}

/// Turns it off, whoever turned it on.
///
/// # Errors
/// The kernel's.
pub fn turn_off() -> io::Result<()> {
    OpenOptions::new().write(true).open(PATH)?.write_all_at(b"0", 0)
}
