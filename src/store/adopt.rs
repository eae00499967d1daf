//! Takes over the store of a process that died.
//!
//! As long as the kernel has the store's device, nothing of the store is lost. The device's table holds the
//! parts, their sizes, and the tail's loop devices (which autoclear would release otherwise). The record
//! holds the rest. The two together give a [`CowStore`] that is read, grown and released like any other. The
//! record is locked first, so only one of two processes gets the store, and `release_leftovers` skips it
//! while it is in use.
//!
//! Invariants: nothing is created, and nothing changes that the origin or the snapshot depends on. A table
//! that was loaded but never activated is dropped, and a file that had a name only while a further tail was
//! made is removed. So a crash at any step leaves the same store, to be adopted again or released by
//! `recover`. If record and kernel disagree, nothing is touched.
//!
//! Not checked here: whether the snapshot is valid, and whether the job may be taken over. The caller holds
//! the job's lock.

use std::path::Path;

use crate::base::{Bytes, DeviceNumber, Error, Result};
use crate::dm::{DeviceInfo, Dm, Slot, Table, Target};

use super::cow::{CowStore, Parts};
use super::head::Head;
use super::leftovers::release_file;
use super::place::TailPlace;
use super::record::{Facts, HeadRecord, RECORD_DIR, Record};
use super::size::TAIL_COUNT_MAX;
use super::tail::Tail;
use crate::sys::process::crash_point;

/// The parts of a store, according to its table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    /// The RAM head.
    head: Option<(DeviceNumber, Bytes)>,
    /// The pieces of the tail; empty before the tail has joined.
    tails: Vec<(DeviceNumber, Bytes)>,
}

impl CowStore {
    /// Takes over the store of job `id`, whose process died. The caller holds the job's lock.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the process lives, if the store no longer
    /// exists, or if record and kernel disagree; I/O and kernel errors. A failed attempt changes nothing and
    /// unlocks the record.
    pub fn adopt(id: &str) -> Result<Self> {
        let mut record = Record::take_over(Path::new(RECORD_DIR), id)?;
        crash_point("store.adopt.locked");
        let found = find(record.facts()).and_then(|found| found.drop_unused(&mut record).map(|()| found));
        found
            .map_err(|error| adoption_error(error, &record))
            .map(|found| Self::from_parts(found.number, found.into_parts(record)))
    }

    /// As [`CowStore::adopt`], but changes nothing: for a caller that only reads the store.
    ///
    /// # Errors
    /// As [`CowStore::adopt`].
    pub fn examine(id: &str) -> Result<Self> {
        let record = Record::take_over(Path::new(RECORD_DIR), id)?;
        find(record.facts())
            .map_err(|error| adoption_error(error, &record))
            .map(|found| Self::from_parts(found.number, found.into_parts(record)))
    }
}

fn adoption_error(error: Error, record: &Record) -> Error {
    error
        .context(format!("taking over the store {}", record.facts().about.device))
        .state("the store is unchanged, and the origin stays in use")
        .next("run 'tidemark recover', which releases the store, then start a new copy")
}

/// What was found in the kernel; the record is added by [`Found::into_parts`].
struct Found {
    dm: Dm,
    number: DeviceNumber,
    head: Option<Head>,
    tails: Vec<Tail>,
    tails_joined: bool,
    mapped: Bytes,
    /// A table that was loaded but never activated.
    has_unused_table: bool,
}

impl Found {
    fn drop_unused(&self, record: &mut Record) -> Result<()> {
        let facts = record.facts().clone();
        if self.has_unused_table {
            self.dm.clear(self.number)?;
        }
        if !facts.about.plan.keep
            && let Some(file) = &facts.file
        {
            release_file(file)?;
            record.note_file(None)?;
        }
        crash_point("store.adopt.cleared");
        Ok(())
    }

    fn into_parts(self, record: Record) -> Parts {
        let Self { dm, head, tails, tails_joined, mapped, .. } = self;
        Parts { dm, head, tails, tails_joined, mapped, record }
    }
}

