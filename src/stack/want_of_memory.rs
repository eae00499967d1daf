//! Was the command killed by the kernel for want of memory? Then its watchdog puts back what it left.
//!
//! Who kills a command by hand may go on with its copy (`resume`), so everything stays in place. Where the kernel kills it,
//! nobody may be there to do so. The kernel's log names the process that it has killed (`__oom_kill_process` in Linux
//! `mm/oom_kill.c`), by its number in the host's first process namespace: in another one nothing is found, and what is
//! left is left to `recover`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

/// The kernel kills first and tells then.
const TOLD_AFTER: Duration = Duration::from_millis(200);

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Longest record of the log (`CONSOLE_EXT_LOG_MAX` in Linux `kernel/printk/printk.c`, or `PRINTKRB_RECORD_MAX`).
const RECORD_BYTES_MAX: usize = 8192;

/// What the kernel says of one process from now on.
pub struct Witness {
    word: String,
    log: File,
}

impl Witness {
    /// Of the process that has started this one.
    ///
    /// # Errors
    /// I/O errors of opening the kernel's log.
    pub fn of_parent() -> io::Result<Self> {
        let word = word(nix::unistd::getppid().as_raw());
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self { word, log })
    }

    /// Waits a moment for the kernel's word that it has killed the process.
    pub fn was_killed(&mut self) -> bool {
        let end = Instant::now() + TOLD_AFTER;
        loop {
            if self.read_on() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(PAUSE);
        }
    }

    /// One read is one record.
    fn read_on(&mut self) -> bool {
        let mut record = [0; RECORD_BYTES_MAX];
        loop {
            match self.log.read(&mut record) {
                Ok(0) => return false,
                Ok(length) if is_of(&record[..length], &self.word) => return true,
                Ok(_) => {}
                // Overwritten before it was read: the next one is the oldest that is left.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

/// What the kernel says of `process`, behind "Out of memory" or "Memory cgroup out of memory".
fn word(process: libc::pid_t) -> String {
    format!("of memory: Killed process {process} (")
}

fn is_of(record: &[u8], word: &str) -> bool {
    record.windows(word.len()).any(|part| part == word.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_names_whom_it_has_killed() {
        for record in [
            "3,1234,56789,-;Out of memory: Killed process 431 (tidemark) total-vm:91kB, anon-rss:7kB",
            "3,1234,56789,-;Memory cgroup out of memory: Killed process 431 (tidemark) total-vm:91kB",
        ] {
            assert!(is_of(record.as_bytes(), &word(431)));
            assert!(!is_of(record.as_bytes(), &word(43)) && !is_of(record.as_bytes(), &word(31)));
        }
        assert!(!is_of(b"6,1,2,-;oom_reaper: reaped process 431 (tidemark)", &word(431)));
    }
}
