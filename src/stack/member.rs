//! One origin of an insertion: what the runner must know of it, and what it learns.

use std::path::PathBuf;

use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, ErrorKind, Result, Sectors};
use crate::dm::{Dm, Table, Target};
use crate::extent::free::{FreeLimits, skippable};
use crate::extent::{Extent, ExtentSet};
use crate::volume::free::{DeviceLayout, FreeMapper, FreeSpace, MapDeadlines, MapRequest};

use super::model::{Skipped, StackRequest};
use super::origin_table::{Form, LowerDevices};

/// The kept snapshots that an origin has already.
#[derive(Clone, Debug, Default)]
pub(super) struct Older {
    /// What all of them leave out; None if there are none.
    pub left_out: Option<ExtentSet>,
}

/// An origin while a stack is inserted under it.
pub(super) struct Member {
    /// Its device-mapper name.
    pub name: String,
    /// Its number.
    pub number: DeviceNumber,
    /// The suspension freezes the filesystem on the origin itself. So this filesystem is written back
    /// beforehand, or the suspension would do it while writers wait.
    pub lock_filesystem: bool,
    /// What need not be preserved.
    pub skipped: Skipped,
    /// Where the filesystems' logs are.
    pub logs: Vec<Extent>,
    /// The devices that the loaded table leads to; None before it is loaded.
    pub lower: Option<LowerDevices>,
    /// The loaded table depends on a free-space map that is valid only while the filesystems are frozen.
    pub map_in_force: bool,
    pub form: Form,
    own_table: Table,
    /// Reads what is in use while everything is frozen; None: all of it counts as in use.
    mapper: Option<FreeMapper>,
    limits: FreeLimits,
    /// What all older snapshots leave out, if the stack is that of kept snapshots.
    older: Option<Older>,
    /// The position of the skipped ranges on the devices when the map was read.
    layout: Option<DeviceLayout>,
}

impl Member {
    /// Prepares the map of the free space on `filesystems`, which are those on this origin.
    ///
    /// # Errors
    /// As [`FreeMapper::prepare`].
    pub fn new(
        request: &StackRequest,
        (number, own_table): (DeviceNumber, Table),
        filesystems: &[PathBuf],
        form: Form,
    ) -> Result<Self> {
        let wanted = MapRequest { free: !request.all, omission: request.omission.clone() };
        let is_needed = wanted.free || wanted.omission.is_some();
        let mapper = FreeMapper::prepare(number, filesystems, wanted)?;
        let (mapper, logs) = if is_needed { (Some(mapper), Vec::new()) } else { (None, mapper.into_logs()) };
        Ok(Self {
            name: request.origin.clone(),
            number,
            lock_filesystem: request.lock_filesystem,
            skipped: Skipped::default(),
            logs,
            lower: None,
            map_in_force: false,
            form,
            own_table,
            mapper,
            limits: FreeLimits::for_chunk(request.chunk),
            older: None,
            layout: None,
        })
    }

    /// For the instant of a further kept snapshot, or the first: what it leaves out is skipped, and what `older` ones
    /// leave out as well leads past them.
    pub fn keeping(mut self, older: Older) -> Self {
        self.older = Some(older);
        self
    }

    /// Where its free space is mapped, if it is.
    pub fn mapper(&self) -> Option<&FreeMapper> {
        self.mapper.as_ref()
    }

