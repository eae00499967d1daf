//! Finds where the origin is being written now.
//!
//! Follows the exceptions of a store as the kernel adds them, area by area. This rests on facts at the head
//! of [`exceptions`](super::exceptions): entries are only appended, a full area never changes, and the
//! current one was zeroed before its first entry.
//!
//! The result is a **hint** for the order of copying, never a list of originals: the current area is read
//! once, without waiting for a write in flight. So a half-written entry may be dropped, or misread as another
//! chunk, and nothing may depend on it. Invariants: an entry outside origin or store is dropped, without an
//! error or a panic; an entry of a full area is returned exactly once; one poll reads at most
//! [`FOLLOW_BYTES_MAX`] (but at least one area) and returns at most the requested number: the rest is left to
//! the next poll.

use crate::base::limits::EXCEPTION_BATCH_MAX;
use crate::base::{Bytes, ChunkSize, Result};
use crate::dm::SnapshotStatus;
use crate::format::exception_store::{Bounds, area_offset, listed_entries};
use crate::io::BlockRead;
use crate::sys::aligned::AlignedBuffer;

use super::exceptions::{StoreDevice, current_area};

/// Most metadata read in one poll: 65,536 exceptions, more than a disk can make in a second.
pub const FOLLOW_BYTES_MAX: Bytes = Bytes::mib(1);

/// Returns the offsets of new exceptions, poll by poll: a hint, not a list of originals.
pub struct Follower<R = StoreDevice> {
    device: R,
    bounds: Bounds,
    area: u64,
    /// Entries of `area` that have been returned or dropped.
    entries_done: usize,
    buffer: AlignedBuffer,
}

impl<R: BlockRead> Follower<R> {
    /// Begins at the store's first exception. `device` may grow: its size is the maximum.
    pub(super) fn new(device: R, chunk: ChunkSize, origin_bytes: Bytes) -> Self {
        let bounds = Bounds { chunk, origin_size: origin_bytes, store_size: device.size() };
        let buffer = AlignedBuffer::zeroed(chunk.bytes().as_len());
        Self { device, bounds, area: 0, entries_done: 0, buffer }
    }

    /// Offsets on the origin of the exceptions that have appeared since the last poll, oldest first, at most
    /// `max`. Empty if the snapshot is lost, as its store is of no use then.
    ///
    /// # Errors
    /// I/O errors; the next poll retries the same area.
    pub fn poll(&mut self, status: &SnapshotStatus, max: usize) -> Result<Vec<Bytes>> {
        let SnapshotStatus::Active { metadata, .. } = status else { return Ok(Vec::new()) };
        let chunk = self.bounds.chunk;
        let Some(current) = current_area(*metadata, chunk) else { return Ok(Vec::new()) };
        let max = max.min(EXCEPTION_BATCH_MAX);
        let mut offsets = Vec::new();
        for _ in 0..(FOLLOW_BYTES_MAX.get() / chunk.bytes().get()).max(1) {
            if self.area > current || offsets.len() >= max {
                break;
            }
            let listed = self.read_area(max, &mut offsets)?;
            let area_is_done = self.entries_done >= listed;
            if self.area == current || !area_is_done {
                break;
            }
            self.area += 1;
            self.entries_done = 0;
        }
        Ok(offsets)
    }

    /// Adds the new entries of the area, up to `max` offsets in all. Returns how many entries the area has.
    fn read_area(&mut self, max: usize, offsets: &mut Vec<Bytes>) -> Result<usize> {
        let end = |offset: &Bytes| offset.checked_add(self.bounds.chunk.bytes());
        let offset = area_offset(self.area, self.bounds.chunk)
            .filter(|offset| end(offset).is_some_and(|end| end <= self.bounds.store_size));
        // The status reports more areas than the store can hold: nothing can be read.
        let Some(offset) = offset else { return Ok(0) };
        self.device.read_at(&mut self.buffer, offset)?;
        let mut listed = 0;
        for entry in listed_entries(&self.buffer) {
            listed += 1;
            if listed > self.entries_done && offsets.len() < max {
                self.entries_done = listed;
                offsets.extend(entry.place(&self.bounds).map(|(extent, _)| extent.start()));
            }
        }
        Ok(listed)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use proptest::prelude::*;

    use super::*;
    use crate::base::{ChunkIx, Sectors};
    use crate::format::exception_store::{Entry, encode_area, entries_per_area};
    use crate::store::simulator::{SnapshotSimulator, TornView};

    const CHUNK: Bytes = Bytes::kib(4);

    fn chunk() -> ChunkSize {
        ChunkSize::new(CHUNK).unwrap()
    }

    fn status(current_area: u64) -> SnapshotStatus {
        let metadata = Sectors((current_area + 2) * 8);
        SnapshotStatus::Active { used: metadata, total: Sectors(1 << 40), metadata }
    }

    /// Shows completed writes only, none half done.
    struct FinishedView<'a>(&'a RefCell<SnapshotSimulator>);

