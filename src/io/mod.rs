//! Reading and writing blocks: a small trait for metadata ([`block`]), and engines that keep many large
//! transfers in flight ([`engine`]).
//!
//! This module does not interpret the bytes. Every engine passes one shared suite.

pub mod block;
mod driver;
pub mod engine;
mod handle;
pub mod open;
mod pool;
#[cfg(test)]
mod suite;
pub mod sync_engine;
pub mod transfer;
pub mod uring;

pub use block::BlockRead;
pub use driver::{Driver, POLL_INTERVAL};
pub use engine::{Buffer, Completion, Engine, EngineConfig, FileIx, Piece, Place};
pub use open::{EnginePreference, open_engine};
