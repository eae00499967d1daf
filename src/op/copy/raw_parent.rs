//! The raw secondary that an increment is to update, as its record describes it.
//!
//! Reads the record, and examines the secondary; changes nothing, and reads none of its content.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use crate::base::{Error, ErrorKind, Result, SegmentSize, clock};
use crate::copy::sample::{Sample, miss_probability};
use crate::extent::ExtentSet;
use crate::format::SecondaryForm;
use crate::format::raw_copy::{RawCopy, RawCopyState};
use crate::op::request::CopyRequest;
use crate::secondary::SecondaryTarget;
use crate::secondary::partial::resolve;
use crate::secondary::raw::identity_of;
use crate::secondary::raw_copies::{FoundCopy, RawCopies};
use crate::topology::check_answers;

/// A raw secondary that has a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawParent {
    /// Where it is: full, without symbolic links.
    pub(super) path: PathBuf,
    /// Its record.
    pub(super) copy: RawCopy,
    /// The facts of the device or file prove that it is the recorded one.
    pub(super) is_proven: bool,
}

/// What is read of a raw secondary before it is updated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RawCheckPlan {
    /// An update of it was interrupted: it is a copy of nothing.
    pub is_interrupted: bool,
    /// Segments of the copy.
    pub segments: u64,
    /// Of those, how many are drawn at random; those that will be changed, the first and the last are read as well.
    pub sample: u64,
    /// The probability that the sample shows nothing if 1 in 100 segments has been changed by others.
    pub miss_probability: f64,
}

/// What was read of a raw secondary before it was updated, and held what is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RawCheckReport {
    /// Segments of the copy.
    pub segments: u64,
    /// Of those, how many were read.
    pub read: u64,
    /// Of those, how many were drawn at random from all that the record's checksums cover.
    pub sample: u64,
    /// The probability that the sample shows nothing if 1 in 100 of these segments has been changed by others.
    pub miss_probability: f64,
}

impl RawParent {
    /// The secondary of `request`; None if it is not to be updated in place.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for options that do not go together; [`ErrorKind::Refused`] if there is no record of it, or
    /// it is another device; [`ErrorKind::BadData`] for a damaged record; I/O errors.
    pub fn find(request: &CopyRequest) -> Result<Option<Self>> {
        let (Some(since), SecondaryForm::Raw, SecondaryTarget::Path(path)) =
            (&request.since, request.format, &request.secondary)
        else {
            return Ok(None);
        };
        if !request.parents.is_empty() {
            return Err(Error::usage("--parent names archives, and the secondary is raw")
                .next("omit --parent: a raw secondary is its own parent"));
        }
        check_answers(path)?;
        let missing = || {
            Error::refused(format!("no record says that {} holds a copy of a kept snapshot", path.display()))
                .state("nothing was changed")
                .next(format!(
                    "make a whole copy first: tidemark copy VOLUME@{} {} (for an increment into an archive: a name \
                     that ends in .tdm, or --format archive)",
                    since.rsplit('@').next().unwrap_or(since),
                    path.display()
                ))
        };
        let path = resolve(path)?;
        let identity = match identity_of(&path) {
            Err(error) if error.errno() == Some(libc::ENOENT) => return Err(missing()),
            identity => identity?,
        };
        let found = RawCopies::default().find(&path, &identity).map_err(|error| match error.kind() {
            ErrorKind::BadData => error.context(format!("whether {} is a copy is unknown", path.display())),
            _ => error,
        })?;
        let FoundCopy { copy, is_proven } = found.ok_or_else(missing)?;
        Ok(Some(Self { path, copy, is_proven }))
    }

    /// The unit of copying, which is that of the record's checksums.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if another one is `requested`.
    pub fn segment(&self, requested: Option<SegmentSize>) -> Result<SegmentSize> {
        let segment = self.copy.segment;
        match requested {
            Some(other) if other != segment => Err(Error::usage(format!(
                "the checksums of {} are those of segments of {segment}, not of {other}",
                self.path.display()
            ))
            .state("nothing was changed")
            .next("omit --segment")),
            _ => Ok(segment),
        }
    }

    /// True if an update of it was interrupted.
    pub(super) fn is_updating(&self) -> bool {
        self.copy.state == RawCopyState::Updating
    }

    /// True if it holds exactly what its base shows, except in absent ranges.
    pub(super) fn is_at_base(&self) -> bool {
        !self.is_updating() && self.copy.shown.snapshot == Some(self.copy.base)
    }

    /// Refuses another base than the recorded one.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`].
    pub(super) fn check_base(&self, base: Uuid, shown: &str) -> Result<()> {
        if self.copy.base == base {
            return Ok(());
        }
        let recorded = &self.copy.description.base;
        let holds = describe(&self.copy);
        Err(Error::refused(format!("{} {holds}: it cannot be updated since {shown}", self.path.display()))
            .state("nothing was changed")
            .next(format!(
                "use --since {recorded}, if that snapshot is kept; or make a whole copy (without --since)"
            )))
    }

    /// What an update destroys, in words.
    #[must_use]
    pub fn overwrites(&self) -> String {
        format!(
            "{} {}; it is updated in place, and is a copy of nothing until the update is complete",
            self.path.display(),
            describe(&self.copy)
        )
    }

    /// The ranges that it does not hold as they were.
    pub(super) fn absent(&self) -> ExtentSet {
        self.copy.absent.iter().copied().collect()
    }

    /// How much is read of it; everything if only its content tells that it is the recorded one.
    pub(super) fn sample(&self, requested: Option<Sample>) -> Sample {
        if self.is_proven { requested.unwrap_or_default() } else { Sample::All }
    }

    /// The plan of the check.
    pub(super) fn check_plan(&self, requested: Option<Sample>) -> RawCheckPlan {
        let segments = self.copy.segment_count();
        let sample = self.sample(requested).count(segments);
        RawCheckPlan {
            is_interrupted: self.is_updating(),
            segments,
            sample,
            miss_probability: miss_probability(segments, sample, segments.div_ceil(100)),
        }
    }
}

/// What a secondary with this record is: "holds data@mon as of ...".
#[must_use]
pub fn describe(copy: &RawCopy) -> String {
    let about = &copy.description;
    let instant = clock::utc_text(copy.shown.instant_ns).unwrap_or_default();
    let shown = match &about.shown {
        Some(shown) => format!("{shown} ({instant})"),
        None => format!("the instant {instant}"),
    };
    match copy.state {
        RawCopyState::Complete if about.shown.as_ref() == Some(&about.base) => format!("holds {shown}"),
        RawCopyState::Complete => format!("holds {shown}, recorded as changes since {}", about.base),
        RawCopyState::Updating => {
            format!("is being updated from {} to {shown}, and is a copy of nothing", about.base)
        }
    }
}

/// The path under which a secondary is recorded.
///
/// # Errors
/// I/O errors.
pub(super) fn recorded_path(path: &Path) -> Result<String> {
    Ok(resolve(path)?.display().to_string())
}
