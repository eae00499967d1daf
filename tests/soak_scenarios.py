"""Tests of the soak's scenarios (vm-tests/soak/scenario.py), its comparison (compare.py) and its table (summary.py).

tests/soak.rs runs it.
"""

import collections
import json
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "vm-tests/soak"))

import compare
import summary
from scenario import DEEDS, DEEDS_OF_LINEAR, REGIONS_MAX, scenario

SEEDS = range(3000)
MIB = 1024


class Scenarios(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.all = [scenario(seed) for seed in SEEDS]
        cls.copies = [(one, copy) for one in cls.all for copy in one["copies"]]

    def test_a_seed_stands_for_one_scenario(self):
        for seed, one in zip(SEEDS, self.all):
            self.assertEqual(scenario(seed), one)
        # No two seeds have the same scenario.
        self.assertEqual(len({json.dumps({**one, "seed": 0}) for one in self.all}), len(SEEDS))

    def test_what_is_asked_for_is_possible(self):
        for one, copy in self.copies:
            kib, chunk, segment = one["origin"]["kib"], copy["chunk_kib"], copy["segment_kib"]
            self.assertTrue(32 * MIB <= kib <= 96 * MIB and kib % 4 == 0, one)
            self.assertTrue(4 <= chunk <= 1024 and chunk & (chunk - 1) == 0, copy)
            self.assertTrue(max(64, chunk) <= segment <= 16 * MIB and segment & (segment - 1) == 0, copy)
            if copy["region_kib"]:
                self.assertLessEqual(-(-kib // copy["region_kib"]), REGIONS_MAX, copy)
            if copy["store"]["size_kib"]:
                self.assertGreaterEqual(copy["store"]["size_kib"], max(4 * MIB, 8 * chunk), copy)
            if copy["store"]["keep"]:
                self.assertEqual((copy["store"]["ram_mib"], copy["store"]["place"] != "device"), (0, True), copy)
            if copy["secondary"]["kind"] == "pipe":
                self.assertFalse(copy["verify"], copy)

    def test_origins_are_whole(self):
        for one in self.all:
            origin = one["origin"]
            if origin["kind"] == "segments":
                self.assertEqual(sum(origin["segments_kib"]), origin["kib"])
            if origin["lvm"]:
                self.assertEqual(origin["kib"] % (128 if origin["kind"] == "striped" else 64), 0)

    def test_the_parts_of_a_load_on_a_bare_device_do_not_meet(self):
        for one in self.all:
            if one["filesystem"]["type"] == "none":
                apart = one["origin"]["kib"] // MIB // 4
                self.assertLessEqual(len(one["load"]), 4)
                self.assertTrue(all(part["mib"] <= apart for part in one["load"]), one)

    def test_only_a_file_system_that_nobody_needs_any_more_is_hurt(self):
        for one in self.all:
            for copy in one["copies"][:-1]:
                self.assertFalse([event for event in copy["events"] if event["do"].startswith("origin")], one)

    def test_everything_occurs(self):
        seen = collections.Counter()
        for one, copy in self.copies:
            seen.update(event["do"] for event in copy["events"])
            seen.update(event["way"] for event in copy["events"] if "way" in event)
            seen.update([one["filesystem"]["type"], one["origin"]["kind"], copy["secondary"]["kind"]])
            seen.update([copy["store"]["place"], *(part["kind"] for part in one["load"])])
        for word in (
            "kill crash signal stop overflow no-space store-fault store-hang secondary-fault secondary-lies reader-dies "
            "origin-reads origin-writes error flakey flakey-writes dust fail-make-request ext4 xfs none volume linear "
            "striped segments raw-device raw-file overlay append pipe folder device file overwrite mmap append churn "
            "punch trim"
        ).split():
            self.assertGreater(seen[word], 5, word)


    def test_beside_neighbours_all_origins_are_slow_volumes_that_have_room_to_grow(self):
        seen = collections.Counter()
        for one in (scenario(seed, lvm=True) for seed in range(500)):
            self.assertTrue(one["origin"]["lvm"] and one["origin"]["kib"] <= 64 * MIB, one)
            self.assertTrue(all(one["disks"][name][1] >= 50 for name in "ab"), one)
            for copy in one["copies"]:
                self.assertTrue(copy["neighbours"], copy)
                seen.update(deed["do"] for deed in copy["neighbours"])
                kinds = {event["do"] for event in copy["events"]}
                self.assertLessEqual(kinds, {"kill", "crash", "signal", "stop", "store-hang"}, copy)
        for deed in [deed for _, deed in DEEDS + DEEDS_OF_LINEAR]:
            self.assertGreater(seen[deed], 20, deed)


class Comparison(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.data = bytes(range(256)) * 4096 * 3

    def files(self, copy):
        paths = [Path(self.folder.name) / name for name in ("instant", "copy")]
        for path, data in zip(paths, (self.data, copy)):
            path.write_bytes(data)
        return paths

    def difference(self, copy):
        return compare.differences("none", *map(str, self.files(copy)), True)

    def test_what_is_equal_is(self):
        self.assertEqual(self.difference(self.data), ([], len(self.data)))

    def test_one_byte_is_seen_anywhere(self):
        for at in (0, 4097, len(self.data) - 1):
            copy = bytearray(self.data)
            copy[at] ^= 1
            wrong, _ = self.difference(bytes(copy))
            self.assertEqual([start <= at < end for start, end, _ in wrong], [True])

    def test_a_copy_that_is_short_is_wrong(self):
        self.assertTrue(self.difference(self.data[:-512])[0])

    def test_what_was_free_is_equal_or_zero(self):
        for there, is_wrong in ((self.data, False), (bytes(len(self.data)), False), (self.data[::-1], True)):
            instant, copy = self.files(there)
            with open(instant, "rb") as one, open(copy, "rb") as other:
                self.assertEqual(bool(compare.unequal(one, other, 0, len(self.data), True)), is_wrong)


class Table(unittest.TestCase):
    def test_it_adds_up(self):
        copies = [
            {"outcome": "exact", "late": 1, "originals": 7, "events": ["kill", "kill"]},
            {"outcome": "given up", "late": 0, "originals": 0, "events": ["crash"]},
        ]
        results = [{"seed": 1, "copies": copies, "failure": None}, {"seed": 2, "copies": copies[:1], "failure": "it"}]
        text = "\n".join(summary.table(results))
        for name, count in {
            "seeds": 2, "copies": 3, "exact": 2, "given up": 1, "kill": 4, "crash": 1, "too late": 2,
            "originals preserved": 14, "failed seeds": 1,
        }.items():
            self.assertRegex(text, rf"(?m)^ *{name} +{count}$")


if __name__ == "__main__":
    unittest.main()
