//! Writes the content of a chain into one whole archive.
//!
//! The data frames of the new archive are those of the chain's whole archive; what the increments hold follows as
//! originals, which a restore writes over the data. So the chain is read once, from front to back, each frame is
//! checked before its bytes are used, and no space is needed but that of the new archive. What a later archive replaces
//! is left out: it is zero in a data frame, and an original that replaces it is in no frame twice.
//!
//! Invariants:
//! - the new archive gets its name only when every archive of the chain was read to its end and found good;
//! - memory: the engine's buffers, and what a [`Chain`] and an [`Archive`] need.

use std::collections::HashSet;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::FrameConsumer;
use super::chain::{Chain, Link, engine_config_for_chain};
use super::input::{read_archive, with_state};
use crate::base::checksum::xxh3_64;
use crate::base::{Bytes, Extent, Result};
use crate::extent::{BlockList, ExtentSet};
use crate::format::archive::{EXTENTS_MAX, FrameKind, Layout, MapEntry};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver, FileIx};
use crate::progress::{Observer, Phase};
use crate::secondary::archive::Archive;
use crate::secondary::archive_read::{CheckedFrame, FrameChecker, SegmentBits};
use crate::secondary::{PAYLOAD_OFFSET, Placement, Secondary as _, Segment, zero_padding};

/// The result of a merge. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct MergeReport {
    /// The archives that were read, the whole one first.
    pub archives: Vec<String>,
    /// The new archive.
    pub merged: String,
    /// Its id.
    pub archive: Uuid,
    /// Bytes of the origin in the frames that were read.
    pub read_bytes: Bytes,
    /// Of those, bytes that are in the new archive.
    pub kept_bytes: Bytes,
    /// Length of the new archive.
    pub written_bytes: Bytes,
    /// Duration of the whole merge.
    pub seconds: f64,
}

/// Writes the content of `chain` to `archive`, whose segments are those of the chain's whole archive.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a damaged archive; I/O errors; the interrupt's. Each
/// states how the new archive is left.
pub fn write(
    mut archive: Archive,
    chain: &Chain,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<MergeReport> {
    let mut engine = open_engine(engine_config_for_chain(chain), EnginePreference::Auto)?;
    let mut io = Driver::new(engine.as_mut(), observer, interrupt);
    write_all(&mut archive, chain, &mut io).map_err(|error| {
        io.drain(Duration::MAX, true);
        match archive.abandon() {
            Ok(state) => with_state(error, state),
            Err(undo) => error.with_failed_undo(undo),
        }
    })
}

/// What the new archive's map calls present or zero: everything but what was not copied.
#[must_use]
pub fn block_list_of(chain: &Chain) -> Vec<Extent> {
    let (first, size) = (&chain.links[0].archive, chain.last().superblock().origin_size);
    let whole = Extent::new(Bytes::ZERO, size);
    let copied = whole.into_iter().flat_map(|whole| chain.absent.gaps_in(whole));
    BlockList::new(copied).with_parts_max(first.superblock().segment, EXTENTS_MAX).runs().to_vec()
}

fn write_all(archive: &mut Archive, chain: &Chain, io: &mut Driver<'_>) -> Result<MergeReport> {
    let last = chain.last().superblock();
    archive.set_instant(last.instant_utc_ns);
    let block_list = block_list_of(chain);
    archive.restrict(&block_list);
    let file = archive.attach(io.engine)?;
    let bytes = |link: &Link| link.archive.totals().present_bytes + link.archive.totals().originals_bytes;
    let read_bytes = chain.links.iter().map(bytes).sum();
    io.begin_phase(Phase::Data, Some(read_bytes));
    let mut merger = Merger {
        layout: chain.links[0].archive.superblock().layout(),
        block_list: block_list.into_iter().collect(),
        archive,
        file,
        owned: &chain.links[0].owned,
        open: OpenFrame::new(chain.links[0].archive.superblock().segment.bytes()),
        writes: HashSet::new(),
        kept: Bytes::ZERO,
        written: Bytes::ZERO,
    };
    merger.blocks(io, |archive, memory| archive.opening(memory))?;
    for link in &chain.links {
        merger.owned = &link.owned;
        let shown = link.archive.path().display().to_string();
        let mut checker = FrameChecker::new(link.archive.superblock().clone(), &shown);
        read_archive(&link.archive, io, &mut checker, &mut merger)?;
    }
    merger.flush(io)?;
    merger.settle(io)?;
    merger.blocks(io, |archive, memory| archive.closing(memory))?;
    let (kept_bytes, written_bytes) = (merger.kept, merger.written);
    io.report();
    io.begin_phase(Phase::Finish, None);
    archive.seal()?;
    io.sync(file)?;
    archive.finish()?;
    Ok(MergeReport {
        archives: chain.links.iter().map(|link| link.archive.path().display().to_string()).collect(),
        merged: archive.description().to_owned(),
        archive: archive.archive_id().unwrap_or_default(),
        read_bytes,
        kept_bytes,
        written_bytes,
        seconds: io.now().as_secs_f64(),
    })
}

struct Merger<'a> {
    archive: &'a mut Archive,
    file: FileIx,
    /// That of the chain's whole archive.
    layout: Layout,
    block_list: ExtentSet,
    /// What the archive that is being read owns.
    owned: &'a ExtentSet,
    /// The frame of originals that is being filled.
    open: OpenFrame,
    /// The tokens of writes in flight.
    writes: HashSet<u64>,
    kept: Bytes,
    written: Bytes,
}

