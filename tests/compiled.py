"""Where the compiled programs of all tests are kept: of every worker, every process that a test starts, and every run.

JAX's key of a program holds its text, options, flags, versions and devices. Machine code depends on the processor too:
each kind of processor has a directory of its own. To clear the cache, remove ROOT.
"""

import hashlib
import os
import platform
from pathlib import Path

ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfm_jax" / "tests"
LIMIT_BYTES = 3 << 30
# Compiling is most of what tests take, and half of it are optimisations of LLVM. They come after XLA's own
# passes: what tests count (FLOPs, bytes, instructions, collectives) is as at the default level.
QUICKLY = "--xla_backend_optimization_level=1"
TELLING = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features")


def directory():
    """The cache for this machine's processor, outside the tree."""
    return ROOT / hashlib.sha256(processor().encode()).hexdigest()[:12]


def processor():
    """What a compiler knows of this machine's processor: its name and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in TELLING}))


def flags(env=os.environ):
    """XLA_FLAGS of tests: QUICKLY, unless `env` asks for a level (`XLA_FLAGS=--xla_backend_optimization_level=3`)."""
    found = env.get("XLA_FLAGS", "")
    return found if "xla_backend_optimization_level" in found else f"{found} {QUICKLY}".strip()


def shrink(root=ROOT, limit_bytes=LIMIT_BYTES):
    """Removes the files that were not used for the longest time, until the rest takes at most `limit_bytes`."""
    files = [(path, path.stat()) for path in root.rglob("*") if path.is_file()]
    excess = sum(stat.st_size for _, stat in files) - limit_bytes
    for path, stat in sorted(files, key=lambda item: max(item[1].st_atime, item[1].st_mtime)):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= stat.st_size
