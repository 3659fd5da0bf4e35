"""Points of a study: settings of the axes become models, each matched in size to the base.

Dimensions: D width, F feed-forward width, L layers, T tokens of a row, B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Protocol

from lfm_jax.ablate.pattern import (
    Place,
    attention_at,
    forms,
    parse_pattern,
    place_of,
    place_of_others,
    to_letters,
)
from lfm_jax.ablate.study import Study
from lfm_jax.config import LayerType, ModelConfig
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.problems import raise_problems
from lfm_jax.train.optimizer import learning_rate

BASE = "base"
"""Name of the base among the points."""
TOLERANCE = 0.01
"""How far a point's count may lie from the base's."""
RATIO_SEARCH = 0.2
"""How far a fitted F / D may lie from the ratio asked for; the nearest is taken."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a study before a task is chosen."""

    name: str
    settings: dict[str, Any]
    """Values of the axes that its grid names; empty for the base."""
    model: ModelConfig
    """Not matched yet; vocab_size is the base's."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A point on a task: what is trained."""

    point: Point
    task: str
    model: ModelConfig
    """Matched, with the task's vocabulary."""
    steps: int
    tokens: int
    """Places in the batches of a run."""
    train_flops: float
    """Of a run."""
    match_off: float
    """Signed relative difference to the base's count."""
    changed: dict[str, tuple[int, int]]
    """Widths that the match changed: (asked for, used)."""


def points(study: Study) -> list[Point]:
    """The base, then the points of all grids in order; one that equals an earlier one is left out.

    Raises:
      ValueError: one message that lists every point that makes no valid model.
    """
    base = study.model.replace(layer_types=parse_pattern(study.pattern))
    found = [Point(BASE, {}, base)]
    problems = []
    for grid in study.vary:
        names = [name for name, _ in grid.axes]
        for values in itertools.product(*(values for _, values in grid.axes)):
            settings = dict(zip(names, values, strict=True))
            name = " ".join(f"{key}={_short(value)}" for key, value in settings.items())
            try:
                point = Point(name, settings, _model(base, settings, study.match_step, place_of_others(study.pattern)))
            except ValueError as error:
                problems.append(f"{name}: {error}")
                continue
            budget = settings.get("train_flops")
            if all((point.model, budget) != (other.model, other.settings.get("train_flops")) for other in found):
                found.append(point)
    raise_problems("points of the study are not valid", problems)
    return found


def all_settings(study: Study, point: Point) -> dict[str, Any]:
    """Values of every axis that the study varies, the base's where the point does not say."""
    base = study.model.replace(layer_types=parse_pattern(study.pattern))
    axes = dict.fromkeys(name for grid in study.vary for name, _ in grid.axes)
    model = point.model
    operators = sorted({_operator(kind, model) for kind in model.layer_types if kind != "full_attention"})
    given: dict[str, Any] = {
        "attention": point.model.attention_layers, "place": place_of(study.pattern) or "base",
        "operator": "+".join(operators) or "none",
        "pattern": to_letters(point.model.layer_types), "taps": base.conv_taps, "gates": base.conv_gates,
        "feed_forward": "+".join(dict.fromkeys(model.ffn_types)), "experts": base.num_experts,
        "active": base.active_experts,
        "ffn_ratio": round(base.ffn_size / base.hidden_size, 3), "kv_heads": base.num_kv_heads,
        "hidden_size": base.hidden_size, "train_flops": None,
    }
    if model.attention_layers != base.attention_layers:
        given["place"] = place_of_others(study.pattern)
    if "pattern" in point.settings:
        given["place"] = "-"
    return {name: point.settings.get(name, given[name]) for name in axes}


class TaskShape(Protocol):
    """What of a task decides the size of a trial."""

    vocab_size: int
    seq_len: int
    batch_size: int
    steps: int


def make_trial(study: Study, point: Point, base: Point, name: str, task: TaskShape) -> Trial:
    """The point on the task `name`, matched to the base on it.

    Raises:
      ValueError: no width brings it within 1 % of the base, or the schedule is longer than the run.
    """
    B, T, steps = task.batch_size, task.seq_len, task.steps
    model = point.model.replace(vocab_size=task.vocab_size)
    reference = base.model.replace(vocab_size=task.vocab_size)
    matched, off = model, 0.0
    if study.match != "none":
        matched, off = match(model, reference, study.match, T, study.match_step, point.settings.get("ffn_ratio"))
    flops = 3 * matched.flops_per_token(T)
    budget = point.settings.get("train_flops")
    if budget is not None:
        steps = max(1, round(budget / (flops * B * T)))
    learning_rate(study.optimizer_for(steps, 1.0), steps)  # Refuses a schedule that does not fit.
    changed = {name: (getattr(model, name), getattr(matched, name)) for name in ("hidden_size", _width_field(model))
               if getattr(model, name) != getattr(matched, name)}
    return Trial(point, name, matched, steps, steps * B * T, steps * B * T * flops, off, changed)


def _width_field(model: ModelConfig) -> str:
    """The field with the width F of a feed-forward: of its last layer, where layers have several kinds."""
    return FEED_FORWARDS[model.layers[-1].feed_forward].width


