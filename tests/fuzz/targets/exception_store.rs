//! The COW store's header and metadata areas from any bytes: no panic, and every accepted entry is within the origin
//! and the store.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::{Bytes, ChunkSize};
use tidemark::format::exception_store::{Bounds, Header, decode_area, is_data_chunk};

fuzz_target!(|input: (u8, u64, u64, u16, &[u8])| {
    let (shift, origin_size, store_size, skip, data) = input;
    if let Ok(header) = Header::decode(data) {
        let mut again = vec![0; data.len()];
        header.encode(&mut again).expect("there was room for a header");
        assert_eq!(again[..16], data[..16]);
    }
    let chunk = ChunkSize::new(Bytes(4096 << (shift % 9))).expect("4 KiB to 1 MiB");
    let bounds = Bounds { chunk, origin_size: Bytes(origin_size), store_size: Bytes(store_size) };
    let mut block = data.to_vec();
    block.resize(chunk.bytes().as_len(), 0);
    if let Ok(area) = decode_area(&block, usize::from(skip), &bounds) {
        for entry in area.entries {
            let (extent, store_offset) = entry.place(&bounds).expect("accepted entries have a place");
            assert!(extent.end() <= bounds.origin_size && store_offset < bounds.store_size);
            assert!(is_data_chunk(entry.new, chunk));
        }
    }
});
