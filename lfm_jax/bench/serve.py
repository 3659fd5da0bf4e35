"""`lfm bench serve` or `python -m lfm_jax.bench.serve`: tokens a second of the engine, and decoding by context.

Needs jax, flax and numpy. On a CPU the peer is `transformers`; on an accelerator each row stands beside its roofline.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.bench.timing import Row, conditions, interleave, table
from lfm_jax.chips import Chip, chip_of
from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Event, Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.kernels.attention import SCORE_BYTES
from lfm_jax.model import LFM
from lfm_jax.state import State, at_context

EQUAL, SPREAD = 48, (16, 256)
"""Tokens a request on a CPU: all the same, and drawn from a range."""
PROMPT = 64
CONTEXTS = (1024, 8192, 32_768)
"""At which a step of decoding is timed."""
SHAPES = ((512, 512), (1024, 128))
"""(prompt, generated) tokens of a request on an accelerator."""
CONCURRENCY = (1024, 1, 256, 2048, 64, 8)
"""Requests at one time, on an accelerator, the most telling first: the time may not suffice for all."""
SECONDS = 330.0
"""After so long no further row of an accelerator is begun."""
PEER = ((1, 512), (64, 512), (256, 512))
"""Rows and tokens of the prompts after which `transformers` decodes on an accelerator."""


def bench_serve(
    *, preset: str = "lfm2.5-350m", repeats: int = 3, gguf: Path | None = None, toy: bool = False
) -> str:
    """Measures and returns a Markdown report; says on stderr what it is at.

    Args:
      preset: shape of the model, with random weights: float32 on a CPU, bfloat16 elsewhere.
      repeats: timed runs of which the median counts; throughput on an accelerator, and texts of spread lengths, are
        measured once.
      gguf: the same shape as llama.cpp reads it, F32, to decode beside; needs llama-cpp-python.
      toy: a small model and short runs, to try the command.

    Raises:
      ValueError: `gguf` and no llama-cpp-python, or a model of another size.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    config = ModelConfig.preset(preset).replace(param_dtype=dtype, dtype=dtype)
    if toy:
        config = config.replace(
            hidden_size=64, ffn_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512,
            layer_types=("conv", "full_attention"),
        )
    with jax.default_prng_impl("rbg"):  # Any numbers will do, and the default takes a GPU's compiler a minute.
        model = LFM(config, rngs=nnx.Rngs(0))
    head = (f"{config.num_params():,} parameters, {dtype}; {jax.devices()[0].device_kind}.\n"
            + conditions("jax", "jaxlib", "flax", "torch", "transformers", "llama_cpp_python"))
    parts = [head]
    if gguf is not None:
        parts.append(_beside_llama_cpp(model, gguf, repeats, toy))
    parts.append(_beside_transformers(model, repeats, toy) if on_cpu else _throughput(model, toy))
    return "\n\n".join([*parts, _contexts(model, repeats)])


# -------------------------------------------------------------------- runs


class _Clock:
    """Counts the tokens of a run, and when the first one of each request came."""

    def __init__(self) -> None:
        self.tokens = 0
        self.first: list[float] = []

    def listener(self) -> Callable[[Event], None]:
        asked, waiting = time.perf_counter(), True

        def hear(event: Event) -> None:
            nonlocal waiting
            if waiting and event.tokens:
                waiting = False
                self.first.append(time.perf_counter() - asked)
            self.tokens += len(event.tokens)

        return hear


def _requests(config: ModelConfig, prompt: int, lengths: Sequence[int], seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(prompt=rng.integers(8, config.vocab_size, prompt).tolist(), max_new_tokens=n, stop_ids=())
        for n in lengths
    ]


def _run(engine: Engine, requests: Sequence[Request]) -> _Clock:
    clock = _Clock()
    for request in requests:
        engine.submit(request, clock.listener())
    while engine.step():
        pass
    return clock


def _engine(model: LFM, slots: int, length: int, **changes: Any) -> Engine:
    engine = Engine(model, EngineConfig(slots=((slots, length),), max_queue=10**6, **changes))
    _say(f"{engine.warm_up()} programs compiled for {slots} slots of {length} tokens")
    return engine


# -------------------------------------------------------------------- on a CPU