def match(
    model: ModelConfig, base: ModelConfig, by: str, T: int, step: int, ffn_ratio: float | None = None
) -> tuple[ModelConfig, float]:
    """`model` with the F (with ffn_ratio: D and F) that brings its count nearest to that of `base`.

    F is the width of a feed-forward, of a mixture that of one expert.

    Args:
      by: `params`, or `flops` of a token in rows of T.
      step: widths are multiples of this.

    Returns:
      (the matched model, the signed relative difference that is left).

    Raises:
      ValueError: the difference is over 1 %.
    """

    width = _width_field(model)

    def count(config: ModelConfig) -> float:
        return config.num_params() if by == "params" else config.flops_per_token(T)

    def off(config: ModelConfig) -> float:
        return count(config) / count(base) - 1

    def fitted(config: ModelConfig) -> ModelConfig:
        """With the F that fits best; counts are linear in F."""
        slope = count(config.replace(**{width: 2 * step})) - count(config.replace(**{width: step}))
        steps = 1 + (count(base) - count(config.replace(**{width: step}))) / slope
        return config.replace(**{width: max(1, round(steps)) * step})

    def ratio(config: ModelConfig) -> float:
        return getattr(config, width) / config.hidden_size

    if ffn_ratio is None:
        options = [model] if abs(off(model)) < 1e-12 else [fitted(model)]
    else:
        widths = range(step, 2 * model.hidden_size, step)
        options = [fitted(_with_width(model, D)) for D in widths]
        options = sorted(options, key=lambda c: abs(math.log(ratio(c) / ffn_ratio)))
        near = [c for c in options if abs(ratio(c) / ffn_ratio - 1) <= RATIO_SEARCH]
        options = [c for c in near if abs(off(c)) <= TOLERANCE] or near or options[:1]
    best = options[0]
    if abs(off(best)) > TOLERANCE:
        raise ValueError(
            f"no width brings it within {TOLERANCE:.0%} of the base by {by}: hidden_size {best.hidden_size} and "
            f"{width} {getattr(best, width)} are {off(best):+.1%} off; lower match_step (now {step}), or match by "
            "something else"
        )
    return best, off(best)


def _model(base: ModelConfig, settings: dict[str, Any], step: int, place: Place) -> ModelConfig:
    """The base with some settings changed; `place`: see `_layers`."""
    changes: dict[str, Any] = {}
    operator = settings.get("operator")
    if "pattern" in settings:
        changes["layer_types"] = parse_pattern(settings["pattern"])
    elif {"attention", "place", "operator"} & set(settings):
        changes["layer_types"] = _layers(base, settings, place)
    for axis, name in (("taps", "conv_taps"), ("gates", "conv_gates"), ("kv_heads", "num_kv_heads"),
                       ("experts", "num_experts"), ("active", "active_experts")):
        if axis in settings:
            changes[name] = settings[axis]
    if "feed_forward" in settings:
        changes["ffn_types"] = (settings["feed_forward"],)
    if operator is not None and forms()[operator].kind in changes["layer_types"]:
        changes |= forms()[operator].fields
    if "ffn_ratio" in settings:
        width = _width_field(base.replace(**changes))
        changes[width] = max(1, round(settings["ffn_ratio"] * base.hidden_size / step)) * step
    model = base.replace(**changes)
    mixtures = any(FEED_FORWARDS[kind].width == "expert_size" for kind in model.ffn_types)
    if {"experts", "active"} & set(settings) and not mixtures:
        raise ValueError("it has no mixture; set feed_forward to moe in the same grid, or give the base mixtures")
    if "hidden_size" in settings:
        model = _scaled(model, settings["hidden_size"], step)
    return model


def _layers(base: ModelConfig, settings: dict[str, Any], place: Place) -> tuple[LayerType, ...]:
    """Layers of a point; `place` is where another number of attention layers stands."""
    L = base.num_layers
    attention = settings.get("attention", base.attention_layers)
    here = tuple(i for i, kind in enumerate(base.layer_types) if kind == "full_attention")
    same = "place" not in settings and attention == len(here)
    at = here if same else attention_at(L, attention, settings.get("place", place))
    rest = {kind for kind in base.layer_types if kind != "full_attention"}
    if "operator" in settings:
        kind = forms()[settings["operator"]].kind
    elif len(rest) == 1:
        kind = rest.pop()
    elif attention == L:
        kind = "conv"
    else:
        raise ValueError(f"the base has {len(rest)} kinds of layers beside attention; name the operator too, or give "
                         "patterns")
    return tuple("full_attention" if i in at else kind for i in range(L))


def _with_width(model: ModelConfig, D: int) -> ModelConfig:
    """Another width of the residual stream; heads stay as they are."""
    return model.replace(hidden_size=D, init_std=model.init_std * (model.hidden_size / D) ** 0.5)


def _scaled(model: ModelConfig, D: int, step: int) -> ModelConfig:
    """Another width, with heads, F and initialisation in proportion."""
    ratio = D / model.hidden_size
    heads, kv_heads = model.num_heads * ratio, model.num_kv_heads * ratio
    if heads != int(heads) or kv_heads != int(kv_heads) or not int(kv_heads):
        raise ValueError(f"hidden_size {D} would have {heads:g} heads and {kv_heads:g} key/value heads; choose a "
                         f"multiple of {model.hidden_size // math.gcd(model.num_heads, model.num_kv_heads)}")
    fields = {FEED_FORWARDS[kind].width for kind in model.ffn_types}
    widths = {field: max(1, round(getattr(model, field) * ratio / step)) * step for field in fields}
    return _with_width(model, D).replace(num_heads=int(heads), num_kv_heads=int(kv_heads), **widths)


def _operator(kind: LayerType, model: ModelConfig) -> str:
    """The value of the axis `operator` that makes this layer."""
    for name, form in forms().items():
        if form.kind == kind and all(getattr(model, field) == value for field, value in form.fields.items()):
            return name
    return kind


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
