//! Records that are in use, taken over, or torn.

use super::*;
use crate::base::ChunkSize;
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
    Facts { version: VERSION, about: about(id), head: HeadRecord::Nothing, file: None, filesystem: None }
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
    fs::read_dir(dir).unwrap().count()
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
    // The last line is cut short: what the new owner records must not become part of it.
    let mut file = OpenOptions::new().append(true).open(dir.path().join("a.json")).unwrap();
    file.write_all(b"{\"version\":2,\"ab").unwrap();
    let mut second = Record::take_over(dir.path(), "a").unwrap();
    assert_eq!(*second.facts(), facts);
    assert!(refused(Record::take_over(dir.path(), "a")), "its new owner lives");
    second.note(HeadRecord::Nothing).unwrap();
    drop(second);
    let third = Record::take_over(dir.path(), "a").unwrap();
    assert_eq!(*third.facts(), Facts { head: HeadRecord::Nothing, ..facts });
    // Removed between open and lock: another store may have the number of its RAM disk by now.
    let path = dir.path().join("a.json");
    let file = File::open(&path).unwrap();
    third.close().unwrap();
    let file = lock(file, &path).unwrap().unwrap();
    assert_eq!(read_locked(&file, &path).unwrap(), None);
    fs::write(&path, "another's").unwrap();
    assert_eq!(read_locked(&file, &path).unwrap(), None);
}

fn line(facts: &Facts) -> String {
    serde_json::to_string(facts).unwrap()
}

#[test]
fn a_torn_line_does_not_count() {
    let nothing = facts("a");
    let zram = Facts { head: HeadRecord::Zram { index: 7 }, ..nothing.clone() };
    let whole = line(&zram);
    for end in 0..whole.len() {
        let text = format!("{}\n{}", line(&nothing), &whole[..end]);
        assert_eq!(last_whole_line(&text).unwrap().unwrap(), nothing);
        // The same after the next owner has appended to it.
        let text = format!("{text}\n{}\n", &whole[..end / 2]);
        assert_eq!(last_whole_line(&text).unwrap().unwrap(), nothing);
    }
    assert_eq!(last_whole_line(&format!("{whole}\n")).unwrap().unwrap(), zram);
    assert!(last_whole_line("garbage\n").unwrap().is_none());
    assert!(last_whole_line("").unwrap().is_none());
}

#[test]
fn a_record_does_not_grow_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut record = create(dir.path(), "a");
    fs::write(dir.path().join("a.json"), vec![b'x'; 1 << 20]).unwrap();
    assert_eq!(record.note(HeadRecord::Brd).unwrap_err().kind(), ErrorKind::NoSpace);
}