/// Finds the parts in the kernel. Changes nothing.
fn find(facts: &Facts) -> Result<Found> {
    let dm = Dm::open()?;
    let name = &facts.about.device;
    let info = dm.info(name)?.ok_or_else(|| Error::refused(format!("there is no device {name}")))?;
    check_device(&info, facts)?;
    let table = dm.table(name, Slot::Active)?;
    let table = table.ok_or_else(|| Error::refused(format!("the device {name} has no table")))?;
    let layout = layout(facts, &table)?;
    let head_bytes = layout.head.map_or(Bytes::ZERO, |(_, bytes)| bytes);
    let head = Head::adopt(&facts.head, head_bytes)?;
    let seen = layout.head.map(|(number, _)| number);
    if head.as_ref().map(|head| head.number) != seen {
        return Err(Error::refused("its RAM head is not the device in its table"));
    }
    let tails = tails_of(facts, &layout)?;
    let tails_joined = head.is_none() || !layout.tails.is_empty();
    let mapped = table.length().bytes();
    let has_unused_table = info.has_inactive;
    Ok(Found { dm, number: info.number, head, tails, tails_joined, mapped, has_unused_table })
}

fn check_device(info: &DeviceInfo, facts: &Facts) -> Result<()> {
    let name = &facts.about.device;
    if info.uuid != facts.about.uuid {
        return Err(Error::refused(format!("the device {name} is a different one (UUID '{}')", info.uuid)));
    }
    if info.suspended {
        return Err(Error::refused(format!("the device {name} is suspended, and not by Tidemark")));
    }
    Ok(())
}

fn tails_of(facts: &Facts, layout: &Layout) -> Result<Vec<Tail>> {
    let plan = &facts.about.plan;
    if let ([], TailPlace::Device { path, number, .. }) = (layout.tails.as_slice(), &plan.place) {
        // No table maps it, so nothing has held it open since.
        return Tail::on_device(path, *number, plan.tail_bytes).map(|tail| vec![tail]);
    }
    let named = facts.file.as_ref().filter(|_| plan.keep);
    let count = layout.tails.len();
    layout
        .tails
        .iter()
        .enumerate()
        .map(|(index, (number, bytes))| Tail::adopt(&plan.place, *number, *bytes, index + 1 == count, named))
        .collect()
}

