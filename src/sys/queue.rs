//! Which settings of a block device's queue did an administrator make, and are they still in force?
//!
//! A change of a device-mapper table computes the limits of the queue anew from what lies beneath
//! (`dm_table_set_restrictions` in Linux `drivers/md/dm-table.c`) and drops what an administrator has set with that. Put back
//! after every change are the read-ahead (also lvm2's `--readahead`) and the largest request. Others that are dropped (seen
//! on 6.12: `discard_max_bytes`, `write_cache`; so is `rotational`) tell what the table can do as well: with another table
//! the old value may be wrong, so they are put back with the table that they were made for.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use crate::base::DeviceNumber;

/// The files, below the directory of the queue.
const FILES: [&str; 5] =
    ["read_ahead_kb", "max_sectors_kb", "discard_max_bytes", "write_cache", "rotational"];

/// Of those, the first ones are right with any table.
const ANY_TABLE: usize = 2;

/// Settings as they were at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    directory: PathBuf,
    /// In the order of [`FILES`]; None for one that cannot be read.
    values: [Option<String>; FILES.len()],
}

impl QueueSettings {
    /// Of the device with this number.
    #[must_use]
    pub fn read(number: DeviceNumber) -> Self {
        Self::read_in(directory_of(number))
    }

    fn read_in(directory: PathBuf) -> Self {
        let values =
            FILES.map(|file| Some(fs::read_to_string(directory.join(file)).ok()?.trim_end().to_owned()));
        Self { directory, values }
    }

    /// As a job's record has them: values by the names of their files.
    #[must_use]
    pub fn to_record(&self) -> BTreeMap<String, String> {
        let read = FILES.iter().zip(&self.values);
        read.filter_map(|(file, value)| Some(((*file).to_owned(), value.clone()?))).collect()
    }

    /// Those of the device with this number that a job has recorded. Files that are not known here are passed over.
    #[must_use]
    pub fn from_record(number: DeviceNumber, record: &BTreeMap<String, String>) -> Self {
        Self { directory: directory_of(number), values: FILES.map(|file| record.get(file).cloned()) }
    }

    /// Writes what is no longer so of that which is right with any table. The kernel may wait for the device's I/O in
    /// flight: not while the device is suspended. Answers the files that could not be written: their settings are lost.
    #[must_use]
    pub fn put_back(&self) -> Vec<PathBuf> {
        self.write(0..ANY_TABLE)
    }

    /// As [`QueueSettings::put_back`], but the others: the table is the one that they were read with.
    #[must_use]
    pub fn put_back_of_table(&self) -> Vec<PathBuf> {
        self.write(ANY_TABLE..FILES.len())
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
    fn what_has_changed_is_put_back_and_nothing_else_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = |file: &str| dir.path().join(file);
        fs::write(path(FILES[0]), "4096\n").unwrap();
        fs::write(path(FILES[1]), "64\n").unwrap();
        fs::write(path(FILES[3]), "write through\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        fs::write(path(FILES[0]), "128\n").unwrap();
        fs::write(path(FILES[3]), "write back\n").unwrap();
        assert!(settings.put_back().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[0])).unwrap(), "4096");
        // What depends on the table waits for it.
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write back\n");
        // What was set since stays, where it has been put back once.
        fs::write(path(FILES[0]), "2048\n").unwrap();
        assert!(settings.put_back_of_table().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[0])).unwrap(), "2048\n");
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write through");
        // A file that is gone is not made.
        fs::remove_file(path(FILES[1])).unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        assert!(settings.put_back().is_empty());
        assert!(!path(FILES[1]).exists());
    }

    #[test]
    fn a_record_has_what_was_read_and_is_taken_as_far_as_it_is_known() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("read_ahead_kb"), "4096\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        let mut record = settings.to_record();
        assert_eq!(record, BTreeMap::from([("read_ahead_kb".to_owned(), "4096".to_owned())]));
        // What stands in a record never leads out of the queue's directory.
        record.insert("../uevent".to_owned(), "add".to_owned());
        let number = DeviceNumber { major: 253, minor: 3 };
        let taken = QueueSettings::from_record(number, &record);
        assert_eq!((&taken.values, taken.directory), (&settings.values, directory_of(number)));
    }

    #[test]
    fn what_cannot_be_put_back_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILES[0]), "4096\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        drop(dir);
        assert_eq!(settings.put_back(), [settings.directory.join(FILES[0])]);
    }
}
