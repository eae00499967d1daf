//! Runs cases in guests: what a case is ([`case`]), how QEMU is driven ([`guest`]), which accelerator works
//! ([`accel`]), what counts as a kernel complaint ([`kernel_log`]), what need not run again ([`stamp`]), how
//! several run at once ([`pool`]), and the runner that ties them together ([`runner`]).
//!
//! It must not know anything of Tidemark but where the binary is.

pub mod accel;
pub mod case;
pub mod guest;
pub mod kernel_log;
pub mod pool;
pub mod runner;
pub mod stamp;

pub use case::Case;
pub use runner::{Options, run};
