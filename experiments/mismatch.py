"""Measures how far sampler and trainer are apart: the log-probability of every sampled token, by the one and the other.

    python experiments/mismatch.py MODEL CHATS [--figure runs/mismatch.png] [--dtypes float32 bfloat16] [--prompts 8]
        [--generations 8] [--max-new-tokens 128] [--seq-len 1024] [--slots 64] [--records runs/mismatch.jsonl]

Prompts, sampling and the sides are those of `beside_generate.py`, in one rollout. Here the sampler is the engine, and
the trainer is the forward pass of GRPO over prompt and answer; there it is `generate` with its cache, and a plain
forward pass of the same tokens. In bfloat16 both of a side compute in it. Each side and dtype is a line of the records,
with the difference of every token, in nats; started again with the same settings and files it repeats none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from beside_generate import (
    SIDES,
    Chat,
    engine,
    find,
    generated,
    opened,
    parser,
    read,
    sampled,
    settings_of,
    torch_model,
)

ABOVE = (1e-5, 1e-3, 1e-2, 0.1)
ROWS = 8
"""Answers in one forward pass of a trainer."""
FLOOR = 1e-8
"""The histogram has no less; equal to the bit is there too."""


def main(argv: list[str]) -> int:
    flags = parser(__doc__, "runs/mismatch.jsonl", rollouts=1)
    flags.add_argument("--figure", type=Path, default=Path("runs/mismatch.png"))
    args = flags.parse_args(argv)
    of, records = opened(args, ("prompts", "generations", "max_new_tokens", "seq_len", "slots", "threads"))
    for side, measure in zip(SIDES, (ours, theirs), strict=True):
        for dtype in args.dtypes:
            if not find(records.rows, dtype, side, 0):
                found = measure(args, read(args, args.prompts), dtype)
                print(f"{side}, {dtype}: {len(found):,} tokens", file=sys.stderr, flush=True)
                records.add({"of": of, "dtype": dtype, "side": side, "rollout": 0,
                             "differences": [float(f"{x:.4g}") for x in found]})
    rows = [row for row in records.rows if row["dtype"] in args.dtypes]
    print(table(rows))
    draw(rows, args.figure)
    print(f"\n{args.figure}\n{settings_of(of)}")
    return 0


def ours(args: argparse.Namespace, chat: Chat, dtype: str) -> np.ndarray:
    """|engine - trainer| of every sampled token."""
    import jax
    from flax import nnx

    from lfm_jax.data.batch import LOSS_IGNORE
    from lfm_jax.kernels.logprobs import token_logprobs
    from lfm_jax.model import abstract_model
    from lfm_jax.post.config import tuned_model
    from lfm_jax.post.rollouts import Answer, rows_of

    made, weights = engine(args, chat.stop_ids, dtype)
    groups = sampled(args, made, chat.prompts, chat.stop_ids, 0)
    answers = [Answer([*prompt, *one.tokens], len(prompt), [x.logprob for x in one.logprobs], 0.0, True)
               for prompt, group in zip(chat.prompts, groups, strict=True) for one in group]
    graphdef = abstract_model(tuned_model(str(args.model)).replace(dtype=dtype))[0]

    @jax.jit
    def policy(weights: Any, batch: Any) -> jax.Array:  # As `grpo.PolicyGradient` has it.
        model = nnx.merge(graphdef, weights)
        hidden_BTD, _ = model.hidden(batch["tokens"], None, batch["segment_ids"])
        return token_logprobs(hidden_BTD, model.head_VD, batch["targets"], chunk=512, temperature=1.0)

    found = []
    for start in range(0, len(answers), ROWS):
        batch = rows_of(answers[start : start + ROWS], args.seq_len)
        sampled_BT = batch["targets"] != LOSS_IGNORE
        policy_BT = np.asarray(policy(weights, batch))
        found.append(np.abs(policy_BT - batch["behaviour"])[sampled_BT])
    return np.concatenate(found)


def theirs(args: argparse.Namespace, chat: Chat, dtype: str) -> np.ndarray:
    """|generate - plain forward pass| of every sampled token."""
    import torch

    model, sampler = torch_model(args, dtype), Sampler()
    ids, mask, lengths = generated(args, model, chat.prompts, chat, 0, logits_processor=[sampler])
    start = mask.shape[1]
    sampler.take(ids)
    count = ids.shape[1] - start
    behaviour = torch.stack(sampler.found, dim=1)
    mask = torch.cat([mask, torch.ones_like(ids[:, start:])], dim=1)
    positions, found = (mask.cumsum(dim=1) - 1).clip(0), []
    for row in range(0, len(ids), ROWS):
        part = slice(row, row + ROWS)
        with torch.no_grad():
            logits = model(input_ids=ids[part], attention_mask=mask[part], position_ids=positions[part],
                           use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        policy = logits.float().log_softmax(-1).gather(-1, ids[part, start:, None])[..., 0]
        differences = (policy - behaviour[part]).abs()
        found += [differences[i, :n] for i, n in enumerate(lengths[part])]
    return torch.cat(found).numpy()


class Sampler:
    """A processor of logits that changes none, and keeps the log-probability of each token that follows.

    Attributes:
      found: of each step, those of all rows.
    """

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._logprobs: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._logprobs is not None:
            self.take(input_ids)
        self._logprobs = scores.float().log_softmax(-1)
        return scores

    def take(self, input_ids: Any) -> None:
        """Looks up the tokens that were sampled last."""
        self.found.append(self._logprobs.gather(-1, input_ids[:, -1:])[:, 0])


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| side | dtype | tokens | mean | median | 99 % below | most | "
             + " | ".join(f"above {x:g}" for x in ABOVE) + " |", "|---" * (7 + len(ABOVE)) + "|"]
    for row in rows:
        x = np.array(row["differences"])
        numbers = [x.mean(), np.median(x), np.quantile(x, 0.99), x.max()]
        lines.append(" | ".join([f"| {row['side']}", row["dtype"], f"{len(x):,}", *(f"{n:.1e}" for n in numbers),
                                 *(f"{np.mean(x > least):.2%}" for least in ABOVE)]) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The histogram of all rows, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, edges = figure.add_subplot(), np.logspace(np.log10(FLOOR), 1, 55)
    for row, colour in zip(rows, ("C0", "C1", "C2", "C3"), strict=False):
        x = np.clip(row["differences"], FLOOR, edges[-1])
        shares = np.histogram(x, edges)[0] / len(x)
        axes.stairs(100 * shares, edges, label=f"{row['side']}, {row['dtype']}", color=colour, linewidth=1.5)
    axes.set(xscale="log", xlabel="|log-probability by the sampler - by the trainer|, nats (0 at the left end)",
             ylabel="% of sampled tokens")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
