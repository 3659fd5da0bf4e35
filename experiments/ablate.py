"""Every study of `lfm ablate` in configs/ablations one after another, as a script, to be changed.

Stops and resumes like `lfm ablate`; flags go to every study, for example `--processes 2`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lfm_jax.ablate.schedule import AblateConfig, ablate
from lfm_jax.recipe import load_recipe
from lfm_jax.train.launch import STOPPED

STUDIES = Path(__file__).parent.parent / "configs" / "ablations"
OTHERS = {"hybridise"}
"""Studies that have a script of their own."""


def main(flags: list[str]) -> int:
    worst = 0
    for path in sorted(path for path in STUDIES.glob("*.yaml") if path.stem not in OTHERS):
        config = load_recipe(AblateConfig, path, flags, prog="ablate.py")
        status = ablate(config, [str(path), *flags])
        if status == STOPPED:
            return status
        worst = max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
