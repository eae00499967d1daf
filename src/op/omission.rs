//! What of an origin the user leaves out, as part of a plan.

use std::sync::Arc;

use serde::Serialize;

use crate::base::{Bytes, Result};
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
    pub(super) omission: Arc<Omission>,
}

impl OmissionPlan {
    /// Finds what `subset` leaves out of `origin`; None if everything is wanted.
    ///
    /// # Errors
    /// As [`subset::find`].
    pub fn find(
        subset: &Subset,
        origin: &Origin,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Self>> {
        if subset.is_whole() {
            return Ok(None);
        }
        let omission = subset::find(subset, origin.size, &origin.frozen, interrupt)?;
        let (files, file_bytes) = omission.files();
        let range_bytes = omission.ranges.iter().map(|range| range.length()).sum();
        let notes = omission.notes.clone();
        Ok(Some(Self { files, file_bytes, range_bytes, notes, omission: Arc::new(omission) }))
    }
}
