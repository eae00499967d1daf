"""Medians, spreads, shares and goals of the measurements in a guest. Pure: turns runs into tables.

A share is relative to the same load alone in the same round. Shares, times and amounts are medians over the rounds,
shown between their minimum and maximum. Goals compare medians; for the slowest operations of the live measurement, the
slowest of all rounds.
"""

import statistics

MIB = 1 << 20

# The emulated measurement, against its peers. Operations during the copy, as a share of those beside dd of the live
# device without any snapshot.
GOAL_OF_BOUND = {"uniform": 0.7, "skewed": 0.9, "append": 0.9, "pgbench": 0.9}
# Operations during the copy, as a multiple of LVM's.
GOAL_OF_LVM = {"uniform": 2.0}
# Time to a complete copy, as a share of LVM's.
GOAL_OF_TIME = {"uniform": 0.6, "skewed": 0.4, "append": 0.4}
# Bytes preserved, as a share of LVM's.
GOAL_OF_BYTES = {"skewed": 0.5, "append": 0.05}
# Slowest operation, as a share of LVM's.
GOAL_OF_SLOWEST = 1.0

# The live measurement. Operations during the copy, as a share of those of the load alone.
GOAL_OF_ALONE = {"uniform": 0.75, "skewed": 0.85, "append": 0.9, "pgbench": 0.9}
# The slowest operation, in milliseconds, by profile.
GOAL_OF_SLOWEST_MS = {"ssd": 20}
# Time to a complete copy, as a multiple of reading and writing as much alone, plus a constant in seconds.
GOAL_OF_LIMIT, GOAL_SECONDS_MORE = 1.05, 0.3

PEERS = ("none", "dd", "stream", "lvm")


def ratio(value, base):
    """None without a value to compare with, for example for a load that was stalled."""
    return value / base if value is not None and base else None


def median(values):
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def spread(values):
    """Minimum and maximum."""
    there = [value for value in values if value is not None]
    return (min(there), max(there)) if there else (None, None)


def limit_seconds(limits):
    """Seconds for reading and writing as much as is in use; None if not measured."""
    return median(line["seconds"] for line in limits)


def summary(runs):
    """{load: {contender: medians}}, in the order of their first runs."""
    alone = {(run["load"], run["round"]): run for run in runs if run["contender"] == "none"}
    found = {}
    for load in dict.fromkeys(run["load"] for run in runs):
        of_load = [run for run in runs if run["load"] == load]
        found[load] = {}
        for contender in dict.fromkeys(run["contender"] for run in of_load):
            mine = [run for run in of_load if run["contender"] == contender]

            def shares(key):
                pairs = [(run, alone.get((load, run["round"]))) for run in mine]
                return [ratio(run[key], base[key]) for run, base in pairs if base]

            values = {
                "operations_per_second": [run["operations_per_second"] for run in mine],
                "operations_share": shares("operations_per_second"),
                "slowest_ms": [run["slowest_ms"] for run in mine],
                "seconds": [run["seconds"] for run in mine] if contender != "none" else [],
                "preserved_bytes": [run.get("preserved_bytes") for run in mine],
                "busy_share": [run.get("busy_share") for run in mine],
            }
            found[load][contender] = {
                "rounds": len(mine),
                **{key: median(those) for key, those in values.items()},
                "spread": {key: spread(those) for key, those in values.items()},
            }
    return found


def judgement(load, contender, text, value, limit, at_least):
    """A goal and its result; empty without a value, because a peer is missing."""
    if value is None:
        return []
    met = value >= limit if at_least else value <= limit
    return [{"load": load, "contender": contender, "goal": text, "value": value, "limit": limit, "met": met}]


def own(found):
    """Yields each variant of Tidemark with the contenders of the same load."""
    for load, contenders in found.items():
        for contender, mine in contenders.items():
            if contender not in PEERS:
                yield load, contender, mine, contenders


