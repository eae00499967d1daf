//! A golden archive with some bytes changed, through the reader that restore and verify use: a changed archive is
//! refused; never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::format::archive::{BLOCK_BYTES, Superblock};
use tidemark::FrameChecker;

static GOLDEN: [&[u8]; 4] = [
    include_bytes!("../../golden/archive/v1.tdm"),
    include_bytes!("../../golden/archive/v2.tdm"),
    include_bytes!("../../golden/archive/v3.tdm"),
    include_bytes!("../../golden/archive/v3-increment.tdm"),
];

fn is_whole(bytes: &[u8]) -> bool {
    let Ok(head) = Superblock::decode_head(bytes) else { return false };
    let mut checker = FrameChecker::new(head, "fuzz");
    let mut rest = &bytes[BLOCK_BYTES..];
    while rest.len() > BLOCK_BYTES {
        let Ok(length) = checker.next_length(rest) else { return false };
        if checker.accept(rest, &mut |_| {}).is_err() {
            return false;
        }
        let Some(after) = rest.get(length.as_len()..) else { return false };
        rest = after;
    }
    checker.finish(rest).is_ok()
}

fuzz_target!(|input: (u8, Vec<(u32, u8)>)| {
    let (which, edits) = input;
    let golden = GOLDEN[usize::from(which) % GOLDEN.len()];
    let mut bytes = golden.to_vec();
    for (at, value) in edits {
        let at = usize::try_from(at).expect("32 bits fit") % bytes.len();
        bytes[at] = value;
    }
    assert_eq!(is_whole(&bytes), bytes == golden);
});
