"""A grammar compiled in a process of its own, where it may take too long, too much memory, or the process with it.

What a JSON schema or a regex asks for is counted before llguidance sees it (`size.py`). Text in Lark combines rules,
schemas, regexes and their intersections; llguidance has crashed on some of a few kilobytes, and on others it never
came back, holding Python's lock.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lfm_jax.structured.json_schema import one_line
from lfm_jax.structured.schema import GrammarError

SECONDS = 1
"""Of a processor, for compiling a grammar and the first mask, and for the start of Python."""
MEBIBYTES = 300
"""Of memory, for the same."""
STACK_MEBIBYTES = 4
"""Half of what a thread has by default, so that a grammar that compiles here compiles in a fuller one too."""
PATIENCE_SECONDS = 60
"""By the clock, where other processes have the processors."""

_PROCESS = Path(__file__).with_name("trial_process.py")


def tried(text: str) -> str:
    """The grammar itself.

    Raises:
      GrammarError: it takes more than SECONDS or MEBIBYTES to compile, it crashes the compiler, or llguidance has
        something against it.
    """
    command = [sys.executable, "-I", _PROCESS, *map(str, (SECONDS, MEBIBYTES, STACK_MEBIBYTES))]
    try:
        done = subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise GrammarError(f"the grammar did not compile within {PATIENCE_SECONDS} s") from None
    if done.returncode:
        raise GrammarError(f"the grammar takes more than {SECONDS} s, {MEBIBYTES} MiB or too deep a stack to compile")
    if done.stdout:
        raise GrammarError(one_line(done.stdout.decode()))
    return text