    impl BlockRead for FinishedView<'_> {
        fn size(&self) -> Bytes {
            self.0.borrow().image.size()
        }
        fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
            self.0.borrow().image.read_at(buffer, offset)
        }
    }

    const ORIGIN_CHUNKS: u64 = 3000;

    /// Polls while the kernel works, and some more rounds after it has stopped.
    fn follow<R: BlockRead>(kernel: &RefCell<SnapshotSimulator>, device: R, max: usize) -> Vec<u64> {
        let mut follower = Follower::new(device, chunk(), CHUNK * ORIGIN_CHUNKS);
        let mut found = Vec::new();
        for round in 0..500 {
            if round < 300 {
                kernel.borrow_mut().step();
            }
            let now = kernel.borrow().status();
            let offsets = follower.poll(&now, max).unwrap();
            assert!(offsets.len() <= max);
            found.extend(chunks(&offsets));
        }
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        /// The oracle is the simulated kernel's own list, in order.
        #[test]
        fn each_exception_is_found_once_and_in_order(seed: u64, max in 10usize..300) {
            let kernel = RefCell::new(SnapshotSimulator::new(seed, chunk(), ORIGIN_CHUNKS, 4));
            let found = follow(&kernel, FinishedView(&kernel), max);
            prop_assert_eq!(&found, &kernel.borrow().committed);
        }

        /// Each byte of a write in flight may be visible or not.
        #[test]
        fn a_half_written_entry_is_no_error(seed: u64, max in 10usize..300) {
            let kernel = RefCell::new(SnapshotSimulator::new(seed, chunk(), ORIGIN_CHUNKS, 40));
            let found = follow(&kernel, TornView(&kernel), max);
            prop_assert!(found.len() <= kernel.borrow().all.len());
            prop_assert!(found.iter().all(|chunk| *chunk < ORIGIN_CHUNKS));
        }
    }

    /// A store whose areas are set by a test, without a kernel.
    struct Image {
        areas: RefCell<Vec<Vec<Entry>>>,
        size: Bytes,
        reads: Cell<usize>,
    }

    impl Image {
        fn new(areas: Vec<Vec<Entry>>) -> Self {
            Self { areas: RefCell::new(areas), size: Bytes::gib(8), reads: Cell::new(0) }
        }
        fn add(&self, area: usize, entry: Entry) {
            self.areas.borrow_mut()[area].push(entry);
        }
    }

    impl BlockRead for &Image {
        fn size(&self) -> Bytes {
            self.size
        }
        fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
            self.reads.set(self.reads.get() + 1);
            let areas = self.areas.borrow();
            let area = (0..).find(|area| area_offset(*area, chunk()) == Some(offset)).unwrap();
            encode_area(&areas[Bytes(area).as_len()], buffer).unwrap();
            Ok(())
        }
    }

    /// The `index`-th exception of a store; the kernel skips the chunks of the areas.
    fn entry(old: u64, index: u64) -> Entry {
        Entry { old: ChunkIx(old), new: ChunkIx(2 + index + index / entries_per_area(chunk())) }
    }

    fn full(area: u64) -> Vec<Entry> {
        let count = entries_per_area(chunk());
        (area * count..(area + 1) * count).map(|index| entry(index, index)).collect()
    }

    fn chunks(offsets: &[Bytes]) -> Vec<u64> {
        offsets.iter().map(|offset| offset.get() / CHUNK.get()).collect()
    }

    #[test]
    fn a_poll_returns_only_new_exceptions() {
        let image = Image::new(vec![vec![entry(5, 0)], Vec::new()]);
        let mut follower = Follower::new(&image, chunk(), CHUNK * 1000);
        assert_eq!(chunks(&follower.poll(&status(0), 100).unwrap()), [5]);
        assert_eq!(follower.poll(&status(0), 100).unwrap(), []);
        image.add(0, entry(9, 1));
        image.add(0, entry(7, 2));
        assert_eq!(chunks(&follower.poll(&status(0), 100).unwrap()), [9, 7]);
        // Between two polls the area fills up and the next begins.
        image.areas.borrow_mut()[0] = full(0);
        image.add(1, entry(777, 256));
        let found = chunks(&follower.poll(&status(1), 1000).unwrap());
        assert_eq!(found, (3..256).chain([777]).collect::<Vec<_>>());
        assert_eq!(follower.poll(&status(1), 1000).unwrap(), []);
    }

    #[test]
    fn a_poll_is_bounded_and_the_next_continues() {
        let areas = 600;
        let image = Image::new((0..areas).map(full).collect());
        let mut follower = Follower::new(&image, chunk(), CHUNK * 1_000_000);
        // Within an area, at its end, and after it.
        for (max, expected) in [(100, 0..100), (156, 100..256), (300, 256..556), (0, 0..0)] {
            assert_eq!(
                chunks(&follower.poll(&status(599), max).unwrap()),
                expected.collect::<Vec<u64>>(),
                "{max}"
            );
        }
        image.reads.set(0);
        let found = follower.poll(&status(599), usize::MAX).unwrap();
        assert_eq!(image.reads.get(), 256, "1 MiB of areas");
        let mut all = chunks(&found);
        while let Some(last) = all.last().filter(|last| **last + 1 < areas * 256) {
            let next = chunks(&follower.poll(&status(599), usize::MAX).unwrap());
            assert_eq!(next.first(), Some(&(last + 1)));
            all.extend(next);
        }
        assert_eq!(all, (556..areas * 256).collect::<Vec<_>>());
    }

    #[test]
    fn impossible_entries_are_dropped() {
        let senseless = [
            // Past the origin's end, past the store's end, in a metadata area, past the origin's end.
            Entry { old: ChunkIx(1000), new: ChunkIx(3) },
            Entry { old: ChunkIx(1), new: ChunkIx(u64::MAX) },
            Entry { old: ChunkIx(1), new: ChunkIx(258) },
            Entry { old: ChunkIx(u64::MAX), new: ChunkIx(4) },
        ];
        let mut area = vec![entry(1, 0)];
        area.extend(senseless);
        area.push(entry(2, 5));
        let image = Image::new(vec![area]);
        let mut follower = Follower::new(&image, chunk(), CHUNK * 1000);
        assert_eq!(chunks(&follower.poll(&status(0), 100).unwrap()), [1, 2]);
        assert_eq!(follower.poll(&status(0), 100).unwrap(), []);
    }

    #[test]
    fn an_unusable_status_gives_no_offsets() {
        let image = Image::new(vec![full(0)]);
        let mut follower = Follower::new(&image, chunk(), CHUNK * 1000);
        let odd = SnapshotStatus::Active { used: Sectors(12), total: Sectors(16), metadata: Sectors(12) };
        for status in [SnapshotStatus::Invalid, SnapshotStatus::Overflow, odd] {
            assert_eq!(follower.poll(&status, 100).unwrap(), []);
        }
        assert_eq!(image.reads.get(), 0);
        // More areas than the store can hold.
        let small = Image { size: CHUNK * 2, ..Image::new(vec![full(0)]) };
        let mut follower = Follower::new(&small, chunk(), CHUNK * 1000);
        assert!(follower.poll(&status(u64::MAX / 64), 1000).unwrap().is_empty());
        assert!(follower.poll(&status(u64::MAX / 64), 1000).unwrap().is_empty());
    }
}
