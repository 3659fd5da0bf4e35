"""What each test takes, in processor seconds and compiled programs, and the table of the suite that comes of it.

`make test-times` runs the suite with `--times FILE`, then this file: it writes `seconds.json`, by which `make test`
orders its files and `make check` leaves out slow tests, and prints the table of docs/measurements/suite.md.
"""

import collections
import json
import resource
import sys
from pathlib import Path

import pytest

SECONDS = Path(__file__).parent / "seconds.json"
SLOW = 1.0
"""Seconds, with those of all its parameters, from which a test is slow."""


class Recorder:
    """Appends a line of JSON for each test to a file; processes that a test starts count when they end."""

    def __init__(self, path):
        from jax import monitoring

        self.path = path
        self.compiled = collections.Counter()
        monitoring.register_event_duration_secs_listener(self.on_duration)
        monitoring.register_event_listener(self.on_event)

    def on_duration(self, name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            self.compiled["programs"] += 1

    def on_event(self, name, **_):
        if name == "/jax/compilation_cache/cache_hits":
            self.compiled["from_cache"] += 1

    def spent(self):
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own, children = (u.ru_utime + u.ru_stime for u in used)
        return {"own": own, "children": children} | self.compiled

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = self.spent()
        result = yield
        row = {name: round(now - before.get(name, 0), 3) for name, now in self.spent().items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"test": item.nodeid} | row) + "\n")
        return result


def summed(lines, part):
    """Sums over the tests whose names are equal up to `part`, the heaviest first."""
    sums = collections.defaultdict(collections.Counter)
    for line in lines:
        row = json.loads(line)
        sums[row.pop("test").partition(part)[0]].update(row | {"tests": 1})
    return dict(sorted(sums.items(), key=lambda item: -seconds(item[1])))


def seconds(row):
    return row["own"] + row["children"]


def main(path):
    lines = Path(path).read_text().splitlines()
    files = summed(lines, "::")
    SECONDS.write_text(json.dumps({
        "files": {Path(file).stem: round(seconds(n)) for file, n in files.items()},
        "slow": sorted(test for test, n in summed(lines, "[").items() if seconds(n) >= SLOW),
    }, indent=1) + "\n")
    print("| file | tests | processor seconds | of started processes | programs compiled | from the cache |")
    print("|---|---|---|---|---|---|")
    for name, n in [("all", sum(files.values(), collections.Counter())), *files.items()]:
        print(f"| `{name}` | {n['tests']} | {seconds(n):.0f} | {n['children']:.0f} | "
              f"{n['programs'] - n['from_cache']} | {n['from_cache']} |")


if __name__ == "__main__":
    main(sys.argv[1])