def _beside_transformers(model: LFM, repeats: int, toy: bool) -> str:
    """Rows beside `transformers` with the same weights, in turn in one process."""
    from lfm_jax.bench.model import Peer

    config, peer, slots = model.config, Peer.build(model), 16
    equal = 6 if toy else EQUAL
    low, high = (2, 12) if toy else SPREAD
    rng = np.random.default_rng(1)
    spread = rng.integers(low, high + 1, slots).tolist()
    engine = _engine(model, slots, PROMPT + high, steps=32)
    rows = []

    def batch(requests: Sequence[Request]) -> np.ndarray:
        return np.array([request.prompt for request in requests], np.int32)

    def done(name: str, times: Sequence[float], target: float) -> None:
        rows.append(Row(name, times[0], times[1] if len(times) > 1 else None, target))
        _say(table(rows[-1:], "transformers").splitlines()[-1])  # Kept if the rest is broken off.

    def row(name: str, lengths: Sequence[int], target: float, peer_run: Callable[[], object], repeats: int) -> None:
        _say(name)
        requests = _requests(config, PROMPT, lengths)
        tasks: list[Callable[[], object]] = [lambda: _run(engine, requests)]
        if peer is not None:
            tasks.append(peer_run)
        done(name, interleave(tasks, repeats) if repeats > 1 else [_seconds(task) for task in tasks], target)

    one = _requests(config, PROMPT, [equal])
    single = [_requests(config, PROMPT, [n])[0] for n in (4, 4 + equal)]
    _say("decode, batch 1")
    tasks: list[Callable[[], object]] = [
        lambda n=request.max_new_tokens: generate_tokens(model, [single[0].prompt], max_new_tokens=n, stop_ids=())
        for request in single
    ]
    if peer is not None:
        tasks += [lambda n=request.max_new_tokens: peer.generate(batch(one), n) for request in single]
    *times, read = interleave([*tasks, _reader(model)], repeats)
    each = [(times[i + 1] - times[i]) / equal for i in range(0, len(times), 2)]
    done("one token at batch 1, `lfm.generate`", each, 2.0)
    bound = (f"For scale: NumPy reads all parameters once, on all cores, in {read * 1e3:.2f} ms "
             f"({config.num_params() * 4 / read / 1e9:.1f} GB/s); a token at batch 1 takes {each[0] / read:.2f} times "
             "that.")
    _say(bound)
    row(f"{slots} requests, {equal} tokens each", [equal] * slots, 1.7,
        lambda: peer and peer.generate(batch(_requests(config, PROMPT, [equal] * slots)), equal), repeats)
    # A batch of transformers goes on until its longest text is done. Once: it takes minutes, and all is warm.
    row(f"{2 * slots} requests, {low} to {high} tokens", spread * 2, 3.0, lambda: [
        peer and peer.generate(batch(_requests(config, PROMPT, spread)), max(spread)) for _ in range(2)
    ], 1)
    _say("time to the first token")
    clock = _run(engine, _requests(config, PROMPT, spread * 2))
    alone = statistics.median(_run(engine, one).first[0] for _ in range(repeats))
    first = (f"Time to the first token: {alone * 1e3:.0f} ms alone; of {2 * slots} requests at once for {slots} slots "
             f"median {statistics.median(clock.first) * 1e3:.0f} ms, longest {max(clock.first) * 1e3:.0f} ms.")
    return f"Prompts of {PROMPT} tokens, greedy.\n\n{table(rows, 'transformers')}\n\n{bound}\n\n{first}"


def _reader(model: LFM) -> Callable[[], object]:
    """A task that reads every parameter once, on all cores: near the memory's limit for a token at batch 1."""
    cores = len(os.sched_getaffinity(0))
    pieces = [piece for x in jax.tree.leaves(nnx.split(model, nnx.Param)[1])
              for piece in np.array_split(np.asarray(x).reshape(-1), cores)]

    def read(core: int) -> None:
        for piece in pieces[core::cores]:
            piece.max(initial=0)  # No arithmetic to speak of; NumPy lets other threads run meanwhile.

    def task() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(read, range(cores)))

    return task


