# The fixed cost of a live copy: how long does it take beyond reading the origin? Copies a small volume repeatedly and
# measures the whole command, a cold copy of the same size (reading alone), and each phase by the copy's own events.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
dd if=/dev/urandom of=/mnt/origin/file bs=1M count=4 conv=fsync status=none
# Warm up: the first run of a program reads it from the host.
tidemark copy data /mnt/scratch/copy.raw --yes --store /mnt/scratch --json >/dev/null
python3 - "$ARTIFACTS/fixed.json" <<'PY'
import json, statistics, subprocess, sys, time

ROUNDS = 15

def run(origin):
    """Seconds of the whole command, and of each phase."""
    begin = time.monotonic()
    child = subprocess.Popen(
        ["tidemark", "copy", origin, "/mnt/scratch/copy.raw", "--yes", "--store", "/mnt/scratch", "--json"],
        stdout=subprocess.PIPE, text=True)
    marks = [("start", begin)]
    for line in child.stdout:
        event = json.loads(line)
        if event.get("event") in ("phase", "instant"):
            marks.append((event.get("phase", "thawed"), time.monotonic()))
        elif event["type"] == "result":
            marks.append(("result", time.monotonic()))
    if child.wait() != 0:
        sys.exit("a copy failed")
    marks.append(("end", time.monotonic()))
    phases = {name: after - at for (name, at), (_, after) in zip(marks, marks[1:])}
    return marks[-1][1] - begin, phases

with open("/mnt/scratch/cold", "wb") as file:
    file.write(open("/mnt/origin/file", "rb").read())

def show(what, runs):
    times = sorted(time * 1000 for time, _ in runs)
    print(f"{what}: {times[len(times) // 2]:.0f} ms ({times[0]:.0f} to {times[-1]:.0f})")
    for name in runs[0][1]:
        print(f"  {name:10} {statistics.median(phases.get(name, 0) for _, phases in runs) * 1000:6.1f} ms")

measured = {}
def measure(what, origin):
    measured[what] = [run(origin) for _ in range(ROUNDS)]
    show(what, measured[what])

measure("live, idle", "data")
load = subprocess.Popen(
    ["fio", "--name=load", "--filename=/mnt/origin/file", "--rw=randwrite", "--bs=4k", "--direct=1", "--sync=dsync",
     "--ioengine=psync", "--rate_iops=200", "--time_based", "--runtime=600"], stdout=subprocess.DEVNULL)
time.sleep(2)
measure("live, 200 synchronous writes a second", "data")
load.terminate()
load.wait()
measure("cold, the file alone", "/mnt/scratch/cold")
json.dump(measured, open(sys.argv[1], "w"))
PY
umount /mnt/origin
assert_no_tidemark_left data