impl FrameConsumer for Merger<'_> {
    fn map(&mut self, _entry: MapEntry) {}

    fn frame(
        &mut self,
        io: &mut Driver<'_>,
        frame: &CheckedFrame,
        _seen: &SegmentBits,
        buffer: Buffer,
    ) -> Result<()> {
        match (frame.facts.kind, frame.is_packed) {
            (FrameKind::Map, _) => io.engine.give_buffer(buffer),
            (_, true) => self.originals(io, frame, buffer)?,
            (_, false) => self.data(io, frame, buffer)?,
        }
        io.advance(frame.extents.iter().map(|extent| extent.length()).sum());
        Ok(())
    }

    fn completed(&mut self, io: &mut Driver<'_>, completion: Completion) -> Result<()> {
        assert!(self.writes.remove(&completion.token), "every token is a frame's or a write's");
        if let Some(buffer) = completion.buffer {
            io.engine.give_buffer(buffer);
        }
        completion.result.map_err(|error| error.context("writing the new archive failed"))
    }

    fn has_room(&self) -> bool {
        true
    }
}

impl Merger<'_> {
    /// A data frame of the whole archive. What it does not own any more becomes zero.
    fn data(&mut self, io: &mut Driver<'_>, frame: &CheckedFrame, mut buffer: Buffer) -> Result<()> {
        let (start, length) = (frame.facts.origin_offset, frame.facts.payload_length);
        let extent = Extent::with_length(start, length).expect("a checked data frame is within the origin");
        let kept: ExtentSet =
            frame.extents.iter().flat_map(|extent| self.owned.intersection_with(*extent)).collect();
        if kept.is_empty() {
            io.engine.give_buffer(buffer);
            return Ok(());
        }
        let position = |at: Bytes| PAYLOAD_OFFSET + (at - start).as_len();
        for gap in kept.gaps_in(extent) {
            buffer[position(gap.start())..position(gap.end())].fill(0);
        }
        zero_padding(&mut buffer, position(extent.end()));
        let valid: Vec<Extent> = self.block_list.intersection_with(extent).collect();
        let checksum = Some(xxh3_64(&buffer[PAYLOAD_OFFSET..position(extent.end())]));
        let segment =
            Segment { ix: self.layout.segment.index_of(start), extent, valid: &valid, checksum, zero: false };
        let placement = self.archive.place(&segment, &mut buffer)?;
        self.kept += kept.total();
        self.put(io, buffer, placement)
    }

    /// Packed extents: originals, or the data of an increment. They are packed anew, as far as they are owned.
    fn originals(&mut self, io: &mut Driver<'_>, frame: &CheckedFrame, buffer: Buffer) -> Result<()> {
        for (extent, at) in frame.parts() {
            let owned: Vec<Extent> = self.owned.intersection_with(extent).collect();
            for part in owned {
                let from = PAYLOAD_OFFSET + (at + (part.start() - extent.start())).as_len();
                let mut rest = Some((part, &buffer[from..from + part.length().as_len()]));
                while let Some((part, bytes)) = rest {
                    if !self.open.takes(part) {
                        self.flush(io)?;
                    }
                    rest = self.open.add(part, bytes);
                }
            }
        }
        io.engine.give_buffer(buffer);
        Ok(())
    }

    /// Writes the frame that is being filled.
    fn flush(&mut self, io: &mut Driver<'_>) -> Result<()> {
        if self.open.extents.is_empty() {
            return Ok(());
        }
        let mut buffer = self.free_buffer(io)?;
        let (extents, bytes) = self.open.take();
        buffer[PAYLOAD_OFFSET..PAYLOAD_OFFSET + bytes.len()].copy_from_slice(&bytes);
        zero_padding(&mut buffer, PAYLOAD_OFFSET + bytes.len());
        self.kept += Bytes::from_len(bytes.len());
        let placement = self.archive.append(&extents, &mut buffer)?;
        self.put(io, buffer, placement)
    }

    fn put(&mut self, io: &mut Driver<'_>, buffer: Buffer, placement: Placement) -> Result<()> {
        self.written += placement.pieces.iter().map(|piece| Bytes::from_len(piece.range.len())).sum();
        let token = io.write(self.file, buffer, placement.pieces)?;
        self.writes.insert(token);
        Ok(())
    }

    /// The blocks before and after the frames, one after the other.
    fn blocks(
        &mut self,
        io: &mut Driver<'_>,
        mut make: impl FnMut(&mut Archive, &mut [u8]) -> Result<Option<Placement>>,
    ) -> Result<()> {
        loop {
            let mut buffer = self.free_buffer(io)?;
            match make(self.archive, &mut buffer) {
                Ok(Some(placement)) => self.put(io, buffer, placement)?,
                other => {
                    io.engine.give_buffer(buffer);
                    other?;
                    return self.settle(io);
                }
            }
        }
    }

    fn free_buffer(&mut self, io: &mut Driver<'_>) -> Result<Buffer> {
        loop {
            if let Some(buffer) = io.engine.take_buffer() {
                return Ok(buffer);
            }
            if self.writes.is_empty() {
                return Err(io.out_of_buffers());
            }
            self.next_write(io)?;
        }
    }

    fn next_write(&mut self, io: &mut Driver<'_>) -> Result<()> {
        let writes = &self.writes;
        let completion = io.next_of(&|token| writes.contains(&token))?;
        self.completed(io, completion.expect("writes are in flight"))
    }

    /// Waits until all writes have completed.
    fn settle(&mut self, io: &mut Driver<'_>) -> Result<()> {
        while !self.writes.is_empty() {
            self.next_write(io)?;
        }
        Ok(())
    }
}

