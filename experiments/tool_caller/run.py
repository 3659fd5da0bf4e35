"""Starts the life of a tool caller: see `life.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # What it shares with other experiments lies there.
    sys.exit(importlib.import_module("tool_caller.life").main(sys.argv[1:]))
