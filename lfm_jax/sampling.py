"""Samples tokens from logits: the parameters of a request (`Sampling`), and pure functions over arrays of them.

Filters and their order are those of `transformers` (`generation/logits_process.py`): repetition penalty,
temperature, top-k, top-p, min-p; OpenAI's penalties of what was generated follow the repetition penalty. Every row has
its own parameters, and its token depends on nothing but its own logits, parameters and position.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.problems import raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose each next token. The default is greedy.

    The token at a position is drawn with the key `fold_in(seed, position)`, so that a request gets the same text in any
    batch and with any number of steps per dispatch. (The logits of a row may differ from those in a batch by rounding,
    about 1e-6: if two tokens are that close, the choice may differ.)

    Raises:
      ValueError: on construction; the message lists every bad field and how to fix it.
    """

    temperature: float = 0.0
    """Divides the logits. 0 is greedy: the most likely token, with any filters."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities add up to top_p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the text so far are divided by it, negative ones multiplied."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it was generated; the prompt does not count."""
    presence_penalty: float = 0.0
    """Taken from the logit of a token that was generated at all."""
    seed: int = 0
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        raise_problems("Sampling is not valid", _problems(self))


def _problems(s: Sampling) -> list[str]:
    problems = []
    for name, ok, want in (
        ("temperature", lambda x: x >= 0, "at least 0 (0 is greedy)"),
        ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1 (1 is off)"),
        ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1 (0 is off)"),
        ("repetition_penalty", lambda x: x > 0, "above 0 (1 is off)"),
        ("frequency_penalty", lambda x: -2 <= x <= 2, "from -2 to 2 (0 is off)"),
        ("presence_penalty", lambda x: -2 <= x <= 2, "from -2 to 2 (0 is off)"),
    ):
        value = getattr(s, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok(value):
            problems.append(f"{name} is {value!r}; it must be a number {want}")
    if type(s.top_k) is not int or s.top_k < 0:
        problems.append(f"top_k is {s.top_k!r}; it must be a whole number of at least 0 (0 is off)")
    if type(s.seed) is not int or not 0 <= s.seed < 2**32:
        problems.append(f"seed is {s.seed!r}; it must be a whole number from 0 to 2**32 - 1")
    return problems


GREEDY = Sampling()
PUBLISHED = Sampling(temperature=0.1, top_k=50, repetition_penalty=1.05)
"""As published for LFM2.5-350M."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The fields of `Sampling` as arrays, with an entry for each row."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array
    frequency_penalty_B: jax.Array
    presence_penalty_B: jax.Array
    seed_B: jax.Array


class Features(NamedTuple):
    """The features that at least one row of a batch uses; static under jit, so that no others are computed.

    The token of a row does not depend on them: a filter that a row does not use leaves its logits as they are.
    """

    sampled: bool
    """Whether some row has a temperature above 0."""
    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool
    counts: bool
    """Some row has a frequency or presence penalty."""


ANYTHING = Features(*[True] * len(Features._fields))
"""For batches whose rows change: one program for them all, in which a filter that no row wants costs little."""
Count = Callable[[], jax.Array]
"""Gives how often each token was generated."""
FEW = 64
"""The largest top_k for which `lax.top_k` is used; a larger one takes many passes over the vocabulary."""


def to_arrays(samplings: Sequence[Sampling], vocab_size: int) -> tuple[SamplingArrays, Features]:
    """Returns the parameters of a batch as NumPy arrays of float32, int32 (top_k) and uint32 (seed), and its
    features."""

    def column(name: str, dtype: type) -> Any:
        values: Any = np.array([getattr(s, name) for s in samplings])
        # The quotient of a token that is ruled out and of infinity, or of what has 0 for its inverse, would be NaN.
        return (np.minimum(values, 1e30) if dtype is np.float32 else values).astype(dtype)

    top_k_B: Any = np.array([min(s.top_k, vocab_size) for s in samplings], np.int32)
    params = SamplingArrays(
        temperature_B=column("temperature", np.float32),
        top_k_B=top_k_B,
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
        frequency_penalty_B=column("frequency_penalty", np.float32),
        presence_penalty_B=column("presence_penalty", np.float32),
        seed_B=column("seed", np.uint32),
    )
    drawn = [s for s in samplings if s.temperature > 0]
    return params, Features(
        sampled=bool(drawn),
        top_k=any(s.top_k for s in drawn),
        top_p=any(s.top_p < 1 for s in drawn),
        min_p=any(s.min_p > 0 for s in drawn),
        repetition_penalty=any(s.repetition_penalty != 1 for s in samplings),
        counts=any(counts_matter(s) for s in samplings),
    )


def counts_matter(s: Sampling) -> bool:
    """How often a token was generated changes its logit."""
    return s.frequency_penalty != 0 or s.presence_penalty != 0


def sample(
    logits_BV: jax.Array, params: SamplingArrays, features: Features, position_B: jax.Array,
    seen_BV: jax.Array | None = None, count: Count | None = None,
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits_BV: of the next token.
      params: per row.
      features: of the batch, from `to_arrays`.
      position_B: position that the token will have in its row; with the seed it fixes the random numbers.
      seen_BV: bool, tokens of the prompt and of the text so far; needed when `features.repetition_penalty`.
      count: gives how often each token was generated, int32 [B, V]; needed when `features.counts`. What it computes is
        computed only while a row has such a penalty.

    Returns:
      token_B, int32. Greedy takes the first of equally likely tokens.

    Raises:
      ValueError: the features need `seen_BV` or `count` and it is None.
    """
    logits_BV = penalise_logits(logits_BV.astype(jnp.float32), params, features, seen_BV, count)
    greedy_B = _argmax(logits_BV)
    if not features.sampled:
        return greedy_B

    def gumbel(seed: jax.Array, position: jax.Array) -> jax.Array:
        # The generator is named, because with others the numbers of a key under vmap depend on the whole batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    noise_BV = jax.vmap(gumbel)(params.seed_B, position_B)
    drawn_B = _argmax(filter_logits(logits_BV, params, features) + noise_BV)
    return jnp.where(params.temperature_B > 0, drawn_B, greedy_B)


def penalise_logits(
    logits_BV: jax.Array, params: SamplingArrays, features: Features, seen_BV: jax.Array | None = None,
    count: Count | None = None,
) -> jax.Array:
    """The logits after the penalties; a greedy row gets the largest. Arguments as for `sample`."""
    if features.repetition_penalty:
        if seen_BV is None:
            raise ValueError("a repetition penalty needs seen_BV, the tokens that each row holds already")
        penalty_B1 = params.repetition_penalty_B[:, None]

        def penalise_seen(logits_BV: jax.Array) -> jax.Array:
            penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
            return jnp.where(seen_BV, penalised_BV, logits_BV)

        logits_BV = _when(penalty_B1 != 1, penalise_seen, logits_BV)
    if features.counts:
        if count is None:
            raise ValueError("a frequency or presence penalty needs count, how often each token was generated")
        frequency_B1, presence_B1 = params.frequency_penalty_B[:, None], params.presence_penalty_B[:, None]

        def penalise_generated(logits_BV: jax.Array) -> jax.Array:
            count_BV = count()
            return logits_BV - presence_B1 * (count_BV > 0) - frequency_B1 * count_BV

        logits_BV = _when((frequency_B1 != 0) | (presence_B1 != 0), penalise_generated, logits_BV)
    return logits_BV


def filter_logits(logits_BV: jax.Array, params: SamplingArrays, features: Features) -> jax.Array:
    """Returns the logits whose softmax `sample` draws from: the penalised ones, divided by the temperature, and -inf
    for tokens that top_k, top_p or min_p leave out."""
    temperature_B1 = params.temperature_B[:, None]
    # With less, the most likely token has all the probability, and the quotient may overflow.
    logits_BV = logits_BV / jnp.where(temperature_B1 > 0, jnp.maximum(temperature_B1, 1e-6), 1)
    drawn_B = params.temperature_B > 0
    if features.top_k:
        top_k_B = jnp.where(drawn_B, params.top_k_B, 0)
        logits_BV = _when(top_k_B > 0, lambda x_BV: jnp.where(_in_top_k(x_BV, top_k_B), x_BV, -jnp.inf), logits_BV)
    if features.top_p:
        top_p_B = jnp.where(drawn_B, params.top_p_B, 1)
        logits_BV = _when(top_p_B < 1, lambda x_BV: jnp.where(_in_top_p(x_BV, top_p_B), x_BV, -jnp.inf), logits_BV)
    if features.min_p:
        border_B1 = jnp.max(logits_BV, axis=1, keepdims=True) + jnp.log(params.min_p_B)[:, None]
        logits_BV = jnp.where(logits_BV >= border_B1, logits_BV, -jnp.inf)
    return logits_BV


def _when(wanted: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns `change(x)` if any row wants it, else x."""
    return jax.lax.cond(jnp.any(wanted), change, lambda x: x, x)


def _in_top_k(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Returns True for the k largest of each row and for those equal to the k-th; for all if k is 0."""
    V = logits_BV.shape[1]

    def few(logits_BV: jax.Array) -> jax.Array:
        best_BK = jax.lax.top_k(logits_BV, min(FEW, V))[0]
        return logits_BV >= jnp.take_along_axis(best_BK, jnp.maximum(top_k_B - 1, 0)[:, None], axis=1)

    def many(logits_BV: jax.Array) -> jax.Array:
        return _from_border(logits_BV, lambda above_BV: jnp.sum(above_BV, axis=1) < top_k_B)

    kept_BV = few(logits_BV) if V <= FEW else jax.lax.cond(jnp.any(top_k_B > FEW), many, few, logits_BV)
    return kept_BV | (top_k_B == 0)[:, None]


def _in_top_p(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns True for tokens if all more likely ones together have less than top_p of the probability."""
    probability_BV = jax.nn.softmax(logits_BV, axis=1)
    # Above 0 also where the device takes so small a number for 0: nothing is likelier than the likeliest.
    top_p_B = jnp.maximum(top_p_B, np.finfo(np.float32).tiny)

    def enough(above_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(above_BV, probability_BV, 0), axis=1) < top_p_B

    return _from_border(logits_BV, enough) | (top_p_B >= 1)[:, None]


def _from_border(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns True for logits from a border on, the lowest one for which the logits above it are `enough`.

    `enough` is bool [B, V] -> [B]. The border is found bit by bit, with 32 sums over the vocabulary: on a CPU 20 times
    as fast as sorting it.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # Integers in the order of the floats.

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = interval
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # The sum itself might overflow.
        enough_B = enough(order_BV > middle_B[:, None])
        return jnp.where(enough_B, low_B, middle_B + 1), jnp.where(enough_B, middle_B, high_B)

    extremes = jnp.iinfo(jnp.int32)
    start = tuple(jnp.full(logits_BV.shape[:1], x, jnp.int32) for x in (extremes.min, extremes.max))
    border_B, _ = jax.lax.fori_loop(0, 32, halve, start)
    return order_BV >= border_B[:, None]


def _argmax(x_BV: jax.Array) -> jax.Array:
    """Returns the index of the first largest value, int32; on a CPU several times as fast as `jnp.argmax`."""
    V = x_BV.shape[1]
    index_V = jnp.arange(V, dtype=jnp.int32)
    first_B = jnp.min(jnp.where(x_BV == jnp.max(x_BV, axis=1, keepdims=True), index_V, V), axis=1)
    return jnp.minimum(first_B, V - 1)  # A row of NaN has no largest value, but needs a valid index.
