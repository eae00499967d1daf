//! What must be given back after a crash, and who is still using it?
//!
//! Most of a store the kernel drops by itself: the tail is a file without a name behind a loop device
//! with autoclear. Not so the RAM head. So before a head is made, a record of it is synced to
//! `/run/tidemark/stores/ID.json`: one JSON line per step, only ever appended, the last whole line
//! holds. Its owner keeps it locked (flock), which dies with the process.
//!
//! Crash argument, by what the last line says:
//! 1. `nothing`: nothing was made, or all of it was given back: the record is removed.
//! 2. `zram-intended` with the devices there were before: one may have been added and not yet noted.
//!    It is ours if it is the only new one and has no size; it holds no memory then.
//! 3. `zram` with its index, `brd`: given back, unless a live device still has the store's UUID.
//!
//! Must not: touch a RAM disk that no record names, or one whose record is locked.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result, ResultExt};
use crate::dm::Dm;

use super::head;

/// Where records are.
pub const RECORD_DIR: &str = "/run/tidemark/stores";

/// Longest record that is read: a handful of lines of a few hundred bytes.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// Most records looked at in one go.
const RECORD_COUNT_MAX: usize = 4096;

/// What has been made for a store that the kernel does not drop by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "made")]
pub(super) enum Made {
    /// Nothing, or nothing any more.
    Nothing,
    /// A zram device is about to be added; these existed before.
    ZramIntended { before: Vec<u32> },
    /// This zram device.
    Zram { index: u32 },
    /// The brd module is (about to be) loaded.
    Brd,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    version: u32,
    /// UUID of the store's device-mapper device.
    uuid: String,
    #[serde(flatten)]
    made: Made,
}

const VERSION: u32 = 1;

/// A record that is ours: locked while this value lives.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    uuid: String,
    file: Flock<File>,
}

impl Record {
    /// Begins the record of store `id` in `dir`.
    pub(super) fn create(dir: &Path, id: &str, uuid: &str) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .io_context(|| format!("making the directory {}", dir.display()))?;
        let path = dir.join(format!("{id}.json"));
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .io_context(|| format!("making the store's record {}", path.display()))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))
            .io_context(|| format!("locking the store's record {}", path.display()))?;
        let mut record = Self { path, uuid: uuid.to_owned(), file };
        record.note(Made::Nothing)?;
        Ok(record)
    }

    /// Returns once `made` is on stable storage (a tmpfs: it outlives the process, not the host, and
    /// so do RAM disks).
    pub(super) fn note(&mut self, made: Made) -> Result<()> {
        let line = Line { version: VERSION, uuid: self.uuid.clone(), made };
        let mut text = serde_json::to_string(&line).map_err(|source| {
            Error::kernel(format!("writing the store's record {}", self.path.display()), source)
        })?;
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_all())
            .io_context(|| format!("writing the store's record {}", self.path.display()))
    }

    /// Ends the record: everything it names has been given back.
    pub(super) fn close(self) -> Result<()> {
        fs::remove_file(&self.path)
            .io_context(|| format!("removing the store's record {}", self.path.display()))
    }
}

/// Gives back the RAM heads of stores whose process is gone and whose device is removed. Call it
/// after the devices of a crashed copy have been removed. Answers what was given back, for people.
///
/// # Errors
/// The first failure, after every record has been tried.
pub fn release_leftovers() -> Result<Vec<String>> {
    let dir = Path::new(RECORD_DIR);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let dm = Dm::open()?;
    release_leftovers_in(dir, &|uuid| dm.list_by_uuid(uuid).map(|found| !found.is_empty()), &mut Kernel)
}

/// The RAM disks, or a test's fake of them.
pub(super) trait Disks {
    fn zram_indices(&self) -> Vec<u32>;
    fn zram_is_unused(&self, index: u32) -> bool;
    fn release_zram(&mut self, index: u32) -> Result<()>;
    fn release_brd(&mut self) -> Result<()>;
}

struct Kernel;

impl Disks for Kernel {
    fn zram_indices(&self) -> Vec<u32> {
        head::zram_indices()
    }
    fn zram_is_unused(&self, index: u32) -> bool {
        head::zram_is_unused(index)
    }
    fn release_zram(&mut self, index: u32) -> Result<()> {
        head::release_zram(index)
    }
    fn release_brd(&mut self) -> Result<()> {
        head::release_brd()
    }
}

pub(super) fn release_leftovers_in(
    dir: &Path,
    in_use: &dyn Fn(&str) -> Result<bool>,
    disks: &mut dyn Disks,
) -> Result<Vec<String>> {
    let mut released = Vec::new();
    let mut first_error: Option<Error> = None;
    let entries = fs::read_dir(dir).io_context(|| format!("listing {}", dir.display()))?;
    for entry in entries.take(RECORD_COUNT_MAX) {
        let path = entry.io_context(|| format!("listing {}", dir.display()))?.path();
        match release_one(&path, in_use, disks) {
            Ok(Some(what)) => released.push(what),
            Ok(None) => {}
            Err(error) => {
                first_error = Some(match first_error {
                    None => error,
                    Some(first) => first.with_failed_undo(error),
                });
            }
        }
    }
    first_error.map_or(Ok(released), Err)
}

