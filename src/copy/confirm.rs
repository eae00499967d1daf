//! Checks whether the segments that an earlier process recorded are still on the secondary.
//!
//! If the secondary may have been detached meanwhile, every segment is read back and compared with its
//! recorded checksum. If it was attached all the time, only a sample is read back, since another process may have
//! written to it. Lost segments are copied again, as long as the origin still holds them. If nothing else
//! proves that the secondary is the copy's target, this check has to: all segments must be there, and at
//! least one must hold something other than zeros.
//!
//! A segment to which originals were being applied may hold some of them, so its checksum proves nothing. Its
//! earlier content had been synced, and all its originals are applied to it again; so it is accepted if all
//! other segments are right. (A frame of an archive has checksums of its own.)
//!
//! Invariants:
//! - nothing is written, and the origin is not read;
//! - a segment that was not read back, or that differs, is trusted in two cases only: the secondary was
//!   attached all the time and no segment of the sample differs, or originals were being applied to it as
//!   described above.
//!
//! This module does not know which process recorded the segments, nor where the record is.

use std::collections::{BTreeSet, HashMap};

use super::checksums::Checksums;
use super::origin::{payload, zero_gaps};
use super::ports::{OriginalsProvider, PlacementLog, ResumePoint};
use super::schedule::{Schedule, Work};
use super::sink::drain;
use crate::base::limits::EXCEPTION_BATCH_MAX;
use crate::base::{Bytes, Error, Result, SegmentIx, SegmentSize};
use crate::extent::Extent;
use crate::io::Driver;
use crate::io::{Completion, Engine, FileIx};
use crate::progress::{Observer, Phase};
use crate::secondary::identity::Recognition;
use crate::secondary::{PlacedSegment, Secondary, Segment, is_zero};

/// Segments in a sample, evenly spread over the recorded ones.
const SAMPLE: usize = 64;

/// The arguments of [`confirm`].
pub struct ConfirmJob<'a> {
    /// A new engine, configured by [`engine_config`](crate::secondary::engine_config).
    pub engine: &'a mut dyn Engine,
    /// The origin's size.
    pub origin_size: Bytes,
    /// The parts of the origin that are copied.
    pub block_list: Vec<Extent>,
    /// Unit of copying.
    pub segment: SegmentSize,
    /// The reopened secondary. It is left as it is.
    pub secondary: Box<dyn Secondary>,
    /// The originals.
    pub originals: &'a mut dyn OriginalsProvider,
    /// Where an earlier process stopped.
    pub resumed: ResumePoint,
    /// Receives progress events.
    pub observer: &'a dyn Observer,
    /// Polled at least every 100 ms; an error ends it.
    pub interrupt: &'a dyn Fn() -> Result<()>,
}

/// Checks whether [`job::run`](super::job::run) would trust the segments that an earlier process has placed.
/// Writes nothing.
///
/// # Errors
/// Those of [`job::run`](super::job::run) before it writes.
pub fn confirm(job: ConfirmJob<'_>) -> Result<()> {
    let ConfirmJob { engine, mut secondary, mut resumed, observer, interrupt, .. } = job;
    let mut driver = Driver::new(engine, observer, interrupt);
    let look = || {
        let schedule = Schedule::new(job.block_list, job.origin_size, job.segment)?;
        let checksums = Checksums::new(schedule.segment_count(), schedule.segment().bytes(), false);
        let overlaid = overlaid(&schedule, secondary.as_ref(), &resumed, Some(job.originals))?;
        let file = secondary.attach(driver.engine)?;
        let facts = (&checksums, &overlaid);
        run(&mut driver, &schedule, secondary.as_mut(), file, &mut resumed, facts, None)
    };
    let outcome = look();
    drain(&mut driver, false);
    secondary.leave();
    outcome.map_err(|error| error.state("nothing was written: everything is as the killed copy left it"))
}

/// Segments to which an earlier process may have applied originals: all that have any, since the store keeps
/// them all.
pub(super) fn overlaid(
    schedule: &Schedule,
    secondary: &dyn Secondary,
    resumed: &ResumePoint,
    originals: Option<&mut dyn OriginalsProvider>,
) -> Result<BTreeSet<SegmentIx>> {
    let mut overlaid = BTreeSet::new();
    let may_be = resumed.originals_begun && !secondary.appends();
    let Some(provider) = originals.filter(|_| may_be) else { return Ok(overlaid) };
    provider.open()?;
    loop {
        let batch = provider.next_batch(EXCEPTION_BATCH_MAX)?;
        if batch.is_empty() {
            return Ok(overlaid);
        }
        let ix = |offset| schedule.segment().index_of(offset).get();
        for extent in batch.iter().map(|original| original.extent) {
            overlaid.extend((ix(extent.start())..=ix(extent.end() - Bytes(1))).map(SegmentIx));
        }
    }
}

