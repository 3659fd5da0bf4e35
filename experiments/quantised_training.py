"""Trains a model through rounded weights so that it loses less when it is quantised.

    python experiments/quantised_training.py MODEL RUN_DIR [--quantize Q4_0] [--steps 400] [--lr 5e-5]
        [--own-tokens 400000] [--texts FILE ...]

MODEL is anything `lfm.load` takes. It learns from text that it has written itself, sampled at temperature 1 after a
token drawn from its vocabulary (as in LLM-QAT, arXiv 2305.17888), so that it stays the model that it was, and from
`--texts`.
The samples are kept in RUN_DIR/own.jsonl, and the rest of the directory is a run; killed and started again, both go on.
What it gains: `experiments/quantised_quality.py RUN_DIR TEXT --types ...`, beside the same for MODEL.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import lfm_jax as lfm
from lfm_jax import compile_cache
from lfm_jax.data.config import DataConfig
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.run import train
from lfm_jax.train.optimizer import OptimizerConfig

ROWS, LENGTH = 64, 512
"""Texts that are sampled at a time, and their tokens."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--quantize", default="Q4_0")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--own-tokens", type=int, default=400_000)
    parser.add_argument("--texts", nargs="*", default=[])
    args = parser.parse_args(argv)
    compile_cache.enable()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    own = args.run_dir / "own.jsonl"
    config = sample(args.model, own, args.own_tokens)
    train(TrainConfig(
        run_dir=str(args.run_dir / "run"), steps=args.steps, init_from=args.model,
        model=config.replace(param_dtype="float32", dtype="bfloat16", quantize=args.quantize),
        data=DataConfig(sources=(str(own), *args.texts), seq_len=LENGTH, batch_size=args.batch,
                        heldout_fraction=0.0),
        optimizer=OptimizerConfig(peak_lr=args.lr, schedule="cosine", warmup_steps=20, weight_decay=0.0),
        checkpoint_every=50, log_every=5,
    ))
    return 0


def sample(name: str, path: Path, tokens: int) -> lfm.ModelConfig:
    """Samples texts until there are enough tokens; returns the config of the model."""
    model, tokenizer = lfm.load(name, dtype=jnp.bfloat16)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer")
    config = model.config
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    while done * LENGTH < tokens:
        samplings = [lfm.Sampling(temperature=1.0, seed=done + row) for row in range(ROWS)]
        first = np.random.default_rng(done).integers(tokenizer.get_vocab_size(), size=ROWS).tolist()
        texts = lfm.generate(model, tokenizer, [[token] for token in first], samplings, max_new_tokens=LENGTH - 1)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": tokenizer.decode([token]) + text}) + "\n"
                            for token, text in zip(first, texts, strict=True))
        done += ROWS
        print(f"sampled {done * LENGTH:,} of {tokens:,} tokens", file=sys.stderr, flush=True)
    return config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
