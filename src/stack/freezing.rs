//! The filesystems that a change freezes, and which of them are frozen now.
//!
//! A filesystem on a file or device of another one is frozen first: its freeze writes, and would wait for the other for
//! ever if that were frozen. Filesystems of the same height do not lie on each other. They are frozen at the same time,
//! as the first one's writers wait until the last one is frozen, and thawed so.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use crate::base::{Error, Result};
use crate::sys::freeze;

/// Stack of a thread that makes one system call, bytes.
const THREAD_STACK: usize = 128 << 10;

/// One filesystem.
struct Filesystem {
    /// Its mount point.
    path: PathBuf,
    file: File,
    /// How high it is above the origins; None if that is not known: then it is frozen and thawed alone.
    height: Option<usize>,
    is_frozen: bool,
}

impl Filesystem {
    fn is_level_with(&self, other: &Self) -> bool {
        self.height.is_some() && self.height == other.height
    }
}

/// The filesystems, in the order of freezing.
#[derive(Default)]
pub(super) struct Filesystems {
    all: Vec<Filesystem>,
}

impl Filesystems {
    /// Adds one that is frozen after those that were added before, or with those of the same height.
    pub fn add(&mut self, path: &Path, file: File, height: Option<usize>) {
        self.all.push(Filesystem { path: path.to_owned(), file, height, is_frozen: false });
    }

    /// Adds one that another process has frozen.
    pub fn add_frozen(&mut self, path: &Path, file: File) {
        self.all.push(Filesystem { path: path.to_owned(), file, height: None, is_frozen: true });
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.all.clear();
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The mount points with their open files.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.all.iter().map(|filesystem| (filesystem.path.as_path(), &filesystem.file))
    }

    /// True if this process has frozen every one and thawed none.
    pub fn are_frozen(&self) -> bool {
        self.all.iter().all(|filesystem| filesystem.is_frozen)
    }

    /// True if one is frozen.
    pub fn is_any_frozen(&self) -> bool {
        self.all.iter().any(|filesystem| filesystem.is_frozen)
    }

    /// Freezes those at `points`, all or none.
    ///
    /// # Errors
    /// The first failure, as the error for the user.
    pub fn freeze(&mut self, points: &[PathBuf]) -> Result<()> {
        let mut chosen = self.at(points);
        let mut result = Ok(());
        for level in chosen.chunk_by_mut(|one, next| one.is_level_with(next)) {
            for (filesystem, frozen) in at_once(level, freeze::freeze) {
                match frozen {
                    Ok(()) => filesystem.is_frozen = true,
                    Err(source) => result = result.and(Err(freeze_error(&filesystem.path, source))),
                }
            }
            if result.is_err() {
                break;
            }
        }
        if result.is_err() {
            let _ = self.thaw(points);
        }
        result
    }

    /// Thaws those at `points` that are frozen, in the reverse order of freezing. Returns the failures. One that fails with
    /// EINVAL counts as thawed: it was not frozen any more.
    pub fn thaw(&mut self, points: &[PathBuf]) -> Vec<(PathBuf, io::Error)> {
        let mut chosen: Vec<&mut Filesystem> =
            self.at(points).into_iter().filter(|filesystem| filesystem.is_frozen).rev().collect();
        let mut failures = Vec::new();
        for level in chosen.chunk_by_mut(|one, next| one.is_level_with(next)) {
            for (filesystem, thawed) in at_once(level, freeze::thaw) {
                let is_over = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
                filesystem.is_frozen = thawed.as_ref().is_err_and(|error| !is_over(error));
                failures.extend(thawed.err().map(|error| (filesystem.path.clone(), error)));
            }
        }
        failures
    }

    fn at(&mut self, points: &[PathBuf]) -> Vec<&mut Filesystem> {
        self.all.iter_mut().filter(|filesystem| points.contains(&filesystem.path)).collect()
    }
}

/// Calls `act` for each, for several at the same time. If no thread can be started, one after the other.
fn at_once<'a, 'b>(
    level: &'a mut [&'b mut Filesystem],
    act: fn(&File) -> io::Result<()>,
) -> Vec<(&'a mut &'b mut Filesystem, io::Result<()>)> {
    let files: Vec<&File> = level.iter().map(|filesystem| &filesystem.file).collect();
    let results: Vec<io::Result<()>> = if let [one] = files[..] {
        vec![act(one)]
    } else {
        thread::scope(|scope| {
            let start =
                |file| thread::Builder::new().stack_size(THREAD_STACK).spawn_scoped(scope, move || act(file));
            let threads: Vec<_> = files.iter().map(|file| start(*file)).collect();
            let of_one = |(thread, file): (io::Result<thread::ScopedJoinHandle<'_, _>>, &&File)| match thread
            {
                Ok(thread) => thread.join().expect("a system call does not panic"),
                Err(_) => act(file),
            };
            threads.into_iter().zip(&files).map(of_one).collect()
        })
    };
    level.iter_mut().zip(results).collect()
}

fn freeze_error(path: &Path, source: io::Error) -> Error {
    let error = |what: &str| Error::refused(format!("freezing {}: {what}", path.display()));
    match source.raw_os_error() {
        Some(libc::EBUSY) => error("it is already frozen")
            .with_source(source)
            .next(format!(
                "if a device beneath it is suspended ('dmsetup info'), resume that device: 'cryptsetup luksResume' or \
                 'dmsetup resume'; else thaw the filesystem: 'fsfreeze -u {}'",
                path.display()
            )),
        Some(libc::EOPNOTSUPP) => {
            error("its filesystem cannot be frozen").with_source(source).next("unmount it, then copy it")
        }
        _ => Error::io(format!("freezing {}", path.display()), source),
    }
}
