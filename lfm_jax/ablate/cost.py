"""What a model costs on this machine, beside the base of its study: measured, not guessed.

Both are timed in turn in one process, so that what else the machine does meets both alike: the ratios are the result,
the absolute figures are of this machine.

Dimensions: B batch, T time, S key slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.bench.passes import on_accelerator
from lfm_jax.bench.timing import conditions, interleave
from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM, abstract_model, param_traits
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.problems import raise_problems
from lfm_jax.state import State, at_context, init_state
from lfm_jax.train.objective import DeviceBatch
from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.train.state import TrainState
from lfm_jax.train.step import Training

PREFILL_LENGTH = 1024
"""Tokens of a timed prefill, where the model's context holds as many."""
DECODE_STEPS = (16, 128)
"""Least and most tokens of one timed decode; the state has room for the most beyond its context."""
DECODE_SLOTS = 2**17
"""Key slots that a layer of full attention reads in one timed decode, within the bounds of DECODE_STEPS."""
STILL_LR = 1e-6
"""Peak learning rate of the timed training steps. An update that is skipped is cheaper than one that is made, so the
parameters must not run away on random tokens."""

Timed = Callable[[], object]


class _Model(NamedTuple):
    config: ModelConfig
    params: Any
    """A plain dict of random arrays."""


def measure_cost(
    config: ModelConfig, base: ModelConfig, *, train_shape: tuple[int, int], optimizer: OptimizerConfig,
    contexts: tuple[int, ...] = (1024, 8192, 32768), prefill_length: int = PREFILL_LENGTH, repeats: int = 5,
    loss_chunk: int = 2048,
) -> dict[str, Any]:
    """Counts and times one model, and times the base of its study in turn with it (A B A B ...).

    What is timed: the whole training step, on random tokens; one prefill into an empty state, batch 1; and greedy
    decoding at batch 1, many tokens in one program, with `context` tokens in the state already. Weights are random. A
    base that comes again is not compiled again.

    Args:
      config: the model.
      base: what `relative` compares with; it may be the same, which is then timed once.
      train_shape: [B, T] of a training step.
      optimizer: of a training step; only its kind matters, not its rates.
      contexts: tokens in the state before those whose decoding is timed.
      prefill_length: tokens of the prefill.
      repeats: timed runs of which the median counts.
      loss_chunk: tokens whose logits a training step has in memory at one time.

    Returns:
      What JSON can hold. params; train_flops_per_token; train_tokens_per_second; prefill_tokens_per_second;
      decode_tokens_per_second and state_bytes (of a state with room for the context), both by str(context); relative:
      speed over the base's, above 1 where the model is faster, as train, prefill and decode by str(context); shape and
      conditions, one line each.

    Raises:
      ValueError: a context or the prefill is empty or longer than `max_position` of either model, or nothing to repeat;
        one message for all.
    """
    _check(config, base, contexts, prefill_length, repeats)
    B, T = train_shape
    models = [_random_model(c) for c in ([config] if config == base else [config, base])]
    seconds = _Seconds(
        train=_train(models, train_shape, optimizer, loss_chunk, repeats),
        prefill=_prefill(models, prefill_length, repeats),
        decode={str(context): _decode(models, context, repeats) for context in contexts},
    )
    return {
        "params": config.num_params(),
        "train_flops_per_token": 3 * config.flops_per_token(T),
        "train_tokens_per_second": B * T / seconds.train[0],
        "prefill_tokens_per_second": prefill_length / seconds.prefill[0],
        "decode_tokens_per_second": {context: 1 / times[0] for context, times in seconds.decode.items()},
        "state_bytes": {str(context): _state_bytes(config, context) for context in contexts},
        "relative": {
            "train": _relative(seconds.train),
            "prefill": _relative(seconds.prefill),
            "decode": {context: _relative(times) for context, times in seconds.decode.items()},
        },
        "shape": f"train {B} x {T}, prefill 1 x {prefill_length}, decode batch 1",
        "conditions": _conditions(),
    }


class _Seconds(NamedTuple):
    """Medians of the model and, where that is another one, of the base."""

    train: list[float]
    """A step."""
    prefill: list[float]
    decode: dict[str, list[float]]
    """A token, by context."""


def _relative(times: Sequence[float]) -> float:
    """The model's speed over the base's; of one that is the base exactly 1."""
    return times[-1] / times[0]


def _check(
    config: ModelConfig, base: ModelConfig, contexts: Sequence[int], prefill_length: int, repeats: int
) -> None:
    lengths = [("contexts has", context) for context in contexts] + [("prefill_length is", prefill_length)]
    problems = [f"{what} {length}; it must be at least 1" for what, length in lengths if length < 1]
    for name, model in (("config", config), ("base", base)):
        problems += [f"{what} {length}, over {name}.max_position {model.max_position}; shorten it or raise that"
                     for what, length in lengths if length > model.max_position]
    if repeats < 1:
        problems.append(f"repeats is {repeats}; it must be at least 1")
    raise_problems("costs cannot be measured", list(dict.fromkeys(problems)))


def _conditions() -> str:
    device = f"{jax.devices()[0].device_kind}; " if on_accelerator() else ""
    return device + conditions("jax", "jaxlib", "flax", "optax")


def _random_model(config: ModelConfig) -> _Model:
    # Not jitted: compiling the draws of every matrix takes as long as a training step of them.
    return _Model(config, nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(0)), nnx.Param)[1]))


def _tokens(config: ModelConfig, B: int, T: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (B, T), dtype=np.int32)


