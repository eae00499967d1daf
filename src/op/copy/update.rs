//! Updates a raw secondary in place: proves that it holds what its record says, marks it, and records what it holds
//! afterwards.
//!
//! An update in place is not atomic, and a secondary that is half updated looks like any other. So the record tells:
//!
//! 1. the secondary is read and compared with its record. Nothing has been written; a crash changes nothing;
//! 2. the record says "being updated", on stable storage: [`Update::mark`];
//! 3. the changes are written, and the secondary is synced. A crash from 2 on leaves a secondary that is a copy of
//!    nothing, and a record that says so. The same increment, run again, writes all that any earlier attempt may have
//!    written ([`since`](super::since) shows why): it needs to know nothing else of them;
//! 4. the changed segments are read back for their checksums. The record says "complete": [`Update::finish`].
//!
//! What is read first: a random sample, because others may have changed anything; the first and the last segment, where
//! a filesystem or partition table that is used leaves its traces; and every segment that will be changed in part,
//! because its new checksum covers what stays in it. Of an interrupted update only segments that no attempt can have
//! written have a known content; the others are written as a whole.

use std::collections::BTreeSet;
use std::time::Duration;

use uuid::Uuid;

use super::plan::CopyPlan;
use super::raw_parent::{RawCheckReport, RawParent, recorded_path};
use super::since::{KeptOrigin, Selection};
use crate::base::{Bytes, Error, ErrorKind, Extent, Result, SegmentIx};
use crate::copy::sample::{Sample, choose, miss_probability};
use crate::copy::{CopyReport, contents};
use crate::extent::ExtentSet;
use crate::format::SecondaryForm;
use crate::format::raw_copy::{Description, RawCopy, RawCopyState, Shown};
use crate::format::state::TargetRecord;
use crate::io::{Driver, Engine, FileIx};
use crate::progress::{Event, Observer};
use crate::secondary::raw_copies::RawCopies;
use crate::secondary::{Secondary, SecondaryTarget};
use crate::sys::process::crash_point;

/// Most differing segments that an error counts before the reading ends.
const DIFFERENCES_MAX: usize = 64;

/// Longest wait for reads in flight after an error.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// The engine, the observer, and the interrupt.
pub(super) struct Reading<'a> {
    pub(super) engine: &'a mut dyn Engine,
    pub(super) observer: &'a dyn Observer,
    pub(super) interrupt: &'a dyn Fn() -> Result<()>,
}

/// An update in progress.
pub struct Update {
    record: RawCopy,
    is_interrupted: bool,
    file: FileIx,
    /// Segments that were read and hold what is recorded.
    checked: BTreeSet<SegmentIx>,
    /// Segments that are written.
    touched: BTreeSet<SegmentIx>,
    /// What will be absent.
    absent: Vec<Extent>,
    is_marked: bool,
    report: RawCheckReport,
}

impl Update {
    /// Checks the secondary, which is open and claimed, against its record. None if it is not to be updated.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`] if it does not hold what is recorded; [`ErrorKind::Refused`] if it is not the secondary
    /// of the plan any more; I/O errors; the interrupt's.
    pub(super) fn begin(
        plan: &CopyPlan,
        secondary: &mut dyn Secondary,
        reading: &mut Reading<'_>,
    ) -> Result<Option<Self>> {
        let Some((since, raw)) = plan.since.as_ref().and_then(|since| Some((since, since.raw.as_ref()?)))
        else {
            return Ok(None);
        };
        let found = match secondary.target() {
            Some(target) => RawCopies::default().find(&raw.path, target)?,
            None => None,
        };
        if found.is_none_or(|found| found.copy != raw.copy || found.is_proven != raw.is_proven) {
            return Err(Error::refused(format!(
                "{} or its record was changed since the copy was planned",
                raw.path.display()
            ))
            .state("nothing was written")
            .next("run the command again"));
        }
        secondary.forget_cache();
        let file = secondary.attach(reading.engine)?;
        let mut update = Self {
            record: raw.copy.clone(),
            is_interrupted: raw.is_updating(),
            file,
            checked: BTreeSet::new(),
            touched: BTreeSet::new(),
            absent: Vec::new(),
            is_marked: false,
            report: RawCheckReport { segments: raw.copy.segment_count(), ..RawCheckReport::default() },
        };
        let planned = update.segments_of(since.planned.iter());
        update.check_sample(&planned, (raw, raw.sample(plan.request.sample)), reading)?;
        Ok(Some(update))
    }

