//! Tables: the mapping of a whole device.
//!
//! Invariants: at least one line, the first at sector 0, each starting at the end of the one before it, none
//! empty, the sum within 64 bits. A table read from the kernel prints as the same text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::base::{DeviceNumber, Error, Result, Sectors};

use super::target::{KIND_BYTES_MAX, Target};

/// Most lines in a table: 4,000 have been measured to load in 0.15 s. This bounds memory and the ioctl's
/// buffer; no real volume reaches it.
pub const LINES_MAX: usize = 65_536;

/// Longest parameter text of a line, in bytes.
pub const PARAMS_BYTES_MAX: usize = 65_536;

/// A range of the device and its mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// First sector.
    pub start: Sectors,
    /// Sectors covered, never 0.
    pub length: Sectors,
    /// Its mapping.
    pub target: Target,
}

/// The lines of a device from sector 0 to its end, without gaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Table {
    lines: Vec<Line>,
}

impl Table {
    /// Checks the lines and makes a table.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData), naming the violated invariant.
    pub fn new(lines: Vec<Line>) -> Result<Self> {
        if lines.is_empty() {
            return Err(Error::bad_data("a device-mapper table without lines"));
        }
        if lines.len() > LINES_MAX {
            return Err(Error::bad_data(format!(
                "a device-mapper table of {} lines (at most {LINES_MAX})",
                lines.len()
            )));
        }
        let mut at = Sectors::ZERO;
        for line in &lines {
            if line.start != at || line.length == Sectors::ZERO {
                return Err(Error::bad_data(format!(
                    "a device-mapper table with a gap, an overlap or an empty line at sector {}",
                    line.start.get()
                )));
            }
            let kind = line.target.kind();
            if kind.is_empty() || kind.len() > KIND_BYTES_MAX || kind.contains(char::is_whitespace) {
                return Err(Error::bad_data(format!("'{kind}' is not the name of a target")));
            }
            let params = line.target.params();
            if params.len() > PARAMS_BYTES_MAX || params.contains(['\0', '\n']) {
                return Err(Error::bad_data(format!(
                    "the parameters of a {kind} target cannot be passed to the kernel"
                )));
            }
            at =
                at.checked_add(line.length).filter(|end| end.checked_bytes().is_some()).ok_or_else(|| {
                    Error::bad_data("a device-mapper table longer than any device can be".to_owned())
                })?;
        }
        Ok(Self { lines })
    }

    /// A table of one line.
    ///
    /// # Errors
    /// As [`Table::new`].
    pub fn single(length: Sectors, target: Target) -> Result<Self> {
        Self::new(vec![Line { start: Sectors::ZERO, length, target }])
    }

    /// Targets one after the other.
    ///
    /// # Errors
    /// As [`Table::new`].
    pub fn concatenated(parts: impl IntoIterator<Item = (Sectors, Target)>) -> Result<Self> {
        let mut lines = Vec::new();
        let mut start = Sectors::ZERO;
        for (length, target) in parts {
            lines.push(Line { start, length, target });
            start = start
                .checked_add(length)
                .ok_or_else(|| Error::bad_data("a device-mapper table longer than any device can be"))?;
        }
        Self::new(lines)
    }

    /// From the kernel's reply: start, length, kind, parameters.
    ///
    /// # Errors
    /// As [`Table::new`].
    pub fn from_kernel(rows: &[(u64, u64, String, String)]) -> Result<Self> {
        Self::new(
            rows.iter()
                .map(|(start, length, kind, params)| Line {
                    start: Sectors(*start),
                    length: Sectors(*length),
                    target: Target::parse(kind, params),
                })
                .collect(),
        )
    }

    /// In the form that the kernel takes.
    #[must_use]
    pub fn to_kernel(&self) -> Vec<(u64, u64, String, String)> {
        self.lines
            .iter()
            .map(|line| {
                let kind = line.target.kind().to_owned();
                (line.start.get(), line.length.get(), kind, line.target.params())
            })
            .collect()
    }

    /// The lines.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Length of the device.
    #[must_use]
    pub fn length(&self) -> Sectors {
        self.lines.iter().map(|line| line.length).sum()
    }

    /// Every device that it maps to, once, in order of first use.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceNumber> {
        let mut seen = Vec::new();
        for device in self.lines.iter().flat_map(|line| line.target.devices()) {
            if !seen.contains(&device) {
                seen.push(device);
            }
        }
        seen
    }

    /// True if a line maps to `device`.
    #[must_use]
    pub fn maps_to(&self, device: DeviceNumber) -> bool {
        self.lines.iter().any(|line| line.target.devices().contains(&device))
    }
}

