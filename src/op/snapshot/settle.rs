//! Makes the devices of a volume's snapshots agree with their record.
//!
//! Runs at the end of every command that has changed the record, when the volume is attached, and in `recover`. Each
//! part looks at what there is, so it can be repeated after a crash at any point:
//! 1. a snapshot whose instant was not recorded is removed, unless its group was committed;
//! 2. every other one gets its store, its view and, unless it is deleted, the device that users see, from the newest
//!    to the oldest. A view that reads through another device than it should is led to the right one;
//!    Then every clone gets the same;
//! 3. deletions are completed;
//! 4. a volume without snapshots gets its own table back.
//!
//! # How a view is led to another device
//!
//! A view that still receives originals must not simply get a new table: the kernel reads the store's metadata when the
//! table is loaded, and what arrives until it is active would be missing. So it is led to an alias of the new device
//! first, which ends the receiving, and then to the device itself, when the store is as it finally is. (Without the
//! alias the kernel would hand the old table's exceptions over to the new one, which is for other cases.) What the old
//! table still appends meanwhile is in the newer store as well, so every view is right at every moment.
//!
//! # How a snapshot in the middle is deleted
//!
//! What its store holds and the next older store does not is written through the older view onto itself, which gives
//! that store originals of its own (copy-up), and is flushed. Then the older view is led past the deleted one, and only
//! then the record stops naming it as a part of the chain. After a crash at any point, the older view is right in both
//! ways.

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt as _, Sectors};
use crate::dm::naming::{
    ROLE_ALIAS, ROLE_CLONE, ROLE_KEEP, ROLE_MASK, ROLE_SNAPSHOT, ROLE_VIEW, ROLE_VOLUME, SnapshotNames,
};
use crate::dm::{DeviceIdentity, Dm, Slot, SnapshotStatus, Table, Target, Udev};
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::stack::change::{IntentLog, NoIntents};
use crate::stack::kept;
use crate::store::persistent::rewrite;
use crate::store::size;
use crate::sys::aligned::AlignedBuffer;
use crate::sys::process::crash_point;

use super::group;
use super::layers::{self, Place, RESTORE_BUDGET};
use super::merge;
use super::set::{self, SnapshotSet};

/// Most bytes that are copied up at once.
const COPY_UP_BYTES: Bytes = Bytes::mib(1);

/// A volume's snapshots while their devices are changed.
pub struct Settlement<'a> {
    /// Device-mapper.
    pub dm: &'a Dm,
    /// The record.
    pub set: SnapshotSet,
    /// Records the change of the volume's table.
    pub journal: &'a mut dyn IntentLog,
    /// Polled while originals are copied up; an error ends that, and the rest is left for the next time.
    pub interrupt: &'a dyn Fn() -> Result<()>,
    /// What was done, in words.
    pub done: Vec<String>,
}

