"""The diagonal linear recurrence `h_t = a_t * h_{t-1} + b_t`, with document boundaries and carried state.

A token maps the state before it to the state after it, h -> a h + b. Such maps are closed under composition,
(a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2), so any run of tokens has a summary (a, b), and the states can be found
in any order of work: one after another, by halves, by chunks, by devices. A new document is a = 0, padding is a = 1,
b = 0. "a == 0" selects rather than multiplies, so that what is forgotten may be NaN.

The derivative is the same recurrence run backwards: with e_t what the tokens after t want of h_t,
`dh_t = g_t + e_t`, `e_{t-1} = a_t * dh_t`, `db_t = dh_t`, `da_t = dh_t * h_{t-1}`. It keeps a and h, nothing else.

Dimensions: B batch, T time, D channels, C tokens of a chunk, N chunks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.sharding import HOPPER, nvidia_capability, platform

CHUNK = 8
"""Tokens of a chunk: what `chunked` recomputes grows with it, the number of summaries shrinks."""
CPU_LOOP = 1024
"""Summaries that `chunked` takes one after another on CPU, where a step of a loop costs less than another level."""
CPU_MANY = 2**20
"""Elements B * T * D from which the passes of `chunked`, spread over the cores, beat the single one of `sequential`."""
PALLAS = ("pallas_tpu", "pallas_gpu")
KERNEL_TOKENS = 256
"""Tokens of a row from which `auto` takes `pallas_gpu` on a Hopper GPU."""


def linear_scan(
    a_BTD: jax.Array,
    b_BTD: jax.Array,
    h0_BD: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    interpret: bool = False,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All states of `h_t = a_t * h_{t-1} + b_t`, and the last one. float32 inside, whatever the dtypes.

    Made for |a| <= 1, as a stable recurrence has: all implementations but `sequential` multiply runs of a, and such a
    product may underflow (a memory that has faded) but must not overflow.

    Args:
      a_BTD: what is kept of the state, by channel. Exactly 0 forgets it, NaN included.
      b_BTD: what is added.
      h0_BD: the state before the first token, which belongs to its document; None means zeros.
      segment_ids_BT: document of each token; ids differ between neighbouring documents, each of which starts from
        zero. 0 is padding, at a row's right end (see `state.align`), and leaves the state alone. None means one
        document per row.
      impl: `sequential` (a loop over tokens, the reference), `associative` (`jax.lax.associative_scan`), `chunked` (a
        loop over the tokens of a chunk, for all chunks side by side), `pallas_tpu`, `pallas_gpu` (kernels), or `auto`:
        `pallas_gpu` for rows of KERNEL_TOKENS and more on a Hopper GPU, `sequential` for small arrays on a CPU,
        `chunked` for the others. docs/measurements/kernels.md has the times.
      interpret: runs a Pallas implementation in interpret mode, on any platform, for tests.
      axis: the mesh axis over which time is split into contiguous shards of equal length; the arguments are one
        shard, h0 and the last state those of whole rows. For use inside `jax.shard_map(..., check_vma=False)`.

    Returns:
      (h_BTD in b's dtype, the state after each row's last real token, [B, D] float32). h means nothing at padding, and
      a gradient that arrives there is dropped.

    Raises:
      ValueError: an unknown impl, `interpret` for one that is not a Pallas kernel, shapes that do not fit, or an axis
        that is not there.
    """
    B, T, D = b_BTD.shape
    if T == 0:
        raise ValueError(f"b_BTD has shape {b_BTD.shape}; a scan needs at least one token")
    expected = (("a_BTD", a_BTD, (B, T, D)), ("h0_BD", h0_BD, (B, D)), ("segment_ids_BT", segment_ids_BT, (B, T)))
    for name, x, shape in expected:
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; expected {shape} to match b_BTD {b_BTD.shape}")
    if impl == "auto":
        small = platform() == "cpu" and B * T * D < CPU_MANY
        half_or_single = a_BTD.dtype in (jnp.bfloat16, jnp.float32) and b_BTD.dtype in (jnp.bfloat16, jnp.float32)
        kernel = nvidia_capability() == HOPPER and T >= KERNEL_TOKENS and half_or_single
        impl = "pallas_gpu" if kernel else "sequential" if small else "chunked"
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(IMPLS)}")
    if interpret and impl not in PALLAS:
        raise ValueError(f"interpret is for {' and '.join(PALLAS)}; leave it out with impl={impl!r}")
    if axis is not None:
        _check_axis(axis)
    marks = None if segment_ids_BT is None else _mark(segment_ids_BT, axis)
    h0_BD = jnp.zeros((B, D), jnp.float32) if h0_BD is None else h0_BD.astype(jnp.float32)
    h_BTD, last_BD = _scan(a_BTD, b_BTD, h0_BD, marks, _How(impl, interpret, axis))
    if axis is not None:  # Out here, so that nothing moves where nobody asks for it.
        on_last_shard = lax.axis_index(axis) == lax.axis_size(axis) - 1
        last_BD = lax.psum(jnp.where(on_last_shard, last_BD, 0), axis)
    return h_BTD, last_BD


