//! Targets as types: one line of a table, from and to the kernel's text.
//!
//! Invariant: `Target::parse(kind, params)` followed by `params()` returns the same text as the kernel
//! prints, for every kind; an unknown kind is kept as text. Devices are numbers ("253:4"), never paths: the
//! kernel prints numbers, and a path could name another device later.

use serde::{Deserialize, Serialize};

use crate::base::{DeviceNumber, Sectors};

/// Longest type name of a target, in bytes (`DM_MAX_TYPE_NAME` with its final zero is 16).
pub const KIND_BYTES_MAX: usize = 15;

/// Most stripes read from a table; the kernel's own bound is the length of the line.
const STRIPES_MAX: usize = 4096;

/// What a range of a device maps to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// `linear DEVICE OFFSET`
    Linear {
        /// Destination device.
        device: DeviceNumber,
        /// First sector there.
        offset: Sectors,
    },
    /// `striped COUNT CHUNK (DEVICE OFFSET)...`
    Striped {
        /// Length of one stripe chunk.
        chunk: Sectors,
        /// The devices, each with its first sector.
        stripes: Vec<(DeviceNumber, Sectors)>,
    },
    /// `switch 1 REGION 0 DEVICE OFFSET`: maps as `linear`, but takes no flush (see
    /// [`origin_table`](crate::stack::origin_table)).
    Switch {
        /// Longest part of an I/O that is passed on unsplit.
        region: Sectors,
        /// Destination device.
        device: DeviceNumber,
        /// First sector there.
        offset: Sectors,
    },
    /// `snapshot-origin DEVICE`: a write first preserves the original in the snapshots of DEVICE.
    SnapshotOrigin {
        /// The device with the data; sectors are not shifted.
        device: DeviceNumber,
    },
    /// `snapshot ORIGIN COW PERSISTENCE CHUNK`
    Snapshot {
        /// The device whose instant the snapshot shows.
        origin: DeviceNumber,
        /// The COW store.
        cow: DeviceNumber,
        /// Ours are always persistent ("P") with a separate overflow state ("O").
        persistence: Persistence,
        /// Unit of copy-on-write.
        chunk: Sectors,
    },
    /// `zero`: reads zeros, drops writes.
    Zero,
    /// `error`: every read and write fails.
    Error,
    /// Any other target, as the kernel's text.
    Other {
        /// The target's type name.
        kind: String,
        /// Its parameters.
        params: String,
    },
}

/// Where a snapshot stores its exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Persistence {
    /// "P": on the COW store.
    Persistent,
    /// "PO": on the COW store, with a status that distinguishes Overflow from Invalid.
    PersistentOverflow,
    /// "N": in memory.
    Transient,
}

impl Persistence {
    /// The text in a table.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Persistent => "P",
            Self::PersistentOverflow => "PO",
            Self::Transient => "N",
        }
    }
}

impl Target {
    /// Parses a target as printed by the kernel. Any text that does not have exactly a known form becomes
    /// [`Target::Other`], so that no text is lost.
    #[must_use]
    pub fn parse(kind: &str, params: &str) -> Self {
        Self::parse_known(kind, params)
            .filter(|target| target.params() == params && target.kind() == kind)
            .unwrap_or_else(|| Self::Other { kind: kind.to_owned(), params: params.to_owned() })
    }

    fn parse_known(kind: &str, params: &str) -> Option<Self> {
        let mut words = params.split_ascii_whitespace();
        let target = match kind {
            "linear" => Self::Linear { device: device(words.next())?, offset: sectors(words.next())? },
            "striped" => {
                let count: usize = words.next()?.parse().ok()?;
                let chunk = sectors(words.next())?;
                if count == 0 || count > STRIPES_MAX {
                    return None;
                }
                let stripes = (0..count)
                    .map(|_| Some((device(words.next())?, sectors(words.next())?)))
                    .collect::<Option<Vec<_>>>()?;
                Self::Striped { chunk, stripes }
            }
            "switch" => {
                let (paths, region, options) = (words.next()?, sectors(words.next())?, words.next()?);
                // With several paths the kernel does not report which path takes which region.
                if paths != "1" || options != "0" {
                    return None;
                }
                Self::Switch { region, device: device(words.next())?, offset: sectors(words.next())? }
            }
            "snapshot-origin" => Self::SnapshotOrigin { device: device(words.next())? },
            "snapshot" => Self::Snapshot {
                origin: device(words.next())?,
                cow: device(words.next())?,
                persistence: match words.next()? {
                    "P" => Persistence::Persistent,
                    "PO" => Persistence::PersistentOverflow,
                    "N" => Persistence::Transient,
                    _ => return None,
                },
                chunk: sectors(words.next())?,
            },
            "zero" => Self::Zero,
            "error" => Self::Error,
            _ => return None,
        };
        words.next().is_none().then_some(target)
    }

    /// The target's type name.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Striped { .. } => "striped",
            Self::Switch { .. } => "switch",
            Self::SnapshotOrigin { .. } => "snapshot-origin",
            Self::Snapshot { .. } => "snapshot",
            Self::Zero => "zero",
            Self::Error => "error",
            Self::Other { kind, .. } => kind,
        }
    }

    /// The parameters, as the kernel prints them.
    #[must_use]
    pub fn params(&self) -> String {
        match self {
            Self::Linear { device, offset } => format!("{device} {}", offset.get()),
            Self::Striped { chunk, stripes } => {
                let mut text = format!("{} {}", stripes.len(), chunk.get());
                for (device, offset) in stripes {
                    text.push_str(&format!(" {device} {}", offset.get()));
                }
                text
            }
            Self::Switch { region, device, offset } => {
                format!("1 {} 0 {device} {}", region.get(), offset.get())
            }
            Self::SnapshotOrigin { device } => device.to_string(),
            Self::Snapshot { origin, cow, persistence, chunk } => {
                format!("{origin} {cow} {} {}", persistence.text(), chunk.get())
            }
            Self::Zero | Self::Error => String::new(),
            Self::Other { params, .. } => params.clone(),
        }
    }

    /// The devices that it maps to. For [`Target::Other`] every word that parses as a device number.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceNumber> {
        match self {
            Self::Linear { device, .. } | Self::Switch { device, .. } | Self::SnapshotOrigin { device } => {
                vec![*device]
            }
            Self::Striped { stripes, .. } => stripes.iter().map(|(device, _)| *device).collect(),
            Self::Snapshot { origin, cow, .. } => vec![*origin, *cow],
            Self::Zero | Self::Error => Vec::new(),
            Self::Other { params, .. } => {
                params.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
            }
        }
    }
}

fn device(word: Option<&str>) -> Option<DeviceNumber> {
    word?.parse().ok()
}

fn sectors(word: Option<&str>) -> Option<Sectors> {
    word?.parse().ok().map(Sectors)
}
