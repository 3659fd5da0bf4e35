"""Runs each check_*.py in a process of its own with eight CPU devices; there, pytest collects it as any other file."""

import os
import re
import subprocess
import sys

import compiled
import pytest

EIGHT = "--xla_force_host_platform_device_count=8"


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.startswith("check_") and EIGHT not in os.environ.get("XLA_FLAGS", ""):
        return Check.from_parent(parent, path=module_path)
    return None


class Check(pytest.File):
    def collect(self):
        yield OnEightDevices.from_parent(self, name="on_eight_devices", mark="slow", tests="not long")
        if re.search(r"\bmark\.long\b|\blong\(", self.path.read_text()):
            yield OnEightDevices.from_parent(self, name="long_on_eight_devices", mark="long", tests="long")


class OnEightDevices(pytest.Item):
    def __init__(self, mark, tests, **kwargs):
        super().__init__(**kwargs)
        self.add_marker(mark)
        self.tests = tests

    def runtest(self):
        env = os.environ | {"XLA_FLAGS": f"{EIGHT} {compiled.flags()}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "pytest", "-m", self.tests, str(self.path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise pytest.fail.Exception(done.stdout[-8000:] + done.stderr[-2000:], pytrace=False)

    def reportinfo(self):
        return self.path, None, self.path.stem
