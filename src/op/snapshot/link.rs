//! Takes a volume with snapshots apart, and puts it together again.
//!
//! A snapshot shows its instant only if every write to the volume since then has gone through it. So the layers are
//! made before the volume, and nothing writes to the device in between: `data` holds it exclusively. Whether anything
//! wrote to it while it was detached is found by what is on it:
//! - `detach --keep-snapshots` records a digest. If an ext4 or XFS covers the device, it is of the first and the last
//!   MiB, of the filesystem's log, and of a random sample: a mount changes ext4's superblock or the log of XFS; any
//!   other write is found if it hits the sample. For anything else (a partition table, LUKS, LVM, a database) it is
//!   of the whole device;
//! - after a crash there is no such digest. An ext4 counts its mounts, and marks its journal as one that has to be
//!   replayed while it is mounted ([`filesystem_mount`]). What was last seen of that is in the record: from `snapshot
//!   create`, and within seconds of a mount from the monitor. If it is still so, no other boot or host has mounted the
//!   filesystem. For anything but ext4 the snapshots are lost, unless their devices still exist.
//!
//! Order of taking apart, the crash argument: the volume's device goes first; then the digest is recorded; then the
//! other devices go. Until the digest is recorded, they exist and hold the device. Order of putting together:
//! devices, then the record without digest, then the volume.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;

use sha2::{Digest as _, Sha256};

use super::layers::{self, Place};
use super::merge;
use super::set::{SnapshotSet, read_of};
use super::settle::{Settlement, settle_first};
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _, clock, numbers};
use crate::dm::naming::{ROLE_DATA, ROLE_KEEP, VolumeNames};
use crate::dm::{DeviceIdentity, DeviceInfo, Dm, Slot, Table, Target, Udev};
use crate::extent::Extent;
use crate::format::state::{DetachedRecord, SnapshotRecord, SnapshotSetRecord};
use crate::format::{filesystem_log, filesystem_mount};
use crate::stack::{self, change::NoIntents, kept};
use crate::sys::aligned::AlignedBuffer;
use crate::sys::process::crash_point;

use super::delete::in_use;

/// Bytes at either end that the digest contains.
const ENDS: Bytes = Bytes::mib(1);

/// Most bytes of the filesystem's log that the digest contains.
const LOG_BYTES_MAX: Bytes = Bytes::mib(256);

/// Blocks of the sample. A change of one in a hundred of all blocks is missed with a probability of 0.99^1024 =
/// 0.00003.
const SAMPLE: u64 = 1024;

/// Unit in which a device is read whole.
const STEP: Bytes = Bytes::mib(4);

/// Threads that read.
const READERS: usize = 32;

/// Size of a block of the sample.
const BLOCK: Bytes = Bytes::kib(4);

/// True if `table`, of volume `name`, leads to `device` through the layers of its snapshots.
#[must_use]
pub fn leads_to(dm: &Dm, name: &str, table: &Table, device: DeviceNumber) -> bool {
    let set = read_of(name).ok().flatten();
    let layer = |find: fn(&Dm, &SnapshotSetRecord) -> Result<Option<DeviceInfo>>| {
        set.as_ref().and_then(|set| find(dm, set).ok().flatten())
    };
    let mut tops = [layer(layers::keep), layer(layers::merge)].into_iter().flatten();
    tops.any(|top| table.maps_to(top.number)) && is_held_by_layers(dm, name, device).unwrap_or(false)
}

/// True if the layers of the snapshots of volume `name` exist and hold `device`.
///
/// # Errors
/// The kernel's; I/O errors.
pub fn is_held_by_layers(dm: &Dm, name: &str, device: DeviceNumber) -> Result<bool> {
    let Some(set) = read_of(name)? else { return Ok(false) };
    let Some(data) = layers::data(dm, &set)?.filter(|data| data.has_active) else { return Ok(false) };
    Ok(dm.table(data.number, Slot::Active)?.is_some_and(|table| table.maps_to(device)))
}

