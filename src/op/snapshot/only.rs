//! `tidemark snapshot rollback --only`: files, directories or bytes of a volume become what they were at a snapshot's
//! instant, while the rest of the volume goes on.
//!
//! A file or directory is copied out of the snapshot, on the volume's own filesystem, and takes the place of the present
//! one by one rename ([`exchange`](super::exchange)). So it is the old one or the new one at any moment, also after a
//! crash, and what the copy overwrites is preserved for all snapshots like every other write. Bytes are written through
//! the volume itself, which no filesystem may use meanwhile.
//!
//! The snapshot is mounted in a mount namespace of a thread of its own: no other process sees that mount, and it ends
//! with the thread, whatever becomes of this process.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;

use super::exchange::{Exchange, Source};
use super::holding;
use super::list::check_valid;
use super::mount::{filesystem_on, options_for};
use super::set::{parse_name, read_existing};
use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::{Dm, node};
use crate::extent::{Extent, ExtentSet};
use crate::format::state::SnapshotSetRecord;
use crate::job::RUN_DIR;
use crate::sys::privilege::require_root;
use crate::sys::signal;
use crate::topology::{Mount, Topology, check_answers};
use crate::volume::subset::{Selector, Subset};

/// Where the snapshot is mounted, in a mount namespace of its own.
const MOUNT_POINT: &str = "snapshot";

/// Bytes of a range that are written at once.
const UNIT: u64 = 1 << 20;

/// The arguments of `tidemark snapshot rollback --only`.
#[derive(Clone, Debug, Serialize)]
pub struct OnlyRequest {
    /// The snapshot, as VOLUME@NAME.
    pub snapshot: String,
    /// Files, directories and ranges.
    pub only: Vec<Selector>,
}

/// A file or directory that is put back.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// The path at present; its directory exists, and the path to that has no symbolic links.
    pub path: PathBuf,
    /// Its path within the filesystem.
    pub within: PathBuf,
    /// False if nothing is there at present.
    pub exists: bool,
}

/// The plan. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct OnlyPlan {
    /// The user's request.
    pub request: OnlyRequest,
    /// The volume.
    pub volume: String,
    /// Its number.
    pub number: DeviceNumber,
    /// The snapshot's device.
    pub device: PathBuf,
    /// The snapshot's instant.
    pub instant: Option<String>,
    /// What is put back.
    pub files: Vec<Target>,
    /// Bytes of the volume that are put back.
    pub ranges: Vec<Extent>,
    /// What the snapshot leaves out.
    #[serde(skip)]
    left_out: ExtentSet,
}

/// What was put back.
#[derive(Clone, Debug, Serialize)]
pub struct PutBack {
    /// The snapshot, as VOLUME@NAME.
    pub snapshot: String,
    /// Files and directories.
    pub files: Vec<PathBuf>,
    /// Bytes of the volume.
    pub bytes: Bytes,
}

/// Makes the plan. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`] for a snapshot that does not show its instant, or leaves out bytes that are needed, and for a
/// path that is not on a filesystem of the volume; [`ErrorKind::Usage`] for patterns.
pub fn plan(request: &OnlyRequest) -> Result<OnlyPlan> {
    require_root("rolling back files")?;
    let dm = Dm::open()?;
    let (volume, _) = parse_name(&request.snapshot)?;
    let record = read_existing(volume)?;
    let view = check_valid(&dm, &record, &request.snapshot)?;
    let device = view.path.clone().ok_or_else(|| super::list::not_valid(&request.snapshot))?;
    let number = dm.info_of(volume)?.number;
    let size = dm.active_table(volume)?.length().bytes();
    let (mut files, mut ranges) = (Vec::new(), Vec::new());
    let (left_out, lacks_metadata) = what_is_left_out(&record, &request.snapshot)?;
    for selector in &request.only {
        match selector {
            Selector::Range(extent) if left_out.intersection_with(*extent).next().is_some() => {
                return Err(not_held(&selector.to_string(), &request.snapshot));
            }
            Selector::Path(_) if lacks_metadata => {
                return Err(Error::refused(format!(
                    "{} leaves out bytes of the volume, whatever was there: it is not known whether it holds all of a file",
                    request.snapshot
                ))
                .state("nothing was changed")
                .next("name bytes that it holds (bytes:START+LENGTH), or choose another snapshot"));
            }
            Selector::Range(extent) if extent.end() <= size => ranges.push(*extent),
            Selector::Range(_) => {
                return Err(Error::usage(format!(
                    "{selector} is not on {volume}, which has {} bytes",
                    size.get()
                ))
                .state("nothing was changed"));
            }
            Selector::Path(path) => files.push(target(path, (volume, number))?),
            Selector::Name(_) => {
                return Err(Error::usage(format!("--only {selector}: a name is not enough"))
                    .next("write the whole path of one file or directory"));
            }
        }
    }
    if !ranges.is_empty() {
        open_alone(volume)?;
    }
    let instant = view.instant;
    Ok(OnlyPlan {
        request: request.clone(),
        volume: volume.to_owned(),
        number,
        device,
        instant,
        files,
        ranges,
        left_out,
    })
}