def goals(found):
    """The goals relative to peers. Without the peer there is no goal."""
    judged = []
    for load, contender, mine, contenders in own(found):
        bound, lvm = contenders.get("dd", {}), contenders.get("lvm", {})
        for table, text, key, peer, at_least in (
            (GOAL_OF_BOUND, "operations, of dd's, at least", "operations_share", bound, True),
            (GOAL_OF_LVM, "operations, of LVM's, at least", "operations_share", lvm, True),
            (GOAL_OF_TIME, "seconds, of LVM's, at most", "seconds", lvm, False),
            (GOAL_OF_BYTES, "bytes preserved, of LVM's, at most", "preserved_bytes", lvm, False),
        ):
            if load in table:
                value = ratio(mine[key], peer.get(key))
                judged += judgement(load, contender, text, value, table[load], at_least)
        slowest = ratio(mine["slowest_ms"], lvm.get("slowest_ms"))
        judged += judgement(load, contender, "slowest operation, of LVM's, at most", slowest, GOAL_OF_SLOWEST, False)
    return judged


def live_goals(profile, found, limit):
    """The goals relative to the load alone and to the disk's limit (seconds)."""
    judged = []
    for load, contender, mine, contenders in own(found):
        share = mine["operations_share"]
        judged += judgement(load, contender, "operations, of those alone, at least", share, GOAL_OF_ALONE[load], True)
        slowest = mine["spread"]["slowest_ms"][1]
        if profile in GOAL_OF_SLOWEST_MS:
            most = GOAL_OF_SLOWEST_MS[profile]
            judged += judgement(load, contender, "slowest operation, ms, at most", slowest, most, False)
        of_lvm = ratio(slowest, contenders["lvm"]["spread"]["slowest_ms"][1]) if "lvm" in contenders else None
        judged += judgement(load, contender, "slowest operation, of LVM's, at most", of_lvm, GOAL_OF_SLOWEST, False)
        if limit is not None:
            most = GOAL_OF_LIMIT * limit + GOAL_SECONDS_MORE
            judged += judgement(load, contender, "seconds, at most", mine["seconds"], most, False)
    return judged


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


HEADS = ("load", "contender", "op/s", "share", "slowest ms", "seconds", "preserved MiB", "CPU")


def between(it, key, digits):
    """The median, between minimum and maximum if there are several rounds."""
    least, most = it["spread"][key]
    middle = number(it[key], digits)
    if it["rounds"] == 1 or it[key] is None:
        return middle
    return f"{number(least, digits)} / {middle} / {number(most, digits)}"


def rows(found):
    for load, contenders in found.items():
        for contender, it in contenders.items():
            yield (
                load,
                contender,
                number(it["operations_per_second"], 0),
                between(it, "operations_share", 2),
                between(it, "slowest_ms", 0),
                between(it, "seconds", 1),
                number(ratio(it["preserved_bytes"], MIB), 1),
                number(it["busy_share"], 2),
            )


def goal_rows(judged):
    for it in judged:
        verdict = "met" if it["met"] else "MISSED"
        yield (it["load"], it["contender"], it["goal"], number(it["value"], 2), number(it["limit"], 2), verdict)


GOAL_HEADS = ("load", "contender", "goal", "value", "limit", "")


def text_table(heads, lines, left):
    """Aligned columns, the first `left` of them to the left."""
    lines = [heads, *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    aligned = lambda line: (
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths))
    )
    return "\n".join("  ".join(aligned(line)).rstrip() for line in lines)


def markdown_table(heads, lines, left):
    rule = ["---" if column < left else "---:" for column in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def conditions(setup):
    """Describes the machine of a profile in one line."""
    volume = f"{setup['volume_mib']} MiB, {setup['used_share']:.0%} in use"
    kernel = f"kernel {setup['kernel']}, {setup['cpus']} CPU"
    if "model" in setup:
        return f"{volume}; {model(setup['model'])}, {setup['scheduler']}; {kernel}"
    flush = f"flushes of the store's disk take {setup['flush_ms']} ms" if setup["flush_ms"] else "flushes are free"
    ways = "for reads and writes together" if setup["disk"] == "shared" else "each way"
    return (
        f"{volume}; disks of {setup['disk_bytes_per_second'] // MIB} MiB/s {ways} and "
        f"{setup['disk_requests_per_second']} requests/s, {flush}; {kernel}, clock {setup.get('clock', 'hpet')}"
    )


def model(it):
    """Describes a null_blk disk."""
    words = [f"null_blk disks: {it['completion_nsec'] / 1000:g} us for each request", f"{it['hw_queue_depth']} at once"]
    if it.get("max_sectors"):
        words.append(f"of at most {it['max_sectors'] // 2} KiB")
    if it.get("mbps"):
        words.append(f"{it['mbps']} MiB/s")
    return ", ".join(words)