/// One record; None where there was nothing to give back (yet).
fn release_one(
    path: &Path,
    in_use: &dyn Fn(&str) -> Result<bool>,
    disks: &mut dyn Disks,
) -> Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).io_context(|| format!("opening {}", path.display())),
    };
    // Locked: its process lives.
    let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(&*file, RECORD_BYTES_MAX), &mut text)
        .io_context(|| format!("reading {}", path.display()))?;
    let remove = || fs::remove_file(path).io_context(|| format!("removing {}", path.display()));
    // A crash within the first write: nothing had been made yet.
    let Some(line) = last_whole_line(&text) else { return remove().map(|()| None) };
    if in_use(&line.uuid)? {
        return Ok(None);
    }
    let what = match line.made {
        Made::Nothing => None,
        Made::Zram { index } => {
            disks.release_zram(index)?;
            Some(format!("the RAM disk /dev/zram{index}"))
        }
        Made::ZramIntended { before } => release_intended(&before, disks)?,
        Made::Brd => {
            disks.release_brd()?;
            Some("the RAM disk /dev/ram0 (module brd)".to_owned())
        }
    };
    remove()?;
    Ok(what)
}

fn release_intended(before: &[u32], disks: &mut dyn Disks) -> Result<Option<String>> {
    let mut new = disks.zram_indices();
    new.retain(|index| !before.contains(index));
    match new.as_slice() {
        [index] if disks.zram_is_unused(*index) => {
            disks.release_zram(*index)?;
            Ok(Some(format!("the RAM disk /dev/zram{index}")))
        }
        [] => Ok(None),
        _ => {
            tracing::warn!(
                "zram devices {new:?} are new since a store's creation broke off; none was removed, \
                 because none is known to be ours (an unused one takes no memory)"
            );
            Ok(None)
        }
    }
}

/// A line cut short by a crash does not count; the one before it does.
fn last_whole_line(text: &str) -> Option<Line> {
    let end = text.rfind('\n')?;
    text[..end]
        .lines()
        .rev()
        .find_map(|line| serde_json::from_str::<Line>(line).ok().filter(|line| line.version == VERSION))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        present: Vec<u32>,
        used: Vec<u32>,
        released: Vec<u32>,
        brd_released: bool,
    }

    impl Disks for Fake {
        fn zram_indices(&self) -> Vec<u32> {
            self.present.clone()
        }
        fn zram_is_unused(&self, index: u32) -> bool {
            !self.used.contains(&index)
        }
        fn release_zram(&mut self, index: u32) -> Result<()> {
            self.released.push(index);
            Ok(())
        }
        fn release_brd(&mut self) -> Result<()> {
            self.brd_released = true;
            Ok(())
        }
    }

    fn leave(dir: &Path, id: &str, steps: Vec<Made>) {
        let mut record = Record::create(dir, id, &format!("TIDEMARK-{id}")).unwrap();
        for made in steps {
            record.note(made).unwrap();
        }
    }

    #[test]
    fn a_crash_behind_each_step_leaves_nothing() {
        let before = vec![0, 3];
        let all = [
            Made::ZramIntended { before: before.clone() },
            Made::Zram { index: 1 },
            Made::Nothing,
            Made::Brd,
        ];
        for count in 0..=all.len() {
            let dir = tempfile::tempdir().unwrap();
            leave(dir.path(), "a", all[..count].to_vec());
            let mut disks = Fake { present: vec![0, 1, 3], used: vec![0, 3], ..Fake::default() };
            release_leftovers_in(dir.path(), &|_| Ok(false), &mut disks).unwrap();
            let expected: &[u32] = if count == 1 || count == 2 { &[1] } else { &[] };
            assert_eq!(disks.released, expected, "after {count} steps");
            assert_eq!(disks.brd_released, count == 4);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_is_locked_or_in_use_or_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut disks = Fake { present: vec![1, 2], used: vec![2], ..Fake::default() };
        let mut live = Record::create(dir.path(), "live", "TIDEMARK-live").unwrap();
        live.note(Made::Zram { index: 1 }).unwrap();
        leave(dir.path(), "mapped", vec![Made::Zram { index: 2 }]);
        // Two new devices, or one that somebody has given a size: not known to be ours.
        leave(dir.path(), "unsure", vec![Made::ZramIntended { before: vec![] }]);
        leave(dir.path(), "other", vec![Made::ZramIntended { before: vec![1] }]);
        release_leftovers_in(dir.path(), &|uuid| Ok(uuid == "TIDEMARK-mapped"), &mut disks).unwrap();
        assert!(disks.released.is_empty(), "{:?}", disks.released);
        assert!(dir.path().join("live.json").exists() && dir.path().join("mapped.json").exists());
        live.close().unwrap();
        assert!(!dir.path().join("live.json").exists());
    }

    #[test]
    fn a_torn_line_does_not_count() {
        let whole = r#"{"version":1,"uuid":"u","made":"zram","index":7}"#;
        for end in 0..whole.len() {
            let text = format!("{{\"version\":1,\"uuid\":\"u\",\"made\":\"nothing\"}}\n{}", &whole[..end]);
            assert_eq!(last_whole_line(&text).unwrap().made, Made::Nothing);
        }
        assert_eq!(last_whole_line(&format!("{whole}\n")).unwrap().made, Made::Zram { index: 7 });
        assert!(last_whole_line("garbage\n").is_none());
        assert!(last_whole_line("").is_none());
    }
}
