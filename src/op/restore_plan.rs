//! The plan of a restore, made without touching the target.
//!
//! Reads the archive's superblocks and map, so that a bad archive is found before consent is asked for, and refuses the
//! same targets as the restore. An archive on a pipe cannot be read in advance, so a target that is too small is found
//! only during the restore.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;

use serde::Serialize;

use super::inspect::{self, InspectReport};
use super::request::{InspectRequest, RestoreRequest};
use super::restore::forbidden_for;
use super::targets::{self, TargetFacts};
use crate::base::{Bytes, Error, Result};
use crate::progress::Silent;
use crate::restore::ArchiveSource;
use crate::restore::chain::Content;
use crate::secondary::raw::{RawRequest, RawTarget};

/// What exists at the target's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A block device, which is overwritten.
    Device,
    /// A file, which is replaced when the restore is complete.
    ExistingFile,
    /// Nothing: a file is created.
    NewFile,
}

/// The plan of `tidemark restore`.
#[derive(Clone, Debug, Serialize)]
pub struct RestorePlan {
    /// The request, with the target's name resolved to a path.
    pub request: RestoreRequest,
    /// What exists at the target's path.
    pub target_kind: TargetKind,
    /// What would be lost there, and warnings.
    pub target: TargetFacts,
    /// The description of the archive; None for a pipe.
    pub archive: Option<InspectReport>,
    /// The archives that it continues, the whole one first; none for a whole archive.
    pub parents: Vec<String>,
}

/// Plans a restore.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive,
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a target that is neither a block device nor a regular
/// file; I/O errors; the interrupt's.
pub fn plan(request: &RestoreRequest, interrupt: &dyn Fn() -> Result<()>) -> Result<RestorePlan> {
    let request = RestoreRequest { target: targets::named(&request.target)?, ..request.clone() };
    let (archive, content) = match &request.archive {
        ArchiveSource::Pipe => (None, None),
        ArchiveSource::Path(path) => (
            Some(inspect::run(&InspectRequest { archive: path.clone() }, &Silent, interrupt)?),
            Some(Content::open(&request.archive, &request.parents, interrupt)?),
        ),
    };
    let target_kind = match fs::metadata(&request.target) {
        Ok(metadata) if metadata.file_type().is_block_device() => TargetKind::Device,
        Ok(metadata) if metadata.is_file() => TargetKind::ExistingFile,
        Ok(_) => {
            let shown = request.target.display();
            return Err(Error::refused(format!("{shown} is neither a block device nor a regular file"))
                .state("nothing was changed")
                .next("name a device, or a file to be created"));
        }
        // A missing file is created. Other problems of the name are reported when it is opened.
        Err(_) => TargetKind::NewFile,
    };
    let size = archive.as_ref().map(|archive| archive.superblock.origin_size);
    let raw = RawRequest {
        size: size.unwrap_or(Bytes::ZERO),
        // Consent is asked for after all other checks.
        replace: true,
        forbidden: match &content {
            Some(content) => forbidden_for(content, &request.archive, &request.target)?,
            None => Vec::new(),
        },
        in_place: false,
    };
    RawTarget::check(&request.target, &raw).map_err(|error| targets::naming_job(error, &request.target))?;
    let (present, parents) = match &content {
        Some(Content::Chain(chain)) => (Some(chain.owned_bytes()), chain.parents()),
        _ => (archive.as_ref().map(|archive| archive.map.present_bytes), Vec::new()),
    };
    let target = TargetFacts::of(&request.target, present);
    Ok(RestorePlan { request, target_kind, target, archive, parents })
}
