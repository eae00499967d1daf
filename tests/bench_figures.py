"""Tests of the measurement's arithmetic (vm-tests/bench/window.py, scripts/benchlib/figures.py) with known figures.

tests/bench.rs runs it.
"""

import os
import re
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT / "vm-tests/bench"), str(ROOT / "scripts")]

import window
from benchlib import figures, guest, live, vm


class Window(unittest.TestCase):
    def test_operations_are_counted_where_they_end(self):
        operations = [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.0, 2.5)]
        found = window.figures(operations, 1.0, 2.0)
        # An operation that ends exactly at the window's end belongs to the next window.
        self.assertEqual(found["operations"], 2)
        self.assertEqual(window.figures(operations, 2.0, 3.0)["operations"], 2)
        self.assertEqual(found["operations_per_second"], 2.0)

    def test_steps_add_up_to_the_window(self):
        operations = [(0.0, 0.1), (0.0, 0.25), (0.0, 0.49), (0.0, 0.6), (0.0, 0.7)]
        found = window.figures(operations, 0.0, 0.7)
        self.assertEqual(found["per_step"], [1, 2, 1])
        self.assertEqual(sum(found["per_step"]), found["operations"])

    def test_a_stall_beyond_the_end_is_felt(self):
        operations = [(0.9, 1.0), (1.0, 1.1), (1.2, 9.2)]
        found = window.figures(operations, 0.5, 2.0)
        self.assertEqual(found["operations"], 2)
        self.assertAlmostEqual(found["slowest_ms"], 8000)

    def test_a_stall_from_before_is_felt_and_others_are_not(self):
        operations = [(0.0, 0.7), (1.0, 4.0), (4.0, 4.1), (6.0, 9.0)]
        self.assertAlmostEqual(window.figures(operations, 3.0, 5.0)["slowest_ms"], 3000)

    def test_a_load_that_stands_still_has_done_nothing(self):
        found = window.figures([(0.0, 10.0)], 2.0, 4.0)
        self.assertEqual(found["operations_per_second"], 0)
        self.assertEqual(found["slowest_ms"], 10_000)

    def test_an_empty_window_is_an_error(self):
        with self.assertRaises(ValueError):
            window.figures([], 2.0, 2.0)

    def test_logs_are_read_for_what_they_say(self):
        self.assertEqual(window.fio_log("1500000, 250000000, 1, 4096, 0, 0\n"), [(1499.75, 1500.0)])
        self.assertEqual(window.pgbench_log("0 1 250000 0 1500 500000\n"), [(1500.25, 1500.5)])
        self.assertEqual(window.plain_log("1000000000 1250000000\n"), [(1.0, 1.25)])

    def test_percentiles(self):
        operations = [(0, latency / 1000) for latency in range(1, 101)]
        found = window.figures(operations, 0, 1)
        self.assertAlmostEqual(found["median_ms"], 51)
        self.assertAlmostEqual(found["p99_ms"], 100)


def run(load, number, contender, operations, slowest, seconds, preserved=None):
    it = {"load": load, "round": number, "contender": contender, "operations_per_second": operations}
    return it | {"slowest_ms": slowest, "seconds": seconds} | ({"preserved_bytes": preserved} if preserved else {})


MIB = figures.MIB
# Three rounds on a machine whose speed changes: the shares within a round are equal, or nearly.
RUNS = [
    run("skewed", number, contender, share * speed, slowest, seconds, preserved)
    for number, speed in enumerate((100, 1000, 500))
    for contender, share, slowest, seconds, preserved in (
        ("none", 1.0, 10, 6, None),
        ("dd", 0.8, 20, 4, None),
        ("lvm", 0.4, 40 + number, 20, 10 * MIB),
        ("tidemark", 0.74, 30, 8 + number, 5 * MIB),
        ("tidemark-slow", 0.7, 60, 7, 6 * MIB),
    )
]


