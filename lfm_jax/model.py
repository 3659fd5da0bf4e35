"""The network: embed -> blocks -> norm -> head, in one class for all models of the LFM2 family.

Dimensions: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lfm_jax import state as state_lib
from lfm_jax.config import Layer, ModelConfig
from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.kinds import FEED_FORWARDS, OPERATORS
from lfm_jax.layers import RMSNorm, Traits, normal_param
from lfm_jax.sharding import parts, reshard, spec_of
from lfm_jax.stacking import RepeatedUnit, runs, stack_layers, unit_layers
from lfm_jax.state import LayerState, State
from lfm_jax.weight_kinds import WeightKind

Logits = Literal["all", "last"]
Padding = Literal["any", "right"]
Named = dict[str, jax.Array]


class Aux(NamedTuple):
    """What layers report besides their output, in float32, as sums over tokens: those of parts of a batch add up.

    Divided by the number of real tokens they are means per token.
    """

    squares: Named
    """The mean square of what each kind of operator, and `feed_forward`, adds to the residual stream before any post
    norm: a mean over width and layers, a sum over real tokens; scalars without a gradient."""
    reports: Named
    """The reports of feed-forwards (`feed_forward.FeedForward`) by `KIND/NAME`, summed over real tokens: [n, ...] with
    a row for each of the n layers of that kind, first to last. Only those named `loss` have a gradient."""

    @property
    def loss(self) -> jax.Array | None:
        """The sum of the losses of all layers, to be added to what is minimised; None if no layer has one."""
        losses = [jnp.sum(x) for name, x in self.reports.items() if name.endswith("/loss")]
        return sum(losses[1:], losses[0]) if losses else None


class Block(nnx.Module):
    """Pre-norm residual block: `x += operator(norm(x)); x += feed_forward(norm(x))` (`Lfm2DecoderLayer`)."""

    def __init__(self, layer: Layer, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.operator_norm = RMSNorm(D, config)
        self.operator = OPERATORS[layer.operator].find_module()(config, rngs=rngs)
        self.ffn_norm = RMSNorm(D, config)
        self.feed_forward = FEED_FORWARDS[layer.feed_forward].find_module()(config, rngs=rngs)
        self.kind, self.ffn_kind = layer
        self.remat, self.post_norm = config.remat, config.post_norm
        if config.post_norm:
            self.post_operator_norm = RMSNorm(D, config)
            self.post_ffn_norm = RMSNorm(D, config)

    def __call__(
        self, x_BTD: jax.Array, squares: Named | None = None, *, positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None, state: LayerState | None, only_B1: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux | None, LayerState | None]:
        """Runs one layer.

        Args:
          squares: mean squares summed over the layers before, [B, T] each; None to compute none.
          only_B1: the index of one token of each row; the others are dropped after the operator, and x is [B, 1, D].

        Returns: (x, aux, state). The squares of aux include this layer, its reports are those of this layer alone; aux
          is None if squares are.
        """
        with jax.named_scope("operator"), jax.named_scope(self.kind):
            out = self.operator(
                self.operator_norm(x_BTD), positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=state
            )
            y_BTD, new_state = _pair(out, x_BTD, f"operator {self.kind!r}", "state")
            if type(new_state) is not type(state):
                raise TypeError(f"operator {self.kind!r} returns {type(new_state).__name__} as its state; "
                                f"{type(state).__name__} came in")
            squares = _add_squares(squares, self.kind, y_BTD)
            x_BTD += self.post_operator_norm(y_BTD) if self.post_norm else y_BTD
            if only_B1 is not None:
                x_BTD = jnp.take_along_axis(x_BTD, only_B1[:, :, None], axis=1)
                if segment_ids_BT is not None:
                    segment_ids_BT = jnp.take_along_axis(segment_ids_BT, only_B1, axis=1)
        with jax.named_scope("feed_forward"):

            def feed_forward(x_BTD: jax.Array) -> tuple[jax.Array, Named]:
                out = self.feed_forward(self.ffn_norm(x_BTD), segment_ids_BT=segment_ids_BT)
                y_BTD, reports = _pair(out, x_BTD, f"feed-forward {self.ffn_kind!r}", "reports")
                return y_BTD, {} if squares is None else _summed(reports, self.ffn_kind, x_BTD, segment_ids_BT)

            y_BTD, reports = (jax.checkpoint(feed_forward) if self.remat == "ffn" else feed_forward)(x_BTD)
            squares = _add_squares(squares, "feed_forward", y_BTD)
            x_BTD += self.post_ffn_norm(y_BTD) if self.post_norm else y_BTD
        return x_BTD, None if squares is None else Aux(squares, reports), new_state


def _pair(out: Any, x_BTD: jax.Array, what: str, second: str) -> tuple[jax.Array, Any]:
    """Returns the output of an operator or a feed-forward, if it is a pair; an array of two rows would unpack too.

    Raises:
      TypeError: it is not a pair, or its first element does not have the shape of the input.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{what} returns {type(out).__name__}; expected a tuple (y_BTD, {second})")
    if out[0].shape != x_BTD.shape:
        raise TypeError(f"{what} returns y_BTD of shape {out[0].shape}; expected {x_BTD.shape}")
    return out