    /// The table that leads through the stack. Maps what the frozen filesystems do not use past the snapshot;
    /// a filesystem that does not answer is preserved whole, and so is what is not read by `deadlines`.
    ///
    /// # Errors
    /// The kernel's; as [`LowerDevices::table`].
    pub fn table_over(
        &mut self,
        dm: &Dm,
        (real, preserve): (&str, &str),
        deadlines: MapDeadlines,
    ) -> Result<Table> {
        let number = |name: &str| dm.info_of(name).map(|info| info.number);
        let (real, preserve) = (number(real)?, number(preserve)?);
        let lower = match &self.older {
            Some(_) => over_data(self.own_table.length(), real, preserve)?,
            None => LowerDevices { own: self.own_table.clone(), real, preserve: Some(preserve) },
        };
        if let Some(mapper) = self.mapper.take() {
            let (mut found, layout) = mapper.read(deadlines);
            let size = lower.own.length().bytes();
            let (extents, omitted) = match &self.older {
                Some(_) => kept_left_out(&mut found, size, self.limits.chunk),
                None => left_out(&found, size, &self.limits),
            };
            self.skipped =
                Skipped { extents, notes: found.notes, omitted, omission_notes: found.omission_notes };
            self.logs = found.logs;
            self.layout = (!self.skipped.extents.is_empty()).then_some(layout);
        }
        let table = match &self.older {
            None => lower.table(&self.skipped.extents, &[], self.form)?,
            Some(Older { left_out: None }) => kept_table(&lower, &self.skipped.extents, self.form)?,
            Some(Older { left_out: Some(older) }) => {
                let own: ExtentSet = self.skipped.extents.iter().copied().collect();
                let by_all: Vec<Extent> = own.intersection(older).iter().collect();
                kept_table(&lower, &by_all, self.form)?
            }
        };
        self.lower = Some(lower);
        Ok(table)
    }

    /// Fails if the devices on the origin are no longer those whose free space was mapped.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`].
    pub fn check_layout(&mut self) -> Result<()> {
        if self.layout.take().is_none_or(|mut layout| layout.is_unchanged()) {
            return Ok(());
        }
        let what = format!("the devices on {} were changed while its filesystems were frozen", self.name);
        Err(Error::new(ErrorKind::Kernel, what)
            .next("copy again, and leave partitions, LVM and loop devices alone meanwhile, or use --all"))
    }
}

/// The devices below a volume that has kept snapshots: `data` has its own table, `keep` preserves originals. What leads
/// past them leads to `data`.
///
/// # Errors
/// As [`Table::new`].
pub(super) fn over_data(length: Sectors, data: DeviceNumber, keep: DeviceNumber) -> Result<LowerDevices> {
    let own = Table::single(length, Target::Linear { device: data, offset: Sectors::ZERO })?;
    Ok(LowerDevices { own, real: data, preserve: Some(keep) })
}

/// The table of a volume all of whose kept snapshots leave out `by_all`. A part of it leads to the device that
/// preserves in any case: that is how a volume with snapshots is told from one without.
///
/// # Errors
/// As [`LowerDevices::table`].
pub(super) fn kept_table(lower: &LowerDevices, by_all: &[Extent], form: Form) -> Result<Table> {
    let table = lower.table(by_all, &[], form)?;
    if lower.preserve.is_some_and(|keep| table.maps_to(keep)) {
        Ok(table)
    } else {
        lower.table(&[], &[], form)
    }
}

/// What a kept snapshot leaves out of an origin of `size` bytes.
fn kept_left_out(found: &mut FreeSpace, size: Bytes, chunk: ChunkSize) -> (Vec<Extent>, Option<Bytes>) {
    let Some(omitted) = &found.omitted else { return (Vec::new(), None) };
    let limits = FreeLimits::kept(chunk);
    let all = skippable(omitted, size, &FreeLimits { count_max: usize::MAX, ..limits });
    let extents = skippable(omitted, size, &limits);
    let bytes = |extents: &[Extent]| extents.iter().map(|extent| extent.length()).sum::<Bytes>();
    if extents.len() < all.len() {
        found.omission_notes.push(format!(
            "{} in {} small ranges are preserved although they were to be left out: a snapshot leaves out the {} largest \
             ranges",
            bytes(&all) - bytes(&extents),
            all.len() - extents.len(),
            limits.count_max
        ));
    }
    let omitted = Some(bytes(&extents));
    (extents, omitted)
}

/// What is neither copied nor preserved of an origin of `size` bytes, and how much of it the user leaves out.
fn left_out(found: &FreeSpace, size: Bytes, limits: &FreeLimits) -> (Vec<Extent>, Option<Bytes>) {
    let Some(omitted) = &found.omitted else { return (skippable(&found.extents, size, limits), None) };
    let both = [found.extents.as_slice(), omitted].concat();
    let mut extents: ExtentSet = skippable(&both, size, limits).into_iter().collect();
    extents.extend(skippable(omitted, size, &FreeLimits::omitted(limits.chunk)));
    let omitted = omitted.iter().flat_map(|extent| extents.intersection_with(*extent));
    let omitted = Some(omitted.map(Extent::length).sum());
    (extents.iter().collect(), omitted)
}
