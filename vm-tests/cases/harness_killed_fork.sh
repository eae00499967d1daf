# The guest survives a process that is killed while it forks: scripts/um-kernel mends that in the user-mode kernel.
timeout 60 python3 - <<'PYTHON'
import mmap, os, random, signal, time

# Many mappings that cannot be merged, each with a page: a fork copies them one by one.
maps = []
for number in range(3000):
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if number % 2 else 0)
    maps.append(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=prot))
    if number % 2:
        maps[-1][0] = 1

def fork_until_killed():
    while True:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

for _ in range(300):
    victim = os.fork()
    if victim == 0:
        fork_until_killed()
    time.sleep(random.uniform(0, 0.03))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
PYTHON