def _check_axis(axis: str) -> None:
    try:
        lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"axis is {axis!r}, which is no mesh axis here; call inside a shard_map over it, or leave it out"
        ) from None


class _How(NamedTuple):
    """What of the arguments is not an array."""

    impl: str
    interpret: bool
    axis: str | None


class _Marks(NamedTuple):
    """Tokens that are special, bool; [B, T, 1], so that what slices time slices them too."""

    start_BT1: jax.Array
    padding_BT1: jax.Array


def _mark(segment_ids_BT: jax.Array, axis: str | None) -> _Marks:
    """A row's first token starts nothing: the incoming state is its own document's."""
    before_B1 = segment_ids_BT[:, :1]
    if axis is not None:
        of_neighbour_B1 = lax.ppermute(segment_ids_BT[:, -1:], axis, _towards(axis, 1))
        before_B1 = jnp.where(lax.axis_index(axis) == 0, before_B1, of_neighbour_B1)
    before_BT = jnp.concatenate([before_B1, segment_ids_BT[:, :-1]], axis=1)
    real_BT = segment_ids_BT != 0
    return _Marks((real_BT & (segment_ids_BT != before_BT))[:, :, None], ~real_BT[:, :, None])


Pick = Callable[[jax.Array], jax.Array]


class Token(NamedTuple):
    """Coefficients of single tokens, and where they are padding (None: nowhere)."""

    a: jax.Array
    b: jax.Array
    padding: jax.Array | None

    @property
    def loss(self) -> jax.Array:
        return 1 - self.a


class Composed(NamedTuple):
    """What runs of tokens amount to: h -> a h + b = h - loss h + b.

    Near a = 1, where memory is long, loss = 1 - a keeps the digits that a rounds away: products of a would add up their
    rounding errors, which over thousands of tokens with the same a have the same sign. Near a = 0, where a far larger
    past is forgotten, it is a that keeps them.
    """

    a: jax.Array
    loss: jax.Array
    b: jax.Array


Read = Callable[[Pick], Any]
"""The tokens or runs that a slice along time picks. What is made after slicing fuses into its reader."""


def _masked(a_BTD: jax.Array, b_BTD: jax.Array, marks: _Marks | None) -> tuple[jax.Array, jax.Array]:
    """Documents and padding as coefficients."""
    if marks is None:
        return a_BTD, b_BTD
    a_BTD = jnp.where(marks.start_BT1, 0, jnp.where(marks.padding_BT1, 1, a_BTD))
    return a_BTD, jnp.where(marks.padding_BT1, 0, b_BTD)


def _reader(a_BTD: jax.Array, b_BTD: jax.Array, marks: _Marks | None = None) -> Read:
    def read(pick: Pick) -> Token:
        a, b, picked = jax.tree.map(pick, (a_BTD, b_BTD, marks))
        a, b = _masked(a, b, picked)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return Token(a, b, None if picked is None else picked.padding_BT1)

    return read


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(
    a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, marks: _Marks | None, how: _How
) -> tuple[jax.Array, jax.Array]:
    """(h, state after this shard's last token)."""
    return _forward(a_BTD, b_BTD, h0_BD, marks, how)[0]


