//! Packing the originals behind the fuzzy data of an archive, for restore to apply last.
//!
//! Originals are sorted by destination within a batch and packed one behind the other into frames as
//! full as they get. Nothing is read back, so this serves a pipe.
//!
//! Memory: one batch, and the engine's buffers.

use std::collections::{HashMap, VecDeque};

use super::driver::{Driver, Sink};
use super::overlay::{OriginalsStats, Store, store_pieces};
use super::schedule::Schedule;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Result};
use crate::extent::{Extent, Original};
use crate::io::{Buffer, Completion, FileIx};
use crate::secondary::{PAYLOAD_OFFSET, Secondary, zero_padding};

struct Append<'a, 'd> {
    driver: &'a mut Driver<'d>,
    store: FileIx,
    secondary: &'a mut dyn Secondary,
    sink: &'a mut Sink,
    reads: HashMap<u64, Vec<Extent>>,
    /// Payload bytes of one frame.
    capacity: Bytes,
}

/// Appends every original of `store`; see the module's head.
pub(super) fn run(
    driver: &mut Driver<'_>,
    store: &mut Store<'_>,
    schedule: &Schedule,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
) -> Result<OriginalsStats> {
    let mut stats = OriginalsStats::default();
    while let Some(batch) = store.next_batch(schedule)? {
        stats.count += Bytes::from_len(batch.len()).get();
        stats.bytes += batch.iter().map(|original| original.extent.length()).sum();
        let capacity = schedule.segment().bytes();
        let mut append =
            Append { driver, store: store.file, secondary, sink, reads: HashMap::new(), capacity };
        append.run_batch(cut(batch, capacity))?;
    }
    Ok(stats)
}

/// Cuts originals that are longer than a frame: a chunk may be larger than a segment.
fn cut(batch: Vec<Original>, capacity: Bytes) -> VecDeque<Original> {
    let mut cut = VecDeque::with_capacity(batch.len());
    for original in batch {
        let mut at = original.extent.start();
        while let Some(extent) = Extent::new(at, original.extent.end().min(at + capacity)) {
            let store_offset = original.store_offset + (at - original.extent.start());
            cut.push_back(Original { extent, store_offset });
            at = extent.end();
        }
    }
    cut
}

/// Takes as many originals from the front of `waiting` as one frame holds. Answers them with their
/// positions in the buffer.
fn pack(waiting: &mut VecDeque<Original>, capacity: Bytes, extents_max: usize) -> Vec<(Original, usize)> {
    let mut packed: Vec<(Original, usize)> = Vec::new();
    let mut extents = 0;
    let mut used = Bytes::ZERO;
    while let Some(original) = waiting.front() {
        let continues = packed.last().is_some_and(|(last, _)| last.extent.end() == original.extent.start());
        let fits = used + original.extent.length() <= capacity && (continues || extents < extents_max);
        // A piece that direct I/O must round up would push the next one off its alignment.
        if !fits || !used.is_aligned(DIRECT_IO_ALIGN) {
            break;
        }
        extents += usize::from(!continues);
        packed.push((*original, PAYLOAD_OFFSET + used.as_len()));
        used += original.extent.length();
        waiting.pop_front();
    }
    packed
}

impl Append<'_, '_> {
    fn run_batch(&mut self, mut waiting: VecDeque<Original>) -> Result<()> {
        loop {
            while !waiting.is_empty() {
                let Some(buffer) = self.driver.engine.take_buffer() else { break };
                self.start(&mut waiting, buffer)?;
            }
            match self.driver.next(None)? {
                Some(completion) => self.complete(completion)?,
                None if !waiting.is_empty() => return Err(self.driver.out_of_buffers()),
                None => return Ok(()),
            }
        }
    }

    fn start(&mut self, waiting: &mut VecDeque<Original>, buffer: Buffer) -> Result<()> {
        let packed = pack(waiting, self.capacity, self.secondary.append_extents_max());
        let mut extents: Vec<Extent> = Vec::new();
        for (original, _) in &packed {
            match extents.last_mut() {
                Some(last) if last.end() == original.extent.start() => {
                    *last = Extent::new(last.start(), original.extent.end())
                        .expect("two neighbours are not empty");
                }
                _ => extents.push(original.extent),
            }
        }
        let token = self.driver.read(self.store, buffer, store_pieces(packed.into_iter()))?;
        self.reads.insert(token, extents);
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<()> {
        let Some(completion) = self.sink.complete(self.driver, completion)? else { return Ok(()) };
        let extents = self.reads.remove(&completion.token).expect("a token is the sink's or a read's");
        completion.result.map_err(|error| error.context("reading originals from the store failed"))?;
        let mut buffer = completion.buffer.expect("a read gives its buffer back");
        let bytes: Bytes = extents.iter().map(|extent| extent.length()).sum();
        zero_padding(&mut buffer, PAYLOAD_OFFSET + bytes.as_len());
        let placement = self.secondary.append(&extents, &mut buffer)?;
        self.sink.put(self.driver, buffer, placement)?;
        self.driver.advance(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn original(start: u64, length: u64) -> Original {
        Original {
            extent: Extent::with_length(Bytes(start), Bytes(length)).unwrap(),
            store_offset: Bytes(start * 2),
        }
    }

    #[test]
    fn frames_are_full_but_aligned_and_within_the_extent_limit() {
        let mut waiting = VecDeque::from([
            original(0, 4096),
            original(4096, 4096),
            original(16384, 4096),
            original(32768, 4096),
        ]);
        let packed = pack(&mut waiting, Bytes(1 << 20), 2);
        assert_eq!(packed.len(), 3);
        assert_eq!(packed[2].1, PAYLOAD_OFFSET + 8192);
        assert_eq!(waiting.len(), 1);

        let mut waiting = VecDeque::from([original(0, 512), original(4096, 4096)]);
        assert_eq!(pack(&mut waiting, Bytes(65536), 9).len(), 1);
        let mut waiting = VecDeque::from([original(0, 65536), original(65536, 4096)]);
        assert_eq!(pack(&mut waiting, Bytes(65536), 9).len(), 1);
        assert_eq!(cut(vec![original(0, 1 << 20)], Bytes(65536)).len(), 16);
    }
}
