//! Files in memory, for tests: an engine that works on them, and the block traits for one of them.
//!
//! [`MemoryEngine`] also takes ordinary files ([`Engine::add_file`]), so that code which opens its own
//! can be tested with it; it works on them as the plain engine does.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::block::{BlockRead, BlockWrite, Durable};
use super::engine::{Buffer, Completion, Engine, EngineConfig, FileIx, Request};
use super::sync_engine::{Progress, SyncEngine, Target};
use super::transfer::{Direction, Step, Transfer};
use crate::base::{Bytes, Error, Result};
use crate::extent::Extent;

/// Largest file in memory: a test that writes at a wild offset fails instead of filling the host.
pub const MEMORY_FILE_BYTES_MAX: Bytes = Bytes::gib(1);

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    syncs: u64,
}

/// A file in memory; clones share it. Writes behind its end make it longer, as a regular file.
#[derive(Clone, Debug, Default)]
pub struct MemoryFile(Arc<Mutex<Inner>>);

impl MemoryFile {
    /// A file with this content.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Inner { bytes, syncs: 0 })))
    }

    /// A file of `size` zeros.
    #[must_use]
    pub fn zeroed(size: Bytes) -> Self {
        Self::new(vec![0; size.as_len()])
    }

    /// A copy of its content now.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// How often it was synced.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is a single copy or resize: a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As pread(2): how many bytes there were, 0 at the end.
    fn read(&self, memory: &mut [u8], at: usize) -> usize {
        let inner = self.lock();
        let rest = inner.bytes.get(at..).unwrap_or_default();
        let count = rest.len().min(memory.len());
        memory[..count].copy_from_slice(&rest[..count]);
        count
    }

    /// As pwrite(2) that takes everything.
    fn write(&self, data: &[u8], at: usize) -> std::io::Result<usize> {
        let end = at.saturating_add(data.len());
        if end > MEMORY_FILE_BYTES_MAX.as_len() {
            return Err(std::io::Error::from_raw_os_error(libc::EFBIG));
        }
        let mut inner = self.lock();
        if inner.bytes.len() < end {
            inner.bytes.resize(end, 0);
        }
        inner.bytes[at..end].copy_from_slice(data);
        Ok(data.len())
    }

    fn zero(&self, extent: Extent) {
        let mut inner = self.lock();
        let size = Bytes::from_len(inner.bytes.len());
        let (start, end) = (extent.start().min(size), extent.end().min(size));
        inner.bytes[start.as_len()..end.as_len()].fill(0);
    }

    fn count_sync(&self) {
        self.lock().syncs += 1;
    }
}

impl BlockRead for MemoryFile {
    fn size(&self) -> Bytes {
        Bytes::from_len(self.lock().bytes.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        if self.read(buffer, offset.as_len()) == buffer.len() {
            return Ok(());
        }
        let what = format!("read of {} bytes at {} of a file in memory", buffer.len(), offset.get());
        Err(Error::io(what, std::io::ErrorKind::UnexpectedEof.into()))
    }
}

impl BlockWrite for MemoryFile {
    fn write_at(&self, data: &[u8], offset: Bytes) -> Result<()> {
        self.write(data, offset.as_len()).map(drop).map_err(|error| {
            let what = format!("write of {} bytes at {} of a file in memory", data.len(), offset.get());
            Error::io(what, error)
        })
    }
}

impl Durable for MemoryFile {
    fn sync(&self) -> Result<()> {
        self.count_sync();
        Ok(())
    }
}

/// A memory file in an engine, with its own position for streams.
#[derive(Debug)]
struct MemoryTarget {
    file: MemoryFile,
    description: String,
    position: Mutex<usize>,
}

impl MemoryTarget {
    fn call(&self, transfer: &Transfer, memory: &mut [u8]) -> std::io::Result<usize> {
        let (range, at) = transfer.next(usize::MAX);
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let start = at.map_or(*position, Bytes::as_len);
        let count = match transfer.direction() {
            Direction::Read => self.file.read(&mut memory[range], start),
            Direction::Write => self.file.write(&memory[range], start)?,
        };
        if at.is_none() {
            *position += count;
        }
        Ok(count)
    }
}

impl Target for MemoryTarget {
    fn is_direct(&self) -> bool {
        false
    }

