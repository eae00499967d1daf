//! The form of a secondary: named in requests, records and the segment log.

use serde::{Deserialize, Serialize};

/// The form of a secondary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecondaryForm {
    /// Byte for byte: no frames.
    Raw,
    /// Framed segments (see the archive's FORMAT.md).
    Archive,
}