/// Makes the layers of volume `name`, whose own table is `own`. Returns the table that leads through them; None for a
/// volume without snapshots, or without any that still shows its instant.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the snapshots are those of another device; the kernel's;
/// I/O errors. Nothing is left then, and the snapshots are as they were.
pub fn assemble(dm: &Dm, name: &str, device: &Path, own: &Table) -> Result<Option<Table>> {
    let Some(mut set) = SnapshotSet::find(name, &|| Ok(()))? else { return Ok(None) };
    if set.record().linked().is_empty() {
        // What the device held proves nothing once the volume is in use.
        set.change(|record| record.detached = None)?;
        return Ok(None);
    }
    if set.record().length()? != own.length() {
        return Err(Error::refused(format!(
            "the snapshots of {name} are those of a device of {} bytes, and this one has {}",
            set.record().size_bytes,
            own.length().bytes().get()
        ))
        .state("nothing was changed")
        .next(format!(
            "choose another --name, or delete the snapshots first ('tidemark snapshot list {name}')"
        )));
    }
    let names = set.record().volume_names();
    let is_held = is_held(dm, &names, own)?;
    if !is_held {
        remove_layers(dm, &set)?;
    }
    create(dm, &set, &names.data, ROLE_DATA, own)?;
    if !is_held && let Some(why) = find_change(dm, &set)? {
        if Path::new(&set.record().device) != device {
            remove_layers(dm, &set)?;
            return Err(Error::refused(format!(
                "the snapshots of {name} are those of {}, and {} holds something else",
                set.record().device,
                device.display()
            ))
            .state("nothing was changed")
            .next(format!(
                "attach that device, or choose another --name, or delete the snapshots of {name} first"
            )));
        }
        tracing::warn!("the snapshots of {name} are lost: {why}");
        if set.record().rolling_back().is_some() {
            // Without them its device is of no use: it holds a mixture.
            set.change(|record| record.lose_all(&why))?;
            return build(dm, set, own, is_held).map(Some);
        }
        remove_layers(dm, &set)?;
        set.change(|record| {
            record.lose_all(&why);
            let linked = record.snapshots.iter_mut().filter(|snapshot| snapshot.state.is_linked());
            linked.for_each(SnapshotRecord::unlink_lost);
            record.detached = None;
        })?;
        return Ok(None);
    }
    build(dm, set, own, is_held).map(Some)
}

/// Makes the layers over `data`. Returns the volume's table.
fn build(dm: &Dm, set: SnapshotSet, own: &Table, is_held: bool) -> Result<Table> {
    let mut settlement =
        Settlement { dm, set, journal: &mut NoIntents, interrupt: &|| Ok(()), done: Vec::new() };
    let built = settlement.assemble(true).and_then(|()| {
        let table = build_keep(dm, &mut settlement.set, own)?;
        if merge::begin_planned(dm, &mut settlement.set)? {
            settlement.assemble(true)?;
        }
        Ok(merge::make(dm, settlement.set.record())?.unwrap_or(table))
    });
    built.map_err(|error| {
        let undo = if is_held { Ok(()) } else { remove_layers(dm, &settlement.set) };
        error.after_undo(undo).state("the volume was not attached, and its snapshots are as they were")
    })
}

/// Makes the device that preserves originals. Returns the volume's table.
fn build_keep(dm: &Dm, set: &mut SnapshotSet, own: &Table) -> Result<Table> {
    let names = set.record().volume_names();
    let data = dm.info_of(names.data.as_str())?.number;
    let over = Table::single(own.length(), Target::SnapshotOrigin { device: data })?;
    create(dm, set, &names.keep, ROLE_KEEP, &over)?;
    crash_point("snapshot.attach.assembled");
    // From here on the volume may be written.
    let found = mounts(dm, set.record())?;
    set.change(|record| {
        record.mounts = found;
        record.detached = None;
    })?;
    let keep = dm.info_of(names.keep.as_str())?.number;
    let by_all = set.record().left_out_by_all().unwrap_or_default();
    kept::volume_table(own.length(), (keep, data), &by_all, stack::form(dm, data))
}

