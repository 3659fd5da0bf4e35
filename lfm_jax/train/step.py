"""The training step: a pure function from (state, batch) to (state, metrics), jitted once with donation.

Over a mesh (`jax.set_mesh`) the same function runs: weights and optimizer state are laid out by
`Training.abstract_state`, batches as their objective declares them.

Dimensions: A micro-batches, B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.config import ModelConfig
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.model import LFM, Aux, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.quant.model import keeper, quantize_params
from lfm_jax.sharding import is_sharded, spec, spec_of
from lfm_jax.stacking import sharing, unit_layers
from lfm_jax.train import state as states
from lfm_jax.train.objective import DeviceBatch, Metrics, Objective, Terms, others_of
from lfm_jax.train.rounding import rounded_weights
from lfm_jax.train.state import Guard, TrainState

if TYPE_CHECKING:
    from lfm_jax.adapters.config import LoRAConfig

BASE = "reference"
"""The name under which an objective finds the trained model without its adapter."""
_INIT, _DROPOUT = 0, 1
"""What keys are for."""
GUARD_MEMORY = 0.98
"""Weight of the past in `Guard.mean_norm`: about 50 updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which updates are skipped, on the device, and when the run goes back to a checkpoint.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    spike: float = 10.0
    """An update is skipped when its gradient norm is over this many times the running mean. 0: never for that. One that
    is not finite is skipped always."""
    after: int = 100
    """Updates before the running mean is trusted."""
    max_in_row: int = 8
    """Updates skipped one after another until the run goes back to its last checkpoint and passes over their data."""
    max_rollbacks: int = 3
    """Times that a run may go back before it stops with an error."""

    def __post_init__(self) -> None:
        problems = [
            f"guard.{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("after", 1), ("max_in_row", 1), ("max_rollbacks", 0)) if getattr(self, name) < least
        ]
        if self.spike != 0 and not self.spike > 1:
            problems.append(f"guard.spike is {self.spike}; it must be above 1, or 0 for never")
        raise_problems("GuardConfig is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained and how: enough to make its state, compile its step and plan it.

    With `lora` an adapter is trained beside the weights, all of which are frozen and, with `lora.quantize`, narrow:
    `TrainState.params` is the adapter, `frozen` the model.

    Raises:
      ValueError: `lora` does not go with something else, or the objective looks at a model that is not there. While it
        is used: `freeze` or `lora` do not fit the model.
    """

    model: ModelConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    """With `lora` an adapter's (`adapters.trees.adapter_traits`)."""
    micro_batches: int = 1
    guard: GuardConfig = GuardConfig()
    freeze: tuple[str, ...] = ()
    """Shell patterns over names of weights that are not trained (`state.frozen_mask`), nor have an adapter."""
    lora: LoRAConfig | None = None
    seed: int = 0
    """Of a new adapter and of what its dropout drops."""
    others: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict, hash=False)
    """Frozen models that the objective looks at (`Objective`), by name. With `lora` there is a `reference` without any:
    the trained model without its adapter."""

    def __post_init__(self) -> None:
        raise_problems("this training is not possible", self.problems())

    def problems(self) -> list[str]:
        """A line for each thing that does not go together."""
        problems = []
        there = {*self.others} | ({BASE} if self.lora is not None else set())
        if missing := [name for name in others_of(self.objective) if name not in there]:
            problems.append(f"the objective looks at other models, {', '.join(missing)}, which the run does not have")
        if self.lora is not None and self.model.quantize:
            problems.append("model.quantize rounds weights that are trained, and lora trains none of them; leave "
                            "model.quantize out, or train without lora (lora.quantize keeps frozen weights narrow)")
        if self.lora is not None and self.lora.quantize:
            try:
                keeper(self.model, self.lora.quantize)
            except ValueError as error:
                problems.append(f"lora.quantize: {error}")
        if self.lora is not None and self.model.expert_bias_rate:
            problems.append("model.expert_bias_rate changes a buffer, and lora leaves the model as it is; set it to 0")
        return problems

    # ---------------------------------------------------------------- state

    @cached_property
    def mask(self) -> Any:
        """True at each frozen weight."""
        return states.frozen_mask(self.model, self.freeze)

    def new_state(self, weights: Any, others: Mapping[str, Any] | None = None) -> TrainState:
        """A fresh state around weights as a step holds them (`ModelConfig.scan_layers`: stacked; `lora.quantize`:
        narrow)."""
        return states.new_state(*self._divided(weights), self.optimizer, others)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and layouts over the mesh in use; see `state.abstract`."""
        return states.abstract(self._held, self.new_state)

    def random_state(self, seed: int) -> TrainState:
        """A fresh state with random weights, laid out over the mesh in use; an adapter follows from `self.seed`."""
        return states.of_random(self._held, self.new_state, seed)

    def placed_state(self, weights: Any, others: Mapping[str, Any] | None = None) -> TrainState:
        """A fresh state around given weights and those of `others` (whole arrays, unstacked), laid out over the mesh in
        use."""
        return states.of_given(self._held, self.new_state, weights, others or {})

    def _divided(self, weights: Any) -> tuple[Any, Any]:
        """(params, frozen) of a new state."""
        if self.lora is None:
            return states.divided(weights, self.mask)
        key = jax.random.fold_in(jax.random.key(self.seed), _INIT)
        from lfm_jax.adapters.trees import init_adapter  # Here, as below: benchmarks have neither tyro nor safetensors.

        made = init_adapter(self.model, self.lora, key, stacked=self.model.scan_layers)
        params = states.without(made, self.mask)
        if not params:
            raise ValueError(f"freeze {list(self.freeze)} leaves no adapter to train; name fewer weights")
        return params, weights

    @property
    def _held(self) -> states.Held:
        form = self.lora.quantize if self.lora is not None else ""
        if not form:
            return states.Held(self.model, self.others)
        return states.Held(self.model, self.others, lambda weights: quantize_params(
            jax.tree.map(lambda w: w, weights), self.model, form))  # Other dicts, which it empties.

    # ---------------------------------------------------------------- what checkpoints leave out

    def stored(self, state: TrainState) -> TrainState:
        """The part of a state that checkpoints hold: without `others`, and beside an adapter without the model, which
        are made again from what the run began with."""
        return dataclasses.replace(state, frozen=state.frozen if self.lora is None else {}, others={})

    def kept(self, state: TrainState) -> tuple[Any, Any]:
        """The part of a state that `stored` leaves out, for `completed`."""
        return ({} if self.lora is None else state.frozen), state.others

    def completed(self, stored: TrainState, kept: tuple[Any, Any]) -> TrainState:
        """The state of its two parts."""
        frozen, others = kept
        return dataclasses.replace(stored, frozen=stored.frozen if self.lora is None else frozen, others=others)

    def remade(self, weights: Any | None, others: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
        """What `kept` says of the state that a run begins with: that of `placed_state`, or of `random_state` where
        weights are None."""

        def make(weights: Any, others: Any) -> tuple[Any, Any]:
            return ({} if self.lora is None else weights), others

        if weights is None:
            return states.of_random(self._held, make, seed)
        return states.of_given(self._held, make, weights, others)

    def abstract_batch(self, B: int, T: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and layouts of a batch over the mesh in use."""
        mesh = jax.sharding.get_mesh()

        def layout(logical: tuple[str | None, ...]) -> NamedSharding | None:
            return None if mesh.empty else NamedSharding(mesh, spec(*logical) or P())

        return {
            name: jax.ShapeDtypeStruct(array.shape(B, T), array.dtype, sharding=layout(array.logical))
            for name, array in self.objective.arrays.items()
        }

    # ---------------------------------------------------------------- programs

    def step(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """`train_step` of this training."""
        return train_step(self, state, batch)

    def compiled_step(self) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
        """The step jitted, the old state donated."""
        return jax.jit(self.step, donate_argnums=0)

    def evaluate(
        self, weights: tuple[Any, Any], batch: DeviceBatch, others: Mapping[str, Any] | None = None
    ) -> tuple[Metrics, jax.Array]:
        """(sums, weight) of the objective over a batch; `weights` are the (params, frozen) of a state, `others` its."""
        terms = self.terms(*weights, others or {}, batch, None)
        return terms.sums, self.objective.weight(batch)

    def compiled_evaluate(self) -> Callable[..., tuple[Metrics, jax.Array]]:
        return jax.jit(self.evaluate)

    def terms(self, params: Any, frozen: Any, others: Mapping[str, Any], batch: DeviceBatch, key: Any) -> Terms:
        """The objective over a batch; `key` is that of dropout, or None."""
        model, names = self.model_of(params, frozen, key), others_of(self.objective)
        if not names:
            return self.objective(model, batch)
        return self.objective(model, batch, {name: self._other(name, frozen, others) for name in names})

    def model_of(self, params: Any, frozen: Any, key: jax.Array | None = None) -> LFM:
        """The model that a step computes with: rounded (`ModelConfig.quantize`), or with its adapter, whose inputs are
        dropped by `key`."""
        if self.lora is None:
            weights = rounded_weights(self.model, states.merged(params, frozen))
        else:
            from lfm_jax.adapters.trees import adapt

            weights = adapt(self.model, self.lora, frozen, params, key=key, stacked=self.model.scan_layers)
        return nnx.merge(self.graphdef, weights)

    def _other(self, name: str, frozen: Any, others: Mapping[str, Any]) -> LFM:
        if name not in self.others:  # The one without its adapter.
            return nnx.merge(self.graphdef, frozen)
        config = self.others[name]
        return nnx.merge(abstract_model(config, stacked=config.scan_layers)[0], others[name])

    def dropout_keys(self, step: jax.Array) -> jax.Array | None:
        """A key for each micro-batch of a step, which follow from seed and step; None without dropout."""
        if self.lora is None or not self.lora.dropout:
            return None
        key = jax.random.fold_in(jax.random.key(self.seed), _DROPOUT)
        return jax.random.split(jax.random.fold_in(key, step), self.micro_batches)

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        """Of the model as a step holds it."""
        return abstract_model(self.model, stacked=self.model.scan_layers)[0]


def train_step(training: Training, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean of the objective over the batch.

    The batch is cut into `micro_batches` of equal rows (row r belongs to part r modulo micro_batches, so that over a
    mesh no row moves). Each part's sum is divided by the weight of the whole batch, so how many parts there are changes
    memory and rounding only. Frozen weights are not differentiated.

    An update whose gradient is not finite, or far larger than usual (`GuardConfig.spike`), is not made: parameters and
    optimizer stay as they are, to the bit, and only `step` and `guard` go on.

    Returns:
      The new state, and float32 scalars: the means (`loss` among them) and the largest numbers that the objective
      reports, grad_norm (before
      clipping), weight, tokens (that are no padding), skipped (1 if the update was not made), skipped_in_row,
      `grad_norm/KIND` by kind of operator, feed_forward, norm and table, `act_norm/KIND`, the root mean square of what
      each kind adds to the residual stream, and what feed-forwards report (`model.Aux`), as means over tokens: of one
      number a token `KIND/NAME`, the mean over layers, and `KIND/NAME/LAYER`; of several numbers a token the largest
      and the least mean, `KIND/NAME/largest/LAYER` and `KIND/NAME/least/LAYER`.
    """
    objective, guard, micro_batches = training.objective, training.guard, training.micro_batches
    weight = objective.weight(batch)
    scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)

    tokens = jnp.asarray(objective.real_tokens(batch), jnp.float32)

    def scaled(params: Any, part: DeviceBatch, key: Any) -> tuple[jax.Array, tuple[Metrics, Aux, Metrics]]:
        terms = training.terms(params, state.frozen, state.others, part, key)
        total, of_layers = scale * terms.total, terms.aux.loss
        if of_layers is not None:
            total += of_layers / jnp.maximum(tokens, 1.0)
        return total, ({name: scale * x for name, x in terms.sums.items()}, terms.aux, dict(terms.largest))

    grad_fn = jax.grad(scaled, has_aux=True)
    keys = training.dropout_keys(state.step)
    first = None if keys is None else keys[0]
    if micro_batches == 1:
        grads, (means, aux, largest) = grad_fn(state.params, batch, first)
    else:

        def add(carry: Any, part: tuple[DeviceBatch, Any]) -> tuple[Any, None]:
            (sums, largest), (grads, (means, aux, more)) = carry, grad_fn(state.params, *part)
            sums = jax.tree.map(jnp.add, sums, (grads, means, aux))
            return (sums, jax.tree.map(jnp.maximum, largest, more)), None

        parts = jax.tree.map(lambda x: _split_rows(x, micro_batches), dict(batch))
        *sums, largest = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts), first)[1]
        # Sums in float32, whatever the parameters are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, *sums))
        least = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), largest)
        ((grads, means, aux), largest), _ = jax.lax.scan(add, (zeros, least), (parts, keys))
    squares = _squares_by_kind(training.model, grads)
    norm = jnp.sqrt(sum(squares.values()))
    grads = jax.tree.map(lambda grad, w: grad.astype(w.dtype), grads, state.params)
    ok = jnp.isfinite(norm) & jnp.isfinite(means["loss"])
    if guard.spike:
        ok &= (state.guard.made < guard.after) | (norm <= guard.spike * state.guard.mean_norm)
    params, opt_state = _updated(training.optimizer, ok, norm, grads, state)
    made, in_row = state.guard.made + ok, jnp.where(ok, 0, state.guard.in_row + 1)
    # The mean of the first updates is a plain one.
    memory = jnp.minimum(GUARD_MEMORY, 1 - 1 / jnp.maximum(made, 1).astype(jnp.float32))
    mean_norm = jnp.where(ok, memory * state.guard.mean_norm + (1 - memory) * norm, state.guard.mean_norm)
    metrics = means | largest | {
        "grad_norm": norm, "weight": weight, "tokens": tokens, "skipped": 1.0 - ok,
        "skipped_in_row": in_row.astype(jnp.float32),
    }
    metrics |= {f"grad_norm/{kind}": jnp.sqrt(square) for kind, square in squares.items()}
    metrics |= {f"act_norm/{kind}": jnp.sqrt(square / jnp.maximum(tokens, 1.0)) for kind, square in aux.squares.items()}
    reports = {name: x / jnp.maximum(tokens, 1.0) for name, x in aux.reports.items()}
    metrics |= _of_reports(training.model, reports)
    frozen = state.frozen if training.lora is not None else _with_rules(training.model, state.frozen, reports, ok)
    new = dataclasses.replace(
        state, params=params, frozen=frozen, opt_state=opt_state, step=state.step + 1,
        guard=Guard(mean_norm, made, in_row),
    )
    return new, metrics


def _of_reports(config: ModelConfig, reports: Metrics) -> Metrics:
    """Metrics of reports, which are means over tokens with a row for each layer of their kind."""
    found: Metrics = {}
    for name, x in reports.items():
        kind = name.partition("/")[0]
        layers = [i for i, layer in enumerate(config.layers) if layer.feed_forward == kind]
        if x.ndim == 1:
            found[name] = jnp.mean(x)
            found |= {f"{name}/{i}": x[row] for row, i in enumerate(layers)}
        else:
            for row, i in enumerate(layers):
                found |= {f"{name}/largest/{i}": jnp.max(x[row]), f"{name}/least/{i}": jnp.min(x[row])}
    return found


def _with_rules(config: ModelConfig, frozen: Any, reports: Metrics, ok: jax.Array) -> Any:
    """The frozen weights, with every buffer as its rule leaves it if the update is made."""
    kinds = [layer.feed_forward for layer in config.layers]
    shared = sharing(config) if config.scan_layers else [range(i, i + 1) for i in range(config.num_layers)]
    for entry, layers in enumerate(shared):
        row = FEED_FORWARDS[kinds[layers[0]]]
        held = frozen.get("blocks", {}).get(entry, {}).get("feed_forward", {})
        of_layers = [{name.removeprefix(f"{row.name}/"): x[kinds[:i].count(row.name)] for name, x in reports.items()
                      if name.startswith(f"{row.name}/")} for i in layers]
        ruled = {}
        for name in row.buffers.keys() & held.keys():
            rule, old = row.find_rule(name), held[name]
            parts = [old] if len(layers) == 1 else list(old)
            new = [rule(part, own, config) for part, own in zip(parts, of_layers, strict=True)]
            ruled[name] = jnp.where(ok, new[0] if len(layers) == 1 else jnp.stack(new), old)
        if ruled:
            block = frozen["blocks"][entry] | {"feed_forward": held | ruled}
            frozen = frozen | {"blocks": frozen["blocks"] | {entry: block}}
    return frozen


def _updated(
    optimizer: optax.GradientTransformation, ok: jax.Array, norm: jax.Array, grads: Any, state: TrainState
) -> tuple[Any, Any]:
    """(parameters, optimizer state) after the update, or as they were where it is not `ok`."""
    with jax.named_scope("optimizer"):

        def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, params, grad_norm=norm  # For clipping, which would find it again.
            )
            return optax.apply_updates(params, updates), opt_state

        # A branch, not a selection of each leaf, for which XLA copies the old moments.
        return jax.lax.cond(
            ok, update, lambda grads, opt_state, params: (params, opt_state), grads, state.opt_state, state.params
        )


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[A, B / A, ...]: row r goes to part r modulo A, so that every device keeps its own rows."""
    B, *rest = x.shape
    out_sharding = None
    if is_sharded(x):
        b, *others = spec_of(x)
        out_sharding = P(b, None, *others)
    return jnp.swapaxes(jax.lax.reshape(x, (B // parts, parts, *rest), out_sharding=out_sharding), 0, 1)


def _squares_by_kind(config: ModelConfig, grads: Any) -> Metrics:
    """Sums of squares of a gradient by kind of operator, feed_forward, norm and table; together those of all of it."""
    layers = unit_layers(config) if config.scan_layers else config.layers
    squares: Metrics = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name, *rest = (entry.key for entry in path if hasattr(entry, "key"))
        kind = name if name != "blocks" else layers[rest[0]].operator if rest[1] == "operator" else rest[1]
        kind = "table" if kind in ("embed", "head") else "norm" if kind.endswith("norm") else kind
        squares[kind] = squares.get(kind, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return squares
