//! `tidemark restore`: writes an archive's content to a device or a file.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::request::RestoreRequest;
use super::targets::naming_job;
use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::job::{Job, conclude};
use crate::progress::{Event, Observer, Phase};
use crate::restore::ArchiveSource;
use crate::restore::chain::Content;
use crate::restore::writer::{self, RestoreReport};
use crate::secondary::Secondary as _;
use crate::secondary::raw::{RawRequest, RawTarget};
use crate::sys::loop_device;
use crate::topology::{Topology, device_number};

/// The major number of loop devices (Linux, Documentation/admin-guide/devices.txt).
const LOOP_MAJOR: u32 = 7;

/// Restores an archive. On success the target is complete and synced, and a file has its final name.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive,
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a target that must not be written, I/O errors, and the
/// errors of the interrupt; each with the state in which the target is left.
pub fn run(
    request: &RestoreRequest,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RestoreReport> {
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let content = Content::open(&request.archive, &request.parents, interrupt)?;
    restore(&content, request, observer, interrupt)
}

/// Restores `content` to the request's target.
pub(super) fn restore(
    content: &Content,
    request: &RestoreRequest,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RestoreReport> {
    let raw = RawRequest {
        size: content.superblock().origin_size,
        replace: request.replace,
        forbidden: forbidden_for(content, &request.archive, &request.target)?,
        in_place: false,
    };
    let target =
        RawTarget::open(&request.target, &raw).map_err(|error| naming_job(error, &request.target))?;
    let job = Job::begin_for_target("restore", target.partial_path());
    let written = match content {
        Content::Whole(input) => writer::write(target, input, observer, interrupt),
        Content::Chain(chain) => writer::write_chain(target, chain, observer, interrupt),
    };
    conclude(job, written)
}

/// As [`forbidden`], for every archive that is read.
pub(super) fn forbidden_for(
    content: &Content,
    archive: &ArchiveSource,
    target: &Path,
) -> Result<Vec<DeviceNumber>> {
    let Content::Chain(chain) = content else { return forbidden(archive, target) };
    let paths = chain.links.iter().map(|link| link.archive.path().to_owned());
    let each = paths.map(|path| forbidden(&ArchiveSource::Path(path), target));
    Ok(each.collect::<Result<Vec<_>>>()?.concat())
}

/// The device that holds the archive: it must not be the target, because a restore must not destroy its archive.
/// Refuses the archive itself as the target.
fn forbidden(archive: &ArchiveSource, target: &Path) -> Result<Vec<DeviceNumber>> {
    let ArchiveSource::Path(path) = archive else { return Ok(Vec::new()) };
    let found = std::fs::metadata(path).io_context(|| format!("examining {}", path.display()))?;
    if let Ok(other) = std::fs::metadata(target)
        && (other.dev(), other.ino()) == (found.dev(), found.ino())
    {
        return Err(Error::refused(format!("{} is the archive itself", target.display()))
            .state("it was not touched")
            .next("name another file or a device"));
    }
    refuse_loop_over(&found, target)?;
    Ok(device_number(path)?.into_iter().collect())
}

/// Refuses a target on a loop device whose file is the archive. The path in sysfs may be another name or be stale, so
/// the file is identified by device and inode number from the kernel.
fn refuse_loop_over(archive: &std::fs::Metadata, target: &Path) -> Result<()> {
    // A target that does not exist yet is a new file.
    let Some(device) = device_number(target).ok().flatten() else { return Ok(()) };
    let topology = Topology::default();
    for beneath in topology.stack(device).into_iter().filter(|device| device.major == LOOP_MAJOR) {
        let node = topology.name(beneath);
        let what = || format!("examining the backing file of {node}");
        let Some(status) = loop_device::status(Path::new(&node)).io_context(what)? else { continue };
        if (status.backing_dev, status.backing_inode) == (archive.dev(), archive.ino()) {
            return Err(Error::refused(format!(
                "{} is on {node}, whose backing file is the archive itself",
                target.display()
            ))
            .state("it was not touched")
            .next("name another file or a device"));
        }
    }
    Ok(())
}
