//! Expedites RCU grace periods while writers wait for one.
//!
//! Freezing a filesystem waits three times for a grace period (`percpu_down_write` for each level, Linux
//! `fs/super.c`), suspending a device at least once. At some 15 ms each, that is most of the time for which
//! applications are held. With `/sys/kernel/rcu_expedited` the kernel interrupts the processors instead of
//! waiting for each to pass a quiescent state (Linux `Documentation/admin-guide/kernel-parameters.txt`,
//! rcupdate.rcu_expedited): a millisecond, for an interrupt on each. If an administrator has set
//! `rcu_normal`, as real-time systems do, the kernel gives that precedence.
//!
//! The switch is a number; any value except 0 is on (`rcu_expedited_store`, Linux `kernel/ksysfs.c`). We
//! write a value that no other tool uses, and turn the switch off only if it still has that value: a value
//! that an administrator sets meanwhile stays.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The path of the switch.
pub const PATH: &str = "/sys/kernel/rcu_expedited";

/// The value that we write: the bytes of "TM".
const OUR_VALUE: &[u8] = b"21581";

/// Longest content that is read.
const CONTENT_BYTES_MAX: usize = 32;

/// The open switch.
#[derive(Debug)]
pub struct Expedite {
    file: File,
}

impl Expedite {
    /// Opens the switch.
    ///
    /// # Errors
    /// The kernel's, if it has no such switch, or we may not write to it.
    pub fn open() -> io::Result<Self> {
        Self::open_at(Path::new(PATH))
    }

    fn open_at(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(path).map(|file| Self { file })
    }

    /// Opens the switch if it exists, we may write to it, and it is off. If it is on already, it is not ours
    /// to turn off.
    #[must_use]
    pub fn open_if_off() -> Option<Self> {
        Self::open().ok().filter(|switch| switch.state().is_ok_and(|state| state == b"0"))
    }

    /// True if it is on because we turned it on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_ours(&self) -> io::Result<bool> {
        Ok(self.state()? == OUR_VALUE)
    }

    fn state(&self) -> io::Result<Vec<u8>> {
        let mut content = [0; CONTENT_BYTES_MAX];
        let length = self.file.read_at(&mut content, 0)?;
        Ok(content[..length].trim_ascii().to_vec())
    }

    /// Turns it on, with our value.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn_on(&self) -> io::Result<()> {
        self.file.write_all_at(OUR_VALUE, 0)
    }

    /// Turns it off if we turned it on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn_off(&self) -> io::Result<()> {
        if self.is_ours()? { self.file.write_all_at(b"0", 0) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_set_by_another_process_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0\n").unwrap();
        let switch = Expedite::open_at(file.path()).unwrap();
        switch.turn_on().unwrap();
        assert!(switch.is_ours().unwrap());
        // Unlike the kernel, a file keeps the rest of a longer text.
        std::fs::write(file.path(), "1\n").unwrap();
        switch.turn_off().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"1\n");
        std::fs::write(file.path(), "21581\n").unwrap();
        switch.turn_off().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[0], b'0');
    }
}
