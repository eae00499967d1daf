//! An increment with the archives that it continues: finds them, checks that they fit, and says which of them holds
//! which part of the content.
//!
//! A parent is found by its identity, never by its name: it has the archive's id that the increment names, or shows the
//! kept snapshot that the increment's changes were counted from (an archive of a kept snapshot shows the same content,
//! whichever archive it is). A chain is complete if it ends in a whole archive.
//!
//! Invariants:
//! - of the archives of a [`Chain`], superblocks and maps were read and are sound; their sizes are the same; and none
//!   inherits a range that its parent does not hold;
//! - each byte of the origin is owned by one archive, or reads as zeros; where both, what its archive's frames hold is
//!   written over the zeros.
//!
//! Memory: some 50 bytes for each run of the maps.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::input::{ArchiveSource, Input, engine_config_for};
use super::map::read_map;
use crate::base::{Bytes, Error, ErrorKind, Extent, Result, ResultExt as _, SegmentSize, directory_of};
use crate::extent::ExtentSet;
use crate::format::archive::{BLOCK_BYTES, MapState, Superblock};
use crate::io::EngineConfig;
use crate::secondary::archive_read::ArchiveFile;
use crate::topology::check_answers;

/// Most archives of a chain.
pub const ARCHIVES_MAX: usize = 4096;

/// Most files of a directory that are looked at.
const CANDIDATES_MAX: usize = 1 << 20;

/// One archive of a chain.
#[derive(Debug)]
pub struct Link {
    /// The archive.
    pub archive: ArchiveFile,
    /// The parts of the origin whose content is in its frames, or zero in it, and in no later archive.
    pub owned: ExtentSet,
}

/// A whole archive and the increments that continue it.
#[derive(Debug)]
pub struct Chain {
    /// The whole archive first.
    pub links: Vec<Link>,
    /// Ranges that were copied and are zero, as far as no original is over them.
    pub zero: ExtentSet,
    /// Ranges that were not copied at the instant of the last archive.
    pub absent: ExtentSet,
}

impl Chain {
    /// The chain that ends in `archive`. `places`: files and directories in which parents are looked for; none: the
    /// archive's directory.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if a parent is not found; [`ErrorKind::BadData`] if one is damaged or does not fit; I/O
    /// errors; the interrupt's.
    pub fn of(archive: ArchiveFile, places: &[PathBuf], interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let heads = heads_of(archive.path(), archive.superblock(), places, interrupt)?;
        let path = archive.path().to_owned();
        let first = Self::found(archive, (&heads, Preference::Named), interrupt);
        match first {
            Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::BadData) => {
                // A whole archive of the same snapshot does without the parents that are missing or damaged.
                let again = ArchiveFile::open(&path)
                    .and_then(|archive| Self::found(archive, (&heads, Preference::Whole), interrupt));
                again.map_err(|_| error)
            }
            chain => chain,
        }
    }

    fn found(
        archive: ArchiveFile,
        (heads, preference): (&[Head], Preference),
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let mut archives = vec![archive];
        while let Some(child) = archives.last().filter(|last| last.superblock().is_increment()) {
            interrupt()?;
            let parent = find_parent(child.path(), child.superblock(), (heads, preference))?;
            let id = parent.superblock().archive;
            if archives.iter().any(|archive| archive.superblock().archive == id) {
                return Err(Error::bad_data(format!("{} continues itself", parent.path().display()))
                    .state("nothing was changed")
                    .next("name the right parents with --parent"));
            }
            archives.push(parent);
            if archives.len() > ARCHIVES_MAX {
                return Err(Error::refused(format!("the chain has more than {ARCHIVES_MAX} archives"))
                    .state("nothing was changed")
                    .next("make a whole archive of its beginning: 'tidemark archive merge'"));
            }
        }
        Self::built(archives, interrupt)
    }

    /// From archives, the last one first.
    fn built(archives: Vec<ArchiveFile>, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let size = archives.first().map_or(Bytes::ZERO, |last| last.superblock().origin_size);
        // What no later archive holds.
        let mut open: ExtentSet = Extent::new(Bytes::ZERO, size).into_iter().collect();
        let (mut zero, mut absent) = (ExtentSet::new(), ExtentSet::new());
        let mut links = Vec::new();
        for (number, archive) in archives.into_iter().enumerate() {
            let (mut owned, mut inherited) = (ExtentSet::new(), ExtentSet::new());
            let mut missing = None;
            // They may be over ranges that the map calls zero, because no data frame holds them.
            let has_originals = archive.totals().originals_frames > 0;
            read_map(&archive, interrupt, &mut |entry| {
                let parts = open.intersection_with(entry.extent);
                match entry.state {
                    MapState::Present => owned.extend(parts),
                    MapState::Inherited => inherited.extend(parts),
                    MapState::Zero => {
                        zero.extend(parts);
                        if has_originals {
                            owned.extend(open.intersection_with(entry.extent));
                        }
                    }
                    MapState::Absent if number == 0 => absent.extend(parts),
                    MapState::Absent => missing = missing.or(open.intersection_with(entry.extent).next()),
                }
                Ok(())
            })?;
            if let Some(extent) = missing {
                return Err(Error::bad_data(format!(
                    "{} does not hold {extent}, which a later archive of the chain takes from it",
                    archive.path().display()
                ))
                .state("nothing was changed")
                .next("name the parent that the increment was made with: --parent PATH"));
            }
            open = inherited;
            links.push(Link { archive, owned });
        }
        links.reverse();
        Ok(Self { links, zero, absent })
    }

    /// The last archive, whose content the chain is.
    ///
    /// # Panics
    /// Never: a chain has an archive.
    #[must_use]
    pub fn last(&self) -> &ArchiveFile {
        &self.links.last().expect("a chain has an archive").archive
    }

    /// The superblock with the largest segments.
    fn largest(&self) -> &Superblock {
        let each = self.links.iter().map(|link| link.archive.superblock());
        each.max_by_key(|one| one.segment.bytes()).unwrap_or_else(|| self.last().superblock())
    }

    /// The largest segments of the archives: no payload is longer.
    #[must_use]
    pub fn largest_segment(&self) -> SegmentSize {
        self.largest().segment
    }

    /// The names of all but the last archive.
    #[must_use]
    pub fn parents(&self) -> Vec<String> {
        let (_, parents) = self.links.split_last().expect("a chain has an archive");
        parents.iter().map(|link| link.archive.path().display().to_string()).collect()
    }

    /// Bytes in the frames of the chain that are still needed; too many if originals are over zeros.
    #[must_use]
    pub fn owned_bytes(&self) -> Bytes {
        self.links.iter().map(|link| link.owned.total()).sum()
    }
}

