//! These cases prove that the golden files come from real kernels: each writes its file again and compares it, byte for
//! byte, with the committed one.

use crate::harness::Case;

/// The exception store as the kernel writes it: chunk size in sectors, exceptions.
const STORES: &[(&str, &str)] = &[("8", "0"), ("8", "256"), ("8", "600"), ("16", "540")];

/// One case per golden file.
pub fn cases() -> Vec<Case> {
    let stores = STORES.iter().map(|(chunk_sectors, exceptions)| {
        Case::new(format!("golden_exception_store_{chunk_sectors}x{exceptions}"), "golden_exception_store.sh")
            .modules(&["dm-snapshot"])
            .commands(&["dmsetup", "python3"])
            .disk_mib(8)
            .disk_mib(16)
            .variable("CHUNK_SECTORS", *chunk_sectors)
            .variable("EXCEPTIONS", *exceptions)
            .without_binary()
    });
    stores.collect()
}
