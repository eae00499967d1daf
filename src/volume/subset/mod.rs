//! The part of an origin that is copied: which files and ranges the user leaves out, and where these are.
//!
//! Only what is known to be left out leads past the snapshot: the bytes of files that are not chosen. Everything else is
//! copied: all metadata, directories, logs, and what no file claims. So the metadata that reaches the chosen files is in
//! the copy by construction, and the copy can be mounted: a file that was left out has its name and size, and reads as
//! zeros. In doubt a byte is copied.
//!
//! The argument that no byte of a chosen file and no metadata is left out:
//! 1. [`find`] walks the filesystems before anything is frozen, and lists files that are left out under all of their
//!    names. That list may be stale when the filesystem is frozen.
//! 2. [`Omission::read`] checks each file while its filesystem is frozen, when names and extents cannot change: it must be
//!    the same inode under all of these names, and have no other name. Then it asks for its extents. So a file that was
//!    renamed, linked or replaced meanwhile is copied; one that was rewritten, truncated or defragmented has the extents
//!    that it has at the instant.
//! 3. An extent counts only if the file alone uses it: not if it is shared (reflinks), or on a realtime device.
//! 4. The rest is as for free space: see [`free`](crate::volume::free), points 1, 2 and 4.

mod omission;
mod walk;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, Error, Result};
use crate::extent::{Extent, ExtentSet};

pub use omission::{MappedOmission, Omission, OmittedFiles};
pub use walk::find;

const RANGE_PREFIX: &str = "bytes:";

/// Names files or bytes of an origin. As text:
///
/// | text | what |
/// |---|---|
/// | `/srv/images` | this file, or all files below this directory |
/// | `/srv/*/cache` | as above, for each path that matches; `*` does not match `/`, `**` does |
/// | `*.iso` | every file with such a name, and all files below a directory with such a name |
/// | `bytes:1GiB+64MiB` | 64 MiB of the origin, from its byte 1 GiB on |
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    /// An absolute path, or a pattern of one.
    Path(PathBuf),
    /// A pattern of a name.
    Name(String),
    /// Bytes of the origin.
    Range(Extent),
}

impl Selector {
    /// Parses the text.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage).
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(range) = text.strip_prefix(RANGE_PREFIX) {
            let bad = || {
                Error::usage(format!("'{text}' is not a range of bytes"))
                    .next("write bytes:START+LENGTH, for example bytes:1GiB+64MiB")
            };
            let (start, length) = range.split_once('+').ok_or_else(bad)?;
            let extent = Extent::with_length(Bytes::parse(start)?, Bytes::parse(length)?);
            return extent.map(Self::Range).ok_or_else(bad);
        }
        if text.is_empty() || (!text.starts_with('/') && text.contains('/')) {
            return Err(Error::usage(format!("'{text}' is neither an absolute path nor a file name"))
                .next("write the whole path, such as /srv/images, or a name or pattern, such as '*.iso'"));
        }
        glob::Pattern::new(text).map_err(|error| {
            Error::usage(format!("'{text}' is not a pattern: {error}"))
                .next("write [*], [?] and [[] for these characters themselves")
        })?;
        if text.starts_with('/') { Ok(Self::Path(text.into())) } else { Ok(Self::Name(text.to_owned())) }
    }

    /// The bytes; None if it names files.
    fn range(&self) -> Option<Extent> {
        match self {
            Self::Range(extent) => Some(*extent),
            Self::Path(_) | Self::Name(_) => None,
        }
    }
}

impl TryFrom<String> for Selector {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Name(pattern) => f.write_str(pattern),
            Self::Range(extent) => {
                write!(f, "{RANGE_PREFIX}{}+{}", extent.start().get(), extent.length().get())
            }
        }
    }
}

/// What of an origin the user wants. What is excluded is left out even if it is included too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subset {
    /// Of all files, only these; of all bytes, only these, if there are only ranges. Empty: everything.
    pub include: Vec<Selector>,
    /// Not these.
    pub exclude: Vec<Selector>,
}

impl Subset {
    /// True if everything is wanted.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// True if files are named, which only a mounted filesystem has.
    #[must_use]
    pub fn names_files(&self) -> bool {
        self.include.iter().chain(&self.exclude).any(|selector| selector.range().is_none())
    }

