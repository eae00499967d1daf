//! What a restore would do, found without touching the target.
//!
//! Reads the archive's superblocks and map, so that something that is no archive is found before
//! consent is asked for, and refuses the targets that the restore refuses. An archive on a pipe says nothing before it
//! is read: whether the target is large enough is found then.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;

use serde::Serialize;

use super::inspect::{self, InspectReport};
use super::request::{InspectRequest, RestoreRequest};
use super::restore::forbidden;
use super::targets::{self, TargetFacts};
use crate::base::{Bytes, Error, Result};
use crate::progress::Silent;
use crate::restore::ArchiveSource;
use crate::secondary::raw::{RawRequest, RawTarget};

/// What the target is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A block device, which is overwritten.
    Device,
    /// A file, which is replaced when the restore is complete.
    ExistingFile,
    /// Nothing: a file is made.
    NewFile,
}

/// `tidemark restore`, planned.
#[derive(Clone, Debug, Serialize)]
pub struct RestorePlan {
    /// The request that it carries out, with the path that the target's name means.
    pub request: RestoreRequest,
    /// What the target is now.
    pub target_kind: TargetKind,
    /// What would be lost there, and what may go wrong.
    pub target: TargetFacts,
    /// What the archive says of itself; None for a pipe.
    pub archive: Option<InspectReport>,
}

/// Plans a restore.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for what is no whole archive,
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a target that is neither a block device
/// nor a regular file; I/O errors; whatever the interrupt answers.
pub fn plan(request: &RestoreRequest, interrupt: &dyn Fn() -> Result<()>) -> Result<RestorePlan> {
    let request = RestoreRequest { target: targets::named(&request.target)?, ..request.clone() };
    let archive = match &request.archive {
        ArchiveSource::Pipe => None,
        ArchiveSource::Path(path) => {
            Some(inspect::run(&InspectRequest { archive: path.clone() }, &Silent, interrupt)?)
        }
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
        // A missing file is made; whatever else is wrong with the name is said when it is opened.
        Err(_) => TargetKind::NewFile,
    };
    let size = archive.as_ref().map(|archive| archive.superblock.origin_size);
    let raw = RawRequest {
        size: size.unwrap_or(Bytes::ZERO),
        // Consent is asked for when all else is well.
        replace: true,
        forbidden: forbidden(&request.archive, &request.target)?,
    };
    RawTarget::check(&request.target, &raw).map_err(|error| targets::naming_job(error, &request.target))?;
    let present = archive.as_ref().map(|archive| archive.map.present_bytes);
    let target = TargetFacts::of(&request.target, present);
    Ok(RestorePlan { request, target_kind, target, archive })
}
