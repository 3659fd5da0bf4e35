"""ModelConfig: one frozen description of a hybrid model; everything else folds over it.

Sizes follow the published LFM2 checkpoints; `convert.families` reads and writes their config.json.

Dimensions: D model width, F feed-forward width, N query heads, K key/value heads, H head width,
W conv taps, V vocabulary, L layers, T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from lfm_jax.kinds import FEED_FORWARDS, ITEMSIZE, OPERATORS
from lfm_jax.problems import raise_problems

LayerType = Annotated[str, OPERATORS]
"""A name in the table, which also gives flags their choices (`recipe.py`)."""
FfnType = Annotated[str, FEED_FORWARDS]
DType = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int8:32", "int8:128", "int4", "int4:32", "int4:128", "w8a8"]
"""Narrow types of weights while a model runs, with the inputs that share a scale behind the colon (`lfm.quantize`)."""
ConvGates = Literal["none", "input", "output", "both"]
Recurrence = Literal["rglru", "liquid", "lti"]
ConvImpl = Literal["auto", "lax", "shifted", "associative", "pallas_tpu", "pallas_gpu"]
ScanImpl = Literal["auto", "sequential", "associative", "chunked", "pallas_tpu", "pallas_gpu"]
AttentionImpl = Literal["auto", "xla", "blockwise", "splash", "cudnn"]
ExpertsImpl = Literal["auto", "dense", "ragged", "blocks", "pallas_gpu"]
Init = Literal["normal", "scaled"]
Remat = Literal["none", "ffn", "dots", "full"]
ENCODER_LAYERS = ("conv", "full_attention")
"""The operators that can see both sides of a token."""


class Layer(NamedTuple):
    """The kinds that a layer is made of."""

    operator: str
    feed_forward: str


def hybrid_pattern(num_layers: int, attention_at: tuple[int, ...]) -> tuple[LayerType, ...]:
    """Returns layer types with `full_attention` at the given indices and `conv` everywhere else."""
    return tuple("full_attention" if i in attention_at else "conv" for i in range(num_layers))


def lfm3_pattern(num_layers: int) -> tuple[LayerType, ...]:
    """Returns the layer types of LFM3: every other layer is `conv`, and between them `full_attention` and
    `sliding_attention` take turns; the first layer is `conv` too."""
    return tuple(
        "full_attention" if i % 4 == 2 else "sliding_attention" if i % 4 == 0 and i > 0 else "conv"
        for i in range(num_layers)
    )


def repeated_units[L](layers: tuple[L, ...]) -> list[tuple[tuple[L, ...], int]]:
    """Returns layers as runs of a repeated unit, [(unit, repeats), ...], with as few units to compile as possible.

    LFM2-350M is `(c c a) x 3, (c a) x 3, (c) x 1`.
    """
    # best[i]: (layers in units, runs, minus the last run's start, its unit's length) for the first i layers.
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
    for end in range(1, len(layers) + 1):
        options = []
        for start in range(end):
            run = layers[start:end]
            length = next(n for n in range(1, len(run) + 1) if len(run) % n == 0 and run == run[:n] * (len(run) // n))
            options.append((best[start][0] + length, best[start][1] + 1, -start, length))
        best.append(min(options))
    units, end = [], len(layers)
    while end:
        _, _, minus_start, length = best[end]
        start = -minus_start
        units.append((layers[start : start + length], (end - start) // length))
        end = start
    return units[::-1]


_PATTERN_16 = hybrid_pattern(16, (2, 5, 8, 10, 12, 14))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape, numerics and token ids of an LFM2-family model. The defaults are LFM2.5-350M.

    Raises:
      ValueError: on construction; the message lists every bad field and how to fix it.
    """

    layer_types: tuple[LayerType, ...] = _PATTERN_16
    """Operator of each layer, first to last; there are as many layers as entries."""
    ffn_types: tuple[FfnType, ...] = ("swiglu",)
    """Feed-forward of each layer, first to last; a single one is for all layers."""
    causal: bool = True
    """Whether a token sees only itself and earlier ones. False is an encoder (LFM2.5-Embedding, LFM2.5-ColBERT): each
    token sees its whole document in `full_attention`, and half of the taps of `conv` on each side."""
    vocab_size: int = 65_536
    """V, number of rows of the embedding table."""
    hidden_size: int = 1024
    """D, width of the residual stream."""
    ffn_size: int = 4608
    """F, width of the hidden layer of a `swiglu` as stored (after HF's auto-adjust)."""
    num_experts: int = 32
    """E, experts of a `moe` layer."""
    active_experts: int = 4
    """Experts that work on each token of a `moe` layer."""
    expert_size: int = 1792
    """Width of the hidden layer of one expert."""
    expert_bias: bool = True
    """Whether a bias for each expert takes part in the choice of experts, but not in their weights."""
    expert_bias_rate: float = 0.0
    """What a training step adds to the bias of an expert with fewer tokens than the mean of its layer, and takes from
    the others' (`feed_forward/moe.py`); 0 leaves the bias alone. 0.001 where it was proposed, for pretraining."""
    normed_weights: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    expert_scale: float = 1.0
    """Factor of the weights of experts."""
    router_z_loss: float = 0.0
    """Weight of the loss that keeps the scores of experts small, log(sum exp(scores))^2; 0: none. 0.001 where it was
    proposed, for pretraining."""
    num_heads: int = 16
    """N, query heads."""
    num_kv_heads: int = 8
    """K, key/value heads; N / K query heads share one."""
    head_dim: int = 64
    """H, width of one head; even, because rotary embedding turns pairs."""
    conv_taps: int = 3
    """W, number of taps of the short convolution: each output sees W - 1 earlier tokens."""
    conv_bias: bool = False
    """Bias on in_proj, conv and out_proj of the short convolution."""
    conv_gates: ConvGates = "both"
    """Gates around the short convolution: a product before it (input), after it (output), both or none."""
    recurrence: Recurrence = "rglru"
    """Form of the `recurrence` layers; see `operators/linear_recurrence.py`."""
    sliding_window: int = 256
    """Tokens that a `sliding_attention` layer sees, the query's own included (256 as in LFM3)."""
    qk_norm: bool = True
    """RMSNorm over each query and key head before the rotary embedding."""
    attention_gate: bool = False
    """A gate on the output of each attention head: the sigmoid of a product with the layer's normed input (as in
    LFM3)."""
    post_norm: bool = False
    """Sandwich norms: another RMSNorm after the operator and after the feed-forward (as in LFM3)."""
    tie_embedding: bool = True
    """The output head is the embedding table."""
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    """Base of the rotary embedding: pair j of a head turns by `position * rope_theta ** (-2 j / H)`."""
    rope_fraction: float = 1.0
    """Share of the pairs of a head, the fastest ones, that turn in a `full_attention` layer; the number of pairs is
    rounded down (0.5 in LFM3)."""
    sliding_rope_theta: float | None = None
    """`rope_theta` of `sliding_attention` layers, whose heads turn whole (1e4 in LFM3); None for the same one."""
    max_position: int = 128_000
    """Longest context of a decode state."""
    init: Init = "normal"
    """How weights are initialised. normal: every matrix from N(0, init_std), as in `transformers`. scaled: each matrix
    preserves the scale of its input, N(0, 1 / inputs), and those that write to the residual stream are divided by
    sqrt(2 L); embedding tables from N(0, init_std). docs/measurements/initialisation.md compares them."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    pad_id: int = 0
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (7,)
    param_dtype: DType = "float32"
    """Dtype in which parameters are stored."""
    dtype: DType = "bfloat16"
    """Dtype of activations and matrix products. Norm variance, softmax and rotary embedding are always float32."""
    logits_dtype: DType = "float32"
    conv_impl: ConvImpl = "auto"
    """Implementation of the depthwise convolution; see `kernels/causal_conv.py`."""
    scan_impl: ScanImpl = "auto"
    """Implementation of the linear recurrence; see `kernels/linear_scan.py`."""
    attention_impl: AttentionImpl = "auto"
    """Implementation of attention in passes over whole rows; see `kernels/attention.py`. The platform and the size
    always choose that of attention to a decode state."""
    experts_impl: ExpertsImpl = "auto"
    """Implementation of the products of experts; see `kernels/experts.py`."""
    remat: Remat = "none"
    """What a training step recomputes in the backward pass instead of keeping it: none; ffn: the hidden layer of each
    feed-forward; dots: all but the results of matrix products; full: all but the input of each layer."""
    scan_layers: bool = False
    """Whether a training step compiles each run of repeated layers once (`repeated_units`), as a loop over them. Its
    parameters and optimizer state are then stacked (`stacking.py`); checkpoints never are."""

    quantize: str = ""
    """What a training step rounds the weights to before it computes with them, so that they learn to bear it: a type of
    `lfm export` (Q4_0), or a kind of `lfm.quantize` (int8, int4, int4:32). The weights that are trained are not
    rounded; `lfm.load` of a run gives the rounded ones."""

    def __post_init__(self) -> None:
        raise_problems("ModelConfig is not valid", _problems(self))
        if len(set(self.ffn_types)) == 1:  # One model, one form.
            object.__setattr__(self, "ffn_types", self.ffn_types[:1])

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Operator and feed-forward of each layer, first to last."""
        ffns = self.ffn_types * (self.num_layers if len(self.ffn_types) == 1 else 1)
        return tuple(map(Layer, self.layer_types, ffns))

    @property
    def attention_layers(self) -> int:
        """Number of layers of kind `full_attention`."""
        return self.layer_types.count("full_attention")

    @property
    def cannot_roll_back(self) -> tuple[str, ...]:
        """The operators whose decode state cannot go back; a model with any of them gets no drafts."""
        return tuple(kind for kind in dict.fromkeys(self.layer_types) if not OPERATORS[kind].rolls_back)

    def need_causal(self, what: str) -> None:
        """Raises ValueError, for `what` cannot be done, if the model is an encoder."""
        if not self.causal:
            raise ValueError(f"{what} needs a causal model, and causal is False: an encoder sees whole documents and "
                             "predicts no next token; use lfm.embed or lfm.rerank, or a model with causal=True")

    def replace(self, **changes: Any) -> ModelConfig:
        """Returns a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def with_layers(self, layers: Sequence[Layer]) -> ModelConfig:
        """Returns a copy with these layers."""
        operators, ffns = zip(*layers, strict=True)
        return self.replace(layer_types=operators, ffn_types=ffns)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ModelConfig:
        """The config of what a checkpoint holds of one, `recipe.to_plain`; missing fields have their defaults."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**fields)

    # ---------------------------------------------------------------- presets

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Returns the config of a published model by name, for example `lfm2.5-350m`.

        Raises:
          ValueError: the name is unknown; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; choose one of {', '.join(sorted(PRESETS))}")
        return cls(**PRESETS[name])

    # ---------------------------------------------------------------- counts

    def num_params(self) -> int:
        """Returns the number of parameters, counting a tied table once."""
        embed = self.vocab_size * self.hidden_size * (1 if self.tie_embedding else 2)
        norms = (4 if self.post_norm else 2) * self.hidden_size
        return embed + self.hidden_size + sum(
            norms + OPERATORS[operator].params(self) + FEED_FORWARDS[ffn].params(self) for operator, ffn in self.layers
        )

    def flops_per_token(self, T: int) -> float:
        """Returns the forward FLOPs per token of a document of T tokens, two per multiply-add.

        Counts every matrix product (head included), the conv taps, the step `a h + b` of a recurrence and attention:
        if it is causal, a token at position t meets t + 1 keys, but no more than a window holds, else T. Elementwise
        work and the embedding lookup are left out. One training step costs three times this.
        """
        macs = float(self.hidden_size * self.vocab_size)
        for operator, ffn in self.layers:
            kind = OPERATORS[operator]
            macs += FEED_FORWARDS[ffn].products(self) + (kind.products(self) + kind.mixing(self, T))
        return 2 * macs

    def state_bytes(self, T: int, dtype: DType | None = None) -> int:
        """Returns the bytes of the decode state of one sequence with room for T tokens (see `state.py`); an encoder has
        none."""
        if not self.causal:
            return 0
        item = ITEMSIZE[dtype or self.dtype]
        return 4 + sum(OPERATORS[kind].state_bytes(self, T, item) for kind in self.layer_types)


