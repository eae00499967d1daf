//! Loop devices: attach with direct I/O, grow, detach.
