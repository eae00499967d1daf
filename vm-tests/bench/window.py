"""What did the applications feel between two moments? Pure: no clock, no files.

An operation is a pair (begin, end) of seconds since the epoch. Operations are counted where they end. The slowest
one is looked for among all that overlap the window: one that a copy held up counts although it ended after it.
"""

from math import ceil

# Operations are counted for every such step too: they tell what each phase of a copy costs.
STEP_SECONDS = 0.25


def fio_log(text):
    """Operations of a fio latency log: `end in ms, latency in ns, ...` with log_unix_epoch."""
    operations = []
    for line in text.splitlines():
        fields = line.split(",")
        end = int(fields[0]) / 1e3
        operations.append((end - int(fields[1]) / 1e9, end))
    return operations


def pgbench_log(text):
    """Operations of a pgbench log: client, number, latency in us, script, end in s, and its us."""
    operations = []
    for line in text.splitlines():
        fields = line.split()
        end = int(fields[4]) + int(fields[5]) / 1e6
        operations.append((end - int(fields[2]) / 1e6, end))
    return operations


def plain_log(text):
    """Operations of append_load.py: begin and end in ns."""
    return [tuple(int(field) / 1e9 for field in line.split()) for line in text.splitlines()]


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def figures(operations, start, end):
    """Operations per second and latencies (ms) between two moments."""
    if end <= start:
        raise ValueError(f"a window from {start} to {end}")
    inside = [it for it in operations if start <= it[1] < end]
    felt = [it[1] - it[0] for it in operations if it[0] < end and it[1] >= start]
    latencies = sorted(it[1] - it[0] for it in inside)
    return {
        "seconds": end - start,
        "operations": len(inside),
        "operations_per_second": len(inside) / (end - start),
        "median_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "slowest_ms": max(felt, default=0.0) * 1e3,
        "per_step": per_step([it[1] - start for it in inside], end - start),
    }


def per_step(moments, length):
    """How many of the moments, seconds below `length`, are in each step."""
    counts = [0] * ceil(length / STEP_SECONDS)
    for moment in moments:
        # Rounding may lift one to the end of the last step.
        counts[min(int(moment / STEP_SECONDS), len(counts) - 1)] += 1
    return counts
