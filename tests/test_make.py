"""What `make` says before there is anything to run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(tmp_path):
    """A copy of the build files, and a PATH that holds make, a shell and whatever a test puts there."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "echo", "touch", "rm"):
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed")
        (tools / name).symlink_to(path)
    return tmp_path


def make(bench, target):
    env = os.environ | {"PATH": str(bench / "bin")}
    return subprocess.run(["make", target], cwd=bench, env=env, capture_output=True, text=True)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_without_a_new_enough_python_one_line_says_so(bench, target):
    executable(bench / "bin" / "python3", "#!/bin/sh\nexit 1\n")  # A Python that is too old.
    result = make(bench, target)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert lines[0].startswith("no Python >= 3.12 found")
    assert not (bench / ".venv").exists()


def test_a_half_made_environment_is_not_left_behind(bench):
    # Debian without python3-venv: `venv` makes bin/python, then fails to install pip.
    executable(bench / "bin" / "python3", f"""#!/bin/sh
if [ "$2" = venv ]; then
  "{shutil.which("mkdir")}" -p .venv/bin; "{shutil.which("cp")}" "$0" .venv/bin/python
  echo "ensurepip is not available: apt install python3.12-venv" >&2; exit 1
fi
""")
    result = make(bench, "demo")
    assert result.returncode != 0
    assert "apt install" in result.stderr
    assert not (bench / ".venv").exists()


def test_the_environment_is_made_when_missing_and_again_when_stale(bench):
    log = bench / "log"
    # A Python that records what it is asked to do, and makes an environment that does the same.
    script = f'#!/bin/sh\necho "$@" >> {log}\nif [ "$2" = venv ]; then\n  "{shutil.which("mkdir")}" -p .venv/bin\n' \
             f'  "{shutil.which("cp")}" "$0" .venv/bin/python\nfi\n'
    executable(bench / "bin" / "python3", script)

    def installs():
        return make(bench, "demo").returncode, log.read_text().count("pip install"), log.read_text().count("-m venv")

    assert installs() == (0, 2, 1)
    assert installs() == (0, 2, 1)
    later = (bench / ".venv" / "core").stat().st_mtime + 5
    os.utime(bench / "requirements.txt", (later, later))
    assert installs() == (0, 4, 1)
