//! The protocol between a command and its watchdog: lines on two pipes.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::base::{DeviceNumber, Error, ErrorKind};

/// The last line of a command that exits. A pipe that ends without it means that the command died.
pub(super) const FAREWELL: &str = "farewell";

/// Longest order or verdict, in bytes.
const LINE_BYTES_MAX: usize = 1 << 20;
/// What the watchdog guards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Device-mapper devices to resume: by number, as other tools may rename them meanwhile.
    pub devices: Vec<DeviceNumber>,
    /// Mount points to thaw.
    pub filesystems: Vec<PathBuf>,
    /// Time from arming until the watchdog acts.
    pub budget_ms: u64,
    /// The command turns [`rcu::PATH`](crate::sys::rcu::PATH) on once the watchdog is armed.
    pub is_expedited: bool,
}

/// Lines from a pipe, each read with a time limit.
#[derive(Debug)]
pub(super) struct Lines<F> {
    file: F,
    buffered: Vec<u8>,
    ended: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Text(String),
    /// No line within the limit.
    Nothing,
    /// The pipe has ended.
    End,
}

impl<F: Read + AsFd> Lines<F> {
    pub(super) fn new(file: F) -> Self {
        Self { file, buffered: Vec::new(), ended: false }
    }

    /// The next line. Waits no longer than `limit`.
    ///
    /// # Errors
    /// Those of the pipe; EMSGSIZE for a line that is too long.
    pub(super) fn next(&mut self, limit: Duration) -> io::Result<Line> {
        let end = Instant::now().checked_add(limit);
        loop {
            if let Some(at) = self.buffered.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffered.drain(..=at).collect();
                return Ok(Line::Text(String::from_utf8_lossy(&line[..at]).into_owned()));
            }
            if self.ended {
                return Ok(Line::End);
            }
            if self.buffered.len() > LINE_BYTES_MAX {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            if !self.wait(end)? {
                return Ok(Line::Nothing);
            }
            let mut block = [0u8; 4096];
            match self.file.read(&mut block) {
                Ok(0) => self.ended = true,
                Ok(count) => self.buffered.extend_from_slice(&block[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// False if the limit passes first.
    fn wait(&self, end: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            // Rounded up: a poll that returns early would spin.
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                let ms = left.as_nanos().div_ceil(1_000_000).min(60_000);
                PollTimeout::from(u16::try_from(ms).unwrap_or(60_000))
            });
            match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_some_and(|left| left <= Duration::from_millis(60_000)) => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

pub(super) fn failed(what: &str) -> Error {
    Error::new(ErrorKind::External, format!("the watchdog {what}"))
}
