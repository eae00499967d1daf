//! Records that are in use, taken over, or torn.

use super::*;
use crate::base::ChunkSize;
use crate::base::ErrorKind;
use crate::store::place::TailPlace;

pub fn about(id: &str) -> About {
    About {
        uuid: format!("TIDEMARK-{id}"),
        device: format!("{id}-cow"),
        origin_bytes: Bytes::gib(1),
        plan: StorePlan {
            place: TailPlace::Directory("/var/lib/tidemark".into()),
            head_bytes: Bytes::mib(16),
            tail_bytes: Bytes::mib(64),
            total_bytes_max: Bytes::gib(1),
            chunk: ChunkSize::default(),
            keep: false,
        },
    }
}

/// The facts of a store without a head.
pub fn facts(id: &str) -> Facts {
    Facts { about: about(id), head: HeadRecord::Nothing, file: None, filesystem: None }
}

pub fn create(dir: &Path, id: &str) -> Record {
    Record::create(dir, id, about(id)).unwrap()
}

pub fn leave(dir: &Path, id: &str, steps: Vec<HeadRecord>) {
    let mut record = create(dir, id);
    for made in steps {
        record.note(made).unwrap();
    }
}

pub fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn the_record_of_a_dead_process_is_taken_over_once() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |result: Result<Record>| result.unwrap_err().kind() == ErrorKind::Refused;
    assert!(refused(Record::take_over(dir.path(), "a")), "no such record");
    let mut first = create(dir.path(), "a");
    first.note(HeadRecord::Zram { index: 4 }).unwrap();
    first.note_filesystem(DeviceNumber { major: 8, minor: 1 }).unwrap();
    let facts = first.facts().clone();
    assert!(refused(Record::take_over(dir.path(), "a")), "its owner lives");
    drop(first);
    let mut second = Record::take_over(dir.path(), "a").unwrap();
    assert_eq!(*second.facts(), facts);
    assert!(refused(Record::take_over(dir.path(), "a")), "its new owner lives");
    second.note(HeadRecord::Nothing).unwrap();
    drop(second);
    let third = Record::take_over(dir.path(), "a").unwrap();
    assert_eq!(*third.facts(), Facts { head: HeadRecord::Nothing, ..facts });
    third.close().unwrap();
    assert_eq!(count(dir.path()), 0);
}

#[test]
fn the_record_of_a_newer_program_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "a", vec![HeadRecord::Zram { index: 4 }]);
    drop(Record::take_over(dir.path(), "a").unwrap());
    let path = record::path_of(dir.path(), "a");
    let text = std::fs::read_to_string(&path).unwrap();
    let (body, _) = text.split_once("crc32c ").unwrap();
    let body = body.replacen('{', "{\"added\":[1],", 1);
    let sum = crate::base::checksum::crc32c_salted(b"store", body.as_bytes());
    std::fs::write(&path, format!("{body}crc32c {sum:08x}\n")).unwrap();
    assert_eq!(Record::take_over(dir.path(), "a").unwrap_err().kind(), ErrorKind::BadData);
}

#[test]
fn the_golden_file_of_version_1_is_read_and_written_the_same() {
    let golden: &[u8] = include_bytes!("../format/state/golden/store-v1.json");
    let file = NamedFile {
        path: "/srv/store".into(),
        inode: Some(Inode { filesystem: DeviceNumber { major: 8, minor: 1 }, number: 12 }),
    };
    let facts = Facts {
        head: HeadRecord::ZramIntended { before: vec![0, 3] },
        file: Some(file),
        filesystem: Some(DeviceNumber { major: 8, minor: 1 }),
        ..facts("a")
    };
    assert_eq!(state::encode(&facts).unwrap(), golden);
    assert_eq!(state::decode::<Facts>(golden).unwrap(), facts);
}
