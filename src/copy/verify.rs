//! Checks whether the secondary holds what was written to it: re-reads every segment and compares its checksum
//! with the one computed when it was written; an archive's own blocks are decoded as well.
//!
//! Reads past the page cache with direct I/O. If a filesystem does not support that, the cache was dropped after
//! the sync. Writes nothing.

use std::collections::HashMap;

use super::checksums::Checksums;
use super::origin::{payload, zero_gaps};
use super::overlay::check_payload;
use super::schedule::{Schedule, Work};
use crate::base::{Bytes, Result};
use crate::io::Driver;
use crate::io::{Buffer, Completion, FileIx};
use crate::progress::Phase;
use crate::secondary::{PAYLOAD_OFFSET, Secondary, Segment};

enum Read {
    Segment(Work),
    Extra(u64),
}

struct Verify<'a, 'd> {
    driver: &'a mut Driver<'d>,
    secondary: &'a dyn Secondary,
    checksums: &'a Checksums,
    file: FileIx,
    reads: HashMap<u64, Read>,
    bytes: Bytes,
}

/// Verifies everything in `schedule`; returns the number of bytes compared.
pub(super) fn run(
    driver: &mut Driver<'_>,
    schedule: &Schedule,
    secondary: &dyn Secondary,
    file: FileIx,
    checksums: &Checksums,
) -> Result<Bytes> {
    driver.begin_phase(Phase::Verify, Some(schedule.total()));
    let mut verify = Verify { driver, secondary, checksums, file, reads: HashMap::new(), bytes: Bytes::ZERO };
    let mut works = schedule.works().map(Read::Segment);
    let mut extras = 0u64;
    let mut next = works.next();
    loop {
        if next.is_none() && secondary.extra(extras).is_some() {
            next = Some(Read::Extra(extras));
            extras += 1;
        }
        if let Some(read) = next.take() {
            let Some(buffer) = verify.driver.engine.take_buffer() else {
                next = Some(read);
                match verify.driver.next_completion(None)? {
                    Some(completion) => verify.complete(completion)?,
                    None => return Err(verify.driver.out_of_buffers()),
                }
                continue;
            };
            verify.start(read, buffer)?;
            next = works.next();
            continue;
        }
        match verify.driver.next_completion(None)? {
            Some(completion) => verify.complete(completion)?,
            None => break,
        }
    }
    verify.driver.report();
    Ok(verify.bytes)
}

impl Verify<'_, '_> {
    fn start(&mut self, read: Read, mut buffer: Buffer) -> Result<()> {
        let pieces = match &read {
            Read::Extra(unit) => self.secondary.extra(*unit),
            Read::Segment(work) => {
                zero_gaps(work, &mut buffer);
                self.secondary.stored(&segment(work, None))
            }
        };
        match (pieces, read) {
            (Some(pieces), read) => {
                let token = self.driver.read(self.file, buffer, pieces)?;
                self.reads.insert(token, read);
            }
            (None, Read::Segment(work)) => {
                // Nothing is stored for a segment of zeros; its checksum must be that of zeros.
                let length = work.extent.length().as_len();
                buffer[PAYLOAD_OFFSET..PAYLOAD_OFFSET + length].fill(0);
                self.compare(&work, &buffer)?;
                self.driver.engine.give_buffer(buffer);
            }
            (None, Read::Extra(_)) => self.driver.engine.give_buffer(buffer),
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<()> {
        let read = self.reads.remove(&completion.token).expect("every token is a read's");
        completion.result.map_err(|error| error.context("re-reading the secondary failed"))?;
        let buffer = completion.buffer.expect("a read gives its buffer back");
        match read {
            Read::Segment(work) => {
                let checksum = self.checksums.get(work.ix);
                self.secondary.check_stored(&segment(&work, checksum), &buffer, false)?;
                self.compare(&work, &buffer)?;
            }
            Read::Extra(unit) => self.secondary.check_extra(unit, &buffer)?,
        }
        self.driver.engine.give_buffer(buffer);
        Ok(())
    }

    fn compare(&mut self, work: &Work, memory: &[u8]) -> Result<()> {
        check_payload(
            self.checksums,
            self.checksums.get(work.ix),
            work,
            memory,
            self.secondary.description(),
        )?;
        self.bytes += Bytes::from_len(payload(work, memory).len());
        self.driver.advance(work.valid_bytes());
        Ok(())
    }
}

fn segment(work: &Work, checksum: Option<u64>) -> Segment<'_> {
    Segment { ix: work.ix, extent: work.extent, valid: &work.valid, checksum, zero: false }
}