# ---------------------------------------------------------------- programs; those of the base stay from call to call


@functools.lru_cache(maxsize=2)
def _train_program(
    config: ModelConfig, optimizer: OptimizerConfig, loss_chunk: int
) -> tuple[Training, Callable[[TrainState, DeviceBatch], tuple[TrainState, Any]]]:
    """(what is trained, its jitted step)."""
    still = dataclasses.replace(optimizer, peak_lr=STILL_LR)
    steps = 2 * (still.warmup_steps + still.decay_steps) + 1000
    made = make_optimizer(still, steps, param_traits(config, stacked=config.scan_layers))
    training = next_token_training(config, made, loss_chunk=loss_chunk)
    return training, training.compiled_step()


@functools.lru_cache(maxsize=2)
def _prefill_program(config: ModelConfig) -> Callable[..., tuple[jax.Array, State]]:
    graphdef, _ = abstract_model(config)

    @jax.jit
    def prefill(params: Any, tokens_BT: jax.Array, state: State) -> tuple[jax.Array, State]:
        logits_B1V, state = nnx.merge(graphdef, params)(tokens_BT, state=state, logits="last")
        assert state is not None  # It went in.
        return logits_B1V, state

    return prefill


@functools.lru_cache(maxsize=2)
def _decode_program(config: ModelConfig) -> Callable[..., tuple[jax.Array, State]]:
    """Over (params, last token [B], state, context, steps): the last token and the state after `steps` more tokens.

    The state is given back to its context first, so that a call can take what the one before has returned.
    """
    graphdef, _ = abstract_model(config)

    @functools.partial(jax.jit, donate_argnames="state")
    def decode(
        params: Any, token_B: jax.Array, state: State, context: jax.Array, steps: jax.Array
    ) -> tuple[jax.Array, State]:
        model = nnx.merge(graphdef, params)

        def step(_: jax.Array, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            token_B, state = carry
            ones_B1 = jnp.ones_like(token_B)[:, None]
            logits_B1V, new_state = model(token_B[:, None], None, ones_B1, state, "last", padding="right")
            assert new_state is not None  # One went in.
            return jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32), new_state

        return jax.lax.fori_loop(0, steps, step, (token_B, at_context(state, context)))

    return decode


# ---------------------------------------------------------------- the state


def full_state(config: ModelConfig, context: int, room: int) -> State:
    """A state of one row that `context` tokens have gone through, with random content, and slots for `room` more."""
    rng = np.random.default_rng(0)

    def some(x: jax.Array) -> jax.Array:
        content = jnp.issubdtype(x.dtype, jnp.floating)  # Else a count.
        return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype) if content else x

    # The room comes on top: a model is timed at its longest context too.
    config = config.replace(max_position=max(config.max_position, context + room))
    state = init_state(config, 1, context + room)
    return at_context(State(jax.tree.map(some, state.layers), state.position_B), context)


def _state_bytes(config: ModelConfig, context: int) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(init_state(config, 1, context)))


# ---------------------------------------------------------------- timing: median seconds of each model


def _train(
    models: Sequence[_Model], shape: tuple[int, int], optimizer: OptimizerConfig, loss_chunk: int, repeats: int
) -> list[float]:
    return interleave([_train_task(model, shape, optimizer, loss_chunk) for model in models], repeats)


def _train_task(model: _Model, shape: tuple[int, int], optimizer: OptimizerConfig, loss_chunk: int) -> Timed:
    training, step = _train_program(model.config, optimizer, loss_chunk)
    state = training.new_state(jax.tree.map(jnp.copy, model.params))  # A step takes over the arrays of its state.
    tokens_BT = _tokens(model.config, *shape)
    ones_BT = np.ones_like(tokens_BT)
    batch = jax.tree.map(jnp.asarray, {
        "tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1), "segment_ids": ones_BT,
        "positions": np.arange(shape[1], dtype=np.int32) * ones_BT,
    })

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return run


def _prefill(models: Sequence[_Model], length: int, repeats: int) -> list[float]:
    return interleave([_prefill_task(model, length) for model in models], repeats)


def _prefill_task(model: _Model, length: int) -> Timed:
    prefill, state = _prefill_program(model.config), init_state(model.config, 1, length)
    tokens_BT = jnp.asarray(_tokens(model.config, 1, length))
    return lambda: jax.block_until_ready(prefill(model.params, tokens_BT, state))


def _decode(models: Sequence[_Model], context: int, repeats: int) -> list[float]:
    steps = [_decode_steps(model.config, context) for model in models]
    tasks = [_decode_task(model, context, n) for model, n in zip(models, steps, strict=True)]
    return [seconds / n for seconds, n in zip(interleave(tasks, repeats), steps, strict=True)]


def _decode_steps(config: ModelConfig, context: int) -> int:
    """Tokens of one timed decode: fewer where each takes long, as where the state grows with the text."""
    least, most = DECODE_STEPS
    grows = config.state_bytes(context + 1) > config.state_bytes(context)
    return max(least, min(most, DECODE_SLOTS // context)) if grows else most


def _decode_task(model: _Model, context: int, steps: int) -> Timed:
    decode, state = _decode_program(model.config), full_state(model.config, context, DECODE_STEPS[1])
    token_B = jnp.zeros((1,), jnp.int32)

    def run() -> None:
        nonlocal state
        _, state = decode(model.params, token_B, state, jnp.int32(context), jnp.int32(steps))
        jax.block_until_ready(state)

    return run
