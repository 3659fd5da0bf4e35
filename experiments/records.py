"""What experiments measured, kept line by line, and what tells that files are not those of an earlier measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def stamp(path: str | Path) -> list[list[str | int]]:
    """Returns name, size and time of change (ns) of a file, or of all files below a folder; of a Hub id nothing."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(file, file.stat()) for file in files if file.exists()]
    return [[str(file.resolve()), of.st_size, of.st_mtime_ns] for file, of in facts]


class Records:
    """A file with a line of JSON for each measurement.

    Attributes:
      rows: those that `kept` keeps, and all that were added. A last line that a kill cut off is taken out of the file.
    """

    def __init__(self, path: Path, kept: Callable[[Row], bool] = lambda row: True):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, text = path, path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.rows = [row for row in map(json.loads, whole.splitlines()) if kept(row)]

    def add(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)
