"""A seeded bug for every rule of the layer: named on every seed, and the corrected kernel gives no report."""

import ctypes
import functools
import re

import pytest

from python_tests.cuda.emulator import EMULATOR, call, emulator

SEEDS = range(40)

TABLE = (EMULATOR / "tests" / "bugs.cpp").read_text().split("const Bug kBugs[]")[1]
NAMES = re.findall(r'(?:NLORA_(?:GRIDS_|PUBLISHING_)?BUG\(|\{)"(\w+)",\s+"', TABLE)


@functools.cache
def bugs():
    """name -> (index, rules of which a report must name one, whether only lane clocks can see it)"""
    library, found = emulator(), {}
    text = ctypes.create_string_buffer(256)
    for index in range(library.bug_count()):
        library.bug_text(index, text, len(text))
        name, rules, lanes_only = text.value.decode().split(",")
        found[name] = index, rules.split("|"), lanes_only == "1"
    return found


def run(name, broken=True, **options):
    return call(emulator().run_bug, bugs()[name][0], int(broken), **options)


def test_every_bug_is_run():
    assert NAMES == list(bugs())


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
@pytest.mark.parametrize("name", NAMES)
def test_bug_is_named_on_every_seed(name, lanes):
    _, rules, lanes_only = bugs()[name]
    for seed in SEEDS:
        right = run(name, broken=False, seed=seed, lanes=lanes)
        assert not right.rule, right.text
        report = run(name, seed=seed, lanes=lanes)
        if lanes or not lanes_only:
            assert report.rule in rules, f"seed {seed}: expected {' or '.join(rules)}, got {report.text!r}"


def test_report_names_both_lines_the_thread_and_the_seed():
    report = run("no_fence_in_one_warp", seed=11)
    assert len(set(re.findall(r"bugs\.cpp:\d+", report.text))) == 2
    assert re.search(r"block \d+ warp \d+ lane \d+", report.text)
    assert "seed 11" in report.text


def test_seed_reproduces_a_report_exactly():
    for seed in range(5):
        assert run("restaging", seed=seed).text == run("restaging", seed=seed).text
    assert len({run("restaging", seed=seed).text.split(" [seed")[0] for seed in SEEDS}) > 1


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
def test_a_wait_without_end_traps_with_its_name_where_spins_are_bounded(lanes):
    lines = {n: text for n, text in enumerate((EMULATOR / "tests" / "bugs.cpp").read_text().splitlines(), 1)}
    waits = {
        "circular": r"mbarrier_wait at bugs\.cpp:(\d+) by block 0 thread (?:0|32) has lasted 2 s: "
        r"the phase of parity 0 of the mbarrier at 0x(?:0|10) is not over",
        "static_order": r"flag_wait at bugs\.cpp:(\d+) by block [01] thread 0 has lasted 2 s: "
        r"the flag at 0x[0-9a-f]+ is 0 and must be [23]",
    }
    for name, text in waits.items():
        for seed in SEEDS:
            assert not run(name, broken=False, seed=seed, lanes=lanes, bounded=True).rule
            report = run(name, seed=seed, lanes=lanes, bounded=True)
            (line,) = re.fullmatch(rf"deadlock: {text} \[seed.*\]", report.text).groups()
            assert report.rule == "deadlock" and report.text.split(" ")[1] in lines[int(line)]
    # What does not spin hangs as ever.
    assert "nothing can run" in run("register_shortage", bounded=True).text


def test_deadlock_lists_who_waits_where():
    report = run("circular")
    waits = re.findall(r"block 0 warp (\d): mbarrier_wait at bugs\.cpp:\d+ \(mbarrier \w+ parity 0", report.text)
    assert {"0", "1"} <= set(waits)
    resident = run("static_order")
    assert "2 blocks are not resident yet" in resident.text
    assert "flag_wait" in resident.text
