//! Does the disk, or the server, beneath a path answer?
//!
//! What the kernel has in memory needs neither, so reading that tells nothing. Here a few blocks are read past the page cache. A disk
//! that is suspended keeps a reader in the kernel, and no signal ends that wait: a child process reads, see [`inquiry`].
//!
//! Every error is an answer. Must not change what it reads.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, open, posix_fadvise};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;
use nix::unistd::{Whence, fsync, lseek};

use super::found::{Source, StatQuestion};
use super::inquiry::{self, Question, WORDS, Words};

/// Bytes of one read, and the alignment of its place.
const BLOCK_BYTES: u16 = 4096;

/// Memory that a direct read takes.
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES as usize]);

/// A path, and at which offsets of the file or device there it is to be read.
#[derive(Debug)]
pub struct Reads {
    at: StatQuestion,
    offsets: Vec<u64>,
}

impl Reads {
    /// Of a file the first data at or after each offset is read. Without `offsets`, and where `path` leads to neither a
    /// file nor a block device, it is looked at alone.
    ///
    /// # Errors
    /// A path with a zero byte.
    pub fn new(path: &Path, offsets: Vec<u64>) -> io::Result<Self> {
        Ok(Self { at: StatQuestion::new(path, Source::Server)?, offsets })
    }

    /// False where there is no answer within [`inquiry::TIMEOUT_FOR_NAMED`], or before `is_wanted` returns false.
    pub fn are_answered(self, is_wanted: &dyn Fn() -> bool) -> bool {
        let answer = inquiry::ask_one_while(self, inquiry::TIMEOUT_FOR_NAMED, is_wanted);
        !answer.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    }
}

// SAFETY: nix's functions make one system call each; they take a C string as it is. `block` is on the stack. Nothing
// allocates, locks or panics.
unsafe impl Question for Reads {
    type Answer = ();

    fn ask(&self) -> Result<Words, i32> {
        let found = StatQuestion::answer(self.at.ask()?);
        if self.offsets.is_empty() || !(found.is_file || found.block_device.is_some()) {
            return Ok([0; WORDS]);
        }
        let file =
            open(self.at.path(), OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|errno| errno as i32)?;
        let mut block = Block([0; BLOCK_BYTES as usize]);
        for offset in &self.offsets {
            let wanted = i64::try_from(*offset).map_err(|_| libc::EFBIG)?;
            let at = match lseek(&file, wanted, Whence::SeekData) {
                Ok(data) => data,
                // No data: what the file system knows of the file can be written back, which asks its disk as well.
                Err(Errno::ENXIO) if found.is_file => {
                    fsync(&file).map_err(|errno| errno as i32)?;
                    continue;
                }
                // A device has data everywhere.
                Err(_) => wanted,
            };
            let at = at - at % i64::from(BLOCK_BYTES);
            let read =
                fcntl(&file, FcntlArg::F_SETFL(OFlag::O_DIRECT)).and_then(|_| pread(&file, &mut block.0, at));
            if read == Err(Errno::EINVAL) {
                // Not directly: then what the page cache has of it goes first.
                let _ = fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()));
                let _ =
                    posix_fadvise(&file, at, i64::from(BLOCK_BYTES), PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                pread(&file, &mut block.0, at).map_err(|errno| errno as i32)?;
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
    fn files_and_what_is_none_are_answered_and_stay_as_they_are() {
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
