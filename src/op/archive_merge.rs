//! `tidemark archive merge`: makes one whole archive of an increment and the archives that it continues.

use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use super::copy::plan::is_same_file;
use super::request::MergeRequest;
use super::targets::{TargetFacts, naming_job};
use crate::base::{Bytes, Error, Result};
use crate::format::SecondaryForm;
use crate::job::{Job, conclude};
use crate::progress::{Event, Observer, Phase};
use crate::restore::chain::Chain;
use crate::restore::merge::{self, MergeReport};
use crate::secondary::archive::Archive;
use crate::secondary::archive_read::ArchiveFile;
use crate::secondary::{
    Lineage, OriginIdentity, OriginalsMode, Secondary as _, SecondaryRequest, SecondaryTarget,
};

/// The plan of a merge. Serialized for `--dry-run --json`.
#[derive(Debug, Serialize)]
pub struct MergePlan {
    /// The request.
    pub request: MergeRequest,
    /// The archives of the chain, the whole one first.
    pub archives: Vec<PathBuf>,
    /// Bytes of the origin that the new archive will hold.
    pub bytes: Bytes,
    /// What would be lost at its path, and warnings.
    pub target: TargetFacts,
    #[serde(skip)]
    chain: Chain,
}

/// Makes the plan: finds the chain and reads its maps. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if there is nothing to merge, a parent is not found, or the
/// new archive must not be written; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a damaged archive; I/O
/// errors; the interrupt's.
pub fn plan(request: &MergeRequest, interrupt: &dyn Fn() -> Result<()>) -> Result<MergePlan> {
    let archive = ArchiveFile::open(&request.archive)?;
    if !archive.superblock().is_increment() {
        return Err(Error::refused(format!(
            "{} is whole: there is nothing to merge",
            request.archive.display()
        ))
        .state("nothing was changed")
        .next("name an increment; 'tidemark inspect' shows what an archive continues"));
    }
    let chain = Chain::of(archive, &request.parents, interrupt)?;
    let archives: Vec<PathBuf> = chain.links.iter().map(|link| link.archive.path().to_owned()).collect();
    if let Some(path) = archives.iter().find(|path| is_same_file(path, &request.merged)) {
        return Err(Error::refused(format!("{} is an archive of the chain itself", path.display()))
            .state("nothing was changed")
            .next("name another file; the archives of the chain can be removed afterwards"));
    }
    let mut plan = MergePlan {
        request: request.clone(),
        archives,
        bytes: chain.owned_bytes(),
        target: TargetFacts::of(&request.merged, Some(chain.owned_bytes())),
        chain,
    };
    // Consent is asked for after all other checks.
    plan.request.replace = true;
    Archive::check(&plan.secondary_request()).map_err(|error| naming_job(error, &request.merged))?;
    plan.request.replace = request.replace;
    Ok(plan)
}

impl MergePlan {
    fn secondary_request(&self) -> SecondaryRequest {
        let (first, last) = (self.chain.links[0].archive.superblock(), self.chain.last().superblock());
        SecondaryRequest {
            target: SecondaryTarget::Path(self.request.merged.clone()),
            form: SecondaryForm::Archive,
            originals: OriginalsMode::Append,
            replace: self.request.replace,
            verify: false,
            forbidden: Vec::new(),
            origin: OriginIdentity {
                name: last.origin_name.clone(),
                path: last.origin_path.clone(),
                size: last.origin_size,
            },
            segment: first.segment,
            chunk: last.chunk,
            block_list: merge::block_list_of(&self.chain),
            lineage: Lineage { snapshot: last.snapshot, base: Uuid::nil(), parent: Uuid::nil() },
            in_place: false,
        }
    }
}

/// Executes the plan.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a damaged archive; I/O errors; the interrupt's.
pub fn run(
    plan: &MergePlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<MergeReport> {
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let archive =
        Archive::open(&plan.secondary_request()).map_err(|error| naming_job(error, &plan.request.merged))?;
    let job = Job::begin_for_target("archive merge", archive.partial_path());
    conclude(job, merge::write(archive, &plan.chain, observer, interrupt))
}
