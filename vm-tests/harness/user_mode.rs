//! How is a user-mode kernel started?
//!
//! It is one process and, for each program in the guest, a process of the host that it traces. The host's root is
//! its root file system (hostfs), under an overlay that `vm-tests/guest/um-init` makes. Its files are named
//! relative to the run's folder: the kernel gives commas and colons in them a meaning of its own.

use std::env;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, Stdio};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::guest::{Boot, Host};

/// Where a guest's memory lies: a file there, unlinked at once, of which it maps what it uses.
const MEMORY: &str = "/dev/shm";

/// Where the kernel keeps its process id, in the run's folder.
const STATE: &str = "um";

/// The command that boots it.
pub fn command(host: &Host, boot: &Boot<'_>, image: &Path) -> Result<Command> {
    let state = boot.folder.join(STATE);
    fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
    // A killed runner takes the kernel with it. A process-id namespace ends with its first process, here a shell (the
    // kernel aborts in a panic, to which a first process is immune): whatever becomes of the kernel, no program of the
    // guest outlives it, untraced, on the host. (Without the right to make a namespace, the kernel's own
    // PR_SET_PDEATHSIG has to do.)
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if nix::unistd::geteuid().is_root() {
        command.args(["unshare", "--pid", "--fork", "--kill-child=KILL", "--"]);
        command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]);
    }
    // The kernel and the programs in its guest take turns: on one processor that is a switch, on two it is a wake-up of
    // the other one, twice for each system call (measured: cases take 1.5 to 2 times as long).
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
    // What is built in and would make devices at once.
    command.args(["null_blk.nr_devices=0", "brd.rd_nr=0", "loop.max_loop=0", "zram.num_devices=1"]);
    for (number, (_, path)) in boot.disks.iter().enumerate() {
        let letter = char::from(b'a' + u8::try_from(number).context("too many disks")?);
        command.arg(format!("ubd{letter}={}", path.display()));
    }
    // What the kernel does not know becomes the environment of the first process.
    command.arg(format!("TIDEMARK_HOST_CASE=\"{}\"", boot.share.display()));
    // A panic ends with a SIGTERM to the kernel's whole process group: it is not the runner's.
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

/// The processor for the `worker`th guest: one for each, as long as there are as many. None where the host does not say
/// which there are.
fn processor(worker: usize) -> Option<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let numbers: Vec<usize> =
        (0..CpuSet::count()).filter(|number| allowed.is_set(*number).is_ok_and(|is_set| is_set)).collect();
    // Runners side by side each begin with another one, as far as chance goes.
    let first = usize::try_from(process::id()).ok()?;
    numbers.get((first + worker) % numbers.len().max(1)).copied()
}
