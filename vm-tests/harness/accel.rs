//! Finds the accelerator that works. A nested `/dev/kvm` can exist and open, and still not run a guest: KVM is used
//! only after a guest has started with it. The answer is cached until the machine reboots.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::case::Clock;
use super::guest::{Boot, Host};
use super::kernel::Kernel;

/// Time limit for the guest to report that it runs.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// Sets `host.accel` to `tcg` or `kvm`.
pub fn find(host: &mut Host) -> Result<()> {
    match std::env::var("TIDEMARK_VM_ACCEL") {
        Ok(accel) if accel == "tcg" || accel == "kvm" => host.accel = accel,
        Ok(other) => bail!("TIDEMARK_VM_ACCEL is '{other}', not tcg or kvm"),
        Err(_) if !Path::new("/dev/kvm").exists() => host.accel = "tcg".to_owned(),
        Err(_) => host.accel = remembered(host)?,
    }
    Ok(())
}

/// The answer cached since the machine booted, or a new one.
fn remembered(host: &mut Host) -> Result<String> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let cache = host.vm.join("accel");
    if let Ok(stored) = fs::read_to_string(&cache)
        && let Some((accel, id)) = stored.split_once(' ')
        && id == boot_id
    {
        return Ok(accel.to_owned());
    }
    let folder = host.vm.join("probe");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    host.accel = "kvm".to_owned();
    let works = host.probe(&Boot {
        worker: 0,
        kernel: Kernel::Main,
        clock: Clock::default(),
        memory_mib: 512,
        disks: Vec::new(),
        console: folder.join("console.log"),
        messages: folder.join("machine.log"),
        share: folder.clone(),
        folder,
        limit: PROBE_LIMIT,
        phase: 0,
        cut: None,
    })?;
    let accel = if works { "kvm" } else { "tcg" };
    // If the answer cannot be cached, the next run probes again.
    let _ = fs::write(&cache, format!("{accel} {boot_id}"));
    Ok(accel.to_owned())
}