/// Compares `table` with the record's `facts`. Pure.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), naming the difference.
fn layout(facts: &Facts, table: &Table) -> Result<Layout> {
    let plan = &facts.about.plan;
    let mut parts = Vec::new();
    for line in table.lines() {
        match (&line.target, line.length.checked_bytes()) {
            (Target::Linear { device, offset }, Some(bytes)) if offset.get() == 0 => {
                parts.push((*device, bytes));
            }
            (target, _) => {
                let (kind, params) = (target.kind(), target.params());
                return Err(Error::refused(format!("its table has the unexpected line '{kind} {params}'")));
            }
        }
    }
    let has_head = match facts.head {
        HeadRecord::Zram { .. } | HeadRecord::Brd => true,
        HeadRecord::Nothing => false,
        HeadRecord::ZramIntended { .. } => return Err(Error::refused("its RAM head was never created")),
    };
    let tails = if has_head { parts.split_off(1) } else { std::mem::take(&mut parts) };
    let head = parts.pop();
    if let Some((_, bytes)) = head.filter(|(_, bytes)| *bytes != plan.head_bytes) {
        return Err(Error::refused(format!("its RAM head has {bytes} instead of {}", plan.head_bytes)));
    }
    if tails.len() > TAIL_COUNT_MAX {
        return Err(Error::refused(format!("its tail has {} pieces", tails.len())));
    }
    let one = matches!(plan.place, TailPlace::Device { .. }) || plan.keep;
    if one && tails.len() > 1 {
        return Err(Error::refused(format!("its tail has {} pieces instead of one", tails.len())));
    }
    if let TailPlace::Device { path, number, .. } = &plan.place
        && let Some((other, _)) = tails.iter().find(|(device, _)| device != number)
    {
        return Err(Error::refused(format!("its tail is the device {other} instead of {}", path.display())));
    }
    let total = table.length().bytes();
    if total > plan.total_bytes_max {
        return Err(Error::refused(format!(
            "it has {total}, more than its maximum of {}",
            plan.total_bytes_max
        )));
    }
    if plan.keep && plan.place.directory().is_some() && facts.file.is_none() {
        return Err(Error::refused("its file has been handed over to the user already"));
    }
    Ok(Layout { head, tails })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{ErrorKind, Sectors};
    use crate::store::record::NamedFile;
    use crate::store::record::tests::facts;

    fn device(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 7, minor }
    }

    /// A table of these parts in MiB.
    fn table(parts: &[(u32, u64)]) -> Table {
        let line = |(minor, mib): &(u32, u64)| {
            let target = Target::Linear { device: device(*minor), offset: Sectors::ZERO };
            (Bytes::mib(*mib).to_sectors("").unwrap(), target)
        };
        Table::concatenated(parts.iter().map(line)).unwrap()
    }

    /// A store with a head of 16 MiB, at most 1 GiB in all, in a directory.
    fn with_head() -> Facts {
        Facts { head: HeadRecord::Zram { index: 0 }, ..facts("a") }
    }

    fn parts(parts: &[(u32, u64)]) -> Vec<(DeviceNumber, Bytes)> {
        parts.iter().map(|(minor, mib)| (device(*minor), Bytes::mib(*mib))).collect()
    }

    fn refused(facts: &Facts, table: &Table) -> bool {
        layout(facts, table).unwrap_err().kind() == ErrorKind::Refused
    }

    #[test]
    fn the_parts_are_told_apart() {
        let head = Some((device(1), Bytes::mib(16)));
        for tails in [&[][..], &[(2, 64)], &[(2, 64), (3, 128), (9, 1)]] {
            let found = layout(&with_head(), &table(&[&[(1, 16)], tails].concat())).unwrap();
            assert_eq!(found, Layout { head, tails: parts(tails) });
        }
        let found = layout(&facts("a"), &table(&[(2, 64), (3, 1)])).unwrap();
        assert_eq!(found, Layout { head: None, tails: parts(&[(2, 64), (3, 1)]) });
    }

    #[test]
    fn a_table_that_contradicts_the_record_is_refused() {
        assert!(refused(&with_head(), &table(&[(1, 17), (2, 64)])), "another head");
        assert!(refused(&with_head(), &table(&[(1, 16), (2, 1009)])), "too large");
        let many: Vec<_> = (1..=65).map(|minor| (minor, 1)).collect();
        assert!(refused(&facts("a"), &table(&many)), "too many pieces");
        let never = Facts { head: HeadRecord::ZramIntended { before: vec![] }, ..facts("a") };
        assert!(refused(&never, &table(&[(1, 16)])), "a head that was never made");
        let length = Sectors(2048);
        for target in [
            Target::Error,
            Target::Linear { device: device(1), offset: Sectors(8) },
            Target::SnapshotOrigin { device: device(1) },
        ] {
            assert!(refused(&facts("a"), &Table::single(length, target).unwrap()));
        }
    }

    #[test]
    fn a_device_and_a_kept_file_are_one_piece() {
        let mut on_device = with_head();
        on_device.about.plan.place =
            TailPlace::Device { path: "/dev/x".into(), number: device(2), bytes: Bytes::mib(64) };
        assert!(layout(&on_device, &table(&[(1, 16), (2, 64)])).is_ok());
        assert!(layout(&on_device, &table(&[(1, 16)])).is_ok());
        assert!(refused(&on_device, &table(&[(1, 16), (3, 64)])), "another device");
        assert!(refused(&on_device, &table(&[(1, 16), (2, 64), (2, 64)])), "twice");

        let mut kept = facts("a");
        kept.about.plan.keep = true;
        assert!(refused(&kept, &table(&[(2, 64)])), "kept already");
        kept.file = Some(NamedFile { path: "/x".into(), inode: None });
        assert!(layout(&kept, &table(&[(2, 64)])).is_ok());
        assert!(refused(&kept, &table(&[(2, 64), (3, 64)])), "two files");
    }

    #[test]
    fn a_foreign_or_suspended_device_is_refused() {
        let facts = facts("a");
        let ours = DeviceInfo {
            name: facts.about.device.clone(),
            uuid: facts.about.uuid.clone(),
            number: device(9),
            open_count: 1,
            suspended: false,
            has_active: true,
            has_inactive: true,
            read_only: false,
        };
        assert!(check_device(&ours, &facts).is_ok());
        let other = DeviceInfo { uuid: "LVM-x".to_owned(), ..ours.clone() };
        let held = DeviceInfo { suspended: true, ..ours };
        for info in [other, held] {
            assert_eq!(check_device(&info, &facts).unwrap_err().kind(), ErrorKind::Refused);
        }
    }
}
