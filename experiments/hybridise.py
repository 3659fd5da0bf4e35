"""How many attention layers does a trained model need? All but k of them become LIV convolutions, distilled from it.

    python experiments/hybridise.py configs/ablations/hybridise.yaml --model MODEL --books BOOKS --texts FILE ... \\
        [configs/ablations/sizes/hybridise-gpu.yaml] [--tasks-data DIR] [--minutes 8]

Every key of the recipe is a flag, and later files win. The same command goes on where a call ended, however it ended:
exit status 130 says that there is more to do. The page is OUT/hybridise/report/README.md; docs/ablations/hybridise
says how the study works.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lfm_jax import compile_cache
from lfm_jax.ablate.hybrid.run import StoppedError, run_study
from lfm_jax.ablate.hybrid.study import HybridStudy
from lfm_jax.recipe import load_recipe
from lfm_jax.train.launch import STOPPED


def main(args: list[str]) -> int:
    recipes = [arg for arg in args if arg.endswith(".yaml") and Path(arg).exists()]
    flags = [arg for arg in args if arg not in recipes]
    try:
        study = load_recipe(HybridStudy, recipes, flags, prog="hybridise.py", description=__doc__)
        compile_cache.enable()
        print(run_study(study))
    except (StoppedError, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError) as error:
        print(f"hybridise.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
