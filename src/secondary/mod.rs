//! The targets of a copy: raw device, raw file, archive, pipe.
//!
//! A [`Secondary`] decides *where* bytes are written and how they are framed; the copier moves them through the
//! engine. So a secondary never does bulk I/O itself: it lays out pieces of the copier's buffers.
//!
//! Invariants:
//! - [`open`] makes every check that can refuse, before the origin's instant is taken;
//! - a result gets its final name only through [`Secondary::finish`], complete and synced;
//! - a payload begins at [`PAYLOAD_OFFSET`] of a buffer, with room for a control block on both sides;
//! - bytes between the origin's end and the next [`DIRECT_IO_ALIGN`](crate::base::limits::DIRECT_IO_ALIGN) are
//!   zero in every buffer that is written.
//!
//! This module knows neither device-mapper nor how the originals were preserved.

use crate::base::{Error, Result};

pub mod archive;
pub mod archive_read;
mod frames;
pub mod guard;
pub mod identity;
mod packed;
pub mod partial;
mod port;
pub mod raw;
pub mod raw_copies;
#[cfg(test)]
mod resume_tests;

use crate::format::SecondaryForm;
pub use crate::format::archive::OriginalsMode;
/// A segment that is on the secondary: what a later process needs in order to resume the copy.
pub use crate::format::segment_log::PlacedSegment;
pub use port::{
    Lineage, OriginIdentity, PAYLOAD_OFFSET, Placement, Resumed, Secondary, SecondaryRequest,
    SecondaryTarget, Segment, engine_config, is_zero, zero_padding,
};

/// Most extents of the block list in one segment that this form can express: see
/// [`BlockList::with_parts_max`](crate::extent::BlockList::with_parts_max). The limit is reached with gaps of
/// 4 KiB in segments of 4 MiB or more.
#[must_use]
pub fn parts_max(form: SecondaryForm) -> usize {
    match form {
        SecondaryForm::Raw => usize::MAX,
        SecondaryForm::Archive => crate::format::archive::EXTENTS_MAX,
    }
}

/// Opens and checks a secondary; nothing is written to a device yet.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) or
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) with the reason and what to do; I/O errors.
pub fn open(request: &SecondaryRequest) -> Result<Box<dyn Secondary>> {
    match (&request.target, request.form) {
        (SecondaryTarget::Pipe, SecondaryForm::Raw) => {
            Err(Error::usage("standard output takes an archive only")
                .next("omit --format, or restore the archive to a raw device or file later"))
        }
        (SecondaryTarget::Path(path), SecondaryForm::Raw) => {
            if request.originals == OriginalsMode::Append {
                return Err(Error::usage("a raw copy cannot hold originals after the data")
                    .next("use --originals overlay, or --format archive"));
            }
            Ok(Box::new(raw::RawTarget::open(path, &raw::RawRequest::from(request))?))
        }
        (_, SecondaryForm::Archive) => Ok(Box::new(archive::Archive::open(request)?)),
    }
}

/// The checks of [`open`], as far as they are possible without creating or touching anything. For a plan.
///
/// # Errors
/// As [`open`].
pub fn check(request: &SecondaryRequest) -> Result<()> {
    match (&request.target, request.form) {
        (SecondaryTarget::Path(path), SecondaryForm::Raw) => {
            raw::RawTarget::check(path, &raw::RawRequest::from(request))
        }
        (_, SecondaryForm::Archive) => archive::Archive::check(request),
        (SecondaryTarget::Pipe, SecondaryForm::Raw) => Ok(()),
    }
}

/// Opens the secondary of a copy that was killed, to resume it: its content stays. Makes the same checks as
/// [`open`]; `request` is the same as for it. A partial file is kept after an error.
///
/// # Errors
/// As [`open`]; [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a pipe, and if the partial
/// file is missing or was not created by Tidemark; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData)
/// if `state` does not fit `request`.
pub fn reopen(request: &SecondaryRequest, state: &Resumed) -> Result<Box<dyn Secondary>> {
    match (&request.target, request.form) {
        (SecondaryTarget::Path(path), SecondaryForm::Raw) => {
            Ok(Box::new(raw::RawTarget::reopen(path, &raw::RawRequest::from(request), state)?))
        }
        _ => Ok(Box::new(archive::Archive::reopen(request, state)?)),
    }
}
