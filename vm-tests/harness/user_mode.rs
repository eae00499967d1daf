//! The command line of the user-mode kernel.
//!
//! The kernel is one process, and traces one process of the host for each program in the guest. The host's root is its
//! root filesystem (hostfs), under an overlay that `vm-tests/guest/um-init` mounts. Its files are named relative to the
//! run's folder, because the kernel gives commas and colons in paths a special meaning.

use std::env;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, Stdio};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::guest::{Boot, Host};

/// Folder of a guest's memory: an unlinked file, of which the guest maps the part it uses.
const MEMORY: &str = "/dev/shm";

/// Folder of the kernel's process id, in the run's folder.
const STATE: &str = "um";

/// The command that boots it.
pub fn command(host: &Host, boot: &Boot<'_>, image: &Path) -> Result<Command> {
    let state = boot.folder.join(STATE);
    fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
    // A killed runner must take the kernel with it. A process-id namespace ends with its first process, here a shell:
    // the kernel itself cannot be the first process, because it aborts in a panic, to which a first process is immune.
    // So no program of the guest outlives the kernel untraced on the host. (Without the right to create a namespace,
    // only the kernel's own PR_SET_PDEATHSIG remains.)
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if nix::unistd::geteuid().is_root() {
        command.args(["unshare", "--pid", "--fork", "--kill-child=KILL", "--"]);
        command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]);
    }
    // The kernel and the programs in its guest run in turns. On one processor each turn is a switch; on two it is a
    // wake-up of the other processor, twice per system call (measured: cases take 1.5 to 2 times as long).
    if let Some(processor) = processor(boot.worker) {
        command.args(["taskset", "--cpu-list", &processor.to_string()]);
    }
    command.arg(image);
    command.current_dir(&boot.folder);
    command.arg(format!("mem={}M", boot.memory_mib));
    command.args(["rootfstype=hostfs", "rootflags=/", "rw"]);
    command.arg(format!("init=\"{}\"", host.repo.join("vm-tests/guest/um-init").display()));
    command.arg(format!("uml_dir={STATE}/"));
    command.args(["con=null", "con0=null,fd:1", "loglevel=5"]);
    // Built-in drivers that would create devices at boot.
    command.args(["null_blk.nr_devices=0", "brd.rd_nr=0", "loop.max_loop=0", "zram.num_devices=1"]);
    for (number, (_, path)) in boot.disks.iter().enumerate() {
        let letter = char::from(b'a' + u8::try_from(number).context("too many disks")?);
        command.arg(format!("ubd{letter}={}", path.display()));
    }
    // Parameters unknown to the kernel become environment variables of the first process.
    command.arg(format!("TIDEMARK_HOST_CASE=\"{}\"", boot.share.display()));
    // In a panic the kernel sends SIGTERM to its whole process group, which must not be the runner's.
    command.process_group(0);
    let console = File::create(&boot.console).context("cannot make the console's log")?;
    let messages = File::create(&boot.messages).context("cannot make the kernel's own log")?;
    command.stdin(Stdio::null()).stdout(console).stderr(messages);
    command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default());
    if Path::new(MEMORY).is_dir() {
        command.env("TMPDIR", MEMORY);
    }
    Ok(command)
}

/// The processor for the `worker`th guest: a different one for each, as long as there are enough. None if the host does
/// not report its processors.
fn processor(worker: usize) -> Option<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let numbers: Vec<usize> =
        (0..CpuSet::count()).filter(|number| allowed.is_set(*number).is_ok_and(|is_set| is_set)).collect();
    // Parallel runners begin with different processors, by their process ids.
    let first = usize::try_from(process::id()).ok()?;
    numbers.get((first + worker) % numbers.len().max(1)).copied()
}