PRESETS: dict[str, dict[str, Any]] = {
    "lfm2-350m": dict(layer_types=_PATTERN_16, hidden_size=1024, ffn_size=4608, num_heads=16),
    "lfm2-700m": dict(layer_types=_PATTERN_16, hidden_size=1536, ffn_size=6912, num_heads=24),
    "lfm2-1.2b": dict(layer_types=_PATTERN_16, hidden_size=2048, ffn_size=8192, num_heads=32),
    "lfm2-2.6b": dict(
        layer_types=hybrid_pattern(30, (2, 5, 9, 13, 17, 21, 24, 27)), hidden_size=2048, ffn_size=10752, num_heads=32
    ),
}
for _name, _layers, _attention_at, _sizes in (
    ("lfm2-8b-a1b", 24, (2, 6, 10, 14, 18, 21), dict(ffn_size=7168, num_experts=32, expert_size=1792)),
    ("lfm2-24b-a2b", 40, tuple(range(2, 40, 4)), dict(ffn_size=11776, num_experts=64, expert_size=1536)),
):
    PRESETS[_name] = dict(layer_types=hybrid_pattern(_layers, _attention_at), hidden_size=2048, num_heads=32,
                          ffn_types=("swiglu",) * 2 + ("moe",) * (_layers - 2), **_sizes)