impl Settlement<'_> {
    /// Settles; afterwards devices and record agree. Returns what was done.
    ///
    /// # Errors
    /// The first failure: the volume stays in use, every view is right, and settling again continues.
    pub fn settle(mut self) -> Result<Vec<String>> {
        let what = format!("the snapshots of {}", self.set.record().volume);
        let result = self.steps().map_err(|error| {
            error.context(what).next("run 'tidemark recover', which continues once the cause is mended")
        });
        result?;
        if self.set.record().snapshots.is_empty() {
            self.set.remove()?;
        }
        Ok(self.done)
    }

    fn steps(&mut self) -> Result<()> {
        self.resume_suspended()?;
        self.drop_unfinished()?;
        match layers::place(self.dm, self.set.record())? {
            Place::Led => {
                self.note_lost()?;
                self.assemble(false)?;
                self.note_lost()?;
                self.done.extend(merge::tend(self.dm, &mut self.set, self.journal)?);
                self.drop_lost()?;
            }
            Place::Bypassed => self.lose_all("the volume was in use without its snapshots")?,
            Place::Absent => {}
        }
        self.finish_deletions()?;
        self.dissolve_if_empty()
    }

    /// Resumes devices of the set that a command left suspended: a table that could not be swapped leaves one so, and
    /// writers may wait for it. Either of its tables is valid.
    fn resume_suspended(&self) -> Result<()> {
        let record = self.set.record();
        let is_of_set = |uuid: &str| {
            DeviceIdentity::parse(uuid).is_some_and(|identity| {
                identity.role != ROLE_VOLUME
                    && (identity.id == record.id || record.snapshots.iter().any(|one| one.id == identity.id))
            })
        };
        for device in self.dm.list_ours()?.iter().filter(|device| is_of_set(&device.uuid)) {
            if device.suspended && device.has_active {
                if device.has_inactive {
                    self.dm.clear(device.number)?;
                }
                self.dm.resume_if_suspended(device.number)?;
            }
        }
        Ok(())
    }

    fn needed(&self, name: &str) -> Result<DeviceNumber> {
        Ok(self.dm.info_of(name)?.number)
    }

    /// Step 1. Such a snapshot is the newest one, or a clone, and nothing reads through it.
    fn drop_unfinished(&mut self) -> Result<()> {
        self.set.accept_committed()?;
        let unfinished: Vec<SnapshotRecord> = self.in_state(SnapshotState::Creating);
        if unfinished.is_empty() {
            return Ok(());
        }
        // The first snapshot's instant may have led the volume to it.
        if self.set.record().linked().is_empty() {
            self.dissolve()?;
        }
        for snapshot in unfinished {
            self.discard(&snapshot)?;
        }
        Ok(())
    }

    fn in_state(&self, state: SnapshotState) -> Vec<SnapshotRecord> {
        self.set.record().snapshots.iter().filter(|snapshot| snapshot.state == state).cloned().collect()
    }

    /// Removes the devices and the store of a snapshot that nothing reads through, then its record.
    fn discard(&mut self, snapshot: &SnapshotRecord) -> Result<()> {
        let record = self.set.record();
        let (names, store) = (record.names(snapshot), record.store(snapshot)?);
        self.hide(snapshot)?;
        self.remove_views(snapshot)?;
        crash_point("snapshot.discard.devices");
        store.remove(self.dm)?;
        if snapshot.is_of_rollback() {
            record.log(snapshot)?.remove(self.dm)?;
        }
        crash_point("snapshot.discard.store");
        self.done.push(format!("remove {}", names.snapshot));
        self.set.change(|record| record.snapshots.retain(|other| other.id != snapshot.id))
    }

    /// Removes the devices through which a snapshot or clone is read.
    fn remove_views(&self, snapshot: &SnapshotRecord) -> Result<()> {
        let names = self.set.record().names(snapshot);
        self.remove(&names.mask, ROLE_MASK, snapshot)?;
        self.remove(&names.view, ROLE_VIEW, snapshot)?;
        self.remove(&names.alias, ROLE_ALIAS, snapshot)
    }

    /// Removes one of our devices, if it exists.
    fn remove(&self, name: &str, role: &str, snapshot: &SnapshotRecord) -> Result<()> {
        self.dm.remove_if_it_is(name, &self.set.record().identity(role, snapshot))
    }

    /// Step 2. `is_building`: the volume is not attached yet, so a view that is missing has missed nothing.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if the newest view was removed while the
    /// volume was in use; the kernel's; I/O errors.
    pub fn assemble(&mut self, is_building: bool) -> Result<()> {
        let record = self.set.record().clone();
        let length = record.length()?;
        let missing = || Error::refused(format!("the device {} is missing", record.volume_names().data));
        let mut upper = layers::data(self.dm, &record)?.ok_or_else(missing)?.number;
        let linked = record.linked();
        for (at, snapshot) in linked.iter().enumerate().rev() {
            let names = record.names(snapshot);
            let store = record.store(snapshot)?.show(self.dm)?;
            let table = kept::view_table(length, upper, store, record.chunk()?)?;
            let is_newest = at + 1 == linked.len();
            self.drop_loaded(&names.view)?;
            let view = layers::view(self.dm, &record, snapshot)?.filter(|view| view.has_active);
            let found = view.map(|view| self.dm.table(view.number, Slot::Active)).transpose()?.flatten();
            match found {
                Some(found) if found == table => {}
                Some(_) => self.lead(&record, snapshot, upper, &table)?,
                None if is_newest && !is_building => {
                    return self.lose_all("the device of the newest was removed while the volume was in use");
                }
                None => self.make_view(&record, snapshot, &table)?,
            }
            self.remove(&names.alias, ROLE_ALIAS, snapshot)?;
            upper = self.needed(&names.view)?;
            if snapshot.state == SnapshotState::Kept {
                let whole = self.mask(&record, snapshot, upper)?;
                self.show(&record, snapshot, length, whole)?;
            }
        }
        record.clones().iter().try_for_each(|clone| self.assemble_clone(&record, clone))
    }

    /// Makes the devices of a clone, whose snapshot has its own. All that was written to it is in its store, so a view
    /// that is missing has missed nothing.
    fn assemble_clone(&mut self, record: &SnapshotSetRecord, clone: &SnapshotRecord) -> Result<()> {
        let length = record.length()?;
        let names = record.names(clone);
        let linked = record.linked();
        let origin = linked.iter().find(|snapshot| Some(&snapshot.id) == clone.clone_of.as_ref());
        // Those of a lost snapshot are taken out with it; a lost store must not be read again as if it were whole.
        let is_lost = |one: &SnapshotRecord| one.lost.is_some();
        let is_merged = clone.is_of_rollback();
        let is_usable = |origin: &&SnapshotRecord| is_merged || !is_lost(origin) && !is_lost(clone);
        let Some(origin) = origin.filter(is_usable) else { return Ok(()) };
        let upper = self.needed(&record.names(origin).view)?;
        let upper = self.mask(record, origin, upper)?;
        let store = record.store(clone)?.show(self.dm)?;
        let table = kept::view_table(length, upper, store, record.chunk()?)?;
        self.drop_loaded(&names.view)?;
        let view = layers::view(self.dm, record, clone)?.filter(|view| view.has_active);
        let found = view.map(|view| self.dm.table(view.number, Slot::Active)).transpose()?.flatten();
        match found {
            None => self.make_view(record, clone, &table)?,
            Some(found) if found != table => self.lead(record, clone, upper, &table)?,
            Some(_) => self.reopen_full(record, clone, upper, &table)?,
        }
        self.remove(&names.alias, ROLE_ALIAS, clone)?;
        if is_merged {
            return Ok(());
        }
        let view = self.needed(&names.view)?;
        self.show(record, clone, length, view)
    }

    /// A clone whose store was full takes no more writes until the store is larger and has been read again.
    fn reopen_full(
        &mut self,
        record: &SnapshotSetRecord,
        clone: &SnapshotRecord,
        upper: DeviceNumber,
        table: &Table,
    ) -> Result<()> {
        if layers::status(self.dm, record, clone)? != Some(SnapshotStatus::Overflow) {
            return Ok(());
        }
        let store = record.store(clone)?;
        let total = store.file_bytes()?;
        let room = store.free_beyond_reserve()?.min(total).align_down(size::STORE_UNIT);
        if room == Bytes::ZERO {
            // It can still be read. The monitor warns, and tries again.
            return Ok(());
        }
        store.enlarge(self.dm, total + room)?;
        self.lead(record, clone, upper, table)?;
        self.done.push(format!("enlarge the store of {}", record.names(clone).snapshot));
        Ok(())
    }

    /// Drops a table that a command that died has loaded into a view: it may hold an alias.
    fn drop_loaded(&self, view: &str) -> Result<()> {
        let has_loaded = self.dm.info(view)?.is_some_and(|info| info.has_active && info.has_inactive);
        if has_loaded { self.dm.clear(view) } else { Ok(()) }
    }

    fn make_view(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        table: &Table,
    ) -> Result<()> {
        let name = record.names(snapshot).view;
        // One without a table was left by a creation that was not completed.
        self.remove(&name, ROLE_VIEW, snapshot)?;
        let uuid = record.identity(ROLE_VIEW, snapshot).uuid();
        self.dm.create_active(&name, &uuid, table, Udev::Internal)?;
        self.done.push(format!("make {name}"));
        Ok(())
    }

    /// Originals were not preserved, so no snapshot shows its instant any more. The volume gets its own table back.
    fn lose_all(&mut self, why: &str) -> Result<()> {
        let linked = self.set.record().linked();
        if linked.is_empty() {
            return Ok(());
        }
        if self.set.record().rolling_back().is_some() {
            // Its device holds a mixture until the merge is complete, and must not be used alone.
            return Err(Error::new(
                ErrorKind::StoreInvalid,
                format!("{} cannot be rolled back any further: {why}", self.set.record().volume),
            ));
        }
        self.set.change(|record| record.lose_all(why))?;
        tracing::warn!("the snapshots of {} are lost: {why}", self.set.record().volume);
        crash_point("snapshot.lost.noted");
        self.take_out_lost(&linked)
    }

    /// Takes the oldest snapshots of the chain, which are lost, out of it, and their clones with them.
    fn take_out_lost(&mut self, oldest: &[SnapshotRecord]) -> Result<()> {
        let record = self.set.record().clone();
        let lost = record.with_clones(oldest);
        // Refused by the kernel while one is mounted; then everything stays as it is.
        lost.iter().try_for_each(|snapshot| self.hide(snapshot))?;
        if oldest.len() == record.linked().len() {
            self.dissolve()?;
        }
        for snapshot in &lost {
            self.remove_views(snapshot)?;
            record.store(snapshot)?.hide(self.dm)?;
        }
        crash_point("snapshot.lost");
        self.set.change(|record| {
            let is_lost = |one: &&mut SnapshotRecord| lost.iter().any(|lost| lost.id == one.id);
            record.snapshots.iter_mut().filter(is_lost).for_each(SnapshotRecord::unlink_lost);
        })
    }

    /// Records which snapshots are lost because a store has failed or was full: that one's, and all that are read
    /// through it. The kernel may be unable to note it in the store, and a table that is loaded again would take the
    /// store for whole.
    fn note_lost(&mut self) -> Result<()> {
        let record = self.set.record().clone();
        let mut why = None;
        let mut lost = Vec::new();
        let failed = |snapshot: &SnapshotRecord| -> Result<Option<String>> {
            let status = layers::status(self.dm, &record, snapshot)?.filter(layers::is_lost);
            Ok(status.map(|_| format!("the store of {}@{} failed or was full", record.volume, snapshot.name)))
        };
        for snapshot in record.linked().iter().rev() {
            why = failed(snapshot)?.or(why);
            for one in record.clones_of(&snapshot.id).chain([snapshot]) {
                let why = if one.id == snapshot.id { why.clone() } else { why.clone().or(failed(one)?) };
                if let Some(why) = why.filter(|_| one.lost.is_none()) {
                    lost.push((one.id.clone(), why));
                }
            }
        }
        if lost.is_empty() {
            return Ok(());
        }
        self.set.change(|record| {
            for (id, why) in lost {
                if let Some(snapshot) = record.snapshots.iter_mut().find(|snapshot| snapshot.id == id) {
                    snapshot.lost = Some(why);
                }
            }
        })
    }

    /// Leads the view of `snapshot` to `upper`, in two steps.
    fn lead(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        upper: DeviceNumber,
        table: &Table,
    ) -> Result<()> {
        let names = record.names(snapshot);
        if !self.is_on_alias(&names)? {
            self.remove(&names.alias, ROLE_ALIAS, snapshot)?;
            let over =
                Table::single(table.length(), Target::Linear { device: upper, offset: Sectors::ZERO })?;
            let uuid = record.identity(ROLE_ALIAS, snapshot).uuid();
            let alias = self.dm.create_active(&names.alias, &uuid, &over, Udev::Internal)?;
            crash_point("snapshot.lead.alias");
            let store = self.needed(&names.store)?;
            self.swap(&names.view, &kept::view_table(table.length(), alias, store, record.chunk()?)?)?;
            crash_point("snapshot.lead.first");
        }
        self.swap(&names.view, table)?;
        crash_point("snapshot.lead.second");
        self.remove(&names.alias, ROLE_ALIAS, snapshot)
    }

    /// True if a command that died has led the view to its alias: it receives nothing any more.
    fn is_on_alias(&self, names: &SnapshotNames) -> Result<bool> {
        let Some(alias) = self.dm.info(names.alias.as_str())?.map(|info| info.number) else {
            return Ok(false);
        };
        Ok(self.dm.table(names.view.as_str(), Slot::Active)?.is_some_and(|table| table.maps_to(alias)))
    }

    fn swap(&self, view: &str, table: &Table) -> Result<()> {
        self.dm.load(view, table)?;
        crash_point("snapshot.lead.loaded");
        self.dm.swap_or_resume(view)
    }

    /// The device that shows what `snapshot` shows, whose view is `view`: that itself, or for a snapshot of a subset
    /// one over it with zeros where something is left out. Older snapshots read through the view: they may need what
    /// this one leaves out.
    fn mask(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        view: DeviceNumber,
    ) -> Result<DeviceNumber> {
        if snapshot.subset.is_none() {
            return Ok(view);
        }
        let name = record.names(snapshot).mask;
        let identity = record.identity(ROLE_MASK, snapshot);
        let found = layers::find(self.dm, &record.volume, (&name, ROLE_MASK, &snapshot.id))?;
        if let Some(found) = found.filter(|found| found.has_active) {
            return Ok(found.number);
        }
        self.dm.remove_if_it_is(&name, &identity)?;
        let table = mask_table(record.length()?, view, &snapshot.left_out())?;
        let number = self.dm.create_active(&name, &identity.uuid(), &table, Udev::Internal)?;
        crash_point("snapshot.mask");
        Ok(number)
    }

    /// Makes the device that users see: read-only, unless it is that of a clone.
    fn show(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        length: Sectors,
        view: DeviceNumber,
    ) -> Result<()> {
        let name = record.names(snapshot).snapshot;
        let info = self.dm.info(name.as_str())?;
        if info.is_some_and(|info| info.has_active) {
            return Ok(());
        }
        self.hide(snapshot)?;
        let table = Table::single(length, Target::Linear { device: view, offset: Sectors::ZERO })?;
        let uuid = record.identity(shown_role(snapshot), snapshot).uuid();
        if snapshot.clone_of.is_some() {
            self.dm.create_active(&name, &uuid, &table, Udev::Internal)?;
        } else {
            self.dm.create_read_only(&name, &uuid, &table, Udev::Internal)?;
        }
        crash_point("snapshot.show");
        Ok(())
    }

    /// A store that has failed is needed by all older snapshots. When one of these is deleted, all are taken out: the
    /// originals that the others would need do not exist.
    fn drop_lost(&mut self) -> Result<()> {
        let linked = self.set.record().linked();
        if self.set.record().rolling_back().is_some() {
            return Ok(());
        }
        let Some(last) = linked.iter().rposition(|snapshot| snapshot.lost.is_some()) else { return Ok(()) };
        let lost = &linked[..=last];
        if lost.iter().all(|snapshot| snapshot.state == SnapshotState::Kept) {
            return Ok(());
        }
        self.take_out_lost(lost)
    }

    /// Step 3.
    fn finish_deletions(&mut self) -> Result<()> {
        loop {
            for snapshot in self.in_state(SnapshotState::Unlinked) {
                self.discard(&snapshot)?;
            }
            let linked = self.set.record().linked();
            let newest = linked.len().saturating_sub(1);
            let is_due = |(at, snapshot): &(usize, &SnapshotRecord)| match snapshot.state {
                SnapshotState::Deleting => true,
                SnapshotState::Retired => *at != newest || *at == 0,
                _ => false,
            };
            let Some((at, snapshot)) = linked.iter().enumerate().find(is_due) else { return Ok(()) };
            self.hide(snapshot)?;
            match at {
                // Nothing reads through the oldest. If it is the only one, it still receives.
                0 => {
                    if newest == 0 {
                        self.dissolve()?;
                    }
                    self.set.change_one(&snapshot.id, |it| it.state = SnapshotState::Unlinked)?;
                }
                at if at == newest => {
                    self.set.change_one(&snapshot.id, |it| it.state = SnapshotState::Retired)?;
                }
                at => self.take_out(&linked, at)?,
            }
            crash_point("snapshot.delete.step");
        }
    }

    /// Removes the device that users see.
    fn hide(&self, snapshot: &SnapshotRecord) -> Result<()> {
        self.remove(&self.set.record().names(snapshot).snapshot, shown_role(snapshot), snapshot)
    }

    /// Takes a snapshot out of the middle of the chain.
    fn take_out(&mut self, linked: &[SnapshotRecord], at: usize) -> Result<()> {
        let (older, snapshot, newer) = (&linked[at - 1], &linked[at], &linked[at + 1]);
        let record = self.set.record().clone();
        // A lost one needs nothing any more, and neither do those that are read through it.
        if older.lost.is_none() {
            self.copy_up(&record, snapshot, older)?;
        }
        crash_point("snapshot.delete.copied");
        let upper = self.needed(&record.names(newer).view)?;
        let store = self.needed(&record.names(older).store)?;
        let table = kept::view_table(record.length()?, upper, store, record.chunk()?)?;
        self.lead(&record, older, upper, &table)?;
        crash_point("snapshot.delete.led");
        self.set.change_one(&snapshot.id, |it| it.state = SnapshotState::Unlinked)
    }

    /// Gives `older` every original that it reads through `snapshot`.
    fn copy_up(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        older: &SnapshotRecord,
    ) -> Result<()> {
        let (from, to) = (record.store(snapshot)?, record.store(older)?);
        let overlap = from.overlap(self.dm, None, Some(&to), self.interrupt)?;
        let missing = overlap.chunks - overlap.shared;
        if missing == 0 {
            return Ok(());
        }
        self.make_room(record, (older, snapshot), missing)?;
        let view = record.names(older).view;
        let number = self.needed(&view)?;
        let device = self.dm.open_device(number, true, libc::O_DIRECT)?;
        let longest = COPY_UP_BYTES.max(record.chunk()?.bytes());
        let mut buffer = AlignedBuffer::zeroed(longest.as_len());
        from.missing(self.dm, &to, longest, self.interrupt, &mut |extent| {
            rewrite(&device, extent, &mut buffer)?;
            crash_point("snapshot.delete.copying");
            (self.interrupt)()
        })?;
        device.sync_all().io_context(|| format!("flushing {view}"))?;
        if self.dm.snapshot_status(&view)?.is_usable() {
            self.done.push(format!("copy {missing} originals of {} to {}", snapshot.name, older.name));
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::StoreInvalid,
            format!("the store of {}@{} failed while originals were added to it", record.volume, older.name),
        ))
    }

    /// Enlarges the store of `snapshot`, which reads through `upper`, for `chunks` more originals.
    fn make_room(
        &mut self,
        record: &SnapshotSetRecord,
        (snapshot, upper): (&SnapshotRecord, &SnapshotRecord),
        chunks: u64,
    ) -> Result<()> {
        let chunk = record.chunk()?;
        let lost = || set::no_snapshot(&format!("{}@{} is lost", record.volume, snapshot.name));
        if layers::status(self.dm, record, snapshot)? == Some(SnapshotStatus::Overflow) {
            // An earlier attempt found no space. The kernel takes no more writes until the store is read again.
            let upper = self.needed(&record.names(upper).view)?;
            let store = self.needed(&record.names(snapshot).store)?;
            let table = kept::view_table(record.length()?, upper, store, chunk)?;
            self.lead(record, snapshot, upper, &table)?;
        }
        let Some(SnapshotStatus::Active { used, total, .. }) = layers::status(self.dm, record, snapshot)?
        else {
            return Err(lost());
        };
        let wanted = used.bytes() + size::worst_case(chunk.bytes() * chunks, chunk)?;
        // By the device: an enlargement that was killed may have reached the file only.
        if wanted > total.bytes() { record.store(snapshot)?.enlarge(self.dm, wanted) } else { Ok(()) }
    }

    /// Step 4.
    fn dissolve_if_empty(&mut self) -> Result<()> {
        let is_empty =
            self.set.record().linked().is_empty() && self.in_state(SnapshotState::Unlinked).is_empty();
        if is_empty { self.dissolve() } else { Ok(()) }
    }

    /// Gives the volume its own table back, and removes the devices below it. Nothing is preserved from then on.
    fn dissolve(&mut self) -> Result<()> {
        let record = self.set.record();
        let (names, volume) = (record.volume_names(), record.volume.clone());
        if let Some(keep) = layers::keep(self.dm, record)? {
            let is_there = self.dm.info(volume.as_str())?.is_some();
            let table = if is_there { self.dm.table(volume.as_str(), Slot::Active)? } else { None };
            let data = layers::data(self.dm, record)?;
            let leads_to =
                |table: &Table| data.is_some_and(|data| kept::leads_to(table, keep.number, data.number));
            if table.as_ref().is_some_and(leads_to) {
                crash_point("snapshot.dissolve.before");
                kept::restore(self.dm, &volume, &names, RESTORE_BUDGET, self.journal)?;
                crash_point("snapshot.dissolve.restored");
                self.done.push(format!("put back the table of {volume}"));
            }
        }
        self.remove_of_volume(&names.keep, ROLE_KEEP)?;
        // Views are on `data`.
        for snapshot in &self.set.record().top_down() {
            self.hide(snapshot)?;
            self.remove_views(snapshot)?;
        }
        self.remove_of_volume(&names.data, crate::dm::naming::ROLE_DATA)
    }

    fn remove_of_volume(&self, name: &str, role: &str) -> Result<()> {
        let record = self.set.record();
        self.dm.remove_if_it_is(name, &DeviceIdentity::new(&record.volume, role, &record.id))
    }
}

