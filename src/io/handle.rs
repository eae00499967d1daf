//! What all engines share about a file: its kind, how it is zeroed, with fallbacks, the latch of a failed
//! sync, and error texts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::uio::pwrite;

use super::transfer::{Direction, Transfer};
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt};
use crate::extent::Extent;
use crate::sys::aligned::AlignedBuffer;
use crate::sys::block::{self, FileKind};

/// Zeros written by one call if a file supports no better method.
const ZERO_WRITE_BYTES: Bytes = Bytes::mib(1);

/// How a file is made to read as zeros. The methods are tried in this order; one that is not supported is not
/// tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ZeroMethod {
    /// fallocate(2) with PUNCH_HOLE on a device: it zeroes the range with a command of the device and may
    /// release the space (a discard that reads as zeros), or it refuses; the kernel never falls back to
    /// writing zeros.
    Unmap,
    /// fallocate(2): a hole in a regular file, a zeroed range of a device.
    Fallocate,
    /// BLKZEROOUT: for kernels and devices that do not support fallocate(2) on a device.
    ZeroOut,
    /// Ordinary writes.
    Write,
}

/// What an engine knows of one file, and what it learned from earlier calls.
#[derive(Debug)]
pub(super) struct FileState {
    pub(super) description: String,
    pub(super) kind: FileKind,
    pub(super) direct: bool,
    zero_method: ZeroMethod,
    /// Major and minor number of a block device.
    device: Option<(u64, u64)>,
    /// errno of the first failed sync. What was lost then is unknown, so no later sync succeeds.
    sync_failed: Option<i32>,
}

impl FileState {
    pub(super) fn new(file: impl AsFd, description: &str) -> Result<Self> {
        let stat = || format!("stat of {description}");
        let kind = block::kind(&file).io_context(stat)?;
        let direct =
            block::is_direct(&file).io_context(|| format!("query of the open flags of {description}"))?;
        let device = match kind {
            FileKind::Block => Some(block::device_number(&file).io_context(stat)?),
            _ => None,
        };
        Ok(Self {
            description: description.to_owned(),
            kind,
            direct,
            zero_method: if kind == FileKind::Block { ZeroMethod::Unmap } else { ZeroMethod::Fallocate },
            device,
            sync_failed: None,
        })
    }

    /// The error of a failed transfer.
    pub(super) fn failure(&self, transfer: &Transfer, cause: io::Error) -> Error {
        transfer.failure(&self.description, self.real_cause(cause))
    }

    /// A removed disk has no size: the kernel reports that a write finds no space, and that a read finds the end.
    fn real_cause(&self, cause: io::Error) -> io::Error {
        match self.device {
            Some(device) if block::is_gone(device) => io::Error::from_raw_os_error(libc::ENODEV),
            _ => cause,
        }
    }

    /// Fails after a failed sync.
    pub(super) fn check_sync(&self) -> Result<()> {
        match self.sync_failed {
            None => Ok(()),
            Some(errno) => Err(self.sync_error(errno)),
        }
    }

    /// Takes the result of fsync(2); remembers a failure.
    pub(super) fn note_sync(&mut self, answer: io::Result<()>) -> Result<()> {
        match answer {
            Ok(()) => self.check_sync(),
            // A pipe or a terminal: it keeps nothing that a sync could make durable.
            Err(error) if self.kind == FileKind::Stream && error.raw_os_error() == Some(libc::EINVAL) => {
                Ok(())
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.sync_failed.get_or_insert(errno);
                Err(self.sync_error(errno))
            }
        }
    }

    fn sync_error(&self, errno: i32) -> Error {
        let cause = self.real_cause(io::Error::from_raw_os_error(errno));
        Error::io(format!("sync of {}", self.description), cause)
            .state("data written to it before the failure may be lost")
    }

    /// The mode in which the next zeroing is to try fallocate(2); None: use another method.
    pub(super) fn zero_mode(&self) -> Option<i32> {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        match (self.zero_method, self.kind) {
            (ZeroMethod::Unmap, FileKind::Block) => Some(libc::FALLOC_FL_PUNCH_HOLE | keep),
            (ZeroMethod::Fallocate, FileKind::Block) => Some(libc::FALLOC_FL_ZERO_RANGE | keep),
            (ZeroMethod::Fallocate, FileKind::Regular) => Some(libc::FALLOC_FL_PUNCH_HOLE | keep),
            _ => None,
        }
    }

    /// True if zeroing releases the space to the device or filesystem, as far as it can.
    pub(super) fn gives_back(&self) -> bool {
        match self.kind {
            FileKind::Block => self.zero_method == ZeroMethod::Unmap,
            _ => self.zero_method == ZeroMethod::Fallocate,
        }
    }

