"""What each test takes, in processor seconds and compiled programs, and the table of the suite that comes of it.

`make test-times` runs the suite with `--times FILE`, then this file: it writes `seconds.json`, after which `make test`
orders its files, and prints the table of docs/measurements/suite.md.
"""

import collections
import json
import resource
import sys
from pathlib import Path

import pytest

SECONDS = Path(__file__).parent / "seconds.json"


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


def by_file(lines):
    """Sums over the tests of each file, the heaviest file first."""
    files = collections.defaultdict(collections.Counter)
    for line in lines:
        row = json.loads(line)
        files[row.pop("test").partition("::")[0]].update(row | {"tests": 1})
    return dict(sorted(files.items(), key=lambda item: -item[1]["own"] - item[1]["children"]))


def main(path):
    files = by_file(Path(path).read_text().splitlines())
    SECONDS.write_text(json.dumps({Path(f).stem: round(n["own"] + n["children"]) for f, n in files.items()}, indent=1))
    print("| file | tests | processor seconds | of started processes | programs compiled | from the cache |")
    print("|---|---|---|---|---|---|")
    for name, n in [("all", sum(files.values(), collections.Counter())), *files.items()]:
        print(f"| `{name}` | {n['tests']} | {n['own'] + n['children']:.0f} | {n['children']:.0f} | "
              f"{n['programs'] - n['from_cache']} | {n['from_cache']} |")


if __name__ == "__main__":
    main(sys.argv[1])
