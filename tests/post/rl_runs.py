"""What the tests of reinforcement learning share: prompts, rewards, and recipes of tiny runs.

Run as a program it is such a run, which is killed with a batch after its first checkpoint: `python rl_runs.py RECIPE`.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tuning
import yaml
from chats import write
from tuning import THINGS, base, load

from lfm_jax.post.grpo import GRPO
from lfm_jax.post.run import tune
from lfm_jax.train.checkpoint import CHECKPOINTS

STEPS, SAVED, KILLED = 30, 5, 9
"""Step of the first checkpoint, in the middle of a rollout, and one before the next, with whose batch a run may die."""
OWN = '''
def share(completion, example):
    """Of e among the characters."""
    return completion.count("e") / max(len(completion), 1)

def of_reply(completion, example):
    return float(example["reply"].endswith(completion))

def broken(completion, example):
    return example["missing"]

def late(completion, example):
    return float("nan") if completion else 0.0
'''
REWARDS: list[str] = []
WEIGHTS = (1.0, 0.1)


def share(text):
    return text.count("e") / max(len(text), 1)


def prompts():
    return [{"prompt": f"the {thing}? " * (i % 3 + 1), "pattern": "e", "id": i} for i, thing in enumerate(THINGS)]


def desk(root, **changes):
    """A directory with what `recipe` names; `changes` are of the model."""
    base(root / "base", **changes)
    write(root / "prompts.jsonl", prompts())
    (root / "rewards.py").write_text(OWN)
    return root


def recipe(root, run_dir, **changes):
    """As `tuning.recipe`, of a run by GRPO."""
    REWARDS[:] = [f"{root}/rewards.py:share", "regex"]
    path = tuning.recipe(root, run_dir)
    content = yaml.safe_load(path.read_text()) | {
        "method": "grpo", "steps": STEPS, "eval_every": 0, "checkpoint_every": SAVED, "guard": {"spike": 0},
        "micro_batches": 2, "optimizer": {"peak_lr": 2.0e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "data": {"sources": [str(root / "prompts.jsonl")], "seq_len": 64, "batch_size": 8, "heldout_fraction": 0.0},
        "grpo": {"rewards": list(REWARDS), "reward_weights": list(WEIGHTS), "generations": 4, "updates": 2, "slots": 4,
                 "max_new_tokens": 12, "mask_truncated": False, "samples_every": 5},
    }
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (content[section] if section else content)[field] = value
    if changes.get("grpo__rewards"):
        content["grpo"]["reward_weights"] = []
    path.write_text(yaml.safe_dump(content))
    return path


class Dying:
    """Rollouts up to a batch with which the process is killed."""

    def __init__(self, rollouts, run_dir):
        self.rollouts, self.run_dir, self.left = rollouts, run_dir, KILLED
        self.get_state, self.set_state = rollouts.get_state, rollouts.set_state

    def next_for(self, state):
        self.left -= 1
        if not self.left:
            while not (self.run_dir / CHECKPOINTS / f"{SAVED}").exists():  # It is written while the run goes on.
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rollouts.next_for(state)


if __name__ == "__main__":
    config = load(sys.argv[1])
    train_data = GRPO.train_data
    GRPO.train_data = lambda self, rows: Dying(train_data(self, rows), Path(config.run_dir))
    tune(config)
