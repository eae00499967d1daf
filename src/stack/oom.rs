//! Detects that the kernel's OOM killer has killed the command. Its watchdog then undoes what it left.
//!
//! An administrator who kills a command can resume its copy (`resume`), so everything stays in place. After
//! the OOM killer there may be no administrator. The kernel's log names the process that was killed
//! (`__oom_kill_process` in Linux `mm/oom_kill.c`), by its number in the initial PID namespace. In another
//! namespace that number is not found, and the rest is left to `recover`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

/// The kernel kills first and logs afterwards, within this time.
const LOG_DELAY_MAX: Duration = Duration::from_millis(200);

/// Pause between two reads of the log.
const PAUSE: Duration = Duration::from_millis(20);

/// Longest record of the log (`CONSOLE_EXT_LOG_MAX` in Linux `kernel/printk/printk.c`, or `PRINTKRB_RECORD_MAX`).
const RECORD_BYTES_MAX: usize = 8192;

/// The kernel's log from now on, searched for the end of one process.
pub struct OomLog {
    oom_text: String,
    log: File,
}

impl OomLog {
    /// For the parent of this process.
    ///
    /// # Errors
    /// I/O errors of opening the kernel's log.
    pub fn of_parent() -> io::Result<Self> {
        let oom_text = oom_text(nix::unistd::getppid().as_raw());
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self { oom_text, log })
    }

    /// Waits briefly for the record that the kernel has killed the process.
    pub fn was_killed(&mut self) -> bool {
        let end = Instant::now() + LOG_DELAY_MAX;
        loop {
            if self.find_record() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Reads the records that are available. Each read returns one record.
    fn find_record(&mut self) -> bool {
        let mut record = [0; RECORD_BYTES_MAX];
        loop {
            match self.log.read(&mut record) {
                Ok(0) => return false,
                Ok(length) if contains(&record[..length], &self.oom_text) => return true,
                Ok(_) => {}
                // Records were overwritten before they were read: the next read returns the oldest one left.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

/// The text that names `process` in both messages of the OOM killer: "Out of memory" and "Memory cgroup out of
/// memory".
fn oom_text(process: libc::pid_t) -> String {
    format!("of memory: Killed process {process} (")
}

fn contains(record: &[u8], oom_text: &str) -> bool {
    record.windows(oom_text.len()).any(|part| part == oom_text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_a_killed_process_is_recognized() {
        for record in [
            "3,1234,56789,-;Out of memory: Killed process 431 (tidemark) total-vm:91kB, anon-rss:7kB",
            "3,1234,56789,-;Memory cgroup out of memory: Killed process 431 (tidemark) total-vm:91kB",
        ] {
            assert!(contains(record.as_bytes(), &oom_text(431)));
            assert!(
                !contains(record.as_bytes(), &oom_text(43)) && !contains(record.as_bytes(), &oom_text(31))
            );
        }
        assert!(!contains(b"6,1,2,-;oom_reaper: reaped process 431 (tidemark)", &oom_text(431)));
    }
}
