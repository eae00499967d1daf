//! Finds what a dead process has left of its store, and releases it if that is safe.
//!
//! Its [`record`](super::record) decides; that module has the argument.
//! Must not touch a RAM disk or a file that no record names, or whose record is locked.

use std::fs;
use std::io;
use std::path::Path;

use crate::base::{Error, Result, ResultExt as _};
use crate::dm::Dm;
use crate::sys::dm_ioctl::Key;

use super::head;
use super::record::{Facts, HeadRecord, Inode, NamedFile, RECORD_DIR};
use crate::record;

/// Releases the RAM heads and files of stores whose process died and whose device is removed. To be called
/// after the devices of a crashed copy have been removed. Returns descriptions of what was released.
///
/// # Errors
/// The first failure, after every record has been tried.
pub fn release_leftovers() -> Result<Vec<String>> {
    let dir = Path::new(RECORD_DIR);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let dm = Dm::open()?;
    release_leftovers_in(dir, &|uuid| Ok(dm.info(Key::Uuid(uuid))?.is_some()), &mut KernelDisks)
}

/// The RAM disks, or a fake in tests.
trait Disks {
    fn zram_indices(&self) -> Vec<u32>;
    fn zram_is_unused(&self, index: u32) -> bool;
    fn release_zram(&mut self, index: u32) -> Result<()>;
    fn release_brd(&mut self) -> Result<()>;
}

struct KernelDisks;

impl Disks for KernelDisks {
    fn zram_indices(&self) -> Vec<u32> {
        head::zram_indices()
    }
    fn zram_is_unused(&self, index: u32) -> bool {
        head::zram_is_unused(index)
    }
    fn release_zram(&mut self, index: u32) -> Result<()> {
        head::release_zram(index)
    }
    fn release_brd(&mut self) -> Result<()> {
        head::release_brd()
    }
}

fn release_leftovers_in(
    dir: &Path,
    in_use: &dyn Fn(&str) -> Result<bool>,
    disks: &mut dyn Disks,
) -> Result<Vec<String>> {
    let mut released = Vec::new();
    let mut first_error: Option<Error> = None;
    for id in record::ids(dir)? {
        match release_one(dir, &id, in_use, disks) {
            Ok(what) => released.extend(what),
            Err(error) => {
                first_error = Some(match first_error {
                    None => error,
                    Some(first) => first.with_failed_undo(error),
                });
            }
        }
    }
    first_error.map_or(Ok(released), Err)
}

/// Releases what record `id` names. Returns descriptions.
fn release_one(
    dir: &Path,
    id: &str,
    in_use: &dyn Fn(&str) -> Result<bool>,
    disks: &mut dyn Disks,
) -> Result<Vec<String>> {
    let Some(found) = record::find::<Facts>(dir, id)? else { return Ok(Vec::new()) };
    if found.lock.is_none() {
        // It belongs to a living process.
        return Ok(Vec::new());
    }
    let facts = match &found.record {
        Ok(facts) => facts.clone(),
        // Nothing is created before the first record is complete.
        Err(_) if !record::path_of(dir, id).exists() => return found.remove(&[]).map(|()| Vec::new()),
        Err(_) => {
            // What it names must not be forgotten.
            let error = found.record.expect_err("it is an error");
            return Err(error.next("run 'tidemark recover' of the version that wrote it"));
        }
    };
    if in_use(&facts.about.uuid)? {
        return Ok(Vec::new());
    }
    let mut released = Vec::new();
    match facts.head {
        HeadRecord::Nothing => {}
        HeadRecord::Zram { index } => {
            disks.release_zram(index)?;
            released.push(format!("the RAM disk /dev/zram{index}"));
        }
        HeadRecord::ZramIntended { before } => released.extend(release_intended(&before, disks)?),
        HeadRecord::Brd => {
            disks.release_brd()?;
            released.push("the RAM disk /dev/ram0 (module brd)".to_owned());
        }
    }
    if let Some(file) = &facts.file {
        released.extend(release_file(file)?);
    }
    found.remove(&[])?;
    Ok(released)
}

/// Removes the named file of a store if it is the recorded one. Returns a description.
pub(super) fn release_file(file: &NamedFile) -> Result<Option<String>> {
    let path = &file.path;
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.io_context(|| format!("examining the store {}", path.display()))?,
    };
    let ours = match file.inode {
        Some(inode) => inode == Inode::of(&metadata),
        None => metadata.is_file() && metadata.len() == 0,
    };
    if !ours {
        tracing::warn!("{} is not the file that was created for a store; it was left alone", path.display());
        return Ok(None);
    }
    fs::remove_file(path).io_context(|| format!("removing the store {}", path.display()))?;
    Ok(Some(format!("the store {}", path.display())))
}

fn release_intended(before: &[u32], disks: &mut dyn Disks) -> Result<Option<String>> {
    let mut new = disks.zram_indices();
    new.retain(|index| !before.contains(index));
    match new.as_slice() {
        [index] if disks.zram_is_unused(*index) => {
            disks.release_zram(*index)?;
            Ok(Some(format!("the RAM disk /dev/zram{index}")))
        }
        [] => Ok(None),
        _ => {
            tracing::warn!(
                "zram devices {new:?} have appeared since the creation of a store was interrupted; none was \
                 removed, because none is known to be Tidemark's (an unused one takes no memory)"
            );
            Ok(None)
        }
    }
}

#[cfg(test)]
#[path = "leftovers_tests.rs"]
mod tests;
