"""What a training step needs, by analysis: bytes on each device and FLOPs, in under a second and without a compiler.

Parameters, optimizer state, gradients and the batch are exact: shapes from `jax.eval_shape`, split as the mesh splits
them. Activations and working memory follow the formulas here, which tests/plan compares with compiled programs.

Dimensions: B rows, T time, D width, F feed-forward width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lfm_jax.adapters.targets import named_targets
from lfm_jax.adapters.trees import init_adapter
from lfm_jax.chips import Chip, chip_of
from lfm_jax.config import ITEMSIZE, Layer, ModelConfig
from lfm_jax.kinds import FEED_FORWARDS, OPERATORS, Kept, Share
from lfm_jax.model import abstract_model
from lfm_jax.sharding import LOGICAL_AXES, MESH_AXES, ROWS
from lfm_jax.train.config import RunConfig
from lfm_jax.train.objective import BatchArray, others_of
from lfm_jax.train.state import TrainState, frozen_mask, named
from lfm_jax.train.step import Training
from lfm_jax.units import si, size

LAYER_FACTOR = 2.5
"""Bytes alive while a layer is computed again and differentiated, over those that it keeps without remat: its values,
their gradients and XLA's copies. Fitted to the compiled programs of docs/measurements/plans.md."""

DOTS_FACTOR = 1.25
"""The same for what `remat: dots` keeps: XLA holds some of it in two layouts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes on one device, and FLOPs of one optimizer step over all devices."""

    chip: Chip | None
    mesh: dict[str, int]
    """Devices along each mesh axis."""
    num_params: int
    trained_params: int
    """Those that are not frozen, or an adapter's."""
    tokens: int
    """Of one optimizer step, over all devices."""
    micro_batches: int
    parameters: float
    optimizer: float
    gradients: float
    batch: float
    activations: float
    """What the forward pass keeps for the backward pass (`kept_bytes`)."""
    working: float
    """The most that is alive beside that at one time (`working_bytes`)."""
    model_flops: float
    """`training_flops_per_token` for each token."""
    remat_flops: float
    """What `ModelConfig.remat` computes a second time; not counted as useful (MFU)."""

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def parts(self) -> dict[str, float]:
        """Bytes on one device by what takes them."""
        names = ("parameters", "optimizer", "gradients", "batch", "activations", "working")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def check(self) -> None:
        """Refuses what does not fit.

        Raises:
          ValueError: more bytes than the device has, with the largest parts and what makes them smaller.
        """
        if self.chip is not None and self.total > self.chip.hbm_bytes:
            raise ValueError(too_large(self.parts, self.total, self.chip))

    def __str__(self) -> str:
        axes = ", ".join(f"{name} {n}" for name, n in self.mesh.items() if n > 1) or "one device"
        parts = ", ".join(f"{name} {size(n)}" for name, n in self.parts.items())
        hbm = f" of {size(self.chip.hbm_bytes)}" if self.chip else ""
        again = f" and {si(self.remat_flops, 'FLOP')} again for remat" if self.remat_flops else ""
        trained = "" if self.trained_params == self.num_params else f" ({si(self.trained_params)} trained)"
        return (f"{si(self.num_params)} parameters{trained}; mesh: {axes}\n"
                f"on each device, by analysis: {size(self.total)}{hbm} ({parts})\n"
                f"a step of {self.tokens:,} tokens: {si(self.model_flops, 'FLOP')}{again}")