def _add_squares(squares: Named | None, name: str, y_BTD: jax.Array) -> Named | None:
    if squares is None:
        return None
    y32_BTD = jax.lax.stop_gradient(y_BTD).astype(jnp.float32)
    return squares | {name: squares[name] + jnp.mean(y32_BTD * y32_BTD, axis=-1)}


def _summed(reports: Named, kind: str, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> Named:
    """Returns the reports of a feed-forward, summed over real tokens.

    Raises:
      TypeError: a report is not float32, or does not have a value for each token.
    """
    found = {}
    for name, value in reports.items():
        if value.dtype != jnp.float32 or value.shape[:2] != x_BTD.shape[:2]:
            raise TypeError(f"feed-forward {kind!r} reports {name} as {value.dtype}{list(value.shape)}; expected "
                            f"float32 with a value for each token, {[*x_BTD.shape[:2], '...']}")
        if segment_ids_BT is not None:
            value = jnp.where(jnp.expand_dims(segment_ids_BT != 0, tuple(range(2, value.ndim))), value, 0.0)
        total = jnp.sum(value, axis=(0, 1))
        found[f"{kind}/{name}"] = total if name == "loss" else jax.lax.stop_gradient(total)
    return found


def _with_state(block: Block, x_BTD: jax.Array, **inputs: Any) -> tuple[jax.Array, Aux | None, LayerState | None]:
    """Calls `block(x_BTD, **inputs)`; of equal blocks in one program only the first is traced."""
    if not isinstance(x_BTD, jax.core.Tracer):
        return block(x_BTD, **inputs)
    graphdef, params = nnx.split(block, nnx.Param)
    return _traced(graphdef, nnx.to_pure_dict(params), x_BTD, inputs)


@functools.partial(jax.jit, static_argnames="graphdef", inline=True)
def _traced(graphdef: nnx.GraphDef[Block], params: Any, x_BTD: jax.Array, inputs: dict[str, Any]) -> Any:
    return nnx.merge(graphdef, params)(x_BTD, **inputs)


REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
"""`ModelConfig.remat` of whole layers -> the policy for what is kept for the backward pass."""


def abstract_model(config: ModelConfig, *, stacked: bool = False) -> tuple[nnx.GraphDef, Any]:
    """Returns (graphdef, parameters as a plain dict of shapes and dtypes) of a model, without making any array.

    With `stacked`, the graphdef is that of a model whose parameters are stacked (`stacking.stack_layers`).
    """
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0))), nnx.Param)
    if stacked:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0), stacked=True)), nnx.Param)
        return graphdef, jax.eval_shape(lambda params: stack_layers(params, config), nnx.to_pure_dict(params))
    return graphdef, nnx.to_pure_dict(params)


def param_traits(config: ModelConfig, *, stacked: bool = False) -> Any:
    """Returns the dict of parameters with the `layers.Traits` of each; it must not be changed.

    Raises:
      TypeError: parameters were made without them.
    """
    modules = [(OPERATORS[operator].find_module(), FEED_FORWARDS[ffn].find_module()) for operator, ffn in config.layers]
    return _param_traits(config, stacked, tuple(modules))


@functools.lru_cache(maxsize=8)
def _param_traits(config: ModelConfig, stacked: bool, modules: tuple[tuple[Any, Any], ...]) -> Any:
    del modules  # Part of the cache's key: another kind may have taken a name of the config since.
    _, params = nnx.split(nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0))), nnx.Param)
    traits = nnx.to_pure_dict(params, extract_fn=lambda param: param.get_metadata().get("traits"))
    missing = [jax.tree_util.keystr(path, simple=True, separator=".")
               for path, leaf in jax.tree.leaves_with_path(traits, is_leaf=lambda x: x is None) if leaf is None]
    if missing:
        raise TypeError(f"{', '.join(missing)} have no traits; make parameters with layers.param or normal_param")

    def stack(first: Traits, *_: Traits) -> Traits:
        return dataclasses.replace(first, axes=(None, *first.axes))

    return stack_layers(traits, config, stack) if stacked else traits


