//! `tidemark verify`: is this archive whole, and does it hold what a device or file holds?

use super::request::VerifyRequest;
use crate::base::Result;
use crate::progress::{Event, Observer, Phase};
use crate::restore::Input;
use crate::restore::compare::{self, VerifyReport};
use crate::volume;

/// Verifies; on success the archive is whole, and equal to what it was compared with.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive, and for a difference;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where there is nothing to compare with, or too
/// much differs to be remembered; I/O errors; whatever the interrupt answers.
pub fn run(
    request: &VerifyRequest,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<VerifyReport> {
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let against = request.against.as_deref().map(volume::find).transpose()?;
    let input = Input::open(&request.archive, interrupt)?;
    compare::verify(&input, against.as_deref(), observer, interrupt)
}
