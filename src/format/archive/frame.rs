//! A whole frame in one piece of memory: head control block, payload, tail control block.

use super::control::{decode, encode, same_facts};
use super::{ArchiveError, Control, FrameFacts, Layout, PAYLOAD_OFFSET, Side};
use crate::base::Extent;
use crate::format::bytes::{BLOCK_BYTES, is_zero};

/// A frame that has been checked.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Its facts and extents.
    pub control: Control<'a>,
    /// The bytes of the payload in use.
    pub payload: &'a [u8],
}

/// Adds both control blocks around a payload at [`PAYLOAD_OFFSET`] of `memory`, and zeros after the payload
/// up to the segment size, or in an increment to the next block. The caller computes `facts.payload_checksum`.
///
/// # Errors
/// As [`encode`]; [`ArchiveError::Truncated`] if `memory` is shorter than a frame.
pub fn seal(
    layout: &Layout,
    facts: &FrameFacts,
    extents: &[Extent],
    memory: &mut [u8],
) -> Result<(), ArchiveError> {
    let expected = layout.stored_frame(facts.payload_length).as_len();
    let found = memory.len();
    let memory = memory.get_mut(..expected).ok_or(ArchiveError::Truncated { found, expected })?;
    let (head, rest) = memory.split_at_mut(PAYLOAD_OFFSET);
    let (payload, tail) = rest.split_at_mut(layout.stored_payload(facts.payload_length).as_len());
    encode(layout, facts, extents, Side::Head, head)?;
    encode(layout, facts, extents, Side::Tail, tail)?;
    payload[facts.payload_length.as_len()..].fill(0);
    Ok(())
}

/// Checks and decodes the frame at the front of `memory`, whose sequence must be `sequence`.
///
/// # Errors
/// The first fault found. Any change of the frame is detected, except in version 1 one of the payload that leaves
/// its CRC-32C the same.
pub fn open<'a>(layout: &Layout, sequence: u64, memory: &'a [u8]) -> Result<Frame<'a>, ArchiveError> {
    let control = open_head(layout, sequence, memory)?;
    let payload_length = control.facts.payload_length;
    let expected = layout.stored_frame(payload_length).as_len();
    let found = memory.len();
    let memory = memory.get(..expected).ok_or(ArchiveError::Truncated { found, expected })?;
    let (head, rest) = memory.split_at(PAYLOAD_OFFSET);
    let (payload, tail) = rest.split_at(layout.stored_payload(payload_length).as_len());
    decode(layout, Side::Tail, tail)?;
    if !same_facts(&head[..BLOCK_BYTES], tail) {
        return Err(ArchiveError::Torn);
    }
    let facts = &control.facts;
    let (payload, padding) = payload.split_at(facts.payload_length.as_len());
    let computed = layout.version.payload_checksum(payload);
    if computed != facts.payload_checksum {
        return Err(ArchiveError::PayloadChecksum {
            algorithm: layout.version.checksum_name(),
            kind: facts.kind,
            origin_offset: facts.origin_offset.get(),
            computed,
            expected: facts.payload_checksum,
        });
    }
    if !is_zero(padding) {
        return Err(ArchiveError::Padding { what: "the payload's padding" });
    }
    Ok(Frame { control, payload })
}

/// Checks the head control block of frame `sequence` alone.
///
/// # Errors
/// The first fault found.
pub fn open_head<'a>(layout: &Layout, sequence: u64, block: &'a [u8]) -> Result<Control<'a>, ArchiveError> {
    let control = decode(layout, Side::Head, block)?;
    if control.facts.sequence == sequence {
        Ok(control)
    } else {
        Err(ArchiveError::Sequence { found: control.facts.sequence })
    }
}