    /// Takes fallocate's errno in `mode`; true if another method may succeed. Requests that failed for the
    /// same reason before may have moved on already: then the method they chose is next.
    pub(super) fn fallocate_failed(&mut self, mode: i32, errno: i32) -> bool {
        if self.kind == FileKind::Block && mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            // For any errno: releasing space is optional, and the next method reports a real failure.
            self.zero_method = self.zero_method.max(ZeroMethod::Fallocate);
            return true;
        }
        let refused = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY);
        if refused && self.kind != FileKind::Stream {
            self.zero_method = self.zero_method.max(ZeroMethod::ZeroOut);
        }
        refused && self.kind != FileKind::Stream
    }

    /// Zeroes `extent`, waiting for it.
    pub(super) fn zero(&mut self, file: BorrowedFd<'_>, extent: Extent) -> Result<()> {
        let (start, length) = (extent.start(), extent.length());
        // This ends: each turn moves to a later method.
        while let Some(mode) = self.zero_mode() {
            let answer = if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
                block::punch_hole(file, start, length)
            } else {
                block::zero_range(file, start, length)
            };
            match answer {
                Ok(()) => return Ok(()),
                Err(error) if self.fallocate_failed(mode, error.raw_os_error().unwrap_or(0)) => {}
                Err(error) => return Err(self.zero_error(extent, error)),
            }
        }
        self.zero_without_fallocate(file, extent)
    }

    /// Zeroes `extent` without fallocate(2), waiting for it.
    pub(super) fn zero_without_fallocate(&mut self, file: BorrowedFd<'_>, extent: Extent) -> Result<()> {
        if matches!(self.kind, FileKind::Stream | FileKind::Other) {
            let cause = io::Error::from_raw_os_error(libc::ESPIPE);
            return Err(self.zero_error(extent, cause));
        }
        if self.kind == FileKind::Block && self.zero_method <= ZeroMethod::ZeroOut {
            match block::zero_out(file, extent.start(), extent.length()) {
                Ok(()) => return Ok(()),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {}
                Err(error) => return Err(self.zero_error(extent, error)),
            }
        }
        if self.zero_method != ZeroMethod::Write {
            tracing::info!(file = %self.description, "no zeroing command is supported: writing zeros");
            self.zero_method = ZeroMethod::Write;
        }
        self.write_zeros(file, extent).map_err(|error| self.zero_error(extent, error))
    }

    fn write_zeros(&self, file: BorrowedFd<'_>, extent: Extent) -> io::Result<()> {
        let size = block::size(file)?;
        if size == Bytes::ZERO && self.kind == FileKind::Block {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let end = extent.end().min(size);
        let zeros = AlignedBuffer::zeroed(ZERO_WRITE_BYTES.as_len());
        let mut at = extent.start();
        let mut retries = 0u32;
        while at < end {
            let length = (end - at).min(ZERO_WRITE_BYTES).as_len();
            let offset =
                libc::off_t::try_from(at.get()).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
            match pwrite(file, &zeros[..length], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    at += Bytes::from_len(count);
                    retries = 0;
                }
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN)
                    if retries < super::transfer::RETRIES_MAX =>
                {
                    retries += 1;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    pub(super) fn zero_error(&self, extent: Extent, cause: io::Error) -> Error {
        Error::io(
            format!(
                "zeroing of {} bytes at {} of {}",
                extent.length().get(),
                extent.start().get(),
                self.description
            ),
            self.real_cause(cause),
        )
    }

    /// The error for a file of a kind that cannot be read or written.
    pub(super) fn wrong_kind(&self, direction: Direction) -> Error {
        Error::new(
            ErrorKind::Io,
            format!("{} is neither a file, a device nor a stream: no {}", self.description, direction.name()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_gives_nothing_back_is_zeroed_by_the_next_method() {
        let file = tempfile::tempfile().unwrap();
        let mut facts = FileState::new(&file, "device").unwrap();
        assert!(facts.gives_back());
        facts.kind = FileKind::Block;
        facts.zero_method = ZeroMethod::Unmap;
        let (punch, range) = (libc::FALLOC_FL_PUNCH_HOLE | 1, libc::FALLOC_FL_ZERO_RANGE | 1);
        assert_eq!(facts.zero_mode(), Some(punch));
        assert!(facts.gives_back());
        // Several were under way when the first was refused: none of them skips a method.
        for errno in [libc::EOPNOTSUPP, libc::EREMOTEIO, libc::EIO] {
            assert!(facts.fallocate_failed(punch, errno));
            assert_eq!(facts.zero_mode(), Some(range));
            assert!(!facts.gives_back());
        }
        assert!(!facts.fallocate_failed(range, libc::EIO), "a real failure is reported");
        assert!(facts.fallocate_failed(range, libc::EOPNOTSUPP));
        assert_eq!(facts.zero_mode(), None);
        assert!(facts.fallocate_failed(punch, libc::EOPNOTSUPP), "a late completion");
        assert_eq!(facts.zero_mode(), None, "an earlier method does not come back");
    }

    #[test]
    fn a_removed_device_is_not_full() {
        let file = tempfile::tempfile().unwrap();
        let mut facts = FileState::new(&file, "/dev/vdc").unwrap();
        let piece = super::super::engine::Piece {
            range: 0..4096,
            place: super::super::engine::Place::At(Bytes::ZERO),
        };
        let transfer = Transfer::new(Direction::Write, piece, true);
        let errno = |facts: &FileState| {
            let cause = io::Error::from_raw_os_error(libc::ENOSPC);
            facts.failure(&transfer, cause).errno()
        };
        assert_eq!(errno(&facts), Some(libc::ENOSPC));
        // No device has this number.
        facts.device = Some((0, 1));
        assert_eq!(errno(&facts), Some(libc::ENODEV));
    }
}