    fn run(&self, transfers: &mut [Transfer], memory: &mut [u8], _until: Option<Instant>) -> Progress {
        for transfer in transfers {
            while !transfer.is_done() {
                let answer = self.call(transfer, memory);
                if let Step::Fail(cause) = transfer.account(answer) {
                    return Progress::Ended(Err(transfer.failure(&self.description, cause)));
                }
            }
        }
        Progress::Ended(Ok(()))
    }

    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.file.zero(extent);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.file.count_sync();
        Ok(())
    }
}

/// See the module's head.
#[derive(Debug)]
pub struct MemoryEngine(SyncEngine);

impl MemoryEngine {
    /// An engine without files.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a pool that is none.
    pub fn new(config: EngineConfig) -> Result<Self> {
        SyncEngine::new(config).map(Self)
    }

    /// Registers a file in memory; its stream position is the engine's own and begins at 0.
    ///
    /// # Errors
    /// More files than an engine takes.
    pub fn add_memory(&mut self, file: &MemoryFile, description: &str) -> Result<FileIx> {
        self.0.add_target(Box::new(MemoryTarget {
            file: file.clone(),
            description: description.to_owned(),
            position: Mutex::new(0),
        }))
    }
}

impl Engine for MemoryEngine {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx> {
        self.0.add_file(file, description)
    }
    fn take_buffer(&mut self) -> Option<Buffer> {
        self.0.take_buffer()
    }
    fn give_buffer(&mut self, buffer: Buffer) {
        self.0.give_buffer(buffer);
    }
    fn submit(&mut self, request: Request) -> Result<()> {
        self.0.submit(request)
    }
    fn wait(&mut self) -> Result<Option<Completion>> {
        self.0.wait()
    }
    fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<Completion>> {
        self.0.wait_timeout(timeout)
    }
    fn gives_back(&self, file: FileIx) -> bool {
        self.0.gives_back(file)
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Piece, Place};

    crate::io::suite::engine_suite!(|config| Box::new(MemoryEngine::new(config).unwrap()));

    #[test]
    fn memory_files_are_shared_and_streams_have_a_position() {
        let config = EngineConfig { buffer_count: 1, buffer_bytes: Bytes::kib(4) };
        let mut engine = MemoryEngine::new(config).unwrap();
        let file = MemoryFile::new(b"0123456789".to_vec());
        let index = engine.add_memory(&file, "memory").unwrap();
        let mut buffer = engine.take_buffer().unwrap();
        for expected in [b"0123", b"4567"] {
            let pieces = vec![Piece { range: 0..4, place: Place::Stream }];
            engine.submit(Request::Read { token: 1, file: index, buffer, pieces, in_turn: false }).unwrap();
            let completion = engine.wait().unwrap().unwrap();
            completion.result.unwrap();
            buffer = completion.buffer.unwrap();
            assert_eq!(&buffer[..4], expected);
        }
        let pieces = vec![Piece { range: 0..4, place: Place::At(Bytes(12)) }];
        engine.submit(Request::Write { token: 2, file: index, buffer, pieces }).unwrap();
        engine.wait().unwrap().unwrap().result.unwrap();
        assert_eq!(file.content(), b"0123456789\0\x004567");
        engine.submit(Request::Sync { token: 3, file: index }).unwrap();
        engine.wait().unwrap().unwrap().result.unwrap();
        assert_eq!(file.syncs(), 1);
        let extent = Extent::new(Bytes(1), Bytes(1 << 40)).unwrap();
        engine.submit(Request::Zero { token: 4, file: index, extent }).unwrap();
        engine.wait().unwrap().unwrap().result.unwrap();
        assert_eq!(file.content()[..3], *b"0\0\0");
        assert_eq!(file.content().len(), 16);
    }

    #[test]
    fn block_traits_meet_the_end() {
        let file = MemoryFile::zeroed(Bytes(8));
        file.write_at(b"ab", Bytes(7)).unwrap();
        assert_eq!(BlockRead::size(&file), Bytes(9));
        let mut two = [0u8; 2];
        file.read_at(&mut two, Bytes(7)).unwrap();
        assert_eq!(&two, b"ab");
        assert!(crate::io::is_end_of_file(&file.read_at(&mut two, Bytes(8)).unwrap_err()));
        assert!(file.write_at(b"x", MEMORY_FILE_BYTES_MAX).is_err());
    }
}