/// A frame of originals that is being filled: from several frames of several archives, so that it is full.
struct OpenFrame {
    extents: Vec<Extent>,
    bytes: Vec<u8>,
    capacity: usize,
}

impl OpenFrame {
    fn new(capacity: Bytes) -> Self {
        Self { extents: Vec::new(), bytes: Vec::new(), capacity: capacity.as_len() }
    }

    /// True if the frame has room for `extent`, or its beginning, and the extents stay in order.
    fn takes(&self, extent: Extent) -> bool {
        let Some(last) = self.extents.last() else { return true };
        let is_in_order = last.end() <= extent.start();
        let continues = last.end() == extent.start();
        is_in_order && self.bytes.len() < self.capacity && (continues || self.extents.len() < EXTENTS_MAX)
    }

    /// Adds `extent`, whose content is `bytes`, as far as there is room; returns the rest.
    fn add<'b>(&mut self, extent: Extent, bytes: &'b [u8]) -> Option<(Extent, &'b [u8])> {
        let (now, later) = bytes.split_at(bytes.len().min(self.capacity - self.bytes.len()));
        let end = extent.start() + Bytes::from_len(now.len());
        self.bytes.extend_from_slice(now);
        match self.extents.last_mut() {
            Some(last) if last.end() == extent.start() => {
                *last = Extent::new(last.start(), end).expect("neighbours are not empty");
            }
            _ => self.extents.extend(Extent::new(extent.start(), end)),
        }
        Extent::new(end, extent.end()).map(|rest| (rest, later))
    }

    fn take(&mut self) -> (Vec<Extent>, Vec<u8>) {
        (std::mem::take(&mut self.extents), std::mem::take(&mut self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_filled_in_order() {
        let extent = |start, end| Extent::new(Bytes(start), Bytes(end)).unwrap();
        let mut open = OpenFrame::new(Bytes(8192));
        assert_eq!(open.add(extent(4096, 8192), &[1; 4096]), None);
        assert!(!open.takes(extent(0, 4096)), "frames ascend");
        assert!(open.takes(extent(8192, 20480)));
        let bytes = [2; 12288];
        assert_eq!(open.add(extent(8192, 20480), &bytes), Some((extent(12288, 20480), &bytes[4096..])));
        assert!(!open.takes(extent(12288, 20480)), "it is full");
        let (extents, bytes) = open.take();
        assert_eq!((extents, bytes.len()), (vec![extent(4096, 12288)], 8192));
        let mut open = OpenFrame::new(Bytes::mib(16));
        let mut count = 0;
        while open.takes(extent(count * 8192, count * 8192 + 512)) {
            assert_eq!(open.add(extent(count * 8192, count * 8192 + 512), &[3; 512]), None);
            count += 1;
        }
        assert_eq!(count, 500);
    }
}