def _forward(a_BTD, b_BTD, h0_BD, marks, how):
    read, shape = _reader(a_BTD, b_BTD, marks), b_BTD.shape
    if how.axis is not None:
        h0_BD = _arriving(_after, read, shape, h0_BD, how.axis, reverse=False)
    if how.impl in _STEPPED:
        h_BTD, last_BD = _STEPPED[how.impl](_after, read, shape, h0_BD, reverse=False, dtype=b_BTD.dtype)
    else:
        coefficients = _masked(a_BTD, b_BTD, marks)
        h_BTD, last_BD = IMPLS[how.impl](*coefficients, h0_BD, reverse=False, interpret=how.interpret)
    return (h_BTD, last_BD), (a_BTD, h0_BD, h_BTD, marks)


def _backward(how, kept, cotangents):
    a_BTD, h0_BD, h_BTD, marks = kept
    g_BTD, e_BD = cotangents
    read, shape = _reader(a_BTD, g_BTD, marks), g_BTD.shape
    if how.axis is not None:
        e_BD = _arriving(_adjoint, read, shape, e_BD, how.axis, reverse=True)
    if how.impl in _STEPPED:
        db_BTD, dh0_BD = _STEPPED[how.impl](_adjoint, read, shape, e_BD, reverse=True, dtype=g_BTD.dtype)
    else:  # dh_t = a_{t+1} dh_{t+1} + g_t; e holds its factor already.
        a_masked_BTD, g_masked_BTD = _masked(a_BTD, g_BTD, marks)
        next_BTD = jnp.concatenate([a_masked_BTD[:, 1:], jnp.ones_like(a_BTD[:, :1])], axis=1)
        db_BTD, first_BD = IMPLS[how.impl](next_BTD, g_masked_BTD, e_BD, reverse=True, interpret=how.interpret)
        dh0_BD = _times(a_masked_BTD[:, 0].astype(jnp.float32), first_BD)
        if marks is not None:
            db_BTD = jnp.where(marks.padding_BT1, 0, db_BTD)
    before_BTD = jnp.concatenate([h0_BD.astype(h_BTD.dtype)[:, None], h_BTD[:, :-1]], axis=1)
    da_BTD = db_BTD.astype(jnp.float32) * before_BTD.astype(jnp.float32)
    if marks is not None:  # What stands before a document may be NaN.
        da_BTD = jnp.where(marks.start_BT1 | marks.padding_BT1, 0, da_BTD)
    if how.axis is not None:  # h0 is the same array on every shard, and only the first uses it.
        dh0_BD = jnp.where(lax.axis_index(how.axis) == 0, dh0_BD, 0)
    return da_BTD.astype(a_BTD.dtype), db_BTD, dh0_BD, None


_scan.defvjp(_forward, _backward)


Step = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
"""One token or run of a recurrence: (state after it, output), from the state before it."""
Shape = tuple[int, ...]
"""(B, T, D)."""


