//! Checks whether the disk or server of a path answers.
//!
//! A read from the page cache does not show this, so a few blocks are read past the cache. A read from a suspended disk
//! waits in the kernel, and no signal ends that wait: a child process does the reads, see [`child_probe`].
//!
//! Every error counts as an answer. Must not change what it reads.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, open, posix_fadvise};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;
use nix::unistd::fsync;

use super::block;
use super::child_probe::{self, Question, WORDS, Words};
use super::path_stat::{Source, StatQuestion};
use crate::base::Bytes;

/// Bytes of one read, and the alignment of its offset.
const BLOCK_BYTES: u16 = 4096;

/// Memory aligned for a direct read.
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES as usize]);

/// Reads from the file or device at a path.
#[derive(Debug)]
pub struct Reads {
    stat: StatQuestion,
    offsets: Vec<u64>,
}

impl Reads {
    /// One read at each of `offsets`; in a file, of the first data at or after the offset. If there are no offsets, or
    /// `path` is neither a file nor a block device, there is only a statx(2).
    ///
    /// # Errors
    /// A path with a zero byte.
    pub fn new(path: &Path, offsets: Vec<u64>) -> io::Result<Self> {
        Ok(Self { stat: StatQuestion::new(path, Source::Server)?, offsets })
    }

    /// False if there is no answer within [`child_probe::TIMEOUT_FOR_NAMED`], or before `is_wanted` returns false.
    pub fn are_answered(self, is_wanted: &dyn Fn() -> bool) -> bool {
        let answer = child_probe::ask_one_while(self, child_probe::TIMEOUT_FOR_NAMED, is_wanted);
        !answer.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    }
}

// SAFETY: each function of nix, and `block::seek_data`, makes one system call, and passes a C string unchanged.
// `memory` is on the stack. Nothing allocates, locks or panics: an `io::Error` of an errno has no memory of its own.
unsafe impl Question for Reads {
    type Answer = ();

    fn ask(&self) -> Result<Words, i32> {
        let found = StatQuestion::answer(self.stat.ask()?);
        if self.offsets.is_empty() || !(found.is_file || found.block_device.is_some()) {
            return Ok([0; WORDS]);
        }
        let file =
            open(self.stat.path(), OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|errno| errno as i32)?;
        let mut memory = Block([0; BLOCK_BYTES as usize]);
        for offset in &self.offsets {
            let at = match block::seek_data(&file, Bytes(*offset)) {
                Ok(Some(data)) => data,
                Ok(None) if found.is_file && *offset > 0 => continue,
                // The file has no data to read. A sync of its metadata needs the disk as well, and has no data to
                // write.
                Ok(None) if found.is_file => {
                    fsync(&file).map_err(|errno| errno as i32)?;
                    continue;
                }
                // Devices do not support SEEK_DATA.
                _ => Bytes(*offset),
            };
            let at = i64::try_from(at.get()).map_err(|_| libc::EFBIG)?;
            let at = at - at % i64::from(BLOCK_BYTES);
            let read = fcntl(&file, FcntlArg::F_SETFL(OFlag::O_DIRECT))
                .and_then(|_| pread(&file, &mut memory.0, at));
            if read == Err(Errno::EINVAL) {
                // No direct I/O here: drop the block from the page cache, then read.
                let _ = fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()));
                let _ =
                    posix_fadvise(&file, at, i64::from(BLOCK_BYTES), PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                pread(&file, &mut memory.0, at).map_err(|errno| errno as i32)?;
            }
        }
        Ok([0; WORDS])
    }

    fn answer(_: Words) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_file_answers_and_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join(name);
        std::fs::write(of("file"), vec![7; 10_000]).unwrap();
        let holes = std::fs::File::create(of("holes")).unwrap();
        holes.set_len(1 << 20).unwrap();
        std::fs::File::create(of("empty")).unwrap();
        nix::unistd::mkfifo(&of("fifo"), Mode::S_IRUSR).unwrap();
        let state = |name: &str| std::fs::metadata(of(name)).and_then(|found| found.modified()).ok();
        for name in ["file", "holes", "empty", "fifo", "missing", "."] {
            let before = state(name);
            let reads = Reads::new(&of(name), vec![0, 9_000, 1 << 40]).unwrap();
            let asked = reads.ask();
            assert_eq!(asked, if name == "missing" { Err(libc::ENOENT) } else { Ok([0; WORDS]) }, "{name}");
            assert!(reads.are_answered(&|| true), "{name}");
            assert_eq!(state(name), before);
        }
    }
}