/// Which of several archives of the snapshot that an increment continues is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preference {
    /// The one with the id that the increment names.
    Named,
    /// One that is whole: it needs no parent.
    Whole,
}

/// A file whose head superblock is that of an archive.
#[derive(Clone, Debug)]
struct Head {
    path: PathBuf,
    superblock: Superblock,
}

/// The archives in which the parents of `child` are looked for.
fn heads_of(
    path: &Path,
    child: &Superblock,
    places: &[PathBuf],
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Vec<Head>> {
    if !child.is_increment() {
        return Ok(Vec::new());
    }
    if places.is_empty() {
        return heads_in(&[directory_of(path).to_owned()], interrupt);
    }
    heads_in(places, interrupt)
}

/// The archives at `places`: files, and directories, whose files are looked at.
fn heads_in(places: &[PathBuf], interrupt: &dyn Fn() -> Result<()>) -> Result<Vec<Head>> {
    let mut heads = Vec::new();
    for place in places {
        check_answers(place)?;
        let what = || format!("looking for a parent in {}", place.display());
        if !fs::metadata(place).io_context(what)?.is_dir() {
            let head = head_of(place)?.ok_or_else(|| {
                Error::bad_data(format!("{} is not an archive", place.display()))
                    .state("nothing was changed")
                    .next("name an archive or a directory with --parent")
            })?;
            heads.push(head);
            continue;
        }
        for entry in fs::read_dir(place).io_context(what)?.take(CANDIDATES_MAX) {
            interrupt()?;
            let path = entry.io_context(what)?.path();
            // A partial file has no name of its own yet, and what cannot be read is not the parent.
            let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !is_hidden && fs::metadata(&path).is_ok_and(|found| found.is_file()) {
                heads.extend(head_of(&path).ok().flatten());
            }
        }
    }
    Ok(heads)
}

/// The head superblock of the file or device at `path`; None if it has none that can be read.
fn head_of(path: &Path) -> Result<Option<Head>> {
    let mut block = [0u8; BLOCK_BYTES];
    let what = || format!("reading {}", path.display());
    let mut file = File::open(path).io_context(what)?;
    match file.read_exact(&mut block) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read.io_context(what)?,
    }
    let decoded = Superblock::decode_head(&block).ok();
    Ok(decoded.map(|superblock| Head { path: path.to_owned(), superblock }))
}

/// True if `parent` may be continued by an increment that names this archive and this snapshot.
fn is_named(parent: &Superblock, archive: uuid::Uuid, snapshot: uuid::Uuid) -> bool {
    parent.archive == archive || (!snapshot.is_nil() && parent.snapshot == snapshot)
}

