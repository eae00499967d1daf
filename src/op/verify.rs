//! `tidemark verify`: checks whether an archive, with those that it continues, is complete, and whether it equals a
//! device or file.

use super::request::VerifyRequest;
use crate::base::Result;
use crate::progress::{Event, Observer, Phase};
use crate::restore::chain::Content;
use crate::restore::compare::{self, VerifyReport};
use crate::volume;

/// Verifies an archive. On success it is complete, and equals the device or file that it was compared with.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive, and for a difference;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the device or file cannot be compared, or too many
/// differences would have to be recorded; I/O errors; any error that the interrupt returns.
pub fn run(
    request: &VerifyRequest,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<VerifyReport> {
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let against = request.against.as_deref().map(volume::find).transpose()?;
    match Content::open(&request.archive, &request.parents, interrupt)? {
        Content::Whole(input) => compare::verify(&input, against.as_deref(), observer, interrupt),
        Content::Chain(chain) => compare::verify_chain(&chain, against.as_deref(), observer, interrupt),
    }
}
