//! `tidemark detach`: makes a volume a plain device again.
//!
//! Refused while the volume is in use. So the device below holds every byte that was written through the volume, at the
//! same offset. Order: first the volume's device, then its unit and its record. A crash in between leaves at most a
//! record without a device, which another detach removes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::{Error, Result, ResultExt};
use crate::dm::naming::ROLE_VOLUME;
use crate::dm::{DeviceIdentity, Dm, Udev};
use crate::sys::privilege;
use crate::topology::Topology;

use super::attach::{forget, record_path, recorded_volumes};
use super::request::DetachRequest;
use super::snapshot::link;
use super::unit::{UNIT_DIR, volume_unit};

/// The result of a detach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Detached {
    /// The volume's name.
    pub name: String,
    /// The systemd unit that was removed.
    pub unit: Option<PathBuf>,
    /// The commands that the user should run next, one per entry.
    pub next: Vec<String>,
}

/// Detaches volume `name`.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the volume does not exist, or is mounted, open or being
/// copied; kernel errors.
pub fn detach(request: &DetachRequest) -> Result<Detached> {
    let name = request.name.as_str();
    privilege::require_root("detaching a volume")?;
    let dm = Dm::open()?;
    // The record has the name under which the volume was attached: the device may have been renamed since.
    let mut recorded = name.to_owned();
    match dm.info(name)? {
        Some(info) => {
            let identity = DeviceIdentity::parse(&info.uuid).filter(|identity| identity.role == ROLE_VOLUME);
            let Some(identity) = identity else {
                return Err(Error::refused(format!("{name} is a device that Tidemark did not attach"))
                    .state("nothing was changed")
                    .next("'tidemark status' lists the volumes"));
            };
            refuse(&dm, name, info.open_count)?;
            let snapshots = link::find_for_detach(&dm, name, request.keep_snapshots)?;
            let record = recorded_volumes()?.into_iter().flatten().find(|record| record.id == identity.id);
            recorded = record.map_or(recorded, |record| record.name);
            dm.remove(name, Udev::Public)?;
            if let Some(snapshots) = snapshots {
                snapshots.take_down(&dm)?;
            }
        }
        None => match link::find_layers(&dm, name)? {
            // The layers of its snapshots were left by a detach that was killed.
            Some(snapshots) if request.keep_snapshots => snapshots.take_down(&dm)?,
            Some(_) => {
                return Err(Error::refused(format!("the layers of the snapshots of {name} still exist"))
                    .state("nothing was changed")
                    .next(format!("tidemark detach {name} --keep-snapshots")));
            }
            None if record_path(name).exists() => {}
            None => {
                return Err(Error::refused(format!("there is no volume {name}"))
                    .next("'tidemark status' lists the volumes"));
            }
        },
    }
    if request.keep_unit {
        return Ok(Detached { name: name.to_owned(), unit: None, next: Vec::new() });
    }
    let unit = remove_unit(&recorded)?;
    forget(&recorded)?;
    let next = unit.iter().map(|_| "systemctl daemon-reload".to_owned()).collect();
    Ok(Detached { name: name.to_owned(), unit, next })
}

fn refuse(dm: &Dm, name: &str, open_count: u32) -> Result<()> {
    let refused = |why: String| Error::refused(why).state("nothing was changed");
    if dm.stack_under(name)?.is_some() {
        return Err(refused(format!("{name} is being copied"))
            .next("wait for the copy ('tidemark status'); after a crash: 'tidemark recover'"));
    }
    let number = dm.info_of(name)?.number;
    let topology = Topology::default();
    if let Some(mount) = topology.mounts()?.iter().find(|mount| mount.is_of(number)) {
        return Err(refused(format!("{name} is mounted at {}", mount.point.display()))
            .next(format!("umount {}", mount.point.display())));
    }
    if let Some(holder) = topology.holders(number).first() {
        return Err(refused(format!("{name} is in use by {}", topology.name(*holder)))
            .next(format!("take {} out of use first", topology.name(*holder))));
    }
    if open_count > 0 {
        return Err(refused(format!("{name} is open ({open_count} times)"))
            .next(format!("find its users: fuser -v /dev/mapper/{name}")));
    }
    Ok(())
}

fn remove_unit(name: &str) -> Result<Option<PathBuf>> {
    let path = Path::new(UNIT_DIR).join(volume_unit(name));
    let link = Path::new(UNIT_DIR).join("local-fs-pre.target.requires").join(volume_unit(name));
    let mut removed = None;
    for file in [&link, &path] {
        match fs::remove_file(file) {
            Ok(()) => removed = Some(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).io_context(|| format!("removing {}", file.display())),
        }
    }
    Ok(removed)
}