/// Opens the parent of `child`, which is at `path`. One that cannot be opened does not hide another.
fn find_parent(
    path: &Path,
    child: &Superblock,
    (heads, preference): (&[Head], Preference),
) -> Result<ArchiveFile> {
    let named = |head: &&Head| {
        is_named(&head.superblock, child.parent, child.base) && head.superblock.archive != child.archive
    };
    let mut found: Vec<&Head> = heads.iter().filter(named).collect();
    found.sort_by_key(|head| {
        let is_other = head.superblock.archive != child.parent;
        let is_increment = head.superblock.is_increment();
        if preference == Preference::Named { (is_other, is_increment) } else { (is_increment, is_other) }
    });
    let mut first: Option<Error> = None;
    for head in found {
        let opened = check_fit(path, child, head).and_then(|()| ArchiveFile::open(&head.path));
        match opened {
            // Replaced since its head was read.
            Ok(archive) if *archive.superblock() != head.superblock => {}
            Ok(archive) => return Ok(archive),
            Err(error) => {
                first.get_or_insert(error.context(format!("the parent of {}", path.display())));
            }
        }
    }
    Err(first.unwrap_or_else(|| {
        Error::refused(format!(
            "{} continues the archive {}, which was not found",
            path.display(),
            child.parent
        ))
        .state("nothing was changed")
        .next("put its parent beside it, or name the parent's file or directory with --parent")
    }))
}

/// Where the parent of the increment at `path` is; None if it is not found beside it.
///
/// # Errors
/// I/O errors of reading the directory; the interrupt's.
pub fn parent_of(
    path: &Path,
    child: &Superblock,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<PathBuf>> {
    let heads = heads_of(path, child, &[], interrupt)?;
    Ok(find_parent(path, child, (&heads, Preference::Named)).ok().map(|parent| parent.path().to_owned()))
}

/// Checks what must be the same in parent and child. Their instants prove nothing: clocks are set back.
fn check_fit(path: &Path, child: &Superblock, parent: &Head) -> Result<()> {
    let (shown, found) = (path.display(), parent.path.display());
    if parent.superblock.origin_size != child.origin_size {
        return Err(Error::bad_data(format!(
            "{found} is of an origin of {} bytes, {shown} of one of {}",
            parent.superblock.origin_size.get(),
            child.origin_size.get()
        )));
    }
    Ok(())
}

/// Finds the archive of the kept snapshot `snapshot`, at `places`, with its chain.
///
/// # Errors
/// As [`Chain::of`].
pub fn find_snapshot(
    snapshot: uuid::Uuid,
    places: &[PathBuf],
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<Chain>> {
    let mut heads = heads_in(places, interrupt)?;
    heads.retain(|head| head.superblock.snapshot == snapshot);
    heads.sort_by_key(|head| head.superblock.is_increment());
    let mut first: Option<Error> = None;
    for head in heads {
        // Its own parents are where it is, or where the user says.
        let mut around = places.to_vec();
        around.push(directory_of(&head.path).to_owned());
        let opened = ArchiveFile::open(&head.path).and_then(|archive| Chain::of(archive, &around, interrupt));
        match opened {
            Ok(chain) => return Ok(Some(chain)),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(None), Err)
}

/// What a command reads: one whole archive, or a chain.
pub enum Content {
    /// A whole archive.
    Whole(Input),
    /// An increment, with the archives that it continues.
    Chain(Box<Chain>),
}

impl Content {
    /// Opens the archive, and its parents if it is an increment. `places` is as for [`Chain::of`].
    ///
    /// # Errors
    /// As [`Input::open`] and [`Chain::of`]; [`ErrorKind::Usage`] for an increment from a pipe.
    pub fn open(
        source: &ArchiveSource,
        places: &[PathBuf],
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        match Input::open(source, interrupt)? {
            Input::File(archive) if archive.superblock().is_increment() => {
                Ok(Self::Chain(Box::new(Chain::of(*archive, places, interrupt)?)))
            }
            Input::Stream(stream) => Self::of_stream(Input::Stream(stream)),
            whole @ Input::File(_) => Ok(Self::Whole(whole)),
        }
    }

    /// An archive that is read once. An increment's map is at its end, and says what its parents have to be read for.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an increment.
    pub fn of_stream(input: Input) -> Result<Self> {
        if !input.superblock().is_increment() {
            return Ok(Self::Whole(input));
        }
        Err(Error::usage(format!(
            "{} is an increment, which cannot be read from a pipe",
            input.description()
        ))
        .state("nothing was changed")
        .next("store it in a file beside its parent, and name that file"))
    }

    /// The superblock of the archive whose content it is.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        match self {
            Self::Whole(input) => input.superblock(),
            Self::Chain(chain) => chain.last().superblock(),
        }
    }
}

/// The engine configuration for the archives of a chain, one after the other.
pub fn engine_config_for_chain(chain: &Chain) -> EngineConfig {
    engine_config_for(chain.largest())
}