impl fmt::Display for Table {
    /// As printed by `dmsetup table`: one line each, no newline after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, line) in self.lines.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{} {} {}", line.start.get(), line.length.get(), line.target.kind())?;
            let params = line.target.params();
            if !params.is_empty() {
                write!(f, " {params}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Table {
    type Err = Error;
    /// Parses what [`fmt::Display`] prints.
    fn from_str(text: &str) -> Result<Self> {
        let mut lines = Vec::new();
        for row in text.split('\n') {
            if lines.len() >= LINES_MAX {
                return Err(Error::bad_data(format!("a device-mapper table of over {LINES_MAX} lines")));
            }
            let bad = || Error::bad_data(format!("'{row}' is not a line of a device-mapper table"));
            let mut words = row.splitn(4, ' ');
            let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).map(Sectors);
            let start = number().ok_or_else(bad)?;
            let length = number().ok_or_else(bad)?;
            let kind = words.next().ok_or_else(bad)?;
            let target = Target::parse(kind, words.next().unwrap_or(""));
            lines.push(Line { start, length, target });
        }
        Self::new(lines)
    }
}

impl TryFrom<String> for Table {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Table> for String {
    fn from(table: Table) -> Self {
        table.to_string()
    }
}

/// A table whose devices may not exist yet: its text, in which `{NAME}` is replaced by the number of the
/// device of that name when the table is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Template(String);

impl Template {
    /// From text with placeholders, otherwise like [`Table`]'s text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The table; `number_of` returns the number of a named device.
    ///
    /// # Errors
    /// Those of `number_of`, and [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a text that is
    /// no table.
    pub fn resolve(&self, number_of: &mut dyn FnMut(&str) -> Result<DeviceNumber>) -> Result<Table> {
        let mut text = String::with_capacity(self.0.len());
        let mut rest = self.0.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after
                .split_once('}')
                .ok_or_else(|| Error::bad_data(format!("'{}' has an unclosed brace", self.0)))?;
            text.push_str(before);
            text.push_str(&number_of(name)?.to_string());
            rest = after;
        }
        text.push_str(rest);
        text.parse()
    }
}

impl From<&Table> for Template {
    fn from(table: &Table) -> Self {
        Self(table.to_string())
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dm::target::Persistence;
    use proptest::prelude::*;

    fn device() -> impl Strategy<Value = DeviceNumber> {
        (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| DeviceNumber { major, minor })
    }

    fn target() -> impl Strategy<Value = Target> {
        let offset = || any::<u64>().prop_map(Sectors);
        prop_oneof![
            (device(), offset()).prop_map(|(device, offset)| Target::Linear { device, offset }),
            (offset(), prop::collection::vec((device(), offset()), 1..5))
                .prop_map(|(chunk, stripes)| Target::Striped { chunk, stripes }),
            (any::<u64>(), device(), any::<u64>()).prop_map(|(region, device, offset)| Target::Switch {
                region: Sectors(region),
                device,
                offset: Sectors(offset)
            }),
            device().prop_map(|device| Target::SnapshotOrigin { device }),
            (device(), device(), 0usize..3, offset()).prop_map(|(origin, cow, which, chunk)| {
                let persistence =
                    [Persistence::Persistent, Persistence::PersistentOverflow, Persistence::Transient][which];
                Target::Snapshot { origin, cow, persistence, chunk }
            }),
            Just(Target::Zero),
            Just(Target::Error),
            ("[a-z]{3,8}x", "[!-~]{1,8}( [!-~]{1,8}){0,3}")
                .prop_map(|(kind, params)| Target::Other { kind, params }),
        ]
    }

    proptest! {
        #[test]
        fn text_and_kernel_forms_round_trip(
            parts in prop::collection::vec((1u64..1 << 40, target()), 1..20),
        ) {
            let table = Table::concatenated(parts.iter().map(|(n, t)| (Sectors(*n), t.clone()))).unwrap();
            prop_assert_eq!(table.to_string().parse::<Table>().unwrap(), table.clone());
            prop_assert_eq!(Table::from_kernel(&table.to_kernel()).unwrap(), table.clone());
            let json = serde_json::to_string(&table).unwrap();
            prop_assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table.clone());
            prop_assert_eq!(table.length(), Sectors(parts.iter().map(|(n, _)| n).sum()));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "[ -~\n]{0,200}") {
            if let Ok(table) = text.parse::<Table>() {
                // No text is lost: an accepted text prints as it was read.
                prop_assert_eq!(table.to_string().parse::<Table>().unwrap(), table);
            }
        }

        #[test]
        fn any_params_survive(kind in "linear|striped|switch|snapshot|snapshot-origin|zero|error|x", params in "[0-9:A-Z ]{0,40}") {
            let target = Target::parse(&kind, &params);
            prop_assert_eq!(target.kind(), kind.as_str());
            prop_assert_eq!(target.params(), params);
        }
    }

    #[test]
    fn broken_tables_are_refused() {
        for text in [
            "",
            "1 8 zero",
            "0 0 zero",
            "0 8 zero\n9 8 zero",
            "0 8 zero\n7 8 zero",
            "0 8",
            "0 18446744073709551615 zero",
            "0 9223372036854775807 zero\n9223372036854775807 9223372036854775807 zero",
        ] {
            assert!(text.parse::<Table>().is_err(), "{text}");
        }
    }

    #[test]
    fn templates_name_devices() {
        let template = Template::new("0 8 snapshot {data#real} {c} PO 8");
        let table = template
            .resolve(&mut |name| Ok(DeviceNumber { major: 253, minor: if name == "c" { 2 } else { 1 } }))
            .unwrap();
        assert_eq!(table.to_string(), "0 8 snapshot 253:1 253:2 PO 8");
        assert!(Template::new("0 8 linear {x 0").resolve(&mut |_| unreachable!()).is_err());
        assert!(Template::new("0 8 linear {x} 0").resolve(&mut |_| Err(Error::usage("none"))).is_err());
    }

    #[test]
    fn an_lvm_table_reads_as_linear() {
        let table: Table = "0 8192 linear 8:16 2048\n8192 8192 linear 8:32 2048".parse().unwrap();
        assert_eq!(table.length(), Sectors(16384));
        assert!(table.maps_to(DeviceNumber { major: 8, minor: 32 }));
        assert!(matches!(table.lines()[1].target, Target::Linear { offset: Sectors(2048), .. }));
    }
}
