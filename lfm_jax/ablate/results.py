"""What a study has found: one small file a run, and results.jsonl made of them.

```
study.yaml                    the study as it was resolved
runs/TASK/POINT/seed-0.json   a run; tune-0.003.json one that chose a learning rate
costs/POINT.json
results.jsonl                 all of it in the order of the study: what the report is made from
```
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lfm_jax.data.manifest import write_whole

RESULTS = "results.jsonl"


def slug(point: str) -> str:
    """A point's name as a file name."""
    return re.sub(r"[^A-Za-z0-9=.+-]+", "_", point)


def run_file(out: Path, task: str, point: str, seed: int) -> Path:
    return out / "runs" / task / slug(point) / f"seed-{seed}.json"


def tuning_file(out: Path, task: str, point: str, peak_lr: float) -> Path:
    return out / "runs" / task / slug(point) / f"tune-{peak_lr:g}.json"


def cost_file(out: Path, point: str) -> Path:
    return out / "costs" / f"{slug(point)}.json"


def digest(*parts: Any) -> str:
    """A fingerprint of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, allow_nan=False) + "\n")


def read_record(path: Path, *expected: str) -> dict[str, Any] | None:
    """A record; None where there is none.

    Args:
      expected: fingerprints of what the record may belong to; none for anything.

    Raises:
      ValueError: it belongs to something else, or cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is not whole; delete it, and its run is made again") from None
    if expected and record["digest"] not in expected:
        raise ValueError(
            f"{path} holds a run of another study: its model, data, steps or learning rate differ from what the study "
            "now says; restore the study, choose another out, or delete the file to make that run again"
        )
    return record


def write_results(out: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Writes results.jsonl; fingerprints are left out."""
    lines = [json.dumps({key: value for key, value in record.items() if key != "digest"}) for record in records]
    write_whole(out / RESULTS, "\n".join(lines) + "\n")
    return out / RESULTS
