"""Figures of the applications' operations between two moments. Pure: no clock, no files.

An operation is a pair (begin, end) of seconds since the epoch. Operations are counted where they end. The slowest one
is searched among all that overlap the window, so that an operation delayed by a copy counts even if it ended after it.
"""

from math import ceil

# Operations are also counted per step of this length, to show the cost of each phase of a copy.
STEP_SECONDS = 0.25


def fio_log(text):
    """Reads the operations of a fio latency log: `end in ms, latency in ns, ...` with log_unix_epoch."""
    operations = []
    for line in text.splitlines():
        fields = line.split(",")
        end = int(fields[0]) / 1e3
        operations.append((end - int(fields[1]) / 1e9, end))
    return operations


def pgbench_log(text):
    """Reads the operations of a pgbench log: client, number, latency in us, script, end in s, and its us."""
    operations = []
    for line in text.splitlines():
        fields = line.split()
        end = int(fields[4]) + int(fields[5]) / 1e6
        operations.append((end - int(fields[2]) / 1e6, end))
    return operations


def plain_log(text):
    """Reads the operations of append_load.py: begin and end in ns."""
    return [tuple(int(field) / 1e9 for field in line.split()) for line in text.splitlines()]


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def figures(operations, start, end):
    """Computes operations per second and latencies (ms) between two moments."""
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
    """Counts the moments (seconds, below `length`) in each step."""
    counts = [0] * ceil(length / STEP_SECONDS)
    for moment in moments:
        # Rounding may move a moment to the end of the last step.
        counts[min(int(moment / STEP_SECONDS), len(counts) - 1)] += 1
    return counts
