"""What tells that files are not those of an earlier measurement."""

from __future__ import annotations

from pathlib import Path


def stamp(path: str | Path) -> list[list[str | int]]:
    """Returns name, size and time of change (ns) of a file, or of all files below a folder; of a Hub id nothing."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(file, file.stat()) for file in files if file.exists()]
    return [[str(file.resolve()), of.st_size, of.st_mtime_ns] for file, of in facts]