/// True if the layers have held the device, whose table is `own`, since the volume was last in use.
fn is_held(dm: &Dm, names: &VolumeNames, own: &Table) -> Result<bool> {
    let table = |name: &str| match dm.info(name)? {
        Some(info) if info.has_active => dm.table(name, Slot::Active),
        _ => Ok(None),
    };
    Ok(table(&names.data)?.as_ref() == Some(own) && table(&names.keep)?.is_some())
}

fn create(dm: &Dm, set: &SnapshotSet, name: &str, role: &str, table: &Table) -> Result<()> {
    if dm.info(name)?.is_some_and(|info| info.has_active) {
        return Ok(());
    }
    let uuid = DeviceIdentity::new(&set.record().volume, role, &set.record().id).uuid();
    dm.create_active(name, &uuid, table, Udev::Internal).map(drop)
}

/// Removes the devices of all snapshots, the oldest first, and those below the volume.
fn remove_layers(dm: &Dm, set: &SnapshotSet) -> Result<()> {
    let record = set.record();
    let remove = |name: &str| match dm.info(name)? {
        Some(info) if DeviceIdentity::parse(&info.uuid).is_some() => dm.remove(name, Udev::Internal),
        _ => Ok(()),
    };
    let names = record.volume_names();
    remove(&names.merge)?;
    remove(&names.log)?;
    remove(&names.keep)?;
    for snapshot in &record.top_down() {
        let names = record.names(snapshot);
        for name in [&names.snapshot, &names.mask, &names.view, &names.alias] {
            remove(name)?;
        }
        record.store(snapshot)?.hide(dm)?;
    }
    remove(&names.data)
}

/// Why it cannot be proven that nothing has written to the device; None if it is proven.
fn find_change(dm: &Dm, set: &SnapshotSet) -> Result<Option<String>> {
    let record = set.record();
    let Some(detached) = &record.detached else {
        // A crash. Its journal tells whether the filesystem was mounted since.
        let found = mounts(dm, record)?;
        let merged = record.rolling_back().map(|rollback| &rollback.mounts);
        let is_proven = found.is_some() && (found == record.mounts || merged == Some(&found));
        return Ok((!is_proven).then(|| {
            "the volume was not detached in order, and nothing proves that its device was not written without them"
                .to_owned()
        }));
    };
    let digest = digest(dm, &record.volume_names().data, detached.seed)?;
    Ok((digest != detached.digest).then(|| "the device was written while the volume was detached".to_owned()))
}

