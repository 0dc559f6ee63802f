"""docs/kernel_layer.md: its example compiles and runs, its report is the real one, its table knows every rule."""

import os
import re
import subprocess

import pytest

from python_tests.cuda.emulator import BUILD, EMULATOR, ROOT, emulator

PAGE = (ROOT / "docs" / "kernel_layer.md").read_text()
EXAMPLE = re.search(r"```cpp\n(.*?)```", PAGE, re.DOTALL)[1]


def run_example(source, folder):
    emulator()
    (folder / "example.cpp").write_text(source)
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wno-psabi", f"-I{ROOT}", folder / "example.cpp"]
    command += [BUILD / "libemulator.so", f"-Wl,-rpath,{BUILD}", "-o", folder / "example"]
    subprocess.run(command, check=True)
    return subprocess.run([folder / "example"], capture_output=True, text=True)


def test_example_runs(tmp_path):
    done = run_example(EXAMPLE, tmp_path)
    assert done.returncode == 0 and done.stdout == "right on 20 schedules\n", done.stdout


def test_report_is_the_real_one(tmp_path):
    line = "    fence_async_shared();\n"
    assert EXAMPLE.count(line) == 1
    done = run_example(EXAMPLE.replace(line, ""), tmp_path)
    printed = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]
    assert done.stdout.split() == printed.split()


def rules():
    found = set()
    for path in EMULATOR.glob("*.cpp"):
        found |= set(re.findall(r'(?:\bfail\(|\brule = )"([^"]+)"', path.read_text()))
    return sorted(found)


@pytest.mark.parametrize("rule", rules())
def test_page_explains_rule(rule):
    table = PAGE.split("| rule |")[1].split("\n\n")[0]
    names = [name.strip() for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")]
    assert rule in names


def test_every_rule_has_a_seeded_bug():
    table = (EMULATOR / "tests" / "bugs.cpp").read_text().split("const Bug kBugs[]")[1]
    seeded = {rule for text in re.findall(r'"\w+",\s+"([^"]+)"', table) for rule in text.split("|")}
    assert seeded == set(rules())
