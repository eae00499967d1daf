//! An entry point for the VM cases that adopts the COW store of a dead process without its copy.

use std::fs::File;
use std::io::BufRead;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::report::tell;
use crate::base::{Bytes, Error, Result, ResultExt};
use crate::dm::{Dm, SnapshotStatus};
use crate::extent::Original;
use crate::store::CowStore;
use crate::store::size::FillRate;
use crate::sys::aligned::AlignedBuffer;

/// `__store REPORT ID SNAP PATH...`: adopts the store of job ID, writes "adopted ..." to REPORT, then executes the
/// orders on standard input and reports the results:
/// - `exceptions`: compares every original in the store with the snapshot device SNAP and with each PATH at the same
///   offset;
/// - `follow`: counts the exceptions that have appeared since the last time;
/// - `grow`: enlarges the store, as if it were about to be full;
/// - `release` and `keep`: releases the store.
///
/// At the end of the input the store stays in place without an owner.
pub const ARGUMENT: &str = "__store";

/// Exceptions per batch: few, so that there are several batches.
const BATCH: usize = 1000;

pub fn run(report: &Path, words: &[String]) -> Result<()> {
    let [id, snap, paths @ ..] = words else {
        return Err(Error::usage("__store REPORT ID SNAP [PATH...]"));
    };
    let dm = Dm::open()?;
    let store = CowStore::adopt(id)?;
    tell(report, &format!("adopted {}", sizes(&store)))?;
    let mut follower = store.follower()?;
    for line in std::io::stdin().lock().lines() {
        let line = line.io_context(|| "reading standard input".to_owned())?;
        let status = || dm.snapshot_status(snap);
        match line.as_str() {
            "exceptions" => tell(report, &compare(&dm, &store, &status()?, snap, paths)?)?,
            "follow" => tell(report, &format!("follow {}", follower.poll(&status()?, usize::MAX)?.len()))?,
            "grow" => {
                let grown = store.grow_ahead(store.total_bytes(), &FillRate::default())?;
                tell(report, &format!("grow {} {}", u8::from(grown.is_some()), sizes(&store)))?;
            }
            "release" | "keep" => {
                drop(follower);
                let kept = store.release(line == "keep")?;
                let path = kept.map(|kept| kept.path.display().to_string());
                return tell(report, &format!("released {}", path.unwrap_or_default()));
            }
            other => return Err(Error::usage(format!("'{other}' is not known here"))),
        }
    }
    Ok(())
}

fn sizes(store: &CowStore) -> String {
    let (total, mapped) = (store.total_bytes().get(), store.mapped_bytes().get());
    format!("total {total} mapped {mapped} ram {}", store.ram_bytes().get())
}

fn compare(
    dm: &Dm,
    store: &CowStore,
    status: &SnapshotStatus,
    snap: &str,
    paths: &[String],
) -> Result<String> {
    let SnapshotStatus::Active { used, metadata, .. } = status else {
        return Ok(format!("exceptions of a lost snapshot: {status:?}"));
    };
    let by_status = used.saturating_sub(*metadata).get() / store.plan().chunk.sectors().get();
    // Direct I/O, because the kernel's writes there bypass the page cache.
    let mut views = vec![dm.open_device(dm.info_of(snap)?.number, false, libc::O_DIRECT)?];
    for path in paths {
        views.push(File::open(path).io_context(|| format!("opening {path}"))?);
    }
    let stored = File::from(store.open_direct()?);
    let mut reader = store.exceptions(status)?;
    let (mut count, mut different, mut farthest) = (0u64, 0u64, Bytes::ZERO);
    loop {
        let batch = reader.next_batch(BATCH)?;
        if batch.is_empty() {
            break;
        }
        for original in batch {
            count += 1;
            farthest = farthest.max(original.store_offset + original.extent.length());
            different += u64::from(!is_same(&stored, &views, original)?);
        }
    }
    let farthest = farthest.get();
    Ok(format!("exceptions {count} of {by_status} different {different} farthest {farthest}"))
}

fn is_same(stored: &File, views: &[File], original: Original) -> Result<bool> {
    let read = |file: &File, offset: Bytes| {
        let mut buffer = AlignedBuffer::zeroed(original.extent.length().as_len());
        file.read_exact_at(&mut buffer, offset.get())
            .io_context(|| format!("reading an original at {}", offset.get()))?;
        Ok::<_, Error>(buffer)
    };
    let content = read(stored, original.store_offset)?;
    for view in views {
        if *read(view, original.extent.start())? != *content {
            return Ok(false);
        }
    }
    Ok(true)
}
