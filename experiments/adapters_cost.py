"""What places for adapters cost a step of decoding, on the device at hand.

    python experiments/adapters_cost.py [--preset lfm2.5-350m] [--dtype bfloat16] [--rank 16] [--times 9]

Random weights, after a prompt of 64 tokens; the rows have the adapters in turn, and the first none. Engines without
places and with 1, 4 and 8 of them, each with its adapter, run the same dispatch at 1 and 8 rows, in turns and in random
order. Printed are the median time of a step without places, and the ratios of the others to it. Without
`--preset` the model is tiny, and the figures say only that the script works.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import jax
import numpy as np
from flax import nnx

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import Adapter
from lfm_jax.adapters.trees import init_adapter
from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import STEPS, EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.model import LFM
from lfm_jax.testing import tiny_config

PLACES, ROWS = (0, 1, 4, 8), (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--times", type=int, default=9)
    args = parser.parse_args()
    config = tiny_config() if args.preset is None else ModelConfig.preset(args.preset)
    model = LFM(config.replace(dtype=args.dtype, param_dtype=args.dtype), rngs=nnx.Rngs(0))
    for rows in ROWS:
        engines = {places: made(model, places, rows, args.rank) for places in PLACES}
        seconds: dict[int, list[float]] = {places: [] for places in PLACES}
        for turn in range(args.times + 1):
            for places in random.sample(PLACES, len(PLACES)):
                taken = step_seconds(engines[places], places, rows)
                if turn:  # The first one compiles.
                    seconds[places].append(taken)
        base = statistics.median(seconds[0])
        ratios = ", ".join(f"{n} adapters {statistics.median(seconds[n]) / base:.2f}" for n in PLACES[1:])
        print(f"{rows} rows: {1e3 * base:.2f} ms a step; {ratios}", flush=True)


def made(model: LFM, places: int, rows: int, rank: int) -> Engine:
    """An engine whose places are all taken."""
    engine = Engine(model, EngineConfig(slots=((rows, 256),), chunk=64, steps=1, adapters=places, adapter_rank=rank))
    lora, rng = LoRAConfig(rank=rank), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapter(model.config, lora, jax.random.key(0)))
    for i in range(places):
        weights = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
        engine.load_adapter(str(i), Adapter(model.config, lora, weights))
    return engine


def step_seconds(engine: Engine, places: int, rows: int) -> float:
    """The time of a step in which all rows generate: that of a dispatch by the number of its steps."""
    adapters = [None if not places or (row == 0 and rows > 1) else str(row % places) for row in range(rows)]
    tickets = [engine.submit(Request(prompt=[1 + row] * 64, max_new_tokens=128, stop_ids=(), adapter=name),
                             lambda event: None) for row, name in enumerate(adapters)]
    [pool] = engine._pools
    while len(pool.live) < rows:
        engine.step()
    jax.block_until_ready(pool._slots)
    began = time.perf_counter()
    pool._slots, told = jax.block_until_ready(
        pool._programs.decode(pool.params, pool._slots, np.int32(STEPS), rows=rows, plain=True, draft=0))
    taken = time.perf_counter() - began
    assert (np.asarray(told.token) >= 0).all(), "a row ended early"
    for ticket in tickets:
        engine.cancel(ticket)
    while engine.step():
        pass
    return taken / STEPS


if __name__ == "__main__":
    main()
