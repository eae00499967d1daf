//! Shorter grace periods for as long as somebody waits for one.
//!
//! Freezing a filesystem waits three times until every processor has passed a quiescent state
//! (`percpu_down_write` for each level, Linux `fs/super.c`), suspending a device waits at least once. At some 15 ms each
//! that is most of the time for which applications are held. `/sys/kernel/rcu_expedited` makes the kernel ask the
//! processors instead of waiting for them to come by (Linux `Documentation/admin-guide/kernel-parameters.txt`,
//! rcupdate.rcu_expedited): a millisecond, for an interrupt on each. Where an administrator has set
//! `rcu_normal`, as real-time systems do, that wins in the kernel itself.
//!
//! The switch is a number, and any but 0 is on (`rcu_expedited_store`, Linux `kernel/ksysfs.c`). We write one that nobody
//! else does, and turn off only what still is that number: what an administrator sets meanwhile stays.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The switch.
pub const PATH: &str = "/sys/kernel/rcu_expedited";

/// On, by us: the bytes of "TM".
const OURS: &[u8] = b"21581";

/// Longest content that is read.
const CONTENT_BYTES_MAX: usize = 32;

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
        Self::open_at(Path::new(PATH))
    }

    fn open_at(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(path).map(|file| Self { file })
    }

    /// None where there is none for us, and where it is on already: then it is not ours to turn off.
    #[must_use]
    pub fn find_off() -> Option<Self> {
        Self::open().ok().filter(|switch| switch.state().is_ok_and(|state| state == b"0"))
    }

    /// Is it on, by our doing?
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_on_by_us(&self) -> io::Result<bool> {
        Ok(self.state()? == OURS)
    }

    fn state(&self) -> io::Result<Vec<u8>> {
        let mut content = [0; CONTENT_BYTES_MAX];
        let length = self.file.read_at(&mut content, 0)?;
        Ok(content[..length].trim_ascii().to_vec())
    }

    /// Turns it on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn_on(&self) -> io::Result<()> {
        self.file.write_all_at(OURS, 0)
    }

    /// Turns it off where it is on by our doing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn turn_off(&self) -> io::Result<()> {
        if self.is_on_by_us()? { self.file.write_all_at(b"0", 0) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_else_has_set_meanwhile_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0\n").unwrap();
        let switch = Expedite::open_at(file.path()).unwrap();
        switch.turn_on().unwrap();
        assert!(switch.is_on_by_us().unwrap());
        // A file keeps what a shorter text does not cover; the kernel's does not.
        std::fs::write(file.path(), "1\n").unwrap();
        switch.turn_off().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"1\n");
        std::fs::write(file.path(), "21581\n").unwrap();
        switch.turn_off().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[0], b'0');
    }
}
