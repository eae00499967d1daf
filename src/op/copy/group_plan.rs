//! The plan of a copy of several origins from one instant. Changes nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::live::check_places;
use super::plan::{CopyPlan, LivePlan, is_same_file, plan_one_of};
use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, directory_of, escape};
use crate::dm::{Dm, Table};
use crate::op::admission::Question;
use crate::op::request::CopyRequest;
use crate::secondary::SecondaryTarget;
use crate::stack::{self, Change, InsertRequest, ORIGINS_MAX};
use crate::store::TailPlace;
use crate::topology::{Topology, device_number};
use crate::volume::filesystems_on;

/// The plan of a copy of several origins. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct GroupCopyPlan {
    /// One for each origin, in the order of the command line.
    pub copies: Vec<CopyPlan>,
    /// The filesystems that are frozen, in this order.
    #[serde(serialize_with = "escape::paths")]
    pub filesystems: Vec<PathBuf>,
    /// Filesystems that are not frozen, and why; as text.
    pub not_frozen: Vec<String>,
    /// The steps of the insertion, in order. Device numbers and ids are examples.
    pub steps: Change,
    #[serde(skip)]
    pub(super) insert: InsertRequest,
}

impl GroupCopyPlan {
    /// What would be overwritten.
    #[must_use]
    pub fn destroys(&self) -> Option<String> {
        let all: Vec<String> = self.copies.iter().filter_map(CopyPlan::destroys).collect();
        (!all.is_empty()).then(|| all.join(", and "))
    }

    /// The numbers of the origins.
    pub(super) fn numbers(&self) -> Vec<DeviceNumber> {
        self.copies.iter().filter_map(|copy| copy.origin.number).collect()
    }

    /// The paths of the origins, separated by spaces, for the hooks.
    pub(super) fn origins(&self) -> String {
        let paths = self.copies.iter().map(|copy| copy.origin.path.display().to_string());
        paths.collect::<Vec<_>>().join(" ")
    }
}

/// Makes the plan of a copy of several origins. The requests differ only in origin and secondary.
///
/// # Errors
/// As [`plan`](super::plan::plan) for each; [`ErrorKind::Refused`] for origins that
/// cannot share an instant, and for stores and secondaries that may wait for one of them;
/// [`ErrorKind::Usage`] for options that only a single origin can have.
///
/// # Panics
/// If there is no request: a broken invariant.
pub fn plan(requests: &[CopyRequest], interrupt: &dyn Fn() -> Result<()>) -> Result<GroupCopyPlan> {
    assert!(!requests.is_empty(), "a copy is of an origin");
    if requests.len() > ORIGINS_MAX {
        return Err(Error::refused(format!(
            "{} origins at once: {ORIGINS_MAX} are possible",
            requests.len()
        ))
        .state("nothing was changed")
        .next("copy them in several groups"));
    }
    refuse_since(&requests[0])?;
    let count = u64::try_from(requests.len()).expect("few origins");
    let copies = requests.iter().map(|request| plan_one_of(count, request, interrupt));
    let mut copies = copies.collect::<Result<Vec<_>>>()?;
    let numbers = copies.iter().map(number_of).collect::<Result<Vec<_>>>()?;
    copies.iter().try_for_each(refuse_one_store)?;
    refuse_twice(&copies, &numbers)?;
    for copy in &mut copies {
        copy.forbidden.clone_from(&numbers);
        copy.check_targets()?;
    }
    check_waits(&copies, &numbers)?;
    check_room(&copies)?;
    let frozen = filesystems_on(&numbers, &Topology::default())?;
    let parts: Vec<&LivePlan> = copies.iter().filter_map(|copy| copy.live.as_ref()).collect();
    let insert = InsertRequest {
        stacks: parts.iter().flat_map(|part| part.insert.stacks.clone()).collect(),
        filesystems: frozen.points.clone(),
        planned: Some(frozen.clone()),
        ..parts[0].insert.clone()
    };
    let tables = insert.stacks.iter().filter_map(|stack| stack.planned_table.clone());
    let steps = stack::insertion(&insert, &tables.collect::<Vec<Table>>(), &parts[0].config.job);
    Ok(GroupCopyPlan { copies, filesystems: frozen.points, not_frozen: frozen.not_frozen, steps, insert })
}