def _times(a: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(a == 0, 0, a * h)


def _after(h: jax.Array, token: Token) -> tuple[jax.Array, jax.Array]:
    h = _times(token.a, h) + token.b
    return h, h


def _adjoint(e: jax.Array, token: Token) -> tuple[jax.Array, jax.Array]:
    """The derivative's step: gives db."""
    dh = e + token.b
    return _times(token.a, dh), dh if token.padding is None else jnp.where(token.padding, 0, dh)


def _across(h: jax.Array, run: Composed) -> tuple[jax.Array, jax.Array]:
    """Past a run of tokens: gives the state before it."""
    return jnp.where(run.loss > 0.5, _times(run.a, h) + run.b, h + (run.b - run.loss * h)), h


def _sequential(
    step: Step, read: Read, shape: Shape, state_BD: jax.Array, *, reverse: bool, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """A loop over tokens, which are read where they lie: (output [B, T, D], state at the end)."""
    T = shape[1]

    def token(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state_B1D, out_BTD = carry
        t = T - 1 - i if reverse else i
        state_B1D, out_B1D = step(state_B1D, read(lambda x: lax.dynamic_slice_in_dim(x, t, 1, axis=1)))
        return state_B1D, lax.dynamic_update_slice_in_dim(out_BTD, out_B1D.astype(dtype), t, axis=1)

    state_B1D, out_BTD = lax.fori_loop(0, T, token, (state_BD[:, None], jnp.zeros(shape, dtype)))
    return out_BTD, state_B1D[:, 0]


def _chunked(
    step: Step, read: Read, shape: Shape, state_BD: jax.Array, *, reverse: bool, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The same by chunks of C tokens: their summaries, the states between them, then all of them at once.

    Reads the coefficients twice and writes the output once, in two fusions that run on all cores. Every output goes
    through its chunk from the start; its neighbours have the rows in the cache. Tokens that fill no chunk come last.
    """
    B, T, D = shape
    N, C = T // CHUNK, CHUNK
    if N > 0:
        first, order = (T % C, range(C - 1, 0, -1)) if reverse else (0, range(C - 1))
        summaries_BN3D = _summaries(step, read, shape, reverse)
        middle = _sequential if platform() == "cpu" and N <= CPU_LOOP else _chunked
        states_BND, state_BD = middle(
            _across, _summary_reader(summaries_BN3D), (B, N, D), state_BD, reverse=reverse, dtype=jnp.float32
        )
        own_1NC1 = lax.broadcasted_iota(jnp.int32, (1, 1, C, 1), 2)
        state_BNCD = lax.optimization_barrier(states_BND)[:, :, None]
        for k in order:
            passed = own_1NC1 < k if reverse else own_1NC1 > k
            state_BNCD = jnp.where(passed, step(state_BNCD, read(partial(_kth, k=k, first=first, N=N)))[0], state_BNCD)
        _, out_BNCD = step(state_BNCD, read(lambda x: x[:, first : first + N * C].reshape(B, N, C, *x.shape[2:])))
        pieces = [out_BNCD.reshape(B, N * C, D).astype(dtype)]
    else:
        pieces = []
    for t in _left_over(T, reverse):
        state_B1D, out_B1D = step(state_BD[:, None], read(lambda x, t=t: x[:, t : t + 1]))
        state_BD = state_B1D[:, 0]
        pieces.append(out_B1D.astype(dtype))
    # A barrier, or XLA makes the output anew in each of its readers rather than read it.
    return lax.optimization_barrier(jnp.concatenate(pieces[::-1] if reverse else pieces, axis=1)), state_BD


def _summaries(step: Step, read: Read, shape: Shape, reverse: bool) -> jax.Array:
    """(product of a, loss, b) of every chunk."""
    B, T, D = shape
    N, C = T // CHUNK, CHUNK
    field_113 = jnp.arange(3)[None, None, :, None]
    summary_BN3D = jnp.broadcast_to(jnp.where(field_113 == 0, 1.0, 0.0), (B, N, 3, D))
    for k in range(C - 1, -1, -1) if reverse else range(C):
        token_BN1D = read(partial(_kth, k=k, first=T % C if reverse else 0, N=N))
        kept, lost = _times(token_BN1D.a, summary_BN3D), _lost(summary_BN3D, token_BN1D.loss)
        after = step(summary_BN3D, token_BN1D)[0]
        summary_BN3D = jnp.where(field_113 == 0, kept, jnp.where(field_113 == 1, lost, after))
    return lax.optimization_barrier(summary_BN3D)  # Or XLA makes it again wherever it is used.


def _lost(first: jax.Array, then: jax.Array) -> jax.Array:
    """The loss of two runs of tokens together."""
    return jnp.where(then == 1, 1, first + (then - first * then))


def _kept(product: jax.Array, loss: jax.Array) -> jax.Array:
    """a of a run, of the product of those in it and their loss together: of the two the one with more digits."""
    return jnp.where(loss > 0.5, product, 1 - loss)


def _joined(first: Composed, then: Composed) -> Composed:
    loss = _lost(first.loss, then.loss)
    return Composed(_kept(_times(then.a, first.a), loss), loss, _across(first.b, then)[0])


def _summary_reader(summaries_BN3D: jax.Array) -> Read:
    def read(pick: Pick) -> Composed:
        picked = pick(summaries_BN3D)
        product, loss, b = (picked[..., i, :] for i in range(3))
        return Composed(_kept(product, loss), loss, b)

    return read


def _kth(x: jax.Array, k: int, first: int, N: int) -> jax.Array:
    """[B, T, ...] -> [B, N, 1, ...], the k-th token of every chunk. Strided, as XLA copies what it would reshape."""
    return lax.slice_in_dim(x, first + k, first + k + (N - 1) * CHUNK + 1, CHUNK, axis=1)[:, :, None]


def _left_over(T: int, reverse: bool) -> range:
    """The tokens that fill no chunk, in the order of the recurrence."""
    return range(T % CHUNK - 1, -1, -1) if reverse else range(T - T % CHUNK, T)


_STEPPED = {"sequential": _sequential, "chunked": _chunked}


def _raw(name: str, a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool, interpret: bool):
    del interpret
    read = _reader(a_BTD, b_BTD)
    return _STEPPED[name](_after, read, b_BTD.shape, h0_BD, reverse=reverse, dtype=b_BTD.dtype)


def _associative(a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool, interpret: bool):
    """Summaries of all beginnings by `jax.lax.associative_scan`: a logarithmic number of passes over the sequence."""
    del interpret

    a_BTD = a_BTD.astype(jnp.float32)
    tokens = Composed(a_BTD, 1 - a_BTD, b_BTD.astype(jnp.float32))
    h_BTD, _ = _across(h0_BD[:, None], lax.associative_scan(_joined, tokens, reverse=reverse, axis=1))
    return h_BTD.astype(b_BTD.dtype), h_BTD[:, 0 if reverse else -1]


def _pallas(name: str, a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool, interpret: bool):
    module = importlib.import_module(f"lfm_jax.kernels.{name}")  # Pallas is slow to import.
    return module.scan(a_BTD, b_BTD, h0_BD, reverse=reverse, interpret=interpret)


IMPLS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "sequential": partial(_raw, "sequential"),
    "associative": _associative,
    "chunked": partial(_raw, "chunked"),
    **{name: partial(_pallas, name) for name in PALLAS},
}
"""`scan(a_BTD, b_BTD, h0_BD, *, reverse, interpret) -> (h_BTD, last_BD)`, without documents or a derivative."""


def _arriving(step: Step, read: Read, shape: Shape, first_BD: jax.Array, axis: str, *, reverse: bool) -> jax.Array:
    """The state that comes into this shard of time; `first_BD` comes into the one where the recurrence begins.

    Each shard hands on its summary, and what it has of those behind it, in steps of 1, 2, 4, ... shards. What nobody
    sends arrives as zeros and changes nothing; the first shard begins with a run that loses all but `first`.
    """
    shards = lax.axis_size(axis)
    way = -1 if reverse else 1

    def from_behind(run: Composed, distance: int) -> Composed:
        return lax.ppermute(run, axis, _towards(axis, way * distance))

    behind = from_behind(_total(step, read, shape, reverse), 1)
    begins = lax.axis_index(axis) == (shards - 1 if reverse else 0)
    zero = jnp.zeros_like(behind.a)
    behind = jax.tree.map(partial(jnp.where, begins), Composed(zero, zero + 1, first_BD), behind)
    distance = 1
    while distance < shards:
        behind = _joined(from_behind(behind, distance), behind)
        distance *= 2
    return behind.b


def _towards(axis: str, distance: int) -> list[tuple[int, int]]:
    shards = lax.axis_size(axis)
    return [(i, i + distance) for i in range(shards) if 0 <= i + distance < shards]


def _total(step: Step, read: Read, shape: Shape, reverse: bool) -> Composed:
    """All tokens as one run. Only summaries are written; XLA finds those that `chunked` makes to be the same."""
    B, T, D = shape
    N = T // CHUNK
    nothing = jnp.zeros((B, D), jnp.float32)
    total = Composed(nothing + 1, nothing, nothing)
    if N > 0:
        total = _total(_across, _summary_reader(_summaries(step, read, shape, reverse)), (B, N, D), reverse)
    for t in _left_over(T, reverse):
        token_BD = read(lambda x, t=t: x[:, t])
        loss = _lost(total.loss, token_BD.loss)
        total = Composed(_kept(_times(token_BD.a, total.a), loss), loss, step(total.b, token_BD)[0])
    return total