    /// Reads the sample, and the segments that will be changed as far as that is known by now.
    fn check_sample(
        &mut self,
        planned: &BTreeSet<SegmentIx>,
        (raw, sample): (&RawParent, Sample),
        reading: &mut Reading<'_>,
    ) -> Result<()> {
        let segments = self.report.segments;
        // After an interrupted update only what it cannot have written is as recorded.
        let known: Vec<SegmentIx> =
            (0..segments).map(SegmentIx).filter(|ix| !self.is_interrupted || !planned.contains(ix)).collect();
        let count = Bytes::from_len(known.len()).get();
        let drawn = sample.count(count);
        let numbers = choose(drawn, count, Uuid::new_v4().as_u64_pair().0);
        let mut wanted: BTreeSet<SegmentIx> = numbers.iter().map(|at| known[Bytes(*at).as_len()]).collect();
        wanted.extend(known.first().into_iter().chain(known.last()));
        if !self.is_interrupted {
            wanted.extend(planned);
        }
        self.compare(wanted, reading)?;
        self.report.sample = drawn;
        self.report.miss_probability = miss_probability(count, drawn, count.div_ceil(100));
        let why = if raw.is_proven { "" } else { " (nothing but its content tells it from another one)" };
        let RawCheckReport { read, miss_probability, .. } = self.report;
        let text = format!(
            "{} of {segments} segments of {} were read and hold what is recorded{why}; {drawn} of {count} were drawn \
             at random: a change of 1 in 100 of these would be missed with a probability of {miss_probability:.2e}",
            read,
            raw.path.display(),
        );
        reading.observer.event(&Event::Note { text });
        Ok(())
    }

    /// Reads those of `wanted` that were not read yet, and compares them with the record.
    fn compare(&mut self, wanted: BTreeSet<SegmentIx>, reading: &mut Reading<'_>) -> Result<()> {
        let left: Vec<SegmentIx> = wanted.difference(&self.checked).copied().collect();
        let mut different: Vec<SegmentIx> = Vec::new();
        let checksums = &self.record.checksums;
        self.read(&left, reading, &mut |ix, checksum| {
            if checksums.get(Bytes(ix.get()).as_len()) != Some(&checksum) {
                different.push(ix);
            }
            if different.len() >= DIFFERENCES_MAX { Err(self.differs(&different)) } else { Ok(()) }
        })?;
        if !different.is_empty() {
            return Err(self.differs(&different));
        }
        self.checked.extend(left);
        self.report.read = Bytes::from_len(self.checked.len()).get();
        Ok(())
    }

    fn differs(&self, different: &[SegmentIx]) -> Error {
        let first =
            different.iter().min().and_then(|ix| self.record.segment.offset_of(*ix)).unwrap_or_default();
        let at_least = if different.len() >= DIFFERENCES_MAX { "at least " } else { "" };
        Error::bad_data(format!(
            "{} does not hold what was recorded of it: {at_least}{} of the segments that were read differ, one of them \
             at {}",
            self.record.description.path,
            different.len(),
            first.get()
        ))
        .state("nothing was written to it")
        .next(
            "if this is another secondary of that name, connect the right one; else others have written to it: make a \
             whole copy (without --since)",
        )
    }

    /// Reads segments of the secondary.
    fn read(
        &self,
        segments: &[SegmentIx],
        reading: &mut Reading<'_>,
        each: &mut dyn FnMut(SegmentIx, u64) -> Result<()>,
    ) -> Result<()> {
        let Reading { engine, observer, interrupt } = reading;
        let mut driver = Driver::new(&mut **engine, *observer, *interrupt);
        let extent = (self.record.size, self.record.segment);
        let read = contents::checksums(&mut driver, self.file, extent, segments, each);
        if read.is_err() {
            driver.drain(DRAIN_MAX, true);
        }
        read
    }

    /// The segments that hold a part of `extents`.
    fn segments_of(&self, extents: impl Iterator<Item = Extent>) -> BTreeSet<SegmentIx> {
        let segment = self.record.segment;
        let numbers =
            |extent: Extent| segment.index_of(extent.start()).get()..segment.count_for(extent.end());
        extents.flat_map(numbers).map(SegmentIx).collect()
    }

    /// Records that the secondary is being updated to `shown`. Returns once that is on stable storage; nothing may be
    /// written to the secondary before.
    ///
    /// # Errors
    /// As [`Update::begin`].
    pub(super) fn mark(
        &mut self,
        selection: &Selection,
        (shown, kept): (Shown, Option<&KeptOrigin>),
        reading: &mut Reading<'_>,
    ) -> Result<()> {
        let inherited: ExtentSet = selection.inherited.iter().copied().collect();
        let zeroed = selection.absent.iter().flat_map(|extent| inherited.gaps_in(*extent));
        self.touched = self.segments_of(selection.needed.iter().copied().chain(zeroed));
        if !self.is_interrupted {
            self.compare(self.touched.clone(), reading)?;
        }
        crash_point("update.mark.before");
        self.absent.clone_from(&selection.absent);
        let mut absent: ExtentSet = self.record.absent.iter().copied().collect();
        absent.extend(selection.absent.iter().copied());
        self.record.absent = absent.iter().collect();
        self.record.state = RawCopyState::Updating;
        self.record.shown = shown;
        self.record.description.shown = kept.map(|kept| kept.snapshot.clone());
        // Before that: a failure may come after the record was replaced.
        self.is_marked = true;
        RawCopies::default()
            .save(&self.record)
            .map_err(|error| error.state("nothing was written to the secondary"))?;
        crash_point("update.mark.after");
        Ok(())
    }

