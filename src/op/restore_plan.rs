//! What a restore would do, found without touching the target.
//!
//! Reads the archive's superblocks and map, so that something that is no archive is found before
//! consent is asked for. An archive on a pipe says nothing before it is read.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;

use serde::Serialize;

use super::inspect::{self, InspectReport};
use super::request::{ArchiveSource, InspectRequest, RestoreRequest};
use crate::base::{Error, Result};
use crate::copy::progress::Silent;

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
    /// The request that it carries out.
    pub request: RestoreRequest,
    /// What the target is now.
    pub target_kind: TargetKind,
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
                .next("name a device, or a file to be made"));
        }
        // A missing file is made; whatever else is wrong with the name is said when it is opened.
        Err(_) => TargetKind::NewFile,
    };
    Ok(RestorePlan { request: request.clone(), target_kind, archive })
}
