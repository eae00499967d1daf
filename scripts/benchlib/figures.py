"""Medians, shares and goals of the measurement in the VM. Pure: runs in, tables out.

A share is taken within a round, against what the same load did alone in that round, and the median of the shares is
shown; a time or an amount is the median of its rounds. A goal compares such medians.
"""

import statistics

MIB = 1 << 20

# Operations during the copy: Tidemark's share of what dd of the live device, without any snapshot, leaves.
GOAL_OF_BOUND = {"uniform": 0.7, "skewed": 0.9, "append": 0.9, "pgbench": 0.9}
# Operations during the copy: times LVM's.
GOAL_OF_LVM = {"uniform": 2.0}
# Time to a complete copy, of LVM's.
GOAL_OF_TIME = {"uniform": 0.6, "skewed": 0.4, "append": 0.4}
# Bytes preserved, of LVM's.
GOAL_OF_BYTES = {"skewed": 0.5, "append": 0.05}
# Slowest operation, of LVM's.
GOAL_OF_SLOWEST = 1.0

PEERS = ("none", "dd", "stream", "lvm")


def ratio(value, base):
    """None where there is nothing to compare with: a load that stood still has no share."""
    return value / base if value is not None and base else None


def median(values):
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def summary(runs):
    """{load: {contender: medians}}, in the order in which they first ran."""
    alone = {(run["load"], run["round"]): run for run in runs if run["contender"] == "none"}
    found = {}
    for load in dict.fromkeys(run["load"] for run in runs):
        of_load = [run for run in runs if run["load"] == load]
        found[load] = {}
        for contender in dict.fromkeys(run["contender"] for run in of_load):
            mine = [run for run in of_load if run["contender"] == contender]

            def share(key):
                pairs = [(run, alone.get((load, run["round"]))) for run in mine]
                return median(ratio(run[key], base[key]) for run, base in pairs if base)

            found[load][contender] = {
                "rounds": len(mine),
                "operations_per_second": median(run["operations_per_second"] for run in mine),
                "operations_share": share("operations_per_second"),
                "slowest_ms": median(run["slowest_ms"] for run in mine),
                "slowest_share": share("slowest_ms"),
                "seconds": median(run["seconds"] for run in mine) if contender != "none" else None,
                "preserved_bytes": median(run.get("preserved_bytes") for run in mine),
            }
    return found


def goals(found):
    """What was to be reached, for each variant of Tidemark; where a peer is missing there is no goal."""
    judged = []

    def judge(load, contender, text, value, limit, at_least):
        if value is not None:
            met = value >= limit if at_least else value <= limit
            judged.append({"load": load, "contender": contender, "goal": text, "value": value, "limit": limit, "met": met})

    for load, contenders in found.items():
        bound, lvm = contenders.get("dd", {}), contenders.get("lvm", {})
        for contender, mine in contenders.items():
            if contender in PEERS:
                continue

            def of(peer, key):
                return ratio(mine[key], peer.get(key))

            def goal(table, text, value, at_least):
                if load in table:
                    judge(load, contender, text, value, table[load], at_least)

            goal(GOAL_OF_BOUND, "operations, of dd's, at least", of(bound, "operations_share"), True)
            goal(GOAL_OF_LVM, "operations, of LVM's, at least", of(lvm, "operations_share"), True)
            goal(GOAL_OF_TIME, "seconds, of LVM's, at most", of(lvm, "seconds"), False)
            goal(GOAL_OF_BYTES, "bytes preserved, of LVM's, at most", of(lvm, "preserved_bytes"), False)
            slowest = of(lvm, "slowest_ms")
            judge(load, contender, "slowest operation, of LVM's, at most", slowest, GOAL_OF_SLOWEST, False)
    return judged


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


HEADS = ("load", "contender", "op/s", "share", "slowest ms", "times alone", "seconds", "of LVM's", "preserved MiB")


def rows(found):
    for load, contenders in found.items():
        lvm = contenders.get("lvm", {})
        for contender, it in contenders.items():
            preserved = ratio(it["preserved_bytes"], MIB)
            yield (
                load,
                contender,
                number(it["operations_per_second"], 0),
                number(it["operations_share"], 2),
                number(it["slowest_ms"], 0),
                number(it["slowest_share"], 1),
                number(it["seconds"], 1),
                number(ratio(it["seconds"], lvm.get("seconds")), 2),
                number(preserved, 1),
            )


def goal_rows(judged):
    for it in judged:
        verdict = "met" if it["met"] else "MISSED"
        yield (it["load"], it["contender"], it["goal"], number(it["value"], 2), number(it["limit"], 2), verdict)


GOAL_HEADS = ("load", "contender", "goal", "value", "limit", "")


def text_table(heads, lines, left):
    """Columns, the first `left` of them aligned left."""
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
    """The machine of a profile, in a line."""
    flush = f"flushes of the store's disk take {setup['flush_ms']} ms" if setup["flush_ms"] else "flushes are free"
    ways = "for reads and writes together" if setup["disk"] == "shared" else "each way"
    return (
        f"{setup['volume_mib']} MiB, {setup['used_share']:.0%} in use; disks of "
        f"{setup['disk_bytes_per_second'] // MIB} MiB/s {ways} and {setup['disk_requests_per_second']} requests/s, {flush}; "
        f"kernel {setup['kernel']}, clock {setup.get('clock', 'hpet')}"
    )