def budget(config: RunConfig, mesh: Mesh | None) -> Budget:
    """The budget of a recipe over a mesh; None for one device."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        state = config.training().abstract_state()
    sizes = dict.fromkeys(MESH_AXES, 1) if mesh is None else dict(mesh.shape)
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return budget_of(config, state, sizes, chip_of(device))


def budget_of(config: RunConfig, state: TrainState, sizes: dict[str, int], chip: Chip | None) -> Budget:
    """The budget of an abstract training state."""
    training, B, T = config.training(), config.rows, config.seq_len
    objective, learning = training.objective, differentiated(training)
    tokens = B * objective.tokens(T)
    shards = math.prod(sizes[axis] for axis in ROWS) * sizes["context"]
    share = Share(tokens / shards / config.micro_batches, T, sizes["tensor"], chip)
    trainable = tree_bytes(state.params, share.lanes)
    # A gradient has its parameter's dtype; a sum over micro-batches is float32, beside the part being added.
    gradients = trainable
    if config.micro_batches > 1:
        gradients += trainable * 4 / ITEMSIZE[config.model.param_dtype]
    return Budget(
        chip=chip, mesh=sizes, num_params=config.model.num_params(), tokens=tokens,
        trained_params=sum(x.size for x in jax.tree.leaves(state.params)), micro_batches=config.micro_batches,
        parameters=trainable + tree_bytes((state.frozen, state.others), share.lanes),
        optimizer=tree_bytes(state.opt_state, share.lanes), gradients=gradients,
        batch=sum(_batch_bytes(array, B, T, sizes) for array in objective.arrays.values()),
        activations=kept_bytes(learning, share) if learning else 0.0,
        working=working_bytes(config.model, share, objective.loss_chunk),
        model_flops=training_flops_per_token(training, T) * tokens,
        remat_flops=recomputed_flops_per_token(learning, T) * tokens if learning else 0.0,
    )


def _batch_bytes(array: BatchArray, B: int, T: int, sizes: dict[str, int]) -> float:
    """Bytes that one device holds of an array of a batch."""
    shards = math.prod(sizes[axis] for name in array.logical if name for axis in LOGICAL_AXES[name])
    return math.prod(array.shape(B, T)) * np.dtype(array.dtype).itemsize / shards


def tree_bytes(tree: Any, lanes: int = 1) -> float:
    """Bytes that one device holds of a tree of arrays, or of their shapes with layouts.

    With `lanes` the dimension of a matrix that fills them best is filled up to a multiple of them.
    """

    def leaf(x: Any) -> float:
        shape = x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
        filled = min((math.ceil(n / lanes) * lanes / n for n in shape), default=1.0) if len(shape) > 1 else 1.0
        return math.prod(shape) * x.dtype.itemsize * filled

    return float(sum(map(leaf, jax.tree.leaves(tree))))


# ---------------------------------------------------------------------------------------------------- activations


def kept_bytes(config: ModelConfig, share: Share) -> float:
    """Bytes that a micro-batch leaves on a device for the backward pass.

    Scanned layers keep what differentiation asks for, one stack for each value: the numbers below are those that
    `jax.ad_checkpoint.print_saved_residuals` lists, among them the gathered weights. In layers compiled one by one XLA
    computes elementwise values again where they are used, and keeps what products give and take.
    """
    factor = DOTS_FACTOR if config.remat == "dots" else 1.0
    kept = sum(
        factor * share.tokens * _activations_kept(config, layer, share) + _weights_kept(config, layer, share.tensor)
        for layer in config.layers
    )
    return kept * ITEMSIZE[config.dtype]


def _activations_kept(config: ModelConfig, layer: Layer, share: Share) -> float:
    """Elements of `dtype` a token."""
    D, remat = config.hidden_size, config.remat
    if remat == "full":
        return D  # The layer's input.

    def kept(of: Kept) -> float:  # Beside its input and, unless that is made again, the normed input.
        if remat == "dots":
            return D + of.products
        return 2 * D + (of.scanned if config.scan_layers else of.unrolled)

    operator, ffn = OPERATORS[layer.operator], FEED_FORWARDS[layer.feed_forward]
    return kept(operator.kept(config, share)) + (D if remat == "ffn" else kept(ffn.kept(config, share)))


def _weights_kept(config: ModelConfig, layer: Layer, tensor: int) -> float:
    """Elements of gathered weights that a layer keeps; without fsdp they are its own parameters in `dtype`."""
    if config.remat in ("dots", "full"):
        return 0.0
    ffn = FEED_FORWARDS[layer.feed_forward].matrices(config) if config.remat == "none" else 0
    return (OPERATORS[layer.operator].matrices(config) + ffn) / tensor


def working_bytes(config: ModelConfig, share: Share, loss_chunk: int) -> float:
    """Bytes alive beside what is kept: the larger of the loss and of one layer.

    Of the loss: the table gathered, its gradient in float32 and then in `dtype`, logits in float32 and their gradient
    in `dtype`. Of a layer: LAYER_FACTOR times what it keeps without remat, beside the table's gradient.
    """
    item = ITEMSIZE[config.dtype]
    rows = config.vocab_size / share.tensor
    table = rows * config.hidden_size
    loss = table * (4 + 2 * item) + min(loss_chunk, share.tokens) * rows * (4 + item)
    # Checkpoints go layer by layer, so that only one is computed again at a time.
    layer = max(
        kept_bytes(config.replace(remat="none", scan_layers=False).with_layers([layer]), share)
        for layer in set(config.layers)
    )
    return max(loss, LAYER_FACTOR * layer + table * item)


# ---------------------------------------------------------------------------------------------------------- FLOPs


def differentiated(training: Training) -> ModelConfig | None:
    """The layers that the backward pass reaches, as a model: from the lowest trained weight up. None if only the final
    norm or the head is trained."""
    model = training.model
    if not training.freeze and training.lora is None:
        return model
    trainable = {name for name, frozen in _frozen(training).items() if not frozen}
    if training.lora is not None:
        trainable &= {".".join(map(str, path)) for path in named_targets(model, training.lora).values()}
    if "embed" in trainable and not model.tie_embedding:
        return model
    lowest = min((int(name.split(".")[1]) for name in trainable if name.startswith("blocks.")),
                 default=model.num_layers)
    if "embed" in trainable:
        lowest = 0  # It is the first thing that runs.
    return model.with_layers(model.layers[lowest:]) if lowest < model.num_layers else None


def training_flops_per_token(training: Training, T: int) -> float:
    """FLOPs of a training step for each token of a row of T: forward pass, gradient by inputs, gradient by weights.

    3 x `ModelConfig.flops_per_token` where everything is trained. Layers below the lowest weight that is trained have
    a forward pass only, as other models of the objective have, and a matrix that is frozen has no gradient of its own.
    """
    model, reached = training.model, differentiated(training)
    forward, head = model.flops_per_token(T), 2 * model.hidden_size * model.vocab_size
    backward = 2 * (reached.flops_per_token(T) if reached else head)
    forward += sum(training.others.get(name, model).flops_per_token(T) for name in others_of(training.objective))
    if not training.freeze and training.lora is None:
        return forward + backward
    first = model.num_layers - (reached.num_layers if reached else 0)
    mask = _frozen(training)
    _, weights = abstract_model(model)
    for name, weight in named(weights):
        if (mask[name] or training.lora is not None) and weight.ndim > 1:
            backward -= 2 * math.prod(weight.shape) * _use(name, model, first)
    return forward + backward + 6 * _adapter_params(training)


def _frozen(training: Training) -> dict[str, bool]:
    """By its name whether a weight is frozen, or has no adapter."""
    return dict(named(frozen_mask(training.model.replace(scan_layers=False), training.freeze) or
                      jax.tree.map(lambda _: False, abstract_model(training.model)[1])))


def _adapter_params(training: Training) -> int:
    model, lora, frozen = training.model, training.lora, _frozen(training)
    if lora is None:
        return 0
    made = jax.eval_shape(lambda: init_adapter(model, lora, jax.random.key(0)))
    return sum(x.size for name, x in named(made) if not frozen[name.rpartition(".")[0]])


def _use(name: str, model: ModelConfig, first: int) -> float:
    """The part of a matrix that a token meets in a product, in layers from `first` up."""
    if not name.startswith("blocks."):
        return float(name == ("embed" if model.tie_embedding else "head"))
    _, layer, part, *_ = name.split(".")
    if int(layer) < first or part != "feed_forward":
        return float(int(layer) >= first)
    kind = FEED_FORWARDS[model.layers[int(layer)].feed_forward]
    return kind.products(model) / kind.matrices(model)


def recomputed_flops_per_token(config: ModelConfig, T: int) -> float:
    """FLOPs for each token of what the backward pass computes again under `config.remat`.

    full: the layers but for the last product of each, whose result nothing needs again; ffn: the products into the
    hidden layer; dots: attention, whose scores have batch dimensions, and the conv taps.
    """
    operators = [OPERATORS[layer.operator] for layer in config.layers]
    ffns = [FEED_FORWARDS[layer.feed_forward] for layer in config.layers]
    if config.remat == "none":
        return 0.0
    if config.remat == "ffn":
        return 2 * sum(ffn.products(config) - ffn.last_product(config) for ffn in ffns)
    layers = config.flops_per_token(T) - 2 * config.hidden_size * config.vocab_size
    if config.remat == "full":
        return layers - 2 * sum(ffn.last_product(config) for ffn in ffns)
    return layers - 2 * sum(kind.products(config) for kind in (*operators, *ffns))


# --------------------------------------------------------------------------------------------------------- advice

_ADVICE = {
    "parameters": "raise mesh.fsdp (or mesh.tensor)",
    "optimizer": "raise mesh.fsdp (or mesh.tensor)",
    "gradients": "raise mesh.fsdp (or mesh.tensor), or set micro_batches to 1",
    "batch": "take fewer rows a batch, or raise mesh.data",
    "activations": "set model.remat to full, raise micro_batches, raise mesh.context, or take fewer rows a batch",
    "working": "lower loss_chunk, raise mesh.tensor, or raise micro_batches",
    "temporaries": "set model.remat to full, raise micro_batches, lower loss_chunk, or raise mesh.context",
}


def too_large(parts: dict[str, float], total: float, chip: Chip) -> str:
    """The message for a step that does not fit a device: its largest parts and what makes each smaller."""
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    lines = "".join(f"\n  - {name}: {size(parts[name])}; {_ADVICE[name]}" for name in largest)
    return f"the step needs {size(total)} on each device, but a {chip.name} has {size(chip.hbm_bytes)}:{lines}"
