//! Applies the originals to the fuzzy copy.
//!
//! Originals come in batches. Each batch is sorted by destination, adjacent originals are merged, and they
//! are grouped by segment. A segment is one unit of work that owns one buffer: (read the segment back, if its
//! checksum is kept;) read its originals from the store into their places; write what changed.
//!
//! Invariants:
//! - writes to one segment are never in flight together: a segment is one unit of work in a batch, and a
//!   batch ends before the next begins;
//! - memory: one batch, and the engine's buffers;
//! - a segment that is read back is checked before anything is applied to it.

use std::collections::HashMap;

use super::checksums::Checksums;
use super::origin::{payload, payload_position, zero_gaps};
use super::ports::OriginalsProvider;
use super::schedule::{Schedule, Work};
use super::sink::Sink;
use crate::base::limits::{DIRECT_IO_ALIGN, EXCEPTION_BATCH_MAX};
use crate::base::{Bytes, Error, ErrorKind, Result};
use crate::extent::originals::{arrange, by_segment, total};
use crate::extent::{Extent, Original};
use crate::io::Driver;
use crate::io::{Buffer, Completion, FileIx, Piece, Place};
use crate::secondary::{Secondary, Segment, is_zero, zero_padding};

/// The originals applied or appended.
#[derive(Clone, Copy, Debug, Default)]
pub struct OriginalsStats {
    pub(super) count: u64,
    pub(super) bytes: Bytes,
}

impl OriginalsStats {
    pub(super) fn add(&mut self, batch: &Batch) {
        self.count += batch.count;
        self.bytes += total(&batch.originals);
    }
}

/// Some of the store's originals, arranged for reading.
pub(super) struct Batch {
    /// Originals in the batch before arranging.
    count: u64,
    /// Sorted, merged, cut to the block list.
    pub(super) originals: Vec<Original>,
}

/// The source of originals while they are processed.
pub(super) struct Store<'a> {
    pub(super) provider: &'a mut dyn OriginalsProvider,
    pub(super) file: FileIx,
}

impl Store<'_> {
    /// The next batch, arranged; None at the end.
    pub(super) fn next_batch(&mut self, schedule: &Schedule) -> Result<Option<Batch>> {
        let batch = self.provider.next_batch(EXCEPTION_BATCH_MAX)?;
        if batch.is_empty() {
            return Ok(None);
        }
        let count = Bytes::from_len(batch.len()).get();
        Ok(Some(Batch { count, originals: arranged(batch, schedule)? }))
    }
}

/// Sorts a batch by destination, merges originals that continue each other, and cuts it to the block list.
///
/// # Errors
/// [`ErrorKind::Kernel`] if two originals overlap, or one is past the origin's end: the content of the
/// store is wrong.
fn arranged(batch: Vec<Original>, schedule: &Schedule) -> Result<Vec<Original>> {
    let batch = arrange(batch);
    for pair in batch.windows(2) {
        if pair[0].extent.overlaps(pair[1].extent) {
            return Err(nonsense(format!("two originals for {}", pair[1].extent)));
        }
    }
    if let Some(last) = batch.last().filter(|last| last.extent.end() > schedule.size()) {
        return Err(nonsense(format!("an original at {} past the origin's end", last.extent)));
    }
    let listed = |original: &Original| schedule.parts_of(original.extent);
    if batch.iter().all(|original| listed(original) == [original.extent]) {
        return Ok(batch);
    }
    let cut = |original: &Original| {
        let original = *original;
        listed(&original).into_iter().filter_map(move |part| original.part(part))
    };
    Ok(batch.iter().flat_map(cut).collect())
}

fn nonsense(what: String) -> Error {
    Error::new(ErrorKind::Kernel, format!("the store holds {what}"))
        .next("this should not happen: keep the store (--keep-store) and report it")
}

/// What to read from the store so that an original is at `position` of a buffer; the end is rounded up to the
/// alignment of direct I/O.
pub(super) fn store_piece(original: &Original, position: usize) -> Piece {
    let length = original.extent.length().align_up(DIRECT_IO_ALIGN).as_len();
    Piece { range: position..position + length, place: Place::At(original.store_offset) }
}

/// Sorted extents with adjacent ones merged.
pub(super) fn merged(originals: impl Iterator<Item = Extent>) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for extent in originals {
        match extents.last_mut() {
            Some(last) if last.end() == extent.start() => {
                *last = Extent::new(last.start(), extent.end()).expect("two neighbours are not empty");
            }
            _ => extents.push(extent),
        }
    }
    extents
}

/// The originals of one segment.
struct Group {
    work: Work,
    originals: Vec<Original>,
}

enum Step {
    /// The segment is being read back.
    Reread(Group),
    /// Its originals are being read.
    Fetch(Group),
}

struct Overlay<'a, 'd> {
    driver: &'a mut Driver<'d>,
    store: FileIx,
    secondary: &'a mut dyn Secondary,
    sink: &'a mut Sink,
    checksums: &'a mut Checksums,
    reads: HashMap<u64, Step>,
}

