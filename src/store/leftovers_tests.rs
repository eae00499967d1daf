//! A crash after each step, and records that are in use.

use super::*;
use crate::base::ErrorKind;
use crate::store::record::Record;
use crate::store::record::tests::{count, create, leave};

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

fn release_all(dir: &Path, disks: &mut Fake) -> Result<Vec<String>> {
    release_leftovers_in(dir, &|_| Ok(false), disks)
}

#[test]
fn a_crash_after_each_step_leaves_nothing() {
    let before = vec![0, 3];
    let all = [
        HeadRecord::ZramIntended { before: before.clone() },
        HeadRecord::Zram { index: 1 },
        HeadRecord::Nothing,
        HeadRecord::Brd,
    ];
    for steps in 0..=all.len() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path(), "a", all[..steps].to_vec());
        let mut disks = Fake { present: vec![0, 1, 3], used: vec![0, 3], ..Fake::default() };
        release_all(dir.path(), &mut disks).unwrap();
        let expected: &[u32] = if steps == 1 || steps == 2 { &[1] } else { &[] };
        assert_eq!(disks.released, expected, "after {steps} steps");
        assert_eq!(disks.brd_released, steps == 4);
        assert_eq!(count(dir.path()), 0);
    }
}

#[test]
fn what_is_locked_or_in_use_or_not_ours_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks = Fake { present: vec![1, 2], used: vec![2], ..Fake::default() };
    let mut live = create(dir.path(), "live");
    live.note(HeadRecord::Zram { index: 1 }).unwrap();
    leave(dir.path(), "mapped", vec![HeadRecord::Zram { index: 2 }]);
    // Two new devices, or one that has a size: ownership is unknown.
    leave(dir.path(), "unsure", vec![HeadRecord::ZramIntended { before: vec![] }]);
    leave(dir.path(), "other", vec![HeadRecord::ZramIntended { before: vec![1] }]);
    release_leftovers_in(dir.path(), &|uuid| Ok(uuid == "TIDEMARK-mapped"), &mut disks).unwrap();
    assert!(disks.released.is_empty(), "{:?}", disks.released);
    assert!(dir.path().join("live.json").exists() && dir.path().join("mapped.json").exists());
    live.close().unwrap();
    assert!(!dir.path().join("live.json").exists());
}

/// Regression: no record named the file that a killed `--keep-store` copy left.
#[test]
fn a_crash_at_each_step_of_a_file_to_be_kept_leaves_none() {
    for step in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let records = dir.path().join("records");
        let path = dir.path().join("kept");
        let mut record = create(&records, "a");
        if step > 0 {
            record.note_file(Some(NamedFile { path: path.clone(), inode: None })).unwrap();
        }
        if step > 1 {
            fs::write(&path, "").unwrap();
        }
        if step > 2 {
            let inode = Some(Inode::of(&fs::metadata(&path).unwrap()));
            record.note_file(Some(NamedFile { path: path.clone(), inode })).unwrap();
            fs::write(&path, "originals").unwrap();
        }
        if step > 3 {
            // The store is kept: from here on the file belongs to the user.
            record.note_file(None).unwrap();
        }
        drop(record);
        let released = release_all(&records, &mut Fake::default()).unwrap();
        assert_eq!(released.len(), usize::from(step == 2 || step == 3), "step {step}: {released:?}");
        assert_eq!(path.exists(), step > 3, "step {step}");
        assert_eq!(count(&records), 0);
    }
}

#[test]
fn a_foreign_file_at_the_same_path_stays() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    let (path, other) = (dir.path().join("kept"), dir.path().join("other"));
    fs::write(&other, "").unwrap();
    for inode in [None, Some(Inode::of(&fs::metadata(&other).unwrap()))] {
        create(&records, "a").note_file(Some(NamedFile { path: path.clone(), inode })).unwrap();
        fs::write(&path, "theirs").unwrap();
        assert_eq!(release_all(&records, &mut Fake::default()).unwrap(), [""; 0]);
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        assert_eq!(count(&records), 0);
    }
}

#[test]
fn a_record_cut_off_during_creation_is_removed() {
    for left in [&["lock-new"][..], &["lock"], &["lock", "new"]] {
        let dir = tempfile::tempdir().unwrap();
        left.iter().for_each(|suffix| fs::write(dir.path().join(format!("a.{suffix}")), "torn").unwrap());
        assert_eq!(release_all(dir.path(), &mut Fake::default()).unwrap(), [""; 0]);
        assert_eq!(count(dir.path()), 0, "{left:?}");
    }
}

/// Such a record may name a RAM disk that would otherwise keep its memory for ever.
#[test]
fn a_record_of_another_version_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.json"), "{\"version\":1,\"uuid\":\"u\",\"made\":\"zram\",\"index\":7}\n")
        .unwrap();
    assert_eq!(release_all(dir.path(), &mut Fake::default()).unwrap_err().kind(), ErrorKind::BadData);
    assert!(dir.path().join("a.json").exists());
    assert_eq!(Record::take_over(dir.path(), "a").unwrap_err().kind(), ErrorKind::BadData);
}

#[test]
fn a_record_that_was_taken_over_is_no_leftover() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "a", vec![HeadRecord::Zram { index: 4 }]);
    let second = Record::take_over(dir.path(), "a").unwrap();
    let mut disks = Fake { present: vec![4], used: vec![4], ..Fake::default() };
    release_all(dir.path(), &mut disks).unwrap();
    assert!(disks.released.is_empty());
    drop(second);
    release_all(dir.path(), &mut disks).unwrap();
    assert_eq!(disks.released, [4]);
}