def _beside_llama_cpp(model: LFM, gguf: Path, repeats: int, toy: bool) -> str:
    """One token of decoding by each, in turn; the time of a few is taken off that of more, and the prompt's with it."""
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")  # No part of any extra.
    except ImportError as error:
        raise ValueError(f"gguf is for a comparison with llama.cpp: pip install llama-cpp-python ({error})") from None
    cores = len(os.sched_getaffinity(0))
    peer = llama_cpp.Llama(str(gguf), n_ctx=256, n_threads=cores, n_threads_batch=cores, verbose=False)
    size = llama_cpp.llama_model_n_params(peer.model)
    if abs(size / model.config.num_params() - 1) > 0.01:
        raise ValueError(f"gguf has {size:,} parameters, the preset {model.config.num_params():,}: not the same shape")
    [request] = _requests(model.config, PROMPT, [1])
    equal = 6 if toy else EQUAL

    def theirs(n: int) -> None:
        peer.reset()
        peer.eval(request.prompt)
        for _ in range(n):
            peer.eval([1])

    _say("decode, batch 1, beside llama.cpp")
    times = interleave([
        *[lambda n=n: generate_tokens(model, [request.prompt], max_new_tokens=n, stop_ids=()) for n in (4, 4 + equal)],
        *[lambda n=n: theirs(n) for n in (4, 4 + equal)],
    ], repeats)
    each = [(times[i + 1] - times[i]) / equal for i in (0, 2)]
    found = table([Row("one token at batch 1, `lfm.generate`", each[0], each[1], 0.8)], "llama.cpp, F32")
    _say(found.splitlines()[-1])
    return found


# -------------------------------------------------------------------- on an accelerator


def _throughput(model: LFM, toy: bool) -> str:
    """Output tokens a second by concurrency, beside what memory and arithmetic allow."""
    head = ["| prompt / generated | concurrency | output tokens/s | of the roofline | first token, median |",
            "|---|---|---|---|---|"]
    end, lines, left_out = time.monotonic() + SECONDS, {}, 0
    for prompt, made in SHAPES if not toy else ((32, 16),):
        for concurrency in CONCURRENCY:
            if time.monotonic() > end:
                left_out += 1
                continue
            try:
                line = _row_of(model, prompt, made, concurrency)
            except (ValueError, jax.errors.JaxRuntimeError) as error:  # Above all memory; the others are worth having.
                line = f"| {prompt} / {made} | {concurrency} | failed: {str(error).splitlines()[0][:80]} | | |"
            lines[prompt, concurrency] = line
            _say(line)
    found = "\n".join([*head, *(lines[key] for key in sorted(lines))])
    if left_out:
        found += f"\n\nOut of time: {left_out} rows were not run."
    return f"{found}\n\n{_peer_on_accelerator(model.config, ((1, 8),) if toy else PEER)}"


def _row_of(model: LFM, prompt: int, made: int, concurrency: int) -> str:
    rate, first = throughput(model, prompt, made, concurrency)
    chip, share = chip_of(jax.devices()[0]), ""
    if chip is not None:
        bound = roofline(model.config, chip, prompt, made, concurrency)
        share = f"{rate / bound:.0%} of {bound:,.0f}"
    return f"| {prompt} / {made} | {concurrency} | {rate:,.0f} | {share} | {first * 1e3:.0f} ms |"


def throughput(model: LFM, prompt: int, made: int, concurrency: int, **changes: Any) -> tuple[float, float]:
    """Output tokens/s, prompts included in the time, and the median seconds to the first token. There are twice as many
    requests as the concurrency below 256, and as many from there on; `changes` are fields of `EngineConfig`."""
    chunk, length = 512, prompt + made
    # As many prompts at once as have their scores in memory; above that attention goes by blocks, slow on a GPU.
    most = SCORE_BYTES // (4 * model.config.num_heads * chunk * length)
    config = EngineConfig(slots=((concurrency, length),), max_queue=10**6, steps=32, chunk=chunk,
                          prefill_rows=max(1, min(32, most, concurrency)), fixed_rows=True, **changes)
    gc.collect()  # Slots of the row before must be gone.
    engine = Engine(model, config)
    requests = _requests(model.config, prompt, [made] * (2 * concurrency if concurrency < 256 else concurrency))
    _run(engine, _requests(model.config, prompt, [3]))  # Compiles what these need, a few of all the programs.
    began = time.perf_counter()
    clock = _run(engine, requests)
    seconds = time.perf_counter() - began
    return clock.tokens / seconds, statistics.median(clock.first)


