//! The kinds of frame, and the two sides of a frame.

use std::fmt;

use serde::Serialize;

/// Whether a control block is before or after the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Before.
    Head,
    /// After.
    Tail,
}

/// The kind of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// The image of one segment.
    Data,
    /// Originals, packed one after the other.
    Originals,
    /// Entries of the map.
    Map,
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Originals => "originals",
            Self::Map => "map",
        })
    }
}

impl FrameKind {
    pub(super) fn code(self) -> u32 {
        match self {
            Self::Data => 1,
            Self::Originals => 2,
            Self::Map => 3,
        }
    }
}

impl Side {
    pub(super) fn code(self) -> u32 {
        match self {
            Self::Head => 1,
            Self::Tail => 2,
        }
    }

    pub(super) fn salt(self, kind: u32) -> &'static [u8] {
        match (self, kind) {
            (Self::Head, 1) => b"tidemark control head data",
            (Self::Head, 2) => b"tidemark control head originals",
            (Self::Head, _) => b"tidemark control head map",
            (Self::Tail, 1) => b"tidemark control tail data",
            (Self::Tail, 2) => b"tidemark control tail originals",
            (Self::Tail, _) => b"tidemark control tail map",
        }
    }
}