fn refuse_since(request: &CopyRequest) -> Result<()> {
    if request.since.is_none() {
        return Ok(());
    }
    Err(Error::usage("--since is for one origin").state("nothing was changed").next(
        "create snapshots of all of them at one instant ('tidemark snapshot create'), and copy each with --since",
    ))
}

/// Refuses a place for one store only.
fn refuse_one_store(copy: &CopyPlan) -> Result<()> {
    match copy.live.as_ref().map(|live| &live.config.place) {
        Some(TailPlace::NewFile(path) | TailPlace::Device { path, .. }) => {
            Err(Error::usage(format!("--store {}: several origins have a store each", path.display()))
                .state("nothing was changed")
                .next("name a directory with --store"))
        }
        Some(TailPlace::Directory(_)) | None => Ok(()),
    }
}

/// The number of an origin that can be held.
fn number_of(copy: &CopyPlan) -> Result<DeviceNumber> {
    copy.origin.number.filter(|_| copy.live.is_some()).ok_or_else(|| {
        Error::refused(format!(
            "{} is a {}, and has no instant to share with other origins",
            copy.origin.path.display(),
            copy.origin.kind
        ))
        .state("nothing was changed")
        .next("copy it alone; or attach the device ('tidemark attach') and copy the volume")
    })
}

/// Refuses an origin or a secondary that is named twice.
fn refuse_twice(copies: &[CopyPlan], numbers: &[DeviceNumber]) -> Result<()> {
    let refused =
        |what: String| Err(Error::refused(what).state("nothing was changed").next("name each once"));
    let mut seen = BTreeSet::new();
    for (copy, number) in copies.iter().zip(numbers) {
        if !seen.insert(number) {
            return refused(format!("{} is named twice", copy.origin.path.display()));
        }
    }
    let secondaries: Vec<&Path> = copies.iter().filter_map(secondary_path).collect();
    for (index, path) in secondaries.iter().enumerate() {
        if secondaries[..index].iter().any(|other| is_same_target(other, path)) {
            return refused(format!("{} is the secondary of two origins", path.display()));
        }
    }
    Ok(())
}

fn secondary_path(copy: &CopyPlan) -> Option<&Path> {
    match &copy.request.secondary {
        SecondaryTarget::Path(path) => Some(path),
        SecondaryTarget::Pipe => None,
    }
}

/// True if both are one device, one file, or one name for a new file in one directory.
fn is_same_target(one: &Path, other: &Path) -> bool {
    let number = |path| device_number(path).ok().flatten();
    let is_same_device = number(one).is_some() && number(one) == number(other);
    let is_same_name =
        one.file_name() == other.file_name() && is_same_file(directory_of(one), directory_of(other));
    is_same_device || is_same_name || is_same_file(one, other)
}

/// Refuses stores and secondaries that may wait for any of the origins: all are held together.
fn check_waits(copies: &[CopyPlan], numbers: &[DeviceNumber]) -> Result<()> {
    check_places(&copies.iter().collect::<Vec<_>>())?;
    let dm = Dm::open()?;
    for number in numbers {
        let question = Question::of(&dm, *number)?;
        for copy in copies {
            if let Some(path) = secondary_path(copy) {
                question.check_secondary(path, copy.request.on_full)?;
            }
        }
    }
    Ok(())
}

/// Refuses a directory without room for all stores at their first size. Each was found to fit alone.
fn check_room(copies: &[CopyPlan]) -> Result<()> {
    let stores = || copies.iter().filter_map(|copy| copy.live.as_ref()).map(|live| &live.store);
    let needed: Bytes = stores().map(|store| store.tail_bytes).sum();
    for place in stores().map(|store| &store.place).take(1) {
        let room = place.available()?;
        if needed > room {
            let what = format!("{} has {room} for the stores, which need {needed}", place.path().display());
            return Err(Error::new(ErrorKind::NoSpace, what)
                .state("nothing was changed")
                .next("choose another directory with --store, or limit each store with --store-size"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_target_by_two_names_is_recognized() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(dir.path(), path("again")).unwrap();
        std::fs::hard_link(path("file"), path("link")).unwrap();
        assert!(is_same_target(&path("new"), &path("again/new")));
        assert!(is_same_target(&path("file"), &path("link")));
        assert!(!is_same_target(&path("new"), &path("other")));
    }
}
