//! Map entries from any bytes: no panic, and accepted entries cover a range without gaps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::Bytes;
use tidemark::format::archive::map::MapCursor;

fuzz_target!(|input: (u64, &[u8])| {
    let (size, data) = input;
    let mut cursor = MapCursor::new(Bytes(size), size % 2 == 1);
    let mut at = Bytes::ZERO;
    let read = cursor.read(Bytes::ZERO, data, |entry| {
        assert_eq!(entry.extent.start(), at);
        at = entry.extent.end();
    });
    assert!(at <= Bytes(size));
    if read.is_ok() {
        assert_eq!(cursor.finish().is_ok(), at == Bytes(size));
    }
});
