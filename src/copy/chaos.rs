//! Test support: an engine that completes requests in random order and fails as configured, and a simulated
//! application that writes the origin while it is copied.
//!
//! The engine checks invariants of every copy: pieces are aligned for direct I/O; overlapping transfers are
//! never in flight together if one of them is a write; no more buffers are used than exist.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;
use std::time::Duration;

use super::{OriginalsProvider, Releases};
use crate::base::{Bytes, Error, Result, ResultExt as _};
use crate::extent::{Extent, Original};
use crate::io::engine::EngineConfig;
use crate::io::engine::Request;
use crate::io::{Buffer, Completion, Engine, FileIx, Piece, Place};
use crate::sys::aligned::AlignedBuffer;

/// SplitMix64: small, seeded, good enough to shuffle.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
    pub fn index(&mut self, limit: usize) -> usize {
        Bytes(self.below(Bytes::from_len(limit).get())).as_len()
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    pub fn fill(&mut self, data: &mut [u8]) {
        for word in data.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// A fault: the `after`th read or write (from 0) of the file whose description contains `file` fails.
#[derive(Clone, Debug)]
pub struct Fault {
    pub file: &'static str,
    pub write: bool,
    pub after: u64,
    pub errno: i32,
    /// A write that fails has written a random first part.
    pub torn: bool,
}

struct Registered {
    file: File,
    description: String,
    reads: u64,
    writes: u64,
    /// How often each 4 KiB block was read.
    read_blocks: BTreeMap<u64, u32>,
}

pub struct ChaosEngine {
    files: Vec<Registered>,
    /// The file whose medium is simulated apart from its cache.
    pub volatile: Option<&'static str>,
    /// The content that is certainly on its medium.
    medium: Vec<u8>,
    /// The content that will be on it once these syncs have completed.
    syncs: BTreeMap<u64, Vec<u8>>,
    pool: Vec<Buffer>,
    queue: Vec<Request>,
    rng: Rng,
    pub faults: Vec<Fault>,
    world: Option<Rc<RefCell<World>>>,
    buffers_used_max: usize,
    buffer_count: usize,
}

impl ChaosEngine {
    pub fn new(config: EngineConfig, seed: u64, world: Option<Rc<RefCell<World>>>) -> Self {
        let make = |index| Buffer::new(AlignedBuffer::zeroed(config.buffer_bytes.as_len()), index);
        let mut pool: Vec<Buffer> = (0..config.buffer_count).map(make).collect();
        let mut rng = Rng(seed);
        for buffer in &mut pool {
            // Random content, so that a buffer that is not cleared is detected.
            rng.fill(buffer);
        }
        Self {
            files: Vec::new(),
            volatile: None,
            medium: Vec::new(),
            syncs: BTreeMap::new(),
            buffer_count: pool.len(),
            pool,
            queue: Vec::new(),
            rng,
            faults: Vec::new(),
            world,
            buffers_used_max: 0,
        }
    }

    fn is_volatile(&self, file: FileIx) -> bool {
        let description = &self.files[usize::from(file.0)].description;
        self.volatile.is_some_and(|volatile| description.contains(volatile))
    }

    fn content(&self, file: FileIx) -> Vec<u8> {
        let file = &self.files[usize::from(file.0)].file;
        let length = Bytes(file.metadata().unwrap().len());
        // Aligned, because the file may be open for direct I/O.
        let mut content = AlignedBuffer::zeroed(length.align_up(Bytes(4096)).as_len());
        let mut done = 0;
        while done < content.len() {
            match file.read_at(&mut content[done..], Bytes::from_len(done).get()).unwrap() {
                0 => break,
                count => done += count,
            }
        }
        content[..length.as_len()].to_vec()
    }

    /// The disk of the volatile file loses power: each block that was not synced keeps its old content or its
    /// new.
    pub fn lose_power(&mut self, file: &File) {
        let mut content = Vec::new();
        io::Read::read_to_end(&mut &*file, &mut content).unwrap();
        self.medium.resize(content.len(), 0);
        let blocks = self.medium.chunks(4096).zip(content.chunks(4096));
        for (at, (medium, cache)) in (0u64..).zip(blocks) {
            if medium != cache && self.rng.chance(50) {
                file.write_all_at(medium, at * 4096).unwrap();
            }
        }
    }

    pub fn buffers_used_max(&self) -> usize {
        self.buffers_used_max
    }

    pub fn pool_is_whole(&self) -> bool {
        self.pool.len() == self.buffer_count
    }

    pub fn read_blocks(&self, description: &str) -> &BTreeMap<u64, u32> {
        let found = self.files.iter().find(|file| file.description.contains(description));
        &found.expect("a registered file").read_blocks
    }

    /// For every piece of a request: the file, the range in it, and whether it is written.
    fn ranges(request: &Request) -> Vec<(u16, Extent, bool)> {
        let of = |file: &FileIx, pieces: &[Piece], write| {
            let range = |piece: &Piece| match piece.place {
                Place::At(at) => {
                    let length = Bytes::from_len(piece.range.len());
                    (file.0, Extent::with_length(at, length).expect("no empty pieces"), write)
                }
                // A whole stream counts as one range.
                Place::Stream => (file.0, Extent::new(Bytes(0), Bytes(u64::MAX)).unwrap(), true),
            };
            pieces.iter().map(range).collect()
        };
        match request {
            Request::Read { file, pieces, .. } => of(file, pieces, false),
            Request::Write { file, pieces, .. } => of(file, pieces, true),
            Request::Zero { file, extent, .. } => vec![(file.0, *extent, true)],
            Request::Sync { .. } => Vec::new(),
        }
    }

    fn check(&self, request: &Request) {
        let new = Self::ranges(request);
        assert!(!new.is_empty() || matches!(request, Request::Sync { .. }), "a request without pieces");
        for (_, extent, _) in &new {
            if extent.end() != Bytes(u64::MAX) {
                assert!(extent.start().is_aligned(Bytes(4096)), "{extent} of {request:?}");
                assert!(extent.end().is_aligned(Bytes(4096)), "{extent} of {request:?}");
            }
        }
        for old in self.queue.iter().flat_map(Self::ranges) {
            for new in &new {
                let clash = old.0 == new.0 && old.1.overlaps(new.1) && (old.2 || new.2);
                assert!(!clash, "{} and {} are in flight together", old.1, new.1);
            }
        }
        for (at, one) in new.iter().enumerate() {
            for other in &new[at + 1..] {
                assert!(!one.1.overlaps(other.1), "{} and {} in one request", one.1, other.1);
            }
        }
    }

    fn fault(&self, file: FileIx, write: bool, count: u64) -> io::Result<()> {
        let description = &self.files[usize::from(file.0)].description;
        let hit =
            |fault: &&Fault| description.contains(fault.file) && fault.write == write && fault.after == count;
        match self.faults.iter().find(hit) {
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
            None => Ok(()),
        }
    }

    fn read(&mut self, file: FileIx, buffer: &mut Buffer, pieces: &[Piece]) -> Result<()> {
        let count = self.files[usize::from(file.0)].reads;
        let fault = self.fault(file, false, count);
        let known = &mut self.files[usize::from(file.0)];
        known.reads += 1;
        let what = || format!("read of {}", known.description);
        fault.io_context(what)?;
        for piece in pieces {
            let Place::At(at) = piece.place else { panic!("the copier never reads a stream") };
            known.file.read_exact_at(&mut buffer[piece.range.clone()], at.get()).io_context(what)?;
            for block in at.get() / 4096..(at.get() + Bytes::from_len(piece.range.len()).get()) / 4096 {
                *known.read_blocks.entry(block).or_default() += 1;
            }
        }
        Ok(())
    }

    fn write(&mut self, file: FileIx, buffer: &Buffer, pieces: &[Piece]) -> Result<()> {
        let count = self.files[usize::from(file.0)].writes;
        let fault = self.fault(file, true, count);
        let known = &mut self.files[usize::from(file.0)];
        known.writes += 1;
        let what = || format!("write of {}", known.description);
        let torn = self.faults.iter().any(|fault| {
            fault.torn && fault.write && fault.after == count && known.description.contains(fault.file)
        });
        if let (Err(_), true) = (&fault, torn) {
            for piece in pieces {
                let Place::At(at) = piece.place else { continue };
                // Direct I/O tears at blocks.
                let blocks = piece.range.len() / 4096;
                let end = piece.range.start + 4096 * self.rng.index(blocks + 1);
                known.file.write_all_at(&buffer[piece.range.start..end], at.get()).io_context(what)?;
            }
        }
        fault.io_context(what)?;
        for piece in pieces {
            let data = &buffer[piece.range.clone()];
            match piece.place {
                Place::At(at) => known.file.write_all_at(data, at.get()).io_context(what)?,
                Place::Stream => io::Write::write_all(&mut known.file, data).io_context(what)?,
            }
        }
        Ok(())
    }

    fn execute(&mut self, request: Request) -> Completion {
        if let Some(world) = &self.world {
            world.borrow_mut().step();
        }
        match request {
            Request::Read { token, file, mut buffer, pieces, .. } => {
                let result = self.read(file, &mut buffer, &pieces);
                Completion { token, buffer: Some(buffer), result }
            }
            Request::Write { token, file, buffer, pieces } => {
                let result = self.write(file, &buffer, &pieces);
                Completion { token, buffer: Some(buffer), result }
            }
            Request::Zero { token, file, extent } => {
                // Aligned, because the file may be open for direct I/O.
                let zeros = AlignedBuffer::zeroed(extent.length().as_len());
                let file = &self.files[usize::from(file.0)].file;
                let result = file.write_all_at(&zeros, extent.start().get()).io_context(|| "zero".to_owned());
                Completion { token, buffer: None, result }
            }
            Request::Sync { token, .. } => {
                self.medium = self.syncs.remove(&token).unwrap_or_default();
                Completion { token, buffer: None, result: Ok(()) }
            }
        }
    }
}

impl Engine for ChaosEngine {
    fn name(&self) -> &'static str {
        "chaos"
    }
    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx> {
        self.files.push(Registered {
            file: File::from(file),
            description: description.to_owned(),
            reads: 0,
            writes: 0,
            read_blocks: BTreeMap::new(),
        });
        let file = FileIx(u16::try_from(self.files.len() - 1).unwrap());
        if self.is_volatile(file) {
            self.medium = self.content(file);
        }
        Ok(file)
    }
    fn take_buffer(&mut self) -> Option<Buffer> {
        if self.pool.is_empty() {
            return None;
        }
        let at = self.rng.index(self.pool.len());
        let buffer = self.pool.swap_remove(at);
        self.buffers_used_max = self.buffers_used_max.max(self.buffer_count - self.pool.len());
        Some(buffer)
    }
    fn give_buffer(&mut self, buffer: Buffer) {
        assert!(self.pool.iter().all(|known| known.index() != buffer.index()));
        self.pool.push(buffer);
    }
    fn submit(&mut self, request: Request) -> Result<()> {
        self.check(&request);
        if let Request::Sync { token, file } = request
            && self.is_volatile(file)
        {
            // Later writes may or may not reach the medium.
            self.syncs.insert(token, self.content(file));
        }
        self.queue.push(request);
        Ok(())
    }
    fn wait_timeout(&mut self, _timeout: Duration) -> Result<Option<Completion>> {
        if self.rng.chance(5) || self.queue.is_empty() {
            return Ok(None);
        }
        let at = self.rng.index(self.queue.len());
        let request = self.queue.swap_remove(at);
        Ok(Some(self.execute(request)))
    }
    fn in_flight(&self) -> usize {
        self.queue.len()
    }
}

/// An origin under load, with copy-on-write into a store, as dm-snapshot does it.
pub struct World {
    pub origin: File,
    pub store: File,
    pub size: Bytes,
    chunk: Bytes,
    /// The origin's content at the instant.
    pub image: Vec<u8>,
    preserved: BTreeMap<u64, Original>,
    /// Where originals were preserved since the last call of `recent`.
    recent: Vec<Bytes>,
    /// Ranges where writes are not preserved.
    linear: Vec<Extent>,
    store_end: Bytes,
    rng: Rng,
    /// Percent of steps that write.
    pub busy: u64,
    /// How often this process opened the store; the application keeps writing.
    opened: u32,
    handed_out: Vec<Original>,
}

impl World {
    pub fn new(size: Bytes, chunk: Bytes, seed: u64, busy: u64) -> Rc<RefCell<Self>> {
        let mut rng = Rng(seed);
        let mut image = vec![0u8; size.as_len()];
        for block in image.chunks_mut(16384) {
            match rng.below(4) {
                0 | 1 => {}
                2 => rng.fill(block),
                _ => {
                    let at = rng.index(block.len());
                    block[at] = 1;
                }
            }
        }
        // Long runs of zeros as well.
        for segment in image.chunks_mut(65536 * 2) {
            if rng.chance(30) {
                segment.fill(0);
            }
        }
        let origin = tempfile::tempfile().unwrap();
        origin.write_all_at(&image, 0).unwrap();
        let store = tempfile::tempfile().unwrap();
        let store_end = chunk * 2;
        Rc::new(RefCell::new(Self {
            origin,
            store,
            size,
            chunk,
            image,
            preserved: BTreeMap::new(),
            recent: Vec::new(),
            linear: Vec::new(),
            store_end,
            rng,
            busy,
            opened: 0,
            handed_out: Vec::new(),
        }))
    }

    /// The copying process died; another one may open the store.
    pub fn copier_died(&mut self) {
        for _ in 0..5 {
            self.step();
        }
        self.opened = 0;
    }

    /// One step of the application, which may write.
    pub fn step(&mut self) {
        while self.rng.chance(self.busy) {
            let chunks = self.size.get().div_ceil(self.chunk.get());
            // Neighbours often change together.
            let first = self.rng.below(chunks);
            let count = 1 + self.rng.below(3);
            for chunk in first..(first + count).min(chunks) {
                self.write_chunk(chunk);
            }
        }
    }

    fn write_chunk(&mut self, chunk: u64) {
        let start = self.chunk * chunk;
        let extent = Extent::new(start, self.size.min(start + self.chunk)).unwrap();
        let is_linear = self.linear.iter().any(|linear| linear.contains(extent));
        if !is_linear && !self.preserved.contains_key(&chunk) {
            self.recent.push(start);
            let mut held = vec![0u8; extent.length().as_len()];
            self.origin.read_exact_at(&mut held, start.get()).unwrap();
            // The store's chunk is whole; its bytes past the origin's end are arbitrary.
            let mut whole = vec![0xeeu8; self.chunk.as_len()];
            whole[..held.len()].copy_from_slice(&held);
            if self.rng.chance(20) {
                self.store_end += self.chunk;
            }
            self.store.write_all_at(&whole, self.store_end.get()).unwrap();
            self.preserved.insert(chunk, Original { extent, store_offset: self.store_end });
            self.store_end += self.chunk;
        }
        let mut data = vec![0u8; extent.length().as_len()];
        if !self.rng.chance(25) {
            self.rng.fill(&mut data);
        }
        self.origin.write_all_at(&data, start.get()).unwrap();
    }

    /// Ranges where writes are not preserved.
    pub fn released(&self) -> Vec<Extent> {
        self.linear.clone()
    }

    pub fn preserved_count(&self) -> usize {
        self.preserved.len()
    }
}

/// Releases regions of a world's origin.
pub struct WorldReleases {
    pub world: Rc<RefCell<World>>,
    /// Percent of calls that report a slow release.
    pub slow: u64,
}

impl Releases for WorldReleases {
    fn release(&mut self, region: Extent) -> Result<()> {
        self.world.borrow_mut().linear.push(region);
        // The application writes to it at once.
        self.world.borrow_mut().step();
        Ok(())
    }
    fn recent(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.world.borrow_mut().recent)
    }
    fn was_slow(&mut self) -> bool {
        self.world.borrow_mut().rng.chance(self.slow)
    }
}

/// Provides the originals of a world's store.
pub struct WorldProvider {
    pub world: Rc<RefCell<World>>,
    pub batch_max: usize,
    pub invalid: bool,
}

impl OriginalsProvider for WorldProvider {
    fn open(&mut self) -> Result<(OwnedFd, String)> {
        let mut world = self.world.borrow_mut();
        world.opened += 1;
        assert!(
            world.opened <= 2,
            "the store is opened once, or twice by a copy that resumes after originals had begun"
        );
        let mut all: Vec<Original> = world.preserved.values().copied().collect();
        for at in (1..all.len()).rev() {
            let other = world.rng.index(at + 1);
            all.swap(at, other);
        }
        world.handed_out = all;
        Ok((world.store.try_clone().unwrap().into(), "the store".to_owned()))
    }
    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>> {
        let mut world = self.world.borrow_mut();
        let left = world.handed_out.len();
        Ok(world.handed_out.split_off(left - left.min(max.min(self.batch_max))))
    }
    fn check_valid(&mut self) -> Result<()> {
        if self.invalid {
            return Err(Error::new(crate::base::ErrorKind::StoreInvalid, "the snapshot became invalid"));
        }
        Ok(())
    }
}
