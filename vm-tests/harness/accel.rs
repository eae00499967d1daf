//! Which accelerator works here? A nested `/dev/kvm` can exist, open, and still not run a guest: KVM is used
//! only where a guest has been seen to start with it. The answer is kept until the machine reboots.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::case::Clock;
use super::guest::{Boot, Machine};

/// How long a guest may take to show that it lives.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// `tcg` or `kvm`.
pub fn find(repo: &Path, series: &str) -> Result<String, String> {
    match std::env::var("TIDEMARK_VM_ACCEL") {
        Ok(accel) if accel == "tcg" || accel == "kvm" => return Ok(accel),
        Ok(other) => return Err(format!("TIDEMARK_VM_ACCEL is '{other}', not tcg or kvm")),
        Err(_) => {}
    }
    if !Path::new("/dev/kvm").exists() {
        return Ok("tcg".to_owned());
    }
    let vm = repo.join("target/vm");
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let cache = vm.join("accel");
    if let Ok(stored) = fs::read_to_string(&cache)
        && let Some((accel, id)) = stored.split_once(' ')
        && id == boot_id
    {
        return Ok(accel.to_owned());
    }
    let share = vm.join("probe");
    fs::create_dir_all(&share).map_err(|error| format!("cannot make {}: {error}", share.display()))?;
    let machine = Machine { repo: repo.to_owned(), accel: "kvm".to_owned() };
    let works = machine.probe(&Boot {
        series,
        clock: Clock::default(),
        memory_mib: 512,
        disks: Vec::new(),
        console: share.join("console.log"),
        messages: share.join("qemu.log"),
        share: share.clone(),
        limit: PROBE_LIMIT,
        phase: 0,
        cut: None,
    })?;
    let accel = if works { "kvm" } else { "tcg" };
    // An answer that cannot be kept is found again next time.
    let _ = fs::write(&cache, format!("{accel} {boot_id}"));
    Ok(accel.to_owned())
}
