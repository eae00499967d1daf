//! One file or device for metadata I/O: any offset and length, past the page cache.
//!
//! Invariants:
//! - what is not aligned goes through an aligned bounce buffer of [`BOUNCE_BYTES`]; a partial block
//!   is read, changed and written back, so two writers of one block must not meet;
//! - a regular file never becomes longer than its writes reach;
//! - after a failed sync every later one fails: what was lost cannot be told.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::block::{BlockRead, BlockWrite, Durable};
use super::engine::{Piece, Place};
use super::handle::Facts;
use super::transfer::{Direction, Step, Transfer};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Error, Result, ResultExt};
use crate::sys::aligned::AlignedBuffer;
use crate::sys::block::{self, FileKind, OpenHow};

/// Size of the bounce buffer: a large read of metadata takes few calls.
pub const BOUNCE_BYTES: Bytes = Bytes::kib(256);

/// See the module's head.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    /// Unit of direct I/O on it.
    block: Bytes,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    facts: Facts,
    bounce: AlignedBuffer,
}

impl DirectFile {
    /// Opens for reading.
    ///
    /// # Errors
    /// The errno of open(2) and of asking for the block size.
    pub fn open_read(path: &Path) -> Result<Self> {
        Self::open(path, OpenHow::direct_read())
    }

    /// Opens for reading and writing.
    ///
    /// # Errors
    /// As [`DirectFile::open_read`].
    pub fn open_write(path: &Path) -> Result<Self> {
        Self::open(path, OpenHow::direct_write())
    }

