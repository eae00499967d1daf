//! Runs cases in guests: what a case is ([`case`]), the kernels ([`kernel`]), how a guest is started ([`user_mode`],
//! [`qemu`], [`accel`]) and watched ([`guest`]), what counts as a kernel complaint ([`kernel_log`]), how a case is
//! judged ([`play`]), which cases need not run again ([`stamp`]), how several run in parallel ([`pool`]), and which are
//! selected ([`options`], [`runner`]).
//!
//! The harness knows nothing of Tidemark but the location of the binary.

pub mod accel;
pub mod case;
pub mod guest;
pub mod kernel;
pub mod kernel_log;
pub mod options;
pub mod play;
pub mod pool;
pub mod qemu;
pub mod runner;
pub mod stamp;
pub mod user_mode;

pub use case::Case;
pub use options::Options;
pub use runner::run;
