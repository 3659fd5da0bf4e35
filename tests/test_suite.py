"""What the suite does around its tests: programs are kept within bounds, times are summed by file."""

import json
import os
from pathlib import Path

import compiled
import timing


def test_the_cache_gives_up_what_was_not_used_for_the_longest_time(tmp_path):
    for i, name in enumerate(("old", "read-again", "new", "newest")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (9 if name == "read-again" else i, i))
    compiled.shrink(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 4
    compiled.shrink(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "read-again"}


def test_the_processor_is_named():
    assert compiled.processor().strip()


def test_times_are_summed_the_heaviest_first():
    rows = [{"test": "a.py::one[1]", "own": 1.0, "children": 2.0, "programs": 3}, {"test": "b.py::x", "own": 9.0},
            {"test": "a.py::two[b.py::y]", "own": 0.5, "children": 0.0, "programs": 2}]
    lines = [json.dumps(row) for row in rows]
    files = timing.summed(lines, "::")
    assert list(files) == ["b.py", "a.py"]
    assert files["a.py"] == {"own": 1.5, "children": 2.0, "programs": 5, "tests": 2}
    assert list(timing.summed(lines, "[")) == ["b.py::x", "a.py::one", "a.py::two"]


def test_every_file_that_was_timed_is_there():
    files = {path.stem for pattern in ("test_*.py", "check_*.py") for path in timing.SECONDS.parent.rglob(pattern)}
    measured = json.loads(timing.SECONDS.read_text())
    assert set(measured["files"]) <= files
    assert {Path(test.partition("::")[0]).stem for test in measured["slow"]} <= files