/// A table that shows `view`, and zeros where `left_out` is.
fn mask_table(length: Sectors, view: DeviceNumber, left_out: &ExtentSet) -> Result<Table> {
    let whole = Extent::new(Bytes::ZERO, length.bytes());
    let shown = whole.into_iter().flat_map(|whole| left_out.gaps_in(whole).collect::<Vec<_>>());
    let mut runs: Vec<(Extent, bool)> = shown.map(|extent| (extent, true)).collect();
    runs.extend(left_out.iter().map(|extent| (extent, false)));
    runs.sort_unstable();
    let damaged = |what: &str| Error::bad_data(format!("the record of a snapshot leaves out {what}"));
    let sectors = |bytes: Bytes| {
        bytes.to_sectors("what a snapshot leaves out").map_err(|_| damaged("parts of sectors"))
    };
    let lines = runs.into_iter().map(|(extent, is_shown)| {
        let offset = sectors(extent.start())?;
        let target = if is_shown { Target::Linear { device: view, offset } } else { Target::Zero };
        Ok((sectors(extent.length())?, target))
    });
    let table = Table::concatenated(lines.collect::<Result<Vec<_>>>()?)?;
    if table.length() == length {
        return Ok(table);
    }
    Err(damaged("bytes beyond the volume"))
}

