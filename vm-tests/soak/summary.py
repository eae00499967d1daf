"""Summarizes the results of seeds in a table."""

import collections


def table(results):
    """Returns lines for a terminal, from the results that soak.py wrote."""
    copies = [copy for result in results for copy in result["copies"]]
    outcomes = collections.Counter(copy["outcome"] for copy in copies)
    events = collections.Counter(event for copy in copies for event in copy["events"])
    failed = [result["seed"] for result in results if result["failure"]]
    rows = [("seeds", len(results)), ("copies", len(copies))]
    rows += [(f"  {name}", count) for name, count in sorted(outcomes.items(), key=lambda pair: -pair[1])]
    rows += [("events", sum(events.values()))]
    rows += [(f"  {name}", count) for name, count in sorted(events.items(), key=lambda pair: -pair[1])]
    rows += [("  too late", sum(copy["late"] for copy in copies))]
    deeds = collections.Counter()
    for result in results:
        deeds.update(result.get("counts", {}))
    rows += [(f"  {name}", count) for name, count in sorted(deeds.items())]
    for key in ("beside", "beside, refused"):
        deeds = collections.Counter()
        for copy in copies:
            deeds.update(copy.get(key, {}))
        if deeds:
            rows += [(f"deeds {key}", sum(deeds.values()))]
            rows += [(f"  {name}", count) for name, count in sorted(deeds.items(), key=lambda pair: -pair[1])]
    rows += [("originals preserved", originals(results)), ("failed seeds", len(failed))]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}} {count:8}" for name, count in rows]


def originals(results):
    return sum(copy["originals"] for result in results for copy in result["copies"])