    fn open(path: &Path, how: OpenHow) -> Result<Self> {
        let opened = match how.open(path) {
            // A file system without direct I/O: through the page cache then.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                OpenHow { direct: false, ..how }.open(path)
            }
            other => other,
        };
        let fd = opened.io_context(|| format!("open {}", path.display()))?;
        Self::from_fd(fd, &path.display().to_string())
    }

    /// Takes an open handle over, direct or not; `description` names it in errors.
    ///
    /// # Errors
    /// A pipe or directory, and the errno of asking.
    pub fn from_fd(fd: OwnedFd, description: &str) -> Result<Self> {
        let facts = Facts::new(&fd, description)?;
        let block = match facts.kind {
            FileKind::Block => {
                block::logical_block(&fd).io_context(|| format!("ask {description} for its block size"))?
            }
            FileKind::Regular => DIRECT_IO_ALIGN,
            FileKind::Stream | FileKind::Other => return Err(facts.wrong_kind(Direction::Read)),
        };
        let bounce = AlignedBuffer::zeroed(BOUNCE_BYTES.as_len());
        Ok(Self { file: File::from(fd), block, state: Mutex::new(State { facts, bounce }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The bounce buffer is filled before each use, and the latch is set in one step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size now, with an error where it cannot be asked for.
    ///
    /// # Errors
    /// The errno of fstat(2) or BLKGETSIZE64.
    pub fn checked_size(&self) -> Result<Bytes> {
        block::size(&self.file).io_context(|| format!("find the size of {}", self.state().facts.description))
    }

    /// Fills `memory` from `at`, both aligned where the file is direct; returns how far the file
    /// reaches.
    fn fill(&self, memory: &mut [u8], at: Bytes, direct: bool) -> (usize, io::Result<()>) {
        let piece = Piece { range: 0..memory.len(), place: Place::At(at) };
        let mut transfer = Transfer::new(Direction::Read, piece, direct);
        let mut reached = 0;
        while !transfer.is_done() {
            let (range, at) = transfer.next(usize::MAX);
            let start = range.start;
            let answer = self.file.read_at(&mut memory[range], at.unwrap_or_default().get());
            if let Ok(count) = &answer {
                reached = reached.max(start + count);
            }
            if let Step::Fail(cause) = transfer.account(answer) {
                return (reached, Err(cause));
            }
        }
        (reached, Ok(()))
    }

    fn store(&self, memory: &[u8], at: Bytes, direct: bool) -> io::Result<()> {
        let piece = Piece { range: 0..memory.len(), place: Place::At(at) };
        let mut transfer = Transfer::new(Direction::Write, piece, direct);
        while !transfer.is_done() {
            let (range, at) = transfer.next(usize::MAX);
            let answer = self.file.write_at(&memory[range], at.unwrap_or_default().get());
            if let Step::Fail(cause) = transfer.account(answer) {
                return Err(cause);
            }
        }
        Ok(())
    }

    /// Writes `data` at `at` through the bounce buffer; `data` fits it with a block to spare.
    fn write_bounced(&self, state: &mut State, data: &[u8], at: Bytes) -> io::Result<()> {
        let size = block::size(&self.file)?;
        let start = at.align_down(self.block);
        let end = at + Bytes::from_len(data.len());
        let length = (end.align_up(self.block) - start).as_len();
        let direct = state.facts.direct;
        let memory = &mut state.bounce[..length];
        memory.fill(0);
        let (_, read) = self.fill(memory, start, direct);
        match read {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
            _ => {}
        }
        let inside = (at - start).as_len();
        memory[inside..inside + data.len()].copy_from_slice(data);
        self.store(memory, start, direct)?;
        if state.facts.kind == FileKind::Regular && end.align_up(self.block) > size.max(end) {
            self.file.set_len(size.max(end).get())?;
        }
        Ok(())
    }

    /// Bytes of `length` at `at` that the bounce buffer takes in one go.
    fn portion(&self, at: Bytes, length: usize) -> usize {
        let inside = (at - at.align_down(self.block)).as_len();
        length.min(BOUNCE_BYTES.as_len() - inside)
    }

    fn error(state: &State, direction: Direction, length: usize, at: Bytes, cause: io::Error) -> Error {
        let piece = Piece { range: 0..length, place: Place::At(at) };
        state.facts.failure(&Transfer::new(direction, piece, false), cause)
    }
}

impl AsFd for DirectFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl BlockRead for DirectFile {
    /// Zero where the kernel does not tell (see [`DirectFile::checked_size`]).
    fn size(&self) -> Bytes {
        block::size(&self.file).unwrap_or_default()
    }

    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        let mut state = self.state();
        let length = buffer.len();
        let mut done = 0;
        while done < length {
            let at = offset + Bytes::from_len(done);
            let portion = self.portion(at, length - done);
            let start = at.align_down(self.block);
            let inside = (at - start).as_len();
            let whole = Bytes::from_len(inside + portion).align_up(self.block).as_len();
            let direct = state.facts.direct;
            let (reached, result) = self.fill(&mut state.bounce[..whole], start, direct);
            if reached < inside + portion {
                let cause = result.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                return Err(Self::error(&state, Direction::Read, length, offset, cause));
            }
            buffer[done..done + portion].copy_from_slice(&state.bounce[inside..inside + portion]);
            done += portion;
        }
        Ok(())
    }
}

impl BlockWrite for DirectFile {
    fn write_at(&self, data: &[u8], offset: Bytes) -> Result<()> {
        let mut state = self.state();
        let mut done = 0;
        while done < data.len() {
            let at = offset + Bytes::from_len(done);
            let portion = self.portion(at, data.len() - done);
            let result = self.write_bounced(&mut state, &data[done..done + portion], at);
            result.map_err(|cause| Self::error(&state, Direction::Write, data.len(), offset, cause))?;
            done += portion;
        }
        Ok(())
    }
}

impl Durable for DirectFile {
    fn sync(&self) -> Result<()> {
        let mut state = self.state();
        state.facts.check_sync()?;
        let answer = self.file.sync_all();
        state.facts.note_sync(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryFile;
    use crate::io::suite::folder;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..Default::default() })]
        #[test]
        fn any_writes_give_the_bytes_of_a_vector(
            size in 0usize..20_000,
            writes in proptest::collection::vec((0u64..700_000, 1usize..9_000, any::<u8>()), 1..12),
            long in 250_000usize..600_000,
        ) {
            let folder = folder();
            let path = folder.path().join("file");
            std::fs::write(&path, vec![9u8; size]).unwrap();
            let file = DirectFile::open_write(&path).unwrap();
            prop_assert!(block::is_direct(&file).unwrap());
            let model = MemoryFile::new(vec![9u8; size]);
            for (at, length, byte) in writes.into_iter().chain([(77, long, 3)]) {
                let data = vec![byte; length];
                file.write_at(&data, Bytes(at)).unwrap();
                model.write_at(&data, Bytes(at)).unwrap();
            }
            file.sync().unwrap();
            let content = model.content();
            prop_assert!(std::fs::read(&path).unwrap() == content);
            prop_assert_eq!(BlockRead::size(&file), Bytes::from_len(content.len()));
            let mut read = vec![0u8; content.len() - 5];
            file.read_at(&mut read, Bytes(5)).unwrap();
            prop_assert!(read == content[5..]);
            let past = file.read_at(&mut read, Bytes(6)).unwrap_err();
            prop_assert!(crate::io::is_end_of_file(&past), "{}", past);
        }
    }

    #[test]
    fn a_pipe_or_a_directory_is_refused() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(DirectFile::from_fd(reader.into(), "pipe").is_err());
        let error = DirectFile::open_read(Path::new("/nonexistent/x")).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOENT));
        assert!(error.what().contains("/nonexistent/x"));
    }

    #[test]
    fn a_failed_sync_is_never_followed_by_a_good_one() {
        let folder = folder();
        let path = folder.path().join("file");
        std::fs::write(&path, [0u8; 4096]).unwrap();
        let file = DirectFile::open_write(&path).unwrap();
        file.sync().unwrap();
        let failed = Err(io::Error::from_raw_os_error(libc::EIO));
        assert!(file.state().facts.note_sync(failed).is_err());
        let error = file.sync().unwrap_err();
        assert_eq!(error.errno(), Some(libc::EIO));
    }
}
