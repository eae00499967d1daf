//! Runs cases in guests: what a case is ([`case`]), which kernels there are ([`kernel`]), how a guest is started
//! ([`user_mode`], [`qemu`], [`accel`]) and watched ([`guest`]), what counts as a kernel complaint ([`kernel_log`]),
//! how a case is judged ([`play`]), what need not run again ([`stamp`]), how several run at once ([`pool`]), and which
//! do ([`options`], [`runner`]).
//!
//! It must not know anything of Tidemark but where the binary is.

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