PRESETS["lfm2.5-350m"] = PRESETS["lfm2-350m"]
PRESETS["lfm2.5-1.2b"] = PRESETS["lfm2-1.2b"]
_VOCAB_128K: dict[str, Any] = dict(vocab_size=128_000, pad_id=124_893, bos_id=124_894, eos_ids=(124_900,))
PRESETS["lfm2.5-230m"] = dict(layer_types=hybrid_pattern(14, (2, 4, 6, 8, 10, 12)), hidden_size=1024, ffn_size=2560)
PRESETS["lfm2.5-2.6b"] = PRESETS["lfm2-2.6b"] | _VOCAB_128K | dict(rope_theta=1e7, max_position=131_072)
PRESETS["lfm3-1.7b"] = _VOCAB_128K | dict(
    layer_types=lfm3_pattern(24), hidden_size=2048, ffn_size=7680, num_heads=16, num_kv_heads=4, head_dim=128,
    conv_taps=7, post_norm=True, attention_gate=True, rope_fraction=0.5, sliding_rope_theta=1e4,
)


def _problems(c: ModelConfig) -> list[str]:
    problems = []

    def need(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    counts = ("vocab_size", "hidden_size", "ffn_size", "num_experts", "active_experts", "expert_size", "num_heads",
              "num_kv_heads", "head_dim", "conv_taps", "sliding_window", "max_position")
    for name in counts:
        value = getattr(c, name)
        need(type(value) is int and value >= 1, f"{name} is {value!r}; it must be a whole number of at least 1")
    for name in ("norm_eps", "rope_theta", "init_std", "expert_scale"):
        value = getattr(c, name)
        need(isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
             f"{name} is {value!r}; it must be a positive number")
    for name in ("expert_bias_rate", "router_z_loss"):
        value = getattr(c, name)
        need(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0,
             f"{name} is {value!r}; it must be a number of at least 0")
    theta = c.sliding_rope_theta
    need(theta is None or (isinstance(theta, (int, float)) and math.isfinite(theta) and theta > 0),
         f"sliding_rope_theta is {theta!r}; it must be a positive number, or None for rope_theta")
    share = c.rope_fraction
    need(isinstance(share, (int, float)) and 0 <= share <= 1,
         f"rope_fraction is {share!r}; it must be a number from 0 to 1")
    for name, kind in (("param_dtype", DType), ("dtype", DType), ("logits_dtype", DType), ("conv_gates", ConvGates),
                       ("recurrence", Recurrence), ("conv_impl", ConvImpl), ("scan_impl", ScanImpl),
                       ("attention_impl", AttentionImpl), ("experts_impl", ExpertsImpl), ("init", Init),
                       ("remat", Remat)):
        value, choices = getattr(c, name), get_args(kind)
        need(value in choices, f"{name} is {value!r}; choose one of {', '.join(choices)}")
    for name in ("causal", "conv_bias", "expert_bias", "normed_weights", "qk_norm", "attention_gate", "post_norm",
                 "tie_embedding", "scan_layers"):
        value = getattr(c, name)
        need(type(value) is bool, f"{name} is {value!r}; it must be true or false")
    for name, table in (("layer_types", OPERATORS), ("ffn_types", FEED_FORWARDS)):
        value = getattr(c, name)
        if isinstance(value, tuple) and value:
            unknown = sorted({str(kind) for kind in value} - set(table))
            need(not unknown, f"{name} has {', '.join(unknown)}; choose from {', '.join(table)}")
        else:
            need(False, f"{name} is {value!r}; it must be a tuple with at least one {table.what}")
    need(isinstance(c.eos_ids, tuple), f"eos_ids is {c.eos_ids!r}; it must be a tuple of token ids, perhaps empty")
    if problems:
        return problems  # The checks below do arithmetic on the fields.
    need(len(c.ffn_types) in (1, c.num_layers),
         f"ffn_types has {len(c.ffn_types)} entries, layer_types {c.num_layers}; give one for each or one for all")
    need(c.active_experts <= c.num_experts,
         f"active_experts {c.active_experts} is more than num_experts {c.num_experts}; change one of them")
    need(c.num_heads % c.num_kv_heads == 0,
         f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}; change one of them")
    if not c.causal:
        bad = sorted(set(c.layer_types) - set(ENCODER_LAYERS))
        need(not bad,
             f"layer_types has {', '.join(bad)}; a model with causal=False has {', '.join(ENCODER_LAYERS)} only")
        for name, impls in (("conv_impl", ("auto", "shifted")),
                            ("attention_impl", ("auto", "xla", "blockwise", "cudnn"))):
            need(getattr(c, name) in impls,
                 f"{name} is {getattr(c, name)!r}; with causal=False choose one of {', '.join(impls)}")
    need(c.head_dim % 2 == 0, f"head_dim is {c.head_dim}; it must be even, because rotary embedding turns pairs")
    for name, ids in (("pad_id", (c.pad_id,)), ("bos_id", (c.bos_id,)), ("eos_ids", c.eos_ids)):
        bad = [i for i in ids if type(i) is not int or not 0 <= i < c.vocab_size]
        need(not bad, f"{name} has {bad}; token ids lie in 0..{c.vocab_size - 1} (vocab_size)")
    return problems