/// The trace of mounts on the device of a volume with snapshots; None if its filesystem leaves none.
fn mounts(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<String>> {
    let data = layers::data(dm, record)?.filter(|data| data.has_active);
    data.map_or(Ok(None), |data| mounts_on(dm, &data))
}

fn mounts_on(dm: &Dm, layer: &DeviceInfo) -> Result<Option<String>> {
    let device = dm.open_device(layer.number, false, libc::O_DIRECT)?;
    let mut head = AlignedBuffer::zeroed(filesystem_mount::HEAD_BYTES);
    device.read_exact_at(&mut head, 0).io_context(|| format!("reading {}", layer.name))?;
    Ok(filesystem_mount::trace(&head))
}

/// The record with the traces of mounts as they are.
///
/// While the device is merged, its first blocks are those of before the rollback, or those that the volume shows. A crash
/// finds one of the two; a mount by anything else leaves a third.
///
/// # Errors
/// The kernel's; I/O errors.
pub fn with_mounts(dm: &Dm, record: &SnapshotSetRecord) -> Result<SnapshotSetRecord> {
    let mut now = SnapshotSetRecord { mounts: mounts(dm, record)?, ..record.clone() };
    if record.rolling_back().is_some()
        && let Some(merge) = layers::merge(dm, record)?.filter(|merge| merge.has_active)
        && let Some(rollback) = now.rollback.as_mut()
    {
        rollback.mounts = mounts_on(dm, &merge)?;
    }
    Ok(now)
}

/// Notes the traces of mounts in the record, if they have changed. Only while the volume leads to its snapshots.
///
/// # Errors
/// As [`with_mounts`].
pub fn note_mounts(dm: &Dm, set: &mut SnapshotSet) -> Result<()> {
    if layers::place(dm, set.record())? != Place::Led {
        return Ok(());
    }
    let now = with_mounts(dm, set.record())?;
    if now == *set.record() { Ok(()) } else { set.change(|record| *record = now) }
}

/// The snapshots of a volume that is about to be detached.
pub struct Snapshots {
    set: SnapshotSet,
}

/// Finds the snapshots of volume `name`. None if it has none.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it has some, and `keep` was not asked for, or one is in
/// use; the kernel's.
pub fn find_for_detach(dm: &Dm, name: &str, keep: bool) -> Result<Option<Snapshots>> {
    layers::refuse_other_set(dm, name, read_of(name)?.as_ref())?;
    let Some(set) = SnapshotSet::find(name, &|| Ok(()))? else { return Ok(None) };
    let linked = set.record().linked();
    if linked.is_empty() {
        return Ok(None);
    }
    if !keep {
        return Err(Error::refused(format!("{name} has {} snapshots", linked.len()))
            .state("nothing was changed")
            .next(format!(
                "delete them ('tidemark snapshot list {name}'), or add --keep-snapshots: then attach the device again \
                 before anything writes to it"
            )));
    }
    // What a command that died has left is completed first.
    let set = settle_first(dm, set, &mut NoIntents, &|| Ok(()))?;
    // That may have been the last of them.
    let set = set.filter(|set| !set.record().linked().is_empty());
    let Some(set) = set else { return Ok(None) };
    for snapshot in &set.record().snapshots {
        let shown = set.record().names(snapshot).snapshot;
        if let Some(info) = dm.info(shown.as_str())?.filter(|info| info.open_count > 0) {
            return Err(in_use(&shown, &info)?);
        }
    }
    Ok(Some(Snapshots { set }))
}

/// The layers of volume `name`, which does not exist any more: a detach that was killed has left them. None if there
/// are none.
///
/// # Errors
/// The kernel's; I/O errors.
pub fn find_layers(dm: &Dm, name: &str) -> Result<Option<Snapshots>> {
    let Some(set) = SnapshotSet::find(name, &|| Ok(()))? else { return Ok(None) };
    let data = layers::data(dm, set.record())?;
    Ok(data.map(|_| Snapshots { set }))
}

impl Snapshots {
    /// Records what the device holds, then removes the devices. The volume's own is gone already.
    ///
    /// # Errors
    /// I/O errors; the kernel's. Attaching the device again puts the snapshots together.
    pub fn take_down(mut self, dm: &Dm) -> Result<()> {
        let names = self.set.record().volume_names();
        let seed = clock::utc_now_ns();
        crash_point("snapshot.detach.removed");
        let digest = digest(dm, &names.data, seed)?;
        let detached = DetachedRecord { at_utc_ns: clock::utc_now_ns(), seed, digest };
        self.set.change(|record| record.detached = Some(detached))?;
        crash_point("snapshot.detach.recorded");
        remove_layers(dm, &self.set).map_err(|error| {
            error
                .state("the volume is detached; devices of its snapshots are left, and hold the device")
                .next("attach it again, and detach it once the users of the snapshots have ended")
        })
    }
}

/// The digest of what a device holds.
fn digest(dm: &Dm, name: &str, seed: u64) -> Result<String> {
    let number = dm.info_of(name)?.number;
    let device = dm.open_device(number, false, libc::O_DIRECT)?;
    let size = dm.active_table(name)?.length().bytes();
    let what = || format!("reading {name}");
    let mut read = |at: Bytes, length: usize| {
        let start = at.align_down(BLOCK);
        let end = (at + Bytes::from_len(length)).align_up(BLOCK).min(size);
        let mut buffer = AlignedBuffer::zeroed((end - start).as_len());
        device.read_exact_at(&mut buffer, start.get()).ok()?;
        let from = (at - start).as_len();
        buffer.get(from..from + length).map(<[u8]>::to_vec)
    };
    let is_whole = read(Bytes::ZERO, filesystem_log::HEAD_BYTES).is_none_or(|head| !is_mount_seen(&head));
    let logs = filesystem_log::find(&mut read);
    let mut extents =
        vec![Extent::new(Bytes::ZERO, ENDS.min(size)), Extent::new(size.saturating_sub(ENDS), size)];
    let mut left = LOG_BYTES_MAX;
    for log in logs {
        let log = Extent::new(log.start().align_down(BLOCK), log.end().align_up(BLOCK).min(size));
        if let Some(log) = log.filter(|log| log.length() <= left) {
            left -= log.length();
            extents.push(Some(log));
        }
    }
    if is_whole {
        extents = steps(size).collect();
    } else {
        extents.extend(positions(seed, size).map(|at| Extent::with_length(at, BLOCK)));
    }
    let extents: Vec<Extent> = extents.into_iter().flatten().collect();
    // Read in parallel: the sample costs a seek for each block.
    let share = extents.len().div_ceil(READERS).max(1);
    let parts = thread::scope(|scope| {
        let readers = extents
            .chunks(share)
            .map(|part| scope.spawn(|| part.iter().map(|extent| hash(&device, *extent)).collect()));
        let readers: Vec<thread::ScopedJoinHandle<'_, io::Result<Vec<Hash>>>> = readers.collect();
        let results = readers.into_iter().map(|reader| reader.join().expect("a reader does not panic"));
        results.collect::<io::Result<Vec<_>>>()
    });
    let parts = parts.io_context(what)?;
    let mut all = Sha256::new();
    parts.iter().flatten().for_each(|part| all.update(part));
    Ok(all.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

type Hash = [u8; 32];

/// The SHA-256 of an extent of `device`. No CRC would do: ext4 ends its superblock with its own CRC-32C, and the
/// CRC-32C of a block that ends so is the same whatever the block holds.
fn hash(device: &File, extent: Extent) -> io::Result<Hash> {
    let mut buffer = AlignedBuffer::zeroed(ENDS.min(extent.length()).as_len());
    let (mut at, mut hash) = (extent.start(), Sha256::new());
    while at < extent.end() {
        let length = ENDS.min(extent.end() - at);
        let part = &mut buffer[..length.as_len()];
        device.read_exact_at(part, at.get())?;
        hash.update(&*part);
        at += length;
    }
    Ok(hash.finalize().into())
}

/// True for ext4 and XFS, which write their superblock or log at every mount.
fn is_mount_seen(head: &[u8]) -> bool {
    head.starts_with(b"XFSB") || head.get(0x438..0x43a) == Some(&[0x53, 0xef])
}

/// The whole device, in parts.
fn steps(size: Bytes) -> impl Iterator<Item = Option<Extent>> {
    let count = size.get().div_ceil(STEP.get());
    (0..count).map(move |step| Extent::new(STEP * step, size.min(STEP * (step + 1))))
}

/// Offsets of the sample's blocks, which follow from `seed`.
fn positions(seed: u64, size: Bytes) -> impl Iterator<Item = Bytes> {
    let blocks = (size.get() / BLOCK.get()).max(1);
    numbers::from_seed(seed)
        .map(move |number| BLOCK * (number % blocks))
        .take(Bytes(SAMPLE.min(blocks)).as_len())
}