/// Completes what a command that died has left. Returns the set; None if it had no snapshots any more.
///
/// # Errors
/// As [`Settlement::settle`] and [`SnapshotSet::find`].
pub fn settle_first(
    dm: &Dm,
    set: SnapshotSet,
    journal: &mut dyn IntentLog,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<SnapshotSet>> {
    let volume = set.record().volume.clone();
    Settlement { dm, set, journal, interrupt, done: Vec::new() }.settle()?;
    SnapshotSet::find(&volume, interrupt)
}

/// As [`settle_first`], for a command that needs the set of `volume`.
///
/// # Errors
/// [`ErrorKind::Refused`] if it has no snapshots; as [`settle_first`].
pub fn find_settled(
    dm: &Dm,
    volume: &str,
    journal: &mut dyn IntentLog,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<SnapshotSet> {
    let set = settle_first(dm, set::find_existing(volume, interrupt)?, journal, interrupt)?;
    set.ok_or_else(|| set::none_of(volume))
}

/// The role of the device that users see.
fn shown_role(snapshot: &SnapshotRecord) -> &'static str {
    if snapshot.clone_of.is_some() { ROLE_CLONE } else { ROLE_SNAPSHOT }
}

/// Settles a set, unless its volume is being copied. Returns what was done.
///
/// # Errors
/// As [`Settlement::settle`].
fn settle_idle(dm: &Dm, set: SnapshotSet) -> Result<Vec<String>> {
    let volume = dm.info(set.record().volume.as_str())?.map(|info| info.number);
    if volume.is_some_and(|number| crate::job::refuse_held_origin(number).is_err()) {
        return Ok(Vec::new());
    }
    Settlement { dm, set, journal: &mut NoIntents, interrupt: &|| Ok(()), done: Vec::new() }.settle()
}

/// As [`settle_idle`], for the set with this id; does nothing while another command changes it.
///
/// # Errors
/// As [`settle_idle`] and [`SnapshotSet::find_idle`].
pub fn settle_if_idle(dm: &Dm, id: &str) -> Result<()> {
    match SnapshotSet::find_idle(id)? {
        Some(set) => settle_idle(dm, set).map(drop),
        None => Ok(()),
    }
}

/// Settles every set of snapshots that no other command is changing, and whose volume is not being copied. Returns what
/// was done.
///
/// # Errors
/// The first failure, with the others as failed undos.
pub fn settle_all(dm: &Dm) -> Result<Vec<String>> {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for set in SnapshotSet::find_all()? {
        match set.and_then(|set| settle_idle(dm, set)) {
            Ok(settled) => done.extend(settled),
            Err(error) => errors.push(error),
        }
    }
    // In this order: the record of a group is written after those of its volumes.
    let groups = group::all()?;
    group::forget(&groups, &set::read_all()?)?;
    Error::first_of(errors).map(|()| done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_shows_zeros_and_the_rest_the_view() {
        let view = DeviceNumber { major: 253, minor: 7 };
        let mask = |left_out: &[(u64, u64)]| {
            let set =
                left_out.iter().filter_map(|(start, end)| Extent::new(Bytes(*start), Bytes(*end))).collect();
            mask_table(Sectors(64), view, &set).map(|table| table.to_string())
        };
        assert_eq!(mask(&[]).unwrap(), "0 64 linear 253:7 0");
        assert_eq!(mask(&[(0, 32768)]).unwrap(), "0 64 zero");
        assert_eq!(
            mask(&[(4096, 8192), (28672, 32768)]).unwrap(),
            "0 8 linear 253:7 0\n8 8 zero\n16 40 linear 253:7 16\n56 8 zero"
        );
        assert_eq!(
            mask(&[(0, 4096), (8192, 12288)]).unwrap(),
            "0 8 zero\n8 8 linear 253:7 8\n16 8 zero\n24 40 linear 253:7 24"
        );
        for damaged in [(0, 36864), (32768, 36864), (0, 100)] {
            assert_eq!(mask(&[damaged]).unwrap_err().kind(), ErrorKind::BadData, "{damaged:?}");
        }
    }
}
