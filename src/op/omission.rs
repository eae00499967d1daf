//! What of an origin the user leaves out, as part of a plan.

use std::sync::Arc;

use serde::Serialize;

use crate::base::{Bytes, DeviceNumber, Result};
use crate::extent::ExtentSet;
use crate::volume::Origin;
use crate::volume::subset::{self, Omission, Subset};

/// What the user leaves out, as found when the plan was made. Files are looked for again at the instant.
#[derive(Clone, Debug, Serialize)]
pub struct OmissionPlan {
    /// Number of files.
    pub files: usize,
    /// Bytes that these files use.
    pub file_bytes: Bytes,
    /// Bytes of ranges, whatever is there.
    pub range_bytes: Bytes,
    /// What is copied although it was to be left out, and why.
    pub notes: Vec<String>,
    #[serde(skip)]
    pub(in crate::op) omission: Arc<Omission>,
}

impl OmissionPlan {
    /// Finds what `subset` leaves out of `origin`; None if everything is wanted. Paths on the filesystems of `others`
    /// do not concern it.
    ///
    /// # Errors
    /// As [`subset::find`].
    pub fn find(
        subset: &Subset,
        origin: &Origin,
        others: &[DeviceNumber],
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Self>> {
        if subset.is_whole() {
            return Ok(None);
        }
        let omission = subset::find(subset, origin.size, (&origin.frozen, others), interrupt)?;
        let (files, file_bytes) = omission.files();
        let range_bytes = omission.ranges.iter().map(|range| range.length()).sum();
        let notes = omission.notes.clone();
        Ok(Some(Self { files, file_bytes, range_bytes, notes, omission: Arc::new(omission) }))
    }

    /// `plan`, and `ranges` in addition, which the origin itself leaves out.
    #[must_use]
    pub fn with_ranges(plan: Option<Self>, ranges: &ExtentSet) -> Option<Self> {
        if ranges.is_empty() {
            return plan;
        }
        let mut omission = plan.as_ref().map(|plan| Omission::clone(&plan.omission)).unwrap_or_default();
        let mut all: ExtentSet = ranges.clone();
        all.extend(omission.ranges.iter().copied());
        omission.ranges = all.iter().collect();
        let (files, file_bytes) = omission.files();
        let notes = omission.notes.clone();
        Some(Self { files, file_bytes, range_bytes: all.total(), notes, omission: Arc::new(omission) })
    }
}
