//! Chooses the engine: io_uring if the kernel permits it, plain system calls otherwise; the log gives the
//! reason.

use super::engine::{Engine, EngineConfig};
use super::sync_engine::SyncEngine;
use super::uring::UringEngine;
use crate::base::{ErrorKind, Result};

/// What the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EnginePreference {
    /// io_uring, or plain calls if the kernel refuses it.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Plain calls.
    Sync,
}

/// Opens an engine, which belongs to the thread that opened it.
///
/// # Errors
/// [`ErrorKind::Usage`] for an invalid pool configuration; with [`EnginePreference::Uring`] also the kernel's
/// refusal, errno included.
pub fn open_engine(config: EngineConfig, preference: EnginePreference) -> Result<Box<dyn Engine>> {
    if preference == EnginePreference::Sync {
        tracing::info!("engine: plain reads and writes, as requested");
        return Ok(Box::new(SyncEngine::new(config)?));
    }
    let opened = UringEngine::new(config).map(|engine| {
        tracing::info!(ring = %engine.features(), "engine: io_uring");
        let engine: Box<dyn Engine> = Box::new(engine);
        engine
    });
    or_plain(opened, config, preference)
}

/// Falls back to plain calls after the kernel's refusal, unless io_uring was required.
fn or_plain(
    opened: Result<Box<dyn Engine>>,
    config: EngineConfig,
    preference: EnginePreference,
) -> Result<Box<dyn Engine>> {
    match opened {
        Err(error) if preference == EnginePreference::Auto && error.kind() == ErrorKind::Kernel => {
            tracing::warn!(
                %error,
                "engine: plain reads and writes (slower): the kernel refuses io_uring; see \
                 /proc/sys/kernel/io_uring_disabled and the container's seccomp filter"
            );
            Ok(Box::new(SyncEngine::new(config)?))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{Bytes, Error};

    const CONFIG: EngineConfig = EngineConfig { buffer_count: 1, buffer_bytes: Bytes::kib(4) };

    #[test]
    fn preferences_are_met() {
        assert_eq!(open_engine(CONFIG, EnginePreference::Sync).unwrap().name(), "sync");
        assert_eq!(open_engine(CONFIG, EnginePreference::Uring).unwrap().name(), "io_uring");
        assert_eq!(open_engine(CONFIG, EnginePreference::Auto).unwrap().name(), "io_uring");
    }

    #[test]
    fn a_refusing_kernel_means_plain_calls_unless_io_uring_was_asked_for() {
        for errno in [libc::EPERM, libc::ENOSYS, libc::ENOMEM, libc::EOPNOTSUPP] {
            let refused = || {
                let cause = std::io::Error::from_raw_os_error(errno);
                Err(Error::kernel("set-up of io_uring", cause))
            };
            let engine = or_plain(refused(), CONFIG, EnginePreference::Auto).unwrap();
            assert_eq!(engine.name(), "sync");
            let Err(error) = or_plain(refused(), CONFIG, EnginePreference::Uring) else { panic!() };
            assert_eq!(error.errno(), Some(errno));
        }
        let bad = EngineConfig { buffer_bytes: Bytes(1), ..CONFIG };
        assert!(open_engine(bad, EnginePreference::Auto).is_err());
    }
}
