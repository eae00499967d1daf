//! One origin of an insertion: what the runner must know of it, and what it learns.

use std::path::PathBuf;
use std::time::Instant;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::dm::{Dm, Table};
use crate::extent::Extent;
use crate::extent::free::{FreeLimits, skippable};
use crate::volume::free::{DeviceLayout, FreeMapper};

use super::model::{Skipped, StackRequest};
use super::origin_table::{Form, LowerDevices};

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
        let mapper = FreeMapper::prepare(number, filesystems)?;
        let (mapper, logs) =
            if request.all { (None, mapper.into_logs()) } else { (Some(mapper), Vec::new()) };
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
            layout: None,
        })
    }

    /// Where its free space is mapped, if it is.
    pub fn mapper(&self) -> Option<&FreeMapper> {
        self.mapper.as_ref()
    }

    /// The table that leads through the stack. Maps what the frozen filesystems do not use past the snapshot;
    /// a filesystem that does not answer is preserved whole, and so is what is not read by `map_deadline`.
    ///
    /// # Errors
    /// The kernel's; as [`LowerDevices::table`].
    pub fn table_over(
        &mut self,
        dm: &Dm,
        (real, preserve): (&str, &str),
        map_deadline: Instant,
    ) -> Result<Table> {
        let number = |name: &str| dm.info_of(name).map(|info| info.number);
        let lower = LowerDevices {
            own: self.own_table.clone(),
            real: number(real)?,
            preserve: Some(number(preserve)?),
        };
        if let Some(mapper) = self.mapper.take() {
            let (found, layout) = mapper.read(map_deadline);
            self.skipped = Skipped {
                extents: skippable(&found.extents, lower.own.length().bytes(), &self.limits),
                notes: found.notes,
            };
            self.logs = found.logs;
            self.layout = (!self.skipped.extents.is_empty()).then_some(layout);
        }
        let table = lower.table(&self.skipped.extents, &[], self.form)?;
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
