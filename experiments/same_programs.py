"""Shows that a redesign costs no speed: compiles the 350M's programs at two commits and compares what they are made of.

    python experiments/same_programs.py OLD [NEW]

NEW is the working tree if left out. Compared are prefill, decoding and a training step, those of `lfm bench model`:
FLOPs, bytes, temporaries and the number of instructions of each kind. Times of two commits differ by 5 % on a machine
that others share; programs that are made of the same do the same work. Takes a few minutes and 12 GiB; ends with
status 1 on a difference.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from same_numbers import ROOT, checkout

PROMPT, STEP_TOKENS = 256, (2, 256)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--probe"]:
        for name, program in programs():
            print(json.dumps({name: counts(program)}), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        old = checkout(argv[0], Path(scratch) / "old")
        new = checkout(argv[1], Path(scratch) / "new") if argv[1:] else ROOT
        found = [probed(tree) for tree in (old, new)]
    different = False
    for name in found[0]:
        before, after = (one[name] for one in found)
        kinds = [one.pop("kinds") for one in (before, after)]
        print(name)
        for what in before:
            print(f"  {what:15} {before[what]:>20,} {after[what]:>20,}")
        if changed := {kind: [one.get(kind, 0) for one in kinds] for kind in sorted({*kinds[0], *kinds[1]})
                       if kinds[0].get(kind) != kinds[1].get(kind)}:
            print(f"  instructions by kind, where they differ: {changed}")
        different |= before != after or bool(changed)
    print("the programs differ" if different else "no differences")
    return int(different)


def probed(tree: Path) -> dict[str, Any]:
    """The counts of a tree's programs, from a process of its own."""
    command = [sys.executable, __file__, "--probe"]
    env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, cwd=tree).stdout
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return {name: value for line in lines for name, value in json.loads(line).items()}


def counts(program: Any) -> dict[str, Any]:
    """What a compiled program is made of."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    kinds = collections.Counter(re.findall(r"= \S+ ([a-z][a-z0-9\-]*)\(", program.as_text()))
    return {"FLOPs": int(cost["flops"]), "bytes": int(cost["bytes accessed"]), "temporaries": memory.temp_size_in_bytes,
            "instructions": sum(kinds.values()), "kinds": kinds}


def programs() -> Any:
    """The compiled programs of the tree that is imported, by name. Names that have moved since are looked for."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import lfm_jax as lfm
    from lfm_jax.infer.decoding import Decoding

    greedy = where("lfm_jax.sampling", "lfm_jax.infer.sampling").GREEDY
    config = lfm.ModelConfig.preset("lfm2.5-350m")
    model = lfm.LFM(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    tokens_1T = jnp.ones((1, PROMPT), jnp.int32)
    prefill = jax.jit(lambda params, tokens, state: nnx.merge(graphdef, params)(tokens, state=state, logits="last"))
    yield "prefill", prefill.lower(params, tokens_1T, model.init_state(1, PROMPT)).compile()
    for rows in (1, 8):
        decoding: Any = Decoding(model, [[1] * PROMPT] * rows, greedy, 8, [7])
        asked = {name: getattr(decoding, f"_{name}") for name in ("features", "plan") if hasattr(decoding, f"_{name}")}
        args = (decoding._model_params, decoding._carry, decoding._params, decoding._stop_ids, 8)
        yield f"decoding, {rows} rows", decoding._programs.decode.lower(*args, **asked).compile()
    batch = {name: jnp.ones(STEP_TOKENS, jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    training, optimizer = where("lfm_jax.pretrain.objective", "lfm_jax.train.step"), optax.adamw(1e-3)
    if hasattr(training, "next_token_training"):
        made = training.next_token_training(config, optimizer)
        step, state = made.compiled_step(), made.new_state(params)
    else:
        step, state = training.compile_train_step(config, optimizer), training.init_train_state(params, optimizer)
    yield "training step", step.lower(state, batch).compile()


def where(name: str, before: str) -> Any:
    """The module of a name, or of that which it had up to f395d2a; an installed package must not stand in for it."""
    import lfm_jax

    there = (Path(lfm_jax.__file__).parents[1] / Path(*name.split("."))).with_suffix(".py").exists()
    return importlib.import_module(name if there else before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