struct Confirm<'a, 'd> {
    driver: &'a mut Driver<'d>,
    secondary: &'a dyn Secondary,
    checksums: &'a Checksums,
    /// Segments to which originals may have been applied.
    overlaid: &'a BTreeSet<SegmentIx>,
    reads: HashMap<u64, (Work, PlacedSegment)>,
    found: ReadBack,
}

/// The result of reading back.
#[derive(Default)]
struct ReadBack {
    lost: BTreeSet<SegmentIx>,
    /// Segments that are right and hold something other than zeros.
    proofs: u64,
    /// Segments whose checksum proves nothing any more.
    unverifiable: u64,
}

/// Removes the segments from `resumed` that are lost.
pub(super) fn run(
    driver: &mut Driver<'_>,
    schedule: &Schedule,
    secondary: &mut dyn Secondary,
    file: FileIx,
    resumed: &mut ResumePoint,
    (checksums, overlaid): (&Checksums, &BTreeSet<SegmentIx>),
    progress: Option<&mut (dyn PlacementLog + '_)>,
) -> Result<()> {
    let known = secondary.recognition();
    if resumed.placed.is_empty() && known != Recognition::Unproven {
        return Ok(());
    }
    let mut read = |placed: &[PlacedSegment]| {
        read_back(driver, schedule, secondary, file, placed, (checksums, overlaid))
    };
    let mut found = ReadBack::default();
    if known == Recognition::Uninterrupted {
        found = read(&sample(&resumed.placed))?;
    }
    if known != Recognition::Uninterrupted || !found.lost.is_empty() {
        found = read(&resumed.placed)?;
    }
    if known == Recognition::Unproven {
        return check_proven(secondary, &found);
    }
    let ReadBack { lost, unverifiable, .. } = found;
    if lost.is_empty() {
        if unverifiable > 0 && known != Recognition::Uninterrupted {
            driver.note(format!(
                "{unverifiable} segments could not be checked: originals were being applied to them"
            ));
        }
        return Ok(());
    }
    check_can_be_copied_again(schedule, secondary, resumed, &lost)?;
    driver.note(format!(
        "{} segments on {} are lost: copying them again",
        lost.len(),
        secondary.description()
    ));
    resumed.placed.retain(|segment| !lost.contains(&segment.ix));
    // Before anything is written, because the place of a lost segment may be assigned to another one.
    if let Some(progress) = progress {
        progress.rewrite(&resumed.placed)?;
    }
    for work in lost.iter().filter_map(|ix| schedule.work(*ix)) {
        secondary.forget(&segment(&work, None));
    }
    Ok(())
}

fn sample(placed: &[PlacedSegment]) -> Vec<PlacedSegment> {
    let mut sorted = placed.to_vec();
    sorted.sort_by_key(|segment| segment.ix);
    let step = sorted.len().div_ceil(SAMPLE).max(1);
    let last = sorted.last().copied();
    let mut sample: Vec<PlacedSegment> = sorted.into_iter().step_by(step).collect();
    sample.extend(last.filter(|last| sample.last().is_some_and(|taken| taken.ix != last.ix)));
    sample
}

/// Fails unless the segments read back prove that the secondary is the copy's target; no other fact does.
fn check_proven(secondary: &dyn Secondary, found: &ReadBack) -> Result<()> {
    let why = match (found.lost.len(), found.proofs) {
        (0, 0) => "only zeros had been written to it".to_owned(),
        (0, _) => return Ok(()),
        (lost, _) => format!("{lost} segments on it differ from what was written"),
    };
    Err(Error::refused(format!(
        "whether {} is the copy's target is unknown: its serial number or filesystem does not identify it uniquely, \
         and {why}",
        secondary.description()
    ))
    .next("connect the copy's target, and try again; or run 'tidemark recover', and copy again"))
}

fn check_can_be_copied_again(
    schedule: &Schedule,
    secondary: &dyn Secondary,
    resumed: &ResumePoint,
    lost: &BTreeSet<SegmentIx>,
) -> Result<()> {
    let is_released = |ix: &&SegmentIx| {
        schedule.work(**ix).is_some_and(|work| {
            work.valid.iter().any(|part| resumed.released.iter().any(|released| released.overlaps(*part)))
        })
    };
    let gone = lost.iter().filter(is_released).count();
    let why = if gone > 0 {
        format!("{gone} of them were released, so the origin no longer holds their content at the instant")
    } else if resumed.originals_begun {
        "originals were being applied to them, so their correct content is unknown".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::bad_data(format!(
        "{} segments on {} differ from what was written, and {why}",
        lost.len(),
        secondary.description()
    ))
    .next(
        "if this is another target of the same name, connect the right one and try again; else run 'tidemark recover', and \
         copy again: do not rely on a secondary that has lost data after it confirmed a sync",
    ))
}

/// Reads `placed` back and compares the segments.
fn read_back(
    driver: &mut Driver<'_>,
    schedule: &Schedule,
    secondary: &dyn Secondary,
    file: FileIx,
    placed: &[PlacedSegment],
    (checksums, overlaid): (&Checksums, &BTreeSet<SegmentIx>),
) -> Result<ReadBack> {
    let listed = placed.iter().filter_map(|segment| Some((schedule.work(segment.ix)?, *segment)));
    driver.begin_phase(Phase::Verify, Some(listed.clone().map(|(work, _)| work.valid_bytes()).sum()));
    let (reads, found) = (HashMap::new(), ReadBack::default());
    let mut confirm = Confirm { driver, secondary, checksums, overlaid, reads, found };
    let mut listed = listed.peekable();
    loop {
        while listed.peek().is_some()
            && let Some(mut buffer) = confirm.driver.engine.take_buffer()
        {
            let (work, placed) = listed.next().expect("it was seen");
            zero_gaps(&work, &mut buffer);
            match secondary.stored(&segment(&work, placed.checksum)) {
                Some(pieces) => {
                    let token = confirm.driver.read(file, buffer, pieces)?;
                    confirm.reads.insert(token, (work, placed));
                }
                // All zero: nothing is stored for it.
                None => confirm.driver.engine.give_buffer(buffer),
            }
        }
        match confirm.driver.next_completion(None)? {
            Some(completion) => confirm.complete(completion)?,
            None if listed.peek().is_some() => return Err(confirm.driver.out_of_buffers()),
            None => break,
        }
    }
    confirm.driver.report();
    Ok(confirm.found)
}

impl Confirm<'_, '_> {
    fn complete(&mut self, completion: Completion) -> Result<()> {
        let (work, placed) = self.reads.remove(&completion.token).expect("every token is a read's");
        completion.result.map_err(|error| error.context("reading the secondary back failed"))?;
        let buffer = completion.buffer.expect("a read gives its buffer back");
        let data = payload(&work, &buffer);
        let zero = is_zero(data);
        let is_same = placed.checksum == Some(self.checksums.of(data, zero));
        let is_overlaid = self.overlaid.contains(&work.ix);
        let framed = self.secondary.check_stored(&segment(&work, placed.checksum), &buffer, is_overlaid);
        match framed.is_ok() && (is_same || is_overlaid) {
            true if !is_same => self.found.unverifiable += 1,
            true => self.found.proofs += u64::from(!zero),
            false => drop(self.found.lost.insert(work.ix)),
        }
        self.driver.engine.give_buffer(buffer);
        self.driver.advance(work.valid_bytes());
        Ok(())
    }
}

fn segment(work: &Work, checksum: Option<u64>) -> Segment<'_> {
    Segment { ix: work.ix, extent: work.extent, valid: &work.valid, checksum, zero: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_spread_over_all_and_has_both_ends() {
        let placed = |ix| PlacedSegment { ix: SegmentIx(ix), frame: None, checksum: Some(1), zero: false };
        for count in [1u64, 2, 63, 64, 65, 1000, 4096] {
            let all: Vec<PlacedSegment> = (0..count).rev().map(placed).collect();
            let sample: Vec<u64> = sample(&all).iter().map(|segment| segment.ix.get()).collect();
            assert!(sample.len() <= SAMPLE + 1, "{count}: {}", sample.len());
            assert_eq!((sample.first(), sample.last()), (Some(&0), Some(&(count - 1))));
            assert!(sample.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert!(sample(&[]).is_empty());
    }
}