/// What the snapshot `shown` leaves out, or the one of which it is a clone; and whether metadata may be among it.
fn what_is_left_out(record: &SnapshotSetRecord, shown: &str) -> Result<(ExtentSet, bool)> {
    let named = record.existing(parse_name(shown)?.1)?;
    let id = named.clone_of.as_ref().unwrap_or(&named.id);
    let Some((snapshot, subset)) = record
        .snapshots
        .iter()
        .find(|one| one.id == *id)
        .and_then(|one| one.subset.as_ref().map(|it| (one, it)))
    else {
        return Ok((ExtentSet::new(), false));
    };
    let parse = |texts: &[String]| texts.iter().map(|text| Selector::parse(text)).collect::<Result<Vec<_>>>();
    let chosen = Subset { include: parse(&subset.include)?, exclude: parse(&subset.exclude)? };
    Ok((snapshot.left_out(), chosen.leaves_out_ranges()))
}

fn not_held(what: &str, snapshot: &str) -> Error {
    Error::refused(format!("{what} is left out of {snapshot}, which is a snapshot of a subset"))
        .state("nothing was changed")
        .next(format!("'tidemark snapshot show {snapshot}' says what it leaves out; choose another snapshot"))
}

/// Where `path` is on the volume.
fn target(path: &Path, (volume, number): (&str, DeviceNumber)) -> Result<Target> {
    let shown = path.display();
    check_answers(path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::usage(format!("{shown} has no name")).next("roll back the whole volume instead"));
    };
    let directory = fs::canonicalize(directory).map_err(|cause| {
        Error::refused(format!("{} cannot be examined", directory.display()))
            .with_source(cause)
            .state("nothing was changed")
            .next("if it does not exist any more, name it, or the highest directory that is gone")
    })?;
    let view = Topology::default().own_view()?;
    let found = view.stat(&directory).io_context(|| format!("examining {}", directory.display()))?;
    let mount = view
        .mounts
        .iter()
        .rfind(|mount| mount.id == found.mount || found.mount == 0 && mount.device == found.dev);
    let Some(mount) = mount.filter(|mount| mount.device == number && found.dev == number) else {
        return Err(Error::refused(format!("{shown} is not on a filesystem that is on {volume} itself"))
            .state("nothing was changed")
            .next("mount the snapshot ('tidemark snapshot mount') and copy the files"));
    };
    let path = directory.join(name);
    if let Some(other) = view.mounts.iter().find(|mount| mount.point.starts_with(&path)) {
        return Err(Error::refused(format!("a filesystem is mounted at {}", other.point.display()))
            .state("nothing was changed")
            .next("unmount it, or roll back the whole volume"));
    }
    let below = directory.strip_prefix(&mount.point).map_err(|_| moved(mount))?;
    let within = mount.root.strip_prefix("/").unwrap_or(&mount.root).join(below).join(name);
    let exists = path.symlink_metadata().is_ok();
    Ok(Target { path, within, exists })
}

fn moved(mount: &Mount) -> Error {
    Error::refused(format!("the mount at {} is being changed", mount.point.display()))
        .state("nothing was changed")
        .next("try again")
}

/// Opens the volume's device, which nothing else may hold.
fn open_alone(volume: &str) -> Result<File> {
    let path = node::mapper_path(volume);
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&path);
    opened.map_err(|cause| match cause.raw_os_error() {
        Some(libc::EBUSY) => Error::refused(format!(
            "{} is mounted, or another device is on it: bytes cannot be put back below what uses them",
            path.display()
        ))
        .state("nothing was changed")
        .next("name files and directories, or unmount it"),
        _ => Error::io(format!("opening {}", path.display()), cause),
    })
}