def param_axes(config: ModelConfig, *, stacked: bool = False) -> Any:
    """Returns the dict of parameters with the logical axes of each, as tuples (`sharding.LOGICAL_AXES`)."""
    return jax.tree.map(lambda traits: traits.axes, param_traits(config, stacked=stacked))


def _by_layer(of_run: list[Named]) -> Named:
    """Puts the reports of the blocks of a repeated unit, [repeats, ...] each, in the order of the run's layers."""
    names = dict.fromkeys(name for block in of_run for name in block)
    stacks = {name: jnp.stack([block[name] for block in of_run if name in block], axis=1) for name in names}
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in stacks.items()}


class _Aligned(NamedTuple):
    """Rows in the form that operators take (`state.align`)."""

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    gather_BT: jax.Array | None
    """Aligned index -> index in the caller's row; None if nothing moved."""
    length_B: jax.Array
    """The number of real tokens of each row."""


def _aligned(
    tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None, first_B: jax.Array,
    padding: str, *, unread: bool,
) -> _Aligned:
    """Moves padding to the right end, and counts documents and positions; keeps the caller's layout over a mesh.

    With `unread`, id -d is of a token of document d, and negative again in the result.
    """
    B, T = tokens_BT.shape
    split = spec_of(tokens_BT)
    if parts(tokens_BT, 1) == 1:  # An axis of one device in the type would still prevent a gather.
        split = P(split[0], None)
        tokens_BT = reshard(tokens_BT, split)
        positions_BT = None if positions_BT is None else reshard(positions_BT, split)
    if segment_ids_BT is None:
        positions_BT = first_B[:, None] + jnp.arange(T, dtype=jnp.int32) if positions_BT is None else positions_BT
        return _Aligned(tokens_BT, reshard(positions_BT, split), None, None, jnp.full((B,), T, jnp.int32))
    # Documents are counted along whole rows; ids are small beside what a layer computes of them.
    given_BT = reshard(segment_ids_BT, P(split[0], None))
    gather_BT, ids_BT = state_lib.align(jnp.abs(given_BT) if unread else given_BT, right_padded=padding == "right")
    if gather_BT is not None:
        tokens_BT = jnp.take_along_axis(tokens_BT, gather_BT, axis=1)
        positions_BT = None if positions_BT is None else jnp.take_along_axis(positions_BT, gather_BT, axis=1)
    if positions_BT is None:
        positions_BT = state_lib.count_positions(ids_BT, first_B)
    if unread:
        ids_BT *= jnp.sign(given_BT if gather_BT is None else jnp.take_along_axis(given_BT, gather_BT, axis=1))
    length_B = state_lib.lengths(ids_BT)
    return _Aligned(tokens_BT, reshard(positions_BT, split), reshard(ids_BT, split), gather_BT, length_B)