    /// True if ranges of bytes are left out, whatever is there.
    #[must_use]
    pub fn leaves_out_ranges(&self) -> bool {
        self.exclude.iter().any(|selector| selector.range().is_some())
            || !self.include.is_empty() && !self.is_list_of_files()
    }

    /// True if ranges of bytes are named.
    #[must_use]
    pub fn names_ranges(&self) -> bool {
        self.include.iter().chain(&self.exclude).any(|selector| selector.range().is_some())
    }

    /// True if only files that are included are wanted.
    fn is_list_of_files(&self) -> bool {
        self.include.iter().any(|selector| selector.range().is_none())
    }

    /// The bytes of an origin of `size` bytes that ranges leave out, whatever files there are.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) if a range is not on the origin.
    pub fn ranges_left_out(&self, size: Bytes) -> Result<Vec<Extent>> {
        let ranges =
            |selectors: &[Selector]| selectors.iter().filter_map(Selector::range).collect::<ExtentSet>();
        let (included, mut left_out) = (ranges(&self.include), ranges(&self.exclude));
        if let Some(beyond) = included.iter().chain(left_out.iter()).find(|extent| extent.end() > size) {
            return Err(Error::usage(format!(
                "bytes {} to {} are not on the origin, which has {} bytes",
                beyond.start().get(),
                beyond.end().get(),
                size.get()
            ))
            .state("nothing was changed"));
        }
        if !self.include.is_empty() && !self.is_list_of_files() {
            left_out.extend(
                Extent::new(Bytes::ZERO, size)
                    .into_iter()
                    .flat_map(|whole| included.gaps_in(whole).collect::<Vec<_>>()),
            );
        }
        Ok(left_out.iter().collect())
    }

    /// The bytes that are included by ranges, also if files that are left out use them.
    fn ranges_included(&self) -> impl Iterator<Item = Extent> {
        self.include.iter().filter_map(Selector::range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(Bytes(start), Bytes(end)).unwrap()
    }

    #[test]
    fn a_selector_is_a_path_a_name_or_a_range_and_its_text_reads_back() {
        for (text, selector) in [
            ("/srv/images", Selector::Path("/srv/images".into())),
            ("/srv/*/cache", Selector::Path("/srv/*/cache".into())),
            ("*.iso", Selector::Name("*.iso".to_owned())),
            ("bytes:1KiB+512", Selector::Range(extent(1024, 1536))),
        ] {
            assert_eq!(Selector::parse(text).unwrap(), selector, "{text}");
            assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector, "{text}");
        }
        for text in
            ["", "a/b", "./a", "/a[", "bytes:", "bytes:1", "bytes:1+0", "bytes:1-2", "bytes:-1+2", "a**"]
        {
            assert_eq!(Selector::parse(text).unwrap_err().kind(), crate::base::ErrorKind::Usage, "{text}");
        }
    }

    #[test]
    fn ranges_alone_leave_out_everything_else() {
        let range = |text: &str| Selector::parse(text).unwrap();
        let of = |include: &[&str], exclude: &[&str]| {
            let parse = |texts: &[&str]| texts.iter().map(|text| range(text)).collect();
            Subset { include: parse(include), exclude: parse(exclude) }.ranges_left_out(Bytes(100))
        };
        assert_eq!(of(&[], &[]).unwrap(), []);
        assert_eq!(of(&["bytes:10+10"], &[]).unwrap(), [extent(0, 10), extent(20, 100)]);
        assert_eq!(
            of(&["bytes:10+10"], &["bytes:15+1"]).unwrap(),
            [extent(0, 10), extent(15, 16), extent(20, 100)]
        );
        // With files, the rest is what these leave out.
        assert_eq!(of(&["bytes:10+10", "*.iso"], &["bytes:15+1"]).unwrap(), [extent(15, 16)]);
        assert_eq!(of(&[], &["bytes:0+100", "*.iso"]).unwrap(), [extent(0, 100)]);
        assert_eq!(of(&[], &["bytes:0+101"]).unwrap_err().kind(), crate::base::ErrorKind::Usage);
    }
}
