"""One side of `lfm bench train`, in a process of its own so that its memory is its own: ours, or `transformers`.

It reads a job as JSON from its first line of input, builds and warms it up, and answers each further line, a number of
steps, with the seconds that they took. Every answer is a line of JSON. Ours needs jax, flax, optax and numpy only.

Dimensions: B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lfm_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training step to time."""

    side: str
    """ours or peer."""
    model: dict[str, Any]
    """Fields of ModelConfig; `preset` names the rest."""
    rows: int
    T: int
    documents: int = 0
    """Documents in a row; 0: the row is one document and no segment ids are given."""
    micro_batches: int = 1
    compile: bool = False
    """The peer's model through torch.compile."""

    @property
    def config(self) -> ModelConfig:
        # Through JSON, tuples have become lists.
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.model.items()}
        return ModelConfig.preset(fields.pop("preset")).replace(**fields)

    @property
    def tokens(self) -> int:
        return self.rows * self.T


@dataclasses.dataclass
class Side:
    """A job that is ready: `run(n)` makes n steps and returns when they are done."""

    run: Callable[[int], None]
    device: str
    """`device_kind`, or cpu."""
    compile_seconds: float | None
    """Tracing and compiling; None where that cannot be told from the first step."""
    device_bytes: Callable[[], int | None]
    """Largest number of bytes in use on the device so far."""


def ours(job: Job) -> Side:
    """The training step of `lfm train`: AdamW, clipping, the guard, norms by kind."""
    import jax

    from lfm_jax.model import param_traits
    from lfm_jax.pretrain.objective import next_token_training
    from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer

    config = job.config
    traits = param_traits(config, stacked=config.scan_layers)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup_steps=0), 1_000_000, traits)
    training = next_token_training(config, optimizer, micro_batches=job.micro_batches)
    with jax.default_prng_impl("rbg"):  # Any numbers will do, and the default takes a GPU's compiler a minute.
        state = training.random_state(0)
    batch = jax.tree.map(jax.numpy.asarray, _batch(job))
    step: Any = training.compiled_step()
    start = time.perf_counter()
    program = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start

    def run(steps: int) -> None:
        nonlocal state
        metrics: Any = {}
        for _ in range(steps):
            state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        if not np.isfinite(float(metrics["loss"])):
            raise FloatingPointError(f"the loss is {float(metrics['loss'])}")

    device = jax.devices()[0]

    def device_bytes() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform != "cpu" else None

    return Side(run, device.device_kind, compile_seconds, device_bytes)


def _batch(job: Job) -> dict[str, np.ndarray | None]:
    """Random tokens; documents of equal length."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(8, job.config.vocab_size, (job.rows, job.T), dtype=np.int32)
    at_BT = np.broadcast_to(np.arange(job.T, dtype=np.int32), tokens_BT.shape)
    length = -(-job.T // max(job.documents, 1))
    return {
        "tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1), "positions": at_BT % length,
        "segment_ids": at_BT // length + 1 if job.documents else None,
    }


def peer(job: Job) -> Side:
    """`Lfm2ForCausalLM` of transformers, fused AdamW, clipping; on a GPU bfloat16 through autocast."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from lfm_jax.convert.families import config_to_hf

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high" if job.config.dtype == "bfloat16" else "highest")
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Lfm2ForCausalLM(Lfm2Config(**config_to_hf(job.config))).float().train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if job.compile else model
    tokens_BT = _batch(job)["tokens"]
    assert tokens_BT is not None  # Only segment_ids may be.
    ids = torch.from_numpy(tokens_BT.astype(np.int64)).to(device)
    parts = ids.chunk(job.micro_batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            for part in parts:
                with torch.autocast(device, torch.bfloat16, enabled=job.config.dtype == "bfloat16"):
                    loss = forward(input_ids=part, labels=part, use_cache=False).loss / len(parts)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return Side(run, kind, None, lambda: torch.cuda.max_memory_allocated() if cuda else None)


def main(lines: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Builds the job of the first line and serves the others; a failure is an answer too."""
    try:
        job = Job(**json.loads(next(lines)))
        side = {"ours": ours, "peer": peer}[job.side](job)
        start = time.perf_counter()
        side.run(1)
        answer({"device": side.device, "compile_seconds": side.compile_seconds,
                "first_seconds": time.perf_counter() - start})
        for line in lines:
            start, busy = time.perf_counter(), time.process_time()
            side.run(int(line))
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            answer({"seconds": seconds, "cpu_seconds": busy, "rss": peak_rss(), "device_bytes": side.device_bytes()})
    except Exception as error:  # A finding, and no reason to lose the rest of the table.
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})


def peak_rss() -> int:
    """Most bytes of memory that this process has had. `VmHWM` where there is one: `ru_maxrss` includes the parent's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    # Libraries print where they like; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, lambda content: print(json.dumps(content), file=channel, flush=True))