    /// Records what the secondary holds, after the copy has ended with `copied`: if it is complete, everything was
    /// written and synced.
    ///
    /// # Errors
    /// That of `copied`, with what to do; I/O errors; the interrupt's.
    pub(super) fn finish(
        mut self,
        copied: Result<CopyReport>,
        secondary: (&TargetRecord, Option<&KeptOrigin>),
        reading: &mut Reading<'_>,
    ) -> Result<(CopyReport, RawCheckReport)> {
        let ended = copied.and_then(|copied| {
            crash_point("update.synced");
            self.complete(secondary, reading).map(|()| copied)
        });
        match ended {
            Ok(copied) => Ok((copied, self.report)),
            Err(error) if self.is_marked && error.kind() != ErrorKind::BadData => Err(error.next(format!(
                "run the command again: the update since {} is then completed; until then {} is a copy of nothing",
                self.record.description.base, self.record.description.path
            ))),
            Err(error) => Err(error),
        }
    }

    fn complete(
        &mut self,
        (target, kept): (&TargetRecord, Option<&KeptOrigin>),
        reading: &mut Reading<'_>,
    ) -> Result<()> {
        let touched: Vec<SegmentIx> = self.touched.iter().copied().collect();
        let mut checksums = std::mem::take(&mut self.record.checksums);
        self.read(&touched, reading, &mut |ix, checksum| {
            if let Some(entry) = checksums.get_mut(Bytes(ix.get()).as_len()) {
                *entry = checksum;
            }
            Ok(())
        })?;
        let record = &mut self.record;
        record.checksums = checksums;
        record.state = RawCopyState::Complete;
        record.absent = std::mem::take(&mut self.absent);
        record.description.target = target.clone();
        if let Some(kept) = kept {
            record.base = kept.id;
            record.description.base.clone_from(&kept.snapshot);
        }
        crash_point("update.record.before");
        RawCopies::default().save(record)?;
        crash_point("update.record.after");
        Ok(())
    }
}

/// The record of a whole raw copy of a kept snapshot, which increments can continue.
pub(super) struct NewRecord {
    kept: KeptOrigin,
    target: TargetRecord,
    path: std::path::PathBuf,
}

impl NewRecord {
    /// None if the copy is of no kept snapshot, or not raw, or continues another one.
    pub(super) fn of(plan: &CopyPlan, secondary: &dyn Secondary) -> Option<Self> {
        let (Some(kept), None, SecondaryForm::Raw) = (&plan.kept, &plan.since, plan.request.format) else {
            return None;
        };
        let SecondaryTarget::Path(path) = &plan.request.secondary else { return None };
        Some(Self { kept: kept.clone(), target: secondary.target()?.clone(), path: path.clone() })
    }

    /// Writes it, after the copy is complete. `copied`: what was copied. That it cannot be written does not undo the
    /// copy.
    pub(super) fn save(
        self,
        plan: &CopyPlan,
        copied: &[Extent],
        report: &CopyReport,
        observer: &dyn Observer,
    ) {
        crash_point("copy.record.before");
        if let Err(error) = self.try_save(plan, copied, report) {
            let text = format!(
                "the copy is complete, but what it holds was not recorded, so that no increment can be written onto \
                 it: {error}"
            );
            observer.event(&Event::Warning { text });
        }
        crash_point("copy.record.after");
    }

    fn try_save(self, plan: &CopyPlan, copied: &[Extent], report: &CopyReport) -> Result<()> {
        let Self { kept, target, path } = self;
        let size = plan.origin.size;
        let in_use: ExtentSet = copied.iter().copied().collect();
        let checksums = report.checksums.clone().ok_or_else(|| Error::bad_data("no checksums were kept"))?;
        let record = RawCopy {
            id: Uuid::new_v4(),
            state: RawCopyState::Complete,
            base: kept.id,
            shown: Shown { snapshot: Some(kept.id), instant_ns: kept.instant_utc_ns },
            size,
            segment: plan.segment,
            description: Description {
                path: recorded_path(&path)?,
                base: kept.snapshot.clone(),
                shown: Some(kept.snapshot),
                target,
            },
            absent: Extent::new(Bytes::ZERO, size)
                .into_iter()
                .flat_map(|whole| in_use.gaps_in(whole))
                .collect(),
            checksums,
        };
        RawCopies::default().save(&record)
    }
}