/// Applies every original of `store` to the secondary.
pub(super) fn run(
    driver: &mut Driver<'_>,
    store: &mut Store<'_>,
    schedule: &Schedule,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
) -> Result<OriginalsStats> {
    let mut stats = OriginalsStats::default();
    while let Some(batch) = store.next_batch(schedule)? {
        stats.add(&batch);
        let mut overlay =
            Overlay { driver, store: store.file, secondary, sink, checksums, reads: HashMap::new() };
        overlay.run_batch(&batch.originals, schedule)?;
    }
    Ok(stats)
}

impl Overlay<'_, '_> {
    fn run_batch(&mut self, originals: &[Original], schedule: &Schedule) -> Result<()> {
        let mut groups = by_segment(originals, schedule.segment()).peekable();
        loop {
            while groups.peek().is_some() && self.sink.has_room() {
                let Some(buffer) = self.driver.engine.take_buffer() else { break };
                let (ix, originals) = groups.next().expect("it was seen");
                let work = schedule.work(ix).expect("an original was cut to the block list");
                self.start(Group { work, originals }, buffer)?;
            }
            match self.driver.next_completion(None)? {
                Some(completion) => self.complete(completion)?,
                None if groups.peek().is_some() => return Err(self.driver.out_of_buffers()),
                None => return Ok(()),
            }
        }
    }

    fn segment<'w>(work: &'w Work, checksum: Option<u64>, zero: bool) -> Segment<'w> {
        Segment { ix: work.ix, extent: work.extent, valid: &work.valid, checksum, zero }
    }

    /// True if the buffer must hold the whole segment.
    fn is_whole(&self) -> bool {
        self.secondary.is_framed() || self.checksums.is_kept()
    }

    fn start(&mut self, group: Group, mut buffer: Buffer) -> Result<()> {
        if !self.is_whole() {
            return self.fetch(group, buffer);
        }
        zero_gaps(&group.work, &mut buffer);
        match self.secondary.stored(&Self::segment(&group.work, None, false)) {
            None => {
                let length = group.work.extent.length().as_len();
                buffer[crate::secondary::PAYLOAD_OFFSET..][..length].fill(0);
                self.fetch(group, buffer)
            }
            Some(pieces) => {
                let token = self.driver.read(self.sink.file, buffer, pieces)?;
                self.reads.insert(token, Step::Reread(group));
                Ok(())
            }
        }
    }

    fn fetch(&mut self, group: Group, buffer: Buffer) -> Result<()> {
        let base = group.work.extent.start();
        let piece =
            |original: &Original| store_piece(original, payload_position(base, original.extent.start()));
        let pieces = group.originals.iter().map(piece).collect();
        let token = self.driver.read(self.store, buffer, pieces)?;
        self.reads.insert(token, Step::Fetch(group));
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<()> {
        let Some(completion) = self.sink.complete(self.driver, completion)? else { return Ok(()) };
        let step = self.reads.remove(&completion.token).expect("a token is the sink's or a read's");
        let buffer = completion.buffer.expect("a read gives its buffer back");
        match step {
            Step::Reread(group) => {
                completion.result.map_err(|error| error.context("reading the secondary back failed"))?;
                self.check(&group.work, &buffer)?;
                self.fetch(group, buffer)
            }
            Step::Fetch(group) => {
                completion
                    .result
                    .map_err(|error| error.context("reading originals from the store failed"))?;
                self.apply(&group, buffer)
            }
        }
    }

    fn check(&self, work: &Work, memory: &[u8]) -> Result<()> {
        let expected = self.checksums.before_overlay(work.ix);
        self.secondary.check_stored(&Self::segment(work, expected, false), memory, true)?;
        check_payload(self.checksums, expected, work, memory, self.secondary.description())
    }

    fn apply(&mut self, group: &Group, mut buffer: Buffer) -> Result<()> {
        // The last original was read to a whole block; zero the payload past the origin's end.
        zero_padding(&mut buffer, payload_position(group.work.extent.start(), group.work.extent.end()));
        let changed = merged(group.originals.iter().map(|original| original.extent));
        let (mut checksum, mut zero) = (None, false);
        if self.is_whole() {
            let data = payload(&group.work, &buffer);
            zero = is_zero(data);
            let value = self.checksums.of(data, zero);
            self.checksums.set(group.work.ix, value);
            checksum = Some(value);
        }
        let bytes = changed.iter().map(|extent| extent.length()).sum();
        let placement =
            self.secondary.overlay(&Self::segment(&group.work, checksum, zero), &changed, &mut buffer)?;
        self.sink.put(self.driver, buffer, placement)?;
        self.driver.advance(bytes);
        Ok(())
    }
}

/// Compares a payload that was read back with the checksum that it must have, if known.
pub(super) fn check_payload(
    checksums: &Checksums,
    expected: Option<u64>,
    work: &Work,
    memory: &[u8],
    secondary: &str,
) -> Result<()> {
    let Some(expected) = expected else { return Ok(()) };
    let data = payload(work, memory);
    let found = checksums.of(data, is_zero(data));
    if found == expected {
        return Ok(());
    }
    Err(Error::bad_data(format!(
        "{secondary} does not hold what was written to it: the segment at {} of the origin has XXH3-64 \
         {found:016x} instead of {expected:016x}",
        work.extent
    ))
    .next("do not use this copy: check the secondary's medium and its cabling, and copy again"))
}