class Figures(unittest.TestCase):
    def test_shares_are_of_the_same_round(self):
        found = figures.summary(RUNS)["skewed"]
        self.assertEqual(list(found), ["none", "dd", "lvm", "tidemark", "tidemark-slow"])
        self.assertAlmostEqual(found["tidemark"]["operations_share"], 0.74)
        self.assertAlmostEqual(found["tidemark"]["operations_per_second"], 370)
        self.assertEqual(found["tidemark"]["seconds"], 9)
        self.assertEqual(found["lvm"]["slowest_ms"], 41)
        self.assertIsNone(found["none"]["seconds"])
        self.assertIsNone(found["dd"]["preserved_bytes"])

    def test_a_median_stands_between_the_least_and_the_most_of_its_rounds(self):
        mine = figures.summary(RUNS)["skewed"]["tidemark"]
        self.assertEqual(mine["spread"]["seconds"], (8, 10))
        self.assertEqual(mine["spread"]["operations_per_second"], (74, 740))
        self.assertEqual(figures.between(mine, "seconds", 1), "8.0 / 9.0 / 10.0")
        self.assertEqual(figures.between(mine, "preserved_bytes", 0)[:7], "5242880")
        self.assertEqual(figures.between(mine, "busy_share", 2), "-")
        alone = figures.summary(RUNS[:5])["skewed"]["tidemark"]
        self.assertEqual(figures.between(alone, "seconds", 1), "8.0")
        # In a round without a run of the load alone there are no shares; the other rounds have theirs.
        partly = figures.summary([it for it in RUNS if (it["round"], it["contender"]) != (1, "none")])
        self.assertAlmostEqual(partly["skewed"]["tidemark"]["operations_share"], 0.74)

    def goals(self, contender, runs=RUNS):
        judged = [it for it in figures.goals(figures.summary(runs)) if it["contender"] == contender]
        return {it["goal"].split(",")[0]: (round(it["value"], 3), it["limit"], it["met"]) for it in judged}

    def test_goals_are_judged_each_way(self):
        self.assertEqual(
            self.goals("tidemark"),
            {
                "operations": (0.925, 0.9, True),
                "seconds": (0.45, 0.4, False),
                "bytes preserved": (0.5, 0.5, True),
                "slowest operation": (0.732, 1.0, True),
            },
        )
        self.assertEqual(
            self.goals("tidemark-slow"),
            {
                "operations": (0.875, 0.9, False),
                "seconds": (0.35, 0.4, True),
                "bytes preserved": (0.6, 0.5, False),
                "slowest operation": (1.463, 1.0, False),
            },
        )

    def test_uniform_overwrites_have_two_goals_for_operations(self):
        runs = [it | {"load": "uniform"} for it in RUNS]
        judged = figures.goals(figures.summary(runs))
        mine = {it["goal"]: it["met"] for it in judged if it["contender"] == "tidemark"}
        self.assertEqual(mine["operations, of dd's, at least"], True)
        self.assertEqual(mine["operations, of LVM's, at least"], False)
        self.assertNotIn("bytes preserved, of LVM's, at most", mine)

    def test_without_a_peer_there_is_no_goal_against_it(self):
        runs = [it for it in RUNS if it["contender"] not in ("dd", "lvm")]
        self.assertEqual(self.goals("tidemark", runs), {})
        runs = [it for it in RUNS if it["contender"] in ("tidemark", "lvm")]
        self.assertEqual(set(self.goals("tidemark", runs)), {"seconds", "bytes preserved", "slowest operation"})
        self.assertIsNone(figures.summary(runs)["skewed"]["lvm"]["operations_share"])

    def test_a_load_that_stood_still_beside_a_peer_is_no_division_by_zero(self):
        runs = [run("append", 0, "none", 9, 1, 6), run("append", 0, "lvm", 0, 1, 9), run("append", 0, "tidemark", 5, 1, 9)]
        self.assertNotIn("operations", self.goals("tidemark", runs))

    def live(self, contender, profile, limit, runs=RUNS):
        judged = figures.live_goals(profile, figures.summary(runs), limit)
        mine = [it for it in judged if it["contender"] == contender]
        return {it["goal"].rpartition(", ")[0]: (round(it["value"], 3), round(it["limit"], 3), it["met"]) for it in mine}

    def test_live_goals_are_of_the_load_alone_and_of_the_disks_limit(self):
        self.assertEqual(
            self.live("tidemark", "ssd", 8.0),
            {
                "operations, of those alone": (0.74, 0.85, False),
                "slowest operation, ms": (30, 20, False),
                # The slowest of all rounds, for both: LVM's were 40, 41 and 42.
                "slowest operation, of LVM's": (0.714, 1.0, True),
                "seconds": (9, 8.7, False),
            },
        )
        self.assertEqual(self.live("tidemark", "ssd", 8.3)["seconds"], (9, 9.015, True))
        self.assertEqual(self.live("tidemark-slow", "ssd", 8.3)["slowest operation, of LVM's"], (1.429, 1.0, False))

    def test_a_rotating_disk_has_no_goal_in_milliseconds_and_no_limit_no_goal_in_seconds(self):
        self.assertEqual(
            set(self.live("tidemark", "rotating", None)),
            {"operations, of those alone", "slowest operation, of LVM's"},
        )
        runs = [it for it in RUNS if it["contender"] == "tidemark"]
        self.assertEqual(self.live("tidemark", "rotating", None, runs), {})

    def test_the_limit_is_the_median_of_its_runs(self):
        self.assertEqual(figures.limit_seconds([{"seconds": 3}, {"seconds": 1}, {"seconds": 1.5}]), 1.5)
        self.assertIsNone(figures.limit_seconds([]))

    def test_a_modelled_disk_is_described(self):
        model = {"memory_backed": 1, "completion_nsec": 7_000_000, "hw_queue_depth": 1, "max_sectors": 2048}
        self.assertEqual(figures.model(model), "null_blk disks: 7000 us for each request, 1 at once, of at most 1024 KiB")
        model = {"completion_nsec": 80_000, "hw_queue_depth": 64, "mbps": 400}
        self.assertEqual(figures.model(model), "null_blk disks: 80 us for each request, 64 at once, 400 MiB/s")

    def test_tables_have_a_line_for_each(self):
        found = figures.summary(RUNS)
        lines = figures.text_table(figures.HEADS, figures.rows(found), 2).splitlines()
        self.assertEqual(len(lines), 6)
        cells = ["skewed", "tidemark", "370", "0.74 / 0.74 / 0.74", "30 / 30 / 30", "8.0 / 9.0 / 10.0", "5.0", "-"]
        self.assertEqual([cell.strip() for cell in re.split("  +", lines[4])], cells)
        marked = figures.markdown_table(figures.HEADS, figures.rows(found), 2).splitlines()
        self.assertEqual(marked[1], "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        self.assertEqual(marked[5], f"| {' | '.join(cells)} |")


class Options(unittest.TestCase):
    def test_letters_and_variants(self):
        options = guest.arguments(vm.GUEST, ["--loads", "b,pgbench", "--variant", "hot=--order hot", "--quick"])
        self.assertEqual(options.loads, ["skewed", "pgbench"])
        self.assertEqual(options.rounds, 1)
        passed_on = guest.environment(vm.GUEST, options)
        self.assertEqual(passed_on["TIDEMARK_BENCH_CONTENDERS"], "none,dd,lvm,tidemark,tidemark-hot=--order hot")
        self.assertEqual(passed_on["TIDEMARK_BENCH_LOADS"], "skewed,pgbench")
        self.assertEqual(passed_on["TIDEMARK_BENCH_CLOCK"], "tsc")

    def test_a_build_is_a_contender_with_a_program_of_its_own(self):
        program = os.path.realpath(sys.executable)
        options = guest.arguments(live.GUEST, ["--build", f"old={program}", "--scheduler", "bfq"])
        passed_on = guest.environment(live.GUEST, options)
        self.assertEqual(passed_on["TIDEMARK_BENCH_CONTENDERS"], "none,dd,lvm,tidemark,tidemark-old")
        self.assertEqual(passed_on["TIDEMARK_BENCH_BUILDS"], f"tidemark-old={program}")
        self.assertEqual(passed_on["TIDEMARK_BENCH_SCHEDULER"], "bfq")
        self.assertNotIn("TIDEMARK_BENCH_CLOCK", passed_on)


if __name__ == "__main__":
    unittest.main()