/// Executes the plan.
///
/// # Errors
/// The first failure. Its state says what was put back before.
pub fn run(plan: &OnlyPlan, notice: &dyn Fn(&str), interrupt: &dyn Fn() -> Result<()>) -> Result<PutBack> {
    let mut done = PutBack { snapshot: plan.request.snapshot.clone(), files: Vec::new(), bytes: Bytes::ZERO };
    let result = put_back_ranges(plan, &mut done, interrupt).and_then(|()| {
        if plan.files.is_empty() { Ok(()) } else { put_back_files(plan, &mut done, notice, interrupt) }
    });
    match result {
        Ok(()) => Ok(done),
        Err(error) if done.files.is_empty() && done.bytes == Bytes::ZERO => {
            Err(error.state("nothing was put back"))
        }
        Err(error) => {
            let files: Vec<String> = done.files.iter().map(|path| path.display().to_string()).collect();
            Err(error
                .state(format!("put back: {} of ranges; files: {}", done.bytes, files.join(", ")))
                .next("run the command again"))
        }
    }
}

fn put_back_ranges(plan: &OnlyPlan, done: &mut PutBack, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
    if plan.ranges.is_empty() {
        return Ok(());
    }
    let volume = open_alone(&plan.volume)?;
    let device = plan.device.display();
    let snapshot = File::open(&plan.device).io_context(|| format!("opening {device}"))?;
    let mut buffer = vec![0; Bytes(UNIT).as_len()];
    for range in &plan.ranges {
        let mut at = range.start();
        while at < range.end() {
            interrupt()?;
            let part = &mut buffer[..(range.end() - at).min(Bytes(UNIT)).as_len()];
            snapshot.read_exact_at(part, at.get()).io_context(|| format!("reading {device}"))?;
            volume.write_all_at(part, at.get()).io_context(|| format!("writing {}", plan.volume))?;
            at += Bytes::from_len(part.len());
            done.bytes += Bytes::from_len(part.len());
        }
    }
    volume.sync_all().io_context(|| format!("writing {}", plan.volume))
}

/// The snapshot is mounted in the thread, so that is where it is read.
fn put_back_files(
    plan: &OnlyPlan,
    done: &mut PutBack,
    notice: &dyn Fn(&str),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let point = Path::new(RUN_DIR).join(MOUNT_POINT);
    fs::create_dir_all(&point).io_context(|| format!("creating {}", point.display()))?;
    let root = mount_alone(plan, &point)?;
    if !plan.left_out.is_empty() {
        for target in &plan.files {
            if let Some(file) = holding::first_left_out(&root, &target.within, &plan.left_out, interrupt)? {
                let shown = match file.strip_prefix(&target.within) {
                    Ok(below) if !below.as_os_str().is_empty() => target.path.join(below),
                    _ => target.path.clone(),
                };
                return Err(not_held(&shown.display().to_string(), &plan.request.snapshot));
            }
        }
    }
    let sources = plan.files.iter().map(|target| {
        Source::find(&root, &target.within).map_err(|cause| {
            Error::refused(format!("{} is not in {}", target.path.display(), plan.request.snapshot))
                .with_source(cause)
        })
    });
    // All are found before the first is put back.
    for (target, source) in plan.files.iter().zip(sources.collect::<Result<Vec<_>>>()?) {
        Exchange::prepare(&target.path, plan.number)?.run(&source, interrupt)?;
        notice(&format!("{} is as it was", target.path.display()));
        done.files.push(target.path.clone());
    }
    Ok(())
}

/// Mounts the snapshot where no other process sees it. The mount lasts as long as the directory that is returned is open.
fn mount_alone(plan: &OnlyPlan, point: &Path) -> Result<File> {
    let filesystem = filesystem_on(&plan.device)?;
    let options = options_for(filesystem, &plan.request.snapshot, false)?;
    let options = options.strip_prefix("ro").unwrap_or(options).trim_start_matches(',').to_owned();
    let (device, point) = (plan.device.clone(), point.to_owned());
    let mounted = thread::spawn(move || {
        signal::block_in_this_thread();
        mount_in_new_namespace(&device, &point, filesystem, &options)
    });
    let failed = || format!("mounting {}", plan.request.snapshot);
    match mounted.join() {
        Ok(mounted) => mounted.io_context(failed),
        Err(_) => Err(Error::new(ErrorKind::External, failed())),
    }
}

fn mount_in_new_namespace(
    device: &Path,
    point: &Path,
    filesystem: &str,
    options: &str,
) -> std::io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some(device), point, Some(filesystem), flags, Some(options))?;
    File::open(point)
}
