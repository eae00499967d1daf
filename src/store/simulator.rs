//! A simulation of how dm-snapshot writes a store, for the tests of its readers: one write at a time, and
//! each write visible half done.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::base::{Bytes, ChunkIx, ChunkSize, Result, Sectors};
use crate::dm::SnapshotStatus;
use crate::format::exception_store::{Entry, Header, area_offset, encode_area, entries_per_area};
use crate::io::BlockRead;

/// A small, fast generator. Each seed gives one run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Follows dm-snap-persistent.c as described at the head of `exceptions`, one write at a time.
pub struct SnapshotSimulator {
    pub random: Random,
    chunk: ChunkSize,
    pub image: Vec<u8>,
    /// Offset and content of the write in flight.
    in_flight: Option<(usize, Vec<u8>)>,
    /// Set while a full area is in flight: when that completes, the next area is the current one.
    area_is_full: bool,
    area: Vec<Entry>,
    current_area: u64,
    next_free: u64,
    /// Every exception ever put into an area, old to new.
    pub all: HashMap<u64, u64>,
    /// The exceptions held by completed writes.
    pub committed: Vec<u64>,
    uncommitted: Vec<u64>,
    origin_chunks: u64,
}

impl SnapshotSimulator {
    pub fn new(seed: u64, chunk: ChunkSize, origin_chunks: u64, areas: u64) -> Self {
        let mut random = Random(seed);
        let bytes = chunk.bytes().as_len();
        let chunks = (areas + 1) * (entries_per_area(chunk) + 1) + 2;
        let mut image = vec![0u8; Bytes(chunks * chunk.bytes().get()).as_len()];
        // A used disk: future areas are not zero until the kernel zeroes them.
        for area in 1..=areas {
            let at = area_offset(area, chunk).unwrap().as_len();
            for word in image[at..at + bytes].chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        Header { valid: true, chunk }.encode(&mut image).unwrap();
        Self {
            random,
            chunk,
            image,
            in_flight: None,
            area_is_full: false,
            area: Vec::new(),
            current_area: 0,
            next_free: 2,
            all: HashMap::new(),
            committed: Vec::new(),
            uncommitted: Vec::new(),
            origin_chunks,
        }
    }

    fn area_at(&self, area: u64) -> usize {
        area_offset(area, self.chunk).unwrap().as_len()
    }

    /// Completes the write in flight.
    pub fn finish(&mut self) {
        let Some((at, content)) = self.in_flight.take() else { return };
        self.image[at..at + content.len()].copy_from_slice(&content);
        self.committed.append(&mut self.uncommitted);
        if std::mem::take(&mut self.area_is_full) {
            self.current_area += 1;
            self.area.clear();
        }
    }

    /// Puts up to `count` exceptions into the current area and starts to write it.
    pub fn begin(&mut self, count: u64) {
        self.finish();
        let per_area = entries_per_area(self.chunk);
        for _ in 0..count {
            let old = self.random.below(self.origin_chunks);
            let room =
                (self.current_area + 2) * (per_area + 1) < self.image.len() as u64 / self.chunk.bytes().get();
            if self.all.contains_key(&old) || self.area.len() as u64 == per_area || !room {
                continue;
            }
            self.all.insert(old, self.next_free);
            self.uncommitted.push(old);
            self.area.push(Entry { old: ChunkIx(old), new: ChunkIx(self.next_free) });
            self.next_free += 1;
            if self.next_free % (per_area + 1) == 1 {
                self.next_free += 1;
            }
        }
        let bytes = self.chunk.bytes().as_len();
        if self.area.len() as u64 == per_area {
            let next = self.area_at(self.current_area + 1);
            self.image[next..next + bytes].fill(0);
            self.area_is_full = true;
        }
        let mut content = vec![0; bytes];
        encode_area(&self.area, &mut content).unwrap();
        self.in_flight = Some((self.area_at(self.current_area), content));
    }

    pub fn step(&mut self) {
        match self.random.below(4) {
            0 => self.finish(),
            1 => {
                let count = self.random.below(40);
                self.begin(count);
            }
            _ => {}
        }
    }

    pub fn status(&self) -> SnapshotStatus {
        let sectors = self.chunk.sectors().get();
        SnapshotStatus::Active {
            used: Sectors(self.next_free * sectors),
            total: Sectors(self.image.len() as u64 / 512),
            metadata: Sectors((self.current_area + 2) * sectors),
        }
    }
}

/// The store as a reader sees it, with a write in flight partly visible.
pub struct TornView<'a>(pub &'a RefCell<SnapshotSimulator>);

impl BlockRead for TornView<'_> {
    fn size(&self) -> Bytes {
        Bytes::from_len(self.0.borrow().image.len())
    }
    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        let kernel = &mut *self.0.borrow_mut();
        kernel.step();
        let at = offset.as_len();
        buffer.copy_from_slice(&kernel.image[at..at + buffer.len()]);
        if let Some((write_at, content)) = &kernel.in_flight
            && *write_at == at
        {
            // Any byte may be visible or not: far worse than any real machine.
            let share = kernel.random.below(5);
            for (byte, new) in buffer.iter_mut().zip(content) {
                if kernel.random.below(4) < share {
                    *byte = *new;
                }
            }
        }
        kernel.step();
        Ok(())
    }
}
