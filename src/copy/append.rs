//! Appends the originals to the fuzzy data of an archive; a restore applies them last.
//!
//! Originals are sorted by destination within a batch, and packed one after the other into frames that are as
//! full as possible. Nothing is read back, so this works on a pipe.
//!
//! Memory: one batch, and the engine's buffers.

use std::collections::{HashMap, VecDeque};

use super::overlay::{OriginalsStats, Store, merged, store_piece};
use super::schedule::Schedule;
use super::sink::Sink;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Result};
use crate::extent::{Extent, Original};
use crate::io::Driver;
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

/// Appends every original of `store` to the archive.
pub(super) fn run(
    driver: &mut Driver<'_>,
    store: &mut Store<'_>,
    schedule: &Schedule,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
) -> Result<OriginalsStats> {
    let mut stats = OriginalsStats::default();
    while let Some(batch) = store.next_batch(schedule)? {
        stats.add(&batch);
        let capacity = schedule.segment().bytes();
        let mut append =
            Append { driver, store: store.file, secondary, sink, reads: HashMap::new(), capacity };
        append.run_batch(batch.originals.into())?;
    }
    Ok(stats)
}

/// Takes as many originals from the front of `waiting` as one frame holds; the last one may be taken in part.
/// Returns them with their positions in the buffer.
fn pack(waiting: &mut VecDeque<Original>, capacity: Bytes, extents_max: usize) -> Vec<(Original, usize)> {
    let mut packed: Vec<(Original, usize)> = Vec::new();
    let mut extents = 0;
    let mut used = Bytes::ZERO;
    while let Some(original) = waiting.pop_front() {
        let continues = packed.last().is_some_and(|(last, _)| last.extent.end() == original.extent.start());
        let start = original.extent.start();
        // A piece that direct I/O rounds up would misalign the next one.
        let room = if used.is_aligned(DIRECT_IO_ALIGN) { capacity - used } else { Bytes::ZERO };
        let fitting = Extent::with_length(start, room.min(original.extent.length()))
            .filter(|_| continues || extents < extents_max)
            .and_then(|extent| original.part(extent));
        let Some(part) = fitting else {
            waiting.push_front(original);
            break;
        };
        extents += usize::from(!continues);
        packed.push((part, PAYLOAD_OFFSET + used.as_len()));
        used += part.extent.length();
        let rest = Extent::new(part.extent.end(), original.extent.end());
        if let Some(rest) = rest.and_then(|rest| original.part(rest)) {
            waiting.push_front(rest);
        }
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
            match self.driver.next_completion(None)? {
                Some(completion) => self.complete(completion)?,
                None if !waiting.is_empty() => return Err(self.driver.out_of_buffers()),
                None => return Ok(()),
            }
        }
    }

    fn start(&mut self, waiting: &mut VecDeque<Original>, buffer: Buffer) -> Result<()> {
        let packed = pack(waiting, self.capacity, self.secondary.append_extents_max());
        let extents = merged(packed.iter().map(|(original, _)| original.extent));
        let pieces = packed.iter().map(|(original, position)| store_piece(original, *position)).collect();
        let token = self.driver.read(self.store, buffer, pieces)?;
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

        // An original longer than a frame continues in the next frame.
        let mut waiting = VecDeque::from([original(0, 4096), original(8192, 131_072)]);
        let frames: Vec<_> = std::iter::from_fn(|| {
            Some(pack(&mut waiting, Bytes(65536), 9)).filter(|frame| !frame.is_empty())
        })
        .collect();
        let lengths: Vec<u64> = frames
            .iter()
            .map(|frame| frame.iter().map(|(part, _)| part.extent.length().get()).sum())
            .collect();
        assert_eq!(lengths, [65536, 65536, 4096]);
        assert_eq!(frames[1][0].0.extent.start(), Bytes(8192 + 61440));
        assert_eq!(frames[1][0].0.store_offset, Bytes(16384 + 61440));
    }
}
