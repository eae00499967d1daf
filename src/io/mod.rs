//! Reading and writing blocks: small traits for metadata ([`block`]), and engines that keep many
//! large transfers in flight ([`engine`]).
//!
//! Nothing here knows what the bytes mean. Every engine passes one shared suite.

pub mod block;
pub mod engine;
pub mod faulty;
pub mod file;
mod handle;
pub mod memory;
pub mod open;
mod pool;
#[cfg(test)]
mod suite;
pub mod sync_engine;
pub mod transfer;
pub mod uring;

pub use block::{BlockRead, BlockWrite, Durable};
pub use engine::{Buffer, Completion, Engine, EngineConfig, FileIx, Piece, Place, Request};
pub use faulty::{Fault, FaultKind, FaultPlan, FaultTrigger, FaultyBlock, FaultyEngine};
pub use file::DirectFile;
pub use memory::{MemoryEngine, MemoryFile};
pub use open::{EnginePreference, open_engine};
pub use sync_engine::SyncEngine;
pub use transfer::is_end_of_file;
pub use uring::UringEngine;
