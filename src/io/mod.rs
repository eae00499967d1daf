//! Reading and writing blocks: small traits for metadata ([`block`]), and engines that keep many
//! large transfers in flight ([`engine`]).
//!
//! Nothing here knows what the bytes mean. Every engine passes one shared suite.

pub mod block;
pub mod engine;

pub use block::{BlockRead, BlockWrite, Durable};
pub use engine::{Buffer, Completion, Engine, FileIx, Piece, Place, Request};
