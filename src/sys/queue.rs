//! Finds the queue settings that an administrator has made for a block device, and restores them.
//!
//! A change of a device-mapper table recomputes the limits of the queue from the devices below
//! (`dm_table_set_restrictions` in Linux `drivers/md/dm-table.c`), and with that drops what an administrator
//! has set. The read-ahead (also lvm2's `--readahead`) and the largest request are restored after every
//! change. Others that are dropped (seen on 6.12: `discard_max_bytes`, `write_cache`; also `rotational`)
//! depend on what the table can do: with another table the old value may be wrong. So these are restored only
//! with the table for which they were made.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use crate::base::DeviceNumber;

/// The files, below the directory of the queue.
const FILES: [&str; 5] =
    ["read_ahead_kb", "max_sectors_kb", "discard_max_bytes", "write_cache", "rotational"];

/// How many of them, from the first on, are valid with any table.
const TABLE_INDEPENDENT_COUNT: usize = 2;

/// The settings at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    directory: PathBuf,
    /// In the order of [`FILES`]; None if it cannot be read.
    values: [Option<String>; FILES.len()],
}

impl QueueSettings {
    /// The settings of the device with this number.
    #[must_use]
    pub fn read(number: DeviceNumber) -> Self {
        Self::read_in(directory_of(number))
    }

    fn read_in(directory: PathBuf) -> Self {
        let values =
            FILES.map(|file| Some(fs::read_to_string(directory.join(file)).ok()?.trim_end().to_owned()));
        Self { directory, values }
    }

    /// The settings as in a job's record: values by the names of their files.
    #[must_use]
    pub fn to_record(&self) -> BTreeMap<String, String> {
        let read = FILES.iter().zip(&self.values);
        read.filter_map(|(file, value)| Some(((*file).to_owned(), value.clone()?))).collect()
    }

    /// The settings of the device with this number, from a job's record. Unknown files are ignored.
    #[must_use]
    pub fn from_record(number: DeviceNumber, record: &BTreeMap<String, String>) -> Self {
        Self { directory: directory_of(number), values: FILES.map(|file| record.get(file).cloned()) }
    }

    /// Restores the settings that are valid with any table, if they have changed. The kernel may wait for the
    /// device's I/O in flight: not to be called while the device is suspended. Returns the files that could
    /// not be written, whose settings are lost.
    #[must_use]
    pub fn restore_any_table(&self) -> Vec<PathBuf> {
        self.write(0..TABLE_INDEPENDENT_COUNT)
    }

    /// As [`QueueSettings::restore_any_table`], for the other settings: the active table must be the one with
    /// which they were read.
    #[must_use]
    pub fn restore_same_table(&self) -> Vec<PathBuf> {
        self.write(TABLE_INDEPENDENT_COUNT..FILES.len())
    }

    fn write(&self, which: Range<usize>) -> Vec<PathBuf> {
        let now = Self::read_in(self.directory.clone());
        let mut lost = Vec::new();
        let both = FILES.iter().zip(self.values.iter().zip(&now.values));
        for (file, (before, now)) in both.take(which.end).skip(which.start) {
            let path = self.directory.join(file);
            if let Some(value) = before
                && before != now
                && fs::write(&path, value).is_err()
            {
                lost.push(path);
            }
        }
        lost
    }
}

fn directory_of(number: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{number}/queue"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_settings_are_restored() {
        let dir = tempfile::tempdir().unwrap();
        let path = |file: &str| dir.path().join(file);
        fs::write(path(FILES[0]), "4096\n").unwrap();
        fs::write(path(FILES[1]), "64\n").unwrap();
        fs::write(path(FILES[3]), "write through\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        fs::write(path(FILES[0]), "128\n").unwrap();
        fs::write(path(FILES[3]), "write back\n").unwrap();
        assert!(settings.restore_any_table().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[0])).unwrap(), "4096");
        // A setting that depends on the table is not restored yet.
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write back\n");
        // A setting that was restored once, and changed since, stays.
        fs::write(path(FILES[0]), "2048\n").unwrap();
        assert!(settings.restore_same_table().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[0])).unwrap(), "2048\n");
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write through");
        // A missing file is not created.
        fs::remove_file(path(FILES[1])).unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        assert!(settings.restore_any_table().is_empty());
        assert!(!path(FILES[1]).exists());
    }

    #[test]
    fn a_record_round_trips_and_unknown_files_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("read_ahead_kb"), "4096\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        let mut record = settings.to_record();
        assert_eq!(record, BTreeMap::from([("read_ahead_kb".to_owned(), "4096".to_owned())]));
        // A name in a record never leads out of the queue's directory.
        record.insert("../uevent".to_owned(), "add".to_owned());
        let number = DeviceNumber { major: 253, minor: 3 };
        let taken = QueueSettings::from_record(number, &record);
        assert_eq!((&taken.values, taken.directory), (&settings.values, directory_of(number)));
    }

    #[test]
    fn settings_that_cannot_be_restored_are_returned() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILES[0]), "4096\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        drop(dir);
        assert_eq!(settings.restore_any_table(), [settings.directory.join(FILES[0])]);
    }
}
