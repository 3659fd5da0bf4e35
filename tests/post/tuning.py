"""What the tests of tuning share: a tiny model to begin with, and recipes of runs that go on from it.

Run as a program it is such a run, which is killed with a batch after its first checkpoint: `python tuning.py RECIPE`.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chats import TURNS, turns, write
from tiny_runs import written

import lfm_jax as lfm
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.run import tune
from lfm_jax.post.sft import SFT
from lfm_jax.recipe import load_recipe
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.train.checkpoint import has_checkpoint

COLOURS = ["red", "green", "blue", "black", "white", "grey"]
THINGS = ["fox", "dog", "cat", "hen", "owl", "bee", "ant", "cow"]


def facts():
    """Chats of which each can be learnt by heart."""
    return [turns(f"the {thing}?", COLOURS[i % len(COLOURS)], "and?", "so it is") for i, thing in enumerate(THINGS)]


def base(directory, **changes):
    """A Hugging Face directory of a tiny model with a tokenizer and a chat template."""
    tokenizer = tiny_tokenizer(vocab_size=300)
    fields = dict(vocab_size=tokenizer.get_vocab_size(), layer_types=("conv", "full_attention"), hidden_size=16,
                  ffn_size=24, num_heads=2, num_kv_heads=1, init_std=0.1)
    lfm.save_hf(tiny_model(**(fields | changes)), directory, tokenizer)
    (directory / "chat_template.jinja").write_text(TURNS)
    return directory


def recipe(root, run_dir, **changes):
    """The path of a recipe for a tiny run in `run_dir` from `root`/base on `root`/chats.jsonl; `data__seed=1` changes a
    key of a section."""
    content = {
        "run_dir": str(run_dir), "init_from": str(root / "base"), "epochs": 6, "eval_every": 5, "checkpoint_every": 4,
        "log_every": 100, "optimizer": {"peak_lr": 2.0e-2, "warmup_fraction": 0.2},
        "data": {"sources": [str(root / "chats.jsonl")], "seq_len": 96, "batch_size": 2,
                 "heldout": [str(root / "held.jsonl")]},
        "model": {},
    }
    return written(content, run_dir, changes)


def load(path, *flags):
    return load_recipe(TuneConfig, path, flags)


def desk(root):
    """A directory with what `recipe` names."""
    base(root / "base")
    write(root / "chats.jsonl", facts())
    write(root / "held.jsonl", facts()[:2])
    return root


def pairs():
    """Pairs of answers to the questions of `facts`."""
    return [{"prompt": f"the {thing}?", "chosen": COLOURS[i % 6], "rejected": f"{COLOURS[(i + 2) % 6]} or so"}
            for i, thing in enumerate(THINGS)]


class Dying:
    """The batches of a corpus, up to one with which the process is killed."""

    def __init__(self, batches, run_dir, last):
        self.batches, self.run_dir, self.left = batches, run_dir, last
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.left -= 1
        if not self.left:
            while not has_checkpoint(self.run_dir):  # It is written while the run goes on.
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self.batches)


if __name__ == "__main__":
    config = load(sys.argv[1])
    train_data = SFT.train_data
    SFT.train_data = lambda self, rows: Dying(train_data(self, rows), Path(config.run_dir), 8)
    tune(config)
