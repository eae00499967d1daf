//! Watches and stops a guest.
//!
//! There is one process per boot ([`qemu`] or [`user_mode`]). It powers itself off after the script, or it is killed,
//! by its own process id, at its time limit or at the moment of the power cut.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::case::{Clock, Cut, Disk};
use super::kernel::{Kernel, Machine};
use super::{qemu, user_mode};

/// Interval between checks of the guest's files.
const POLL: Duration = Duration::from_millis(5);

/// The host's side of a boot, the same for every guest.
pub struct Host {
    /// The project's folder; `/tidemark/repo` in the guest.
    pub repo: PathBuf,
    /// The folder of the binary under test; `/tidemark/bin` in the guest.
    pub binaries: PathBuf,
    /// Where `scripts/setup` puts kernels: `target/vm`.
    pub vm: PathBuf,
    /// What QEMU uses: `tcg` or `kvm`.
    pub accel: String,
}

/// What one boot needs.
pub struct Boot<'case> {
    /// The kernel.
    pub kernel: Kernel,
    /// Number of the guest among those running at the same time, from 0.
    pub worker: usize,
    /// The clock source of the guest's kernel; QEMU only.
    pub clock: Clock,
    /// The guest's memory.
    pub memory_mib: u32,
    /// The disks and their files, in order; relative to `folder`, or absolute.
    pub disks: Vec<(&'case Disk, PathBuf)>,
    /// The run's folder.
    pub folder: PathBuf,
    /// The folder shared with the guest.
    pub share: PathBuf,
    /// Where the console goes.
    pub console: PathBuf,
    /// Where the machine's own messages go.
    pub messages: PathBuf,
    /// When the guest is killed.
    pub limit: Duration,
    /// The boot's number, which names its result files.
    pub phase: usize,
    /// When the power fails, and how long after the marker.
    pub cut: Option<(&'case Cut, Duration)>,
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The script ended with this status and the guest powered off.
    Exited(i32),
    /// The power was cut where the case asked for it.
    Cut,
    /// Killed at the time limit.
    Hung,
    /// The machine ended before the script: a panic, or the machine could not start.
    Died,
}

/// Kills the machine if the runner returns early.
struct Guard(Child);

impl Guard {
    fn start(mut command: Command) -> Result<Guard> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("cannot start {program} (run scripts/setup)"))?;
        Ok(Guard(child))
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait().context("cannot wait for the machine")?.is_some())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // An error means that it is already gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Host {
    fn command(&self, boot: &Boot<'_>) -> Result<Command> {
        let kernel = boot.kernel;
        let image = kernel.image(&self.vm);
        let image = image.ok_or_else(|| anyhow!("no kernel {}: run scripts/setup", kernel.name()))?;
        match kernel.machine() {
            Machine::UserMode => user_mode::command(self, boot, &image),
            Machine::Qemu => qemu::command(self, boot, &image, false),
        }
    }

    /// Boots and waits for the end.
    pub fn boot(&self, boot: &Boot<'_>) -> Result<Ending> {
        let mut guard = Guard::start(self.command(boot)?)?;
        let start = Instant::now();
        let status = boot.share.join(format!("status.{}", boot.phase));
        let mut cut_at: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if let Some((cut, delay)) = boot.cut {
                if cut_at.is_none() && boot.share.join(format!("marker.{}", cut.marker)).exists() {
                    cut_at = Some(now + delay);
                }
                if cut_at.is_some_and(|at| now >= at) {
                    return Ok(Ending::Cut);
                }
            }
            if guard.has_ended()? {
                let code = fs::read_to_string(&status).ok().and_then(|text| text.trim().parse().ok());
                return Ok(code.map_or(Ending::Died, Ending::Exited));
            }
            if now.duration_since(start) > boot.limit {
                return Ok(Ending::Hung);
            }
            thread::sleep(POLL);
        }
    }

    /// Whether a guest starts at all under QEMU with this accelerator.
    pub fn probe(&self, boot: &Boot<'_>) -> Result<bool> {
        let Some(image) = boot.kernel.image(&self.vm) else { return Ok(false) };
        let Ok(mut guard) = qemu::command(self, boot, &image, true).and_then(Guard::start) else {
            return Ok(false);
        };
        let start = Instant::now();
        while !guard.has_ended()? && start.elapsed() <= boot.limit {
            thread::sleep(POLL);
        }
        let console = fs::read(&boot.console).unwrap_or_default();
        Ok(String::from_utf8_lossy(&console).contains("tidemark-guest: alive"))
    }
}