class LFM(nnx.Module):
    """An LFM2-family language model.

    Args:
      config: shape and numerics.
      rngs: streams for the initialisation; the model does not keep them.
      stacked: builds only the structure, one block for each entry of a stacked parameter tree, to be merged with such a
        tree. A call without a state scans over runs of layers; a call with one raises ValueError.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = False):
        self.config, self.stacked = config, stacked
        self.runs = tuple(runs(config)) if stacked else (RepeatedUnit(0, config.num_layers, 1),)
        layers = unit_layers(config) if stacked else config.layers
        table, axes = (config.vocab_size, config.hidden_size), ("vocab", "width")
        self.embed = normal_param(rngs, table, axes, config, decay=True, matrix=None)
        self.blocks = nnx.List([Block(layer, config, rngs=rngs) for layer in layers])
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_embedding:
            self.head = normal_param(rngs, table, axes, config, decay=True, matrix=None)

    @property
    def head_VD(self) -> jax.Array | WeightKind:
        """The output matrix: the embedding table, or the head if it is untied."""
        return self.embed[...] if self.config.tie_embedding else self.head[...]

    def init_state(self, batch: int, max_len: int, dtype: str | jnp.dtype | None = None) -> State:
        """Makes an empty decode state; see `lfm_jax.state.init_state`."""
        return state_lib.init_state(self.config, batch, max_len, dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        state: State | None = None,
        logits: Logits | None = "all",
        *,
        padding: Padding = "any",
    ) -> tuple[jax.Array, State | None]:
        """Runs the model on whole rows, on a chunk that continues `state`, or on one token of each row.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: rotary positions. None counts them within each document, the first of which continues the
            state.
          segment_ids_BT: 0 for padding, another id for each document; a change of id starts a new
            document. None means one document per row without padding. In an encoder (`config.causal` is False) id -d
            marks a token of document d that attention does not read, its own included; such tokens expand queries.
          state: from `init_state` or an earlier call; None for a pass without a state.
          logits: `all` for [B, T, V], `last` for [B, 1, V] at each row's last real token, None for the
            normed hidden states [B, T, D].
          padding: with `any`, padding may be anywhere. `right` promises that it is at the right end of every row, and
            saves the gather that moves it there.

        Over a mesh of explicit axes (`jax.set_mesh`) a pass without a state may have rows split over devices, and time
        split over the axis `context`: padding must then be `right`, and logits `all` or None. Parameters are whole, or
        split by their `param_axes`.

        Returns:
          (logits or hidden states, new state or None). Values at padding are undefined. A row that
          outgrows the state's slots gives NaN.

        Raises:
          ValueError: shapes or options do not fit together.
        """
        self._check(tokens_BT, positions_BT, segment_ids_BT, state, logits, padding)
        first_B = jnp.zeros((tokens_BT.shape[0],), jnp.int32) if state is None else state.position_B
        tokens_BT, positions_BT, segment_ids_BT, gather_BT, length_B = _aligned(
            tokens_BT, positions_BT, segment_ids_BT, first_B, padding, unread=not self.config.causal
        )

        x_BTD = self._embed(tokens_BT)
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        only_B1 = last_B1 if logits == "last" else None
        layer_states: list[Any] = []
        if state is None:
            x_BTD, _ = self._run_layers(x_BTD, None, positions_BT, segment_ids_BT, only_B1)
        else:
            for i, block in enumerate(self.blocks):
                with jax.named_scope(f"layer_{i}"):
                    x_BTD, _, layer_state = _with_state(
                        block, x_BTD, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=state.layers[i],
                        only_B1=only_B1 if i == self.config.num_layers - 1 else None,
                    )
                layer_states.append(layer_state)
        if gather_BT is not None and logits != "last":
            x_BTD = jnp.take_along_axis(x_BTD, jnp.argsort(gather_BT, axis=1)[:, :, None], axis=1)
        x_BTD = self.norm(x_BTD)

        new_state = None
        if state is not None:
            after_B = jnp.take_along_axis(positions_BT, last_B1, axis=1)[:, 0] + 1
            new_state = State(tuple(layer_states), jnp.where(length_B > 0, after_B, state.position_B))
        return (x_BTD if logits is None else self.project(x_BTD)), new_state

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """Runs the model for a training step: as a call without logits and state, with padding at the right.

        Returns:
          (normed hidden states [B, T, D], reports of the layers).
        """
        x_BTD, positions_BT, segment_ids_BT = self.inputs(tokens_BT, positions_BT, segment_ids_BT)
        kinds = self.config.layer_types
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} | {"feed_forward": len(kinds)}
        zeros_BT = jnp.zeros_like(tokens_BT, jnp.float32)
        x_BTD, aux = self._run_layers(x_BTD, dict.fromkeys(counts, zeros_BT), positions_BT, segment_ids_BT, None)
        assert aux is not None  # Squares went in.
        real_BT = True if segment_ids_BT is None else segment_ids_BT != 0
        squares = {kind: jnp.sum(jnp.where(real_BT, aux.squares[kind], 0.0)) / n for kind, n in counts.items()}
        return self.norm(x_BTD), Aux(squares, aux.reports)

    def inputs(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Makes what the layers of a training step get: (embedded tokens [B, T, D], positions, segment ids)."""
        self._check(tokens_BT, positions_BT, segment_ids_BT, None, None, "right")
        first_B = jnp.zeros((tokens_BT.shape[0],), jnp.int32)
        tokens_BT, positions_BT, segment_ids_BT, _, _ = _aligned(
            tokens_BT, positions_BT, segment_ids_BT, first_B, "right", unread=not self.config.causal
        )
        return self._embed(tokens_BT), positions_BT, segment_ids_BT

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns rows of the table, in `config.dtype`."""
        with jax.named_scope("embed"):
            return lookup(tokens_BT, self.embed[...], self.config.dtype)

    def _run_layers(
        self, x_BTD: jax.Array, squares: Named | None, positions_BT: jax.Array, segment_ids_BT: jax.Array | None,
        only_B1: jax.Array | None,
    ) -> tuple[jax.Array, Aux | None]:
        """Runs all layers without a state, with `config.remat`; each run of stacked layers is one scan."""

        def run_block(block: Block, carry: Any, only_B1: jax.Array | None = None) -> tuple[Any, Named]:
            def layer(carry: Any) -> tuple[Any, Named]:
                x_BTD, squares = carry
                x_BTD, aux, _ = block(x_BTD, squares, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT,
                                      state=None, only_B1=only_B1)
                return ((x_BTD, None), {}) if aux is None else ((x_BTD, aux.squares), aux.reports)

            remat = self.config.remat
            return (jax.checkpoint(layer, policy=REMAT_POLICIES[remat]) if remat in REMAT_POLICIES else layer)(carry)

        carry, first = (x_BTD, squares), 0
        reports: list[Named] = []
        for run in self.runs:
            blocks = self.blocks[run.first : run.first + run.length]
            stop = first + run.length * run.repeats
            if run.repeats == 1:
                for i, block in enumerate(blocks, first):
                    with jax.named_scope(f"layer_{i}"):
                        carry, of_one = run_block(block, carry, only_B1 if i == self.config.num_layers - 1 else None)
                    reports.append({name: x[None] for name, x in of_one.items()})
            else:
                with jax.named_scope(f"layers_{first}_to_{stop - 1}"):
                    split = [nnx.split(block, nnx.Param) for block in blocks]

                    def unit(carry: Any, params: list[Any], split: list[Any] = split) -> tuple[Any, list[Named]]:
                        reports = []
                        for (graphdef, _), layer_params in zip(split, params, strict=True):
                            carry, of_one = run_block(nnx.merge(graphdef, layer_params), carry)
                            reports.append(of_one)
                        return carry, reports

                    carry, of_run = jax.lax.scan(unit, carry, [params for _, params in split])
                reports.append(_by_layer(of_run))
            first = stop
        x_BTD, squares = carry
        names = dict.fromkeys(name for found in reports for name in found)
        together = {name: jnp.concatenate([found[name] for found in reports if name in found]) for name in names}
        return x_BTD, None if squares is None else Aux(squares, together)

    def project(self, x_BTD: jax.Array) -> jax.Array:
        """Computes logits of normed hidden states, accumulated and returned in `config.logits_dtype`."""
        with jax.named_scope("head"):
            return linear(x_BTD, self.head_VD, dtype=self.config.logits_dtype)

    def _check(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None,
        state: State | None, logits: str | None, padding: str,
    ) -> None:
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer) or tokens_BT.size == 0:
            raise ValueError(
                f"tokens_BT is {tokens_BT.dtype}{list(tokens_BT.shape)}; expected integers of shape [batch, time], "
                "neither of them 0"
            )
        for name, array in (("positions_BT", positions_BT), ("segment_ids_BT", segment_ids_BT)):
            if array is not None and array.shape != tokens_BT.shape:
                raise ValueError(f"{name} has shape {array.shape}; expected that of tokens_BT, {tokens_BT.shape}")
        if logits not in ("all", "last", None):
            raise ValueError(f"logits is {logits!r}; choose 'all', 'last' or None for hidden states")
        if padding not in ("any", "right"):
            raise ValueError(f"padding is {padding!r}; choose 'any' or 'right'")
        if parts(tokens_BT, 1) > 1 and (state is not None or logits == "last" or (
            segment_ids_BT is not None and padding != "right"
        )):
            raise ValueError("tokens_BT is split along time; that goes without a state, with logits 'all' or None, and "
                             "with padding='right' if there are segment ids")
        if parts(tokens_BT, 0) > 1 and state is not None:
            raise ValueError("tokens_BT is split over devices; with a decode state give every device all rows")
        if state is None:
            return
        self.config.need_causal("a call with a state")
        if self.stacked:
            raise ValueError("a model of stacked layers runs without a state; unstack its parameters to decode")
        if len(state.layers) != self.config.num_layers:
            raise ValueError(f"state has {len(state.layers)} layers; the model has {self.config.num_layers}")
        if state.position_B.shape[0] != tokens_BT.shape[0]:
            raise ValueError(f"state holds {state.position_B.shape[0]} rows; tokens_BT has {tokens_BT.shape[0]}")
