//! Extents, sets of them, and the block lists that a copy works through. Pure.
//!
//! An [`Extent`] is half-open and never empty. A set or list built here is sorted and coalesced unless its
//! type says otherwise.

mod block_list;
pub mod free;
pub mod originals;
mod set;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::base::Bytes;

pub use crate::base::extent::Extent;
pub use block_list::{BlockList, cut};
pub use set::ExtentSet;

/// An original as the COW store holds it: what `extent` of the origin held at the instant is at
/// `store_offset` of the store. Both are multiples of the chunk size, except the end of the origin's last
/// chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Original {
    /// Where on the origin.
    pub extent: Extent,
    /// Where in the store, in bytes.
    pub store_offset: Bytes,
}