def _peer_on_accelerator(config: ModelConfig, shapes: Sequence[tuple[int, int]]) -> str:
    """Decoding by `transformers` on the same device: the time of some tokens is taken off that of more."""
    from lfm_jax.convert.families import config_to_hf

    found, failure = [], ""
    try:
        torch, hf = importlib.import_module("torch"), importlib.import_module("transformers")
        device, few, more = "cuda" if torch.cuda.is_available() else "cpu", 8, 40
        with torch.device(device):
            model = hf.Lfm2ForCausalLM(hf.Lfm2Config(**config_to_hf(config))).to(torch.bfloat16).eval()
        for rows, prompt in shapes:
            _say(f"transformers, {rows} rows")
            ids = torch.randint(8, config.vocab_size, (rows, prompt), device=device)

            def generate(count: int, ids: Any = ids) -> object:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                     min_new_tokens=count, do_sample=False, pad_token_id=0)
                return out[:, -1].tolist()  # Waits for the device.

            generate(few)
            once, twice = (_seconds(lambda n=n: generate(n)) for n in (few, more))
            found.append(f"{rows * (more - few) / (twice - once):,.0f} at {rows}")
    except Exception as error:  # Whatever it is, it is the finding.
        failure = " ".join(str(error).split())[:120]
    if not found:
        return f"transformers: absent ({failure})."
    return (f"transformers on the same device, eager PyTorch without causal-conv1d, bfloat16, decoding alone after "
            f"{shapes[-1][1]} tokens of prompt, tokens/s by rows: {', '.join(found)}"
            f"{failure and f'; then failed: {failure}'}.")


def roofline(config: ModelConfig, chip: Chip, prompt: int, made: int, concurrency: int) -> float:
    """Output tokens a second that a device's memory and arithmetic allow.

    A step reads all parameters once and the state of each row, at its mean length; prompts are arithmetic alone. The
    larger of the time for bytes and that for operations counts, for steps and prompts by themselves.
    """
    item = jnp.dtype(config.dtype).itemsize
    mean = prompt + made // 2
    step_bytes = config.num_params() * item + concurrency * config.state_bytes(mean)
    step_flops = concurrency * config.flops_per_token(mean)
    step = max(step_bytes / chip.hbm_bandwidth, step_flops / chip.peak_bf16_flops)
    head = 2 * config.vocab_size * config.hidden_size  # Of a prompt's last token alone.
    taken_in = (prompt * (config.flops_per_token(prompt) - head) + head) / chip.peak_bf16_flops
    return made / (made * step / concurrency + taken_in)


# -------------------------------------------------------------------- long contexts


def _contexts(model: LFM, repeats: int) -> str:
    """One step of decoding after contexts of several lengths, beside a model of the same size with attention alone."""
    config = model.config
    dense = config.replace(layer_types=("full_attention",) * config.num_layers)
    gap = config.num_params() - dense.num_params()
    dense = dense.replace(ffn_size=dense.ffn_size + round(gap / (3 * dense.hidden_size * dense.num_layers)))
    lines = [f"One step of decoding at batch 1, beside {dense.num_params():,} parameters, all attention.", "",
             "| context | hybrid | all attention | ratio | state of the hybrid | of all attention |",
             "|---|---|---|---|---|---|"]
    with jax.default_prng_impl("rbg"):
        steps = {config: _step(model), dense: _step(LFM(dense, rngs=nnx.Rngs(0)))}
    for context in CONTEXTS:
        _say(f"a step at {context} tokens")
        ours, theirs = interleave([steps[c](context) for c in (config, dense)], repeats)
        size = [c.state_bytes(context) / 2**20 for c in (config, dense)]
        lines.append(f"| {context:,} | {ours * 1e3:.3g} ms | {theirs * 1e3:.3g} ms | {theirs / ours:.2f}x | "
                     f"{size[0]:.1f} MiB | {size[1]:.1f} MiB |")
        _say(lines[-1])
    return "\n".join(lines)


def _step(model: LFM) -> Callable[[int], Callable[[], object]]:
    """A function from a context to a task that decodes some tokens after it; its time is that of one token."""
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)

    @functools.partial(jax.jit, donate_argnames="state")
    def run(params: Any, state: State, token_B1: jax.Array) -> tuple[jax.Array, State]:
        logits_B1V, new_state = nnx.merge(graphdef, params)(token_B1, state=state, logits="last")
        assert new_state is not None  # It is None only when none was given.
        return logits_B1V, new_state

    def at(context: int) -> Callable[[], object]:
        # What is in the slots makes no difference to the time, only how many are in use.
        state = at_context(model.init_state(1, min(context + 64, model.config.max_position)), context)

        def task() -> None:
            nonlocal state
            logits_B1V, state = run(params, state, jnp.ones((1, 1), jnp.int32))
            jax.block_until_ready(logits_B1V)

        return task

    return at


def _seconds(task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def _say(text: str) -> None:
    print(f"bench serve: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lfm_jax.bench.serve")
    parser.add_argument("--toy", action="store_true", help="a small model and short runs, to try the command")
    print(bench_serve(toy=parser.parse_args().toy))
