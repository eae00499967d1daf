//! The checksums of whole segments, as they are on a secondary now.

use std::collections::HashMap;

use crate::base::checksum::xxh3_64;
use crate::base::{Bytes, Extent, Result, SegmentIx, SegmentSize};
use crate::io::{Driver, FileIx, Piece, Place};
use crate::progress::Phase;
use crate::secondary::PAYLOAD_OFFSET;

/// Reads `segments` of the first `size` bytes of `file`, and calls `each` with the XXH3-64 of each of them, in any
/// order. `size` is a multiple of the alignment of direct I/O. Writes nothing.
///
/// # Errors
/// I/O errors; those of `each`; the interrupt's. Reads may then still be in flight.
pub fn checksums(
    driver: &mut Driver<'_>,
    file: FileIx,
    (size, segment): (Bytes, SegmentSize),
    segments: &[SegmentIx],
    each: &mut dyn FnMut(SegmentIx, u64) -> Result<()>,
) -> Result<()> {
    let extent_of = |ix: SegmentIx| {
        let start = segment.offset_of(ix)?;
        Extent::new(start, size.min(start.checked_add(segment.bytes())?)).map(|extent| (ix, extent))
    };
    let extents: Vec<(SegmentIx, Extent)> = segments.iter().filter_map(|ix| extent_of(*ix)).collect();
    driver.begin_phase(Phase::Verify, Some(extents.iter().map(|(_, extent)| extent.length()).sum()));
    let mut left = extents.into_iter().peekable();
    let mut reads = HashMap::new();
    loop {
        while left.peek().is_some()
            && let Some(buffer) = driver.engine.take_buffer()
        {
            let (ix, extent) = left.next().expect("it was seen");
            let range = PAYLOAD_OFFSET..PAYLOAD_OFFSET + extent.length().as_len();
            let pieces = vec![Piece { range, place: Place::At(extent.start()) }];
            reads.insert(driver.read(file, buffer, pieces)?, (ix, extent));
        }
        let Some(completion) = driver.next_completion(None)? else {
            if left.peek().is_some() {
                return Err(driver.out_of_buffers());
            }
            break;
        };
        let (ix, extent) = reads.remove(&completion.token).expect("every token is a read's");
        completion.result.map_err(|error| error.context("reading the secondary failed"))?;
        let buffer = completion.buffer.expect("a read gives its buffer back");
        let checksum = xxh3_64(&buffer[PAYLOAD_OFFSET..][..extent.length().as_len()]);
        driver.engine.give_buffer(buffer);
        driver.advance(extent.length());
        each(ix, checksum)?;
    }
    driver.report();
    Ok(())
}
