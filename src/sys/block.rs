//! Block-device facts and commands: size, logical block, exclusive open, zero-out, discard.
