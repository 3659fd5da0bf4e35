"""Figures of a study: quality against cost, score against attention share, curves, and loss against tokens a parameter.

Each draws into a directory and returns (what it shows, file name) of what it drew. Bytes depend on the records alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm_jax.ablate import scaling
from lfm_jax.ablate.results import slug
from lfm_jax.ablate.stats import summarize
from lfm_jax.units import si, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lfm_jax.ablate.results import Results

Picture = tuple[str, str]
"""(what it shows, file name)."""

SPEED_NOISE = 0.25
"""Measured speeds this close to each other are not drawn: equal models differ by as much in a noisy hour."""
MOST_LINES = 10
"""Points whose curves are drawn; of more, the base and the extremes."""
EXTREMES = 3
"""Best and worst points drawn where there are too many."""
MOST_TICKS = 10
"""Places of a curve that are all marked on its axis."""
_MARKERS = "osD^vPX"
_OTHER_LAYERS = ("operator", "place", "taps", "gates")
"""Axes that say nothing where all layers are attention."""
_ATTENTION_LAYERS = ("place", "kv_heads")
"""Axes that say nothing where none is."""
_SHARE_AXES = ("attention", "pattern")
"""Axes that set the attention share."""


def _styled(draw: Callable[..., list[Picture]]) -> Callable[..., list[Picture]]:
    """Draws in the fonts of these figures."""

    @functools.wraps(draw)
    def styled(*args: Any) -> list[Picture]:
        from matplotlib import rc_context

        with rc_context({"font.size": 8, "axes.titlesize": 9, "figure.titlesize": 9}):
            return draw(*args)

    return styled


@_styled
def draw_task(results: Results, task: str, out: Path) -> list[Picture]:
    """Quality against cost, and score against attention share where that varies."""
    if not results.scores(task):
        return []
    return [picture for draw in (_draw_cost, _draw_share) if (picture := draw(results, task, out)) is not None]


@_styled
def draw_curves(results: Results, task: str, out: Path) -> list[Picture]:
    """Each curve of the task: the mean over seeds with its 95 % interval, and the same minus the base's."""
    record = results.tasks.get(task)
    if record is None:
        return []
    return [picture for name in sorted(record["curves"])
            if (picture := _draw_curve(results, task, name, record["curves"][name], out)) is not None]


@_styled
def draw_scaling(
    results: Results, groups: Sequence[Sequence[scaling.Arm]], law: scaling.Fit | None, out: Path
) -> list[Picture]:
    """Loss against tokens per parameter, one colour a FLOP budget, with the fitted curve and its band."""
    if not groups:
        return []
    figure, (axes,) = _figure(1)
    for i, group in enumerate(groups):
        color = f"C{i % 10}"
        for arm in group:
            _bar(axes, arm.D / arm.N, list(arm.scores.values()), color=color, marker=_MARKERS[i % len(_MARKERS)])
        axes.plot([], [], color=color, marker=_MARKERS[i % len(_MARKERS)], label=f"{si(group[0].C)} FLOPs")
        if law is not None:
            low, high = scaling.ratios_of(group)
            ratios = np.geomspace(low / 1.25, high * 1.25, 200)
            at = scaling.at_budget(group, ratios)
            axes.plot(ratios, law.law(*at), color=color)
            if law.resampled:
                band = np.quantile([one(*at) for one in law.resampled], (0.025, 0.975), axis=0)
                axes.fill_between(ratios, *band, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="training tokens a parameter", ylabel=results.score_label("text"))
    _log_x(axes, "{:g}".format)
    axes.set_title("Equal training FLOPs: small on many tokens (right), large on few (left)"
                   + ("" if law is None else "; line: the fitted law"))
    axes.legend(title="training budget")
    return [_save(figure, out, "tokens-per-parameter.png", "Loss against training tokens a parameter at equal FLOPs")]


# ------------------------------------------------------------------------------------------------------------ cost


def _draw_cost(results: Results, task: str, out: Path) -> Picture | None:
    noise = {"higher": SPEED_NOISE, "lower": scaling.EQUAL}
    panels = [panel for panel in _cost_panels(results, task) if _differ(panel[1].values(), noise[panel[2]])]
    if not panels:
        return None
    better = results.tasks.get(task, {}).get("better")
    scores = results.scores(task)
    means = {point: summarize(values.values()).mean for point, values in scores.items()}
    figure, all_axes = _figure(len(panels), rows_of_legend=math.ceil(len(scores) / 4))
    for axes, (label, costs, cheap, form) in zip(all_axes, panels, strict=True):
        front = pareto(level(costs, noise[cheap]), cheap, {p: means[p] for p in costs}, better) if better else []
        axes.plot([costs[p] for p in front], [means[p] for p in front], "--", color="0.4", linewidth=1, zorder=1)
        for point in costs:
            color, marker = _style(results, point)
            filled = point in front or not better
            _bar(axes, costs[point], list(scores[point].values()), color=color, marker=marker,
                 markerfacecolor=color if filled else "white", zorder=3 if filled else 2)
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter(lambda x, _, form=form: form(x))
        axes.locator_params(axis="x", nbins=5)
        if min(costs.values()) > 0 and max(costs.values()) > 8 * min(costs.values()):
            _log_x(axes, form, base=2 if form is _mebibytes else 10)
        axes.set_xlabel(f"{label} ({cheap} is better)")
    all_axes[0].set_ylabel(results.score_label(task))
    figure.suptitle(f"{results.title(task)}: quality against cost" + (
        "; filled, joined by dashes: Pareto front of the means" if better else ""))
    _legend(figure, results, list(scores))
    return _save(figure, out, f"{slug(task)}-cost.png", f"{results.title(task)}: quality against cost")


def _cost_panels(results: Results, task: str) -> list[tuple[str, dict[str, float], str, Callable[[float], str]]]:
    """(label of the axis, cost of each scored point, which way is cheap, a cost as text)."""
    points = list(results.scores(task))
    costs = {p: results.costs[p] for p in points if p in results.costs}
    flops = {p: results.points[task, p]["train_flops"] for p in points if (task, p) in results.points}
    contexts = {int(T) for cost in costs.values() for T in cost["state_bytes"]}
    panels: list[tuple[str, dict[str, float], str, Callable[[float], str]]] = [
        ("training FLOPs\nof a run", flops, "lower", si),
    ]
    if contexts:
        T = str(max(contexts))
        speeds = {p: cost["relative"]["decode"][T] for p, cost in costs.items()
                  if T in cost["relative"].get("decode", {})}
        state = {p: cost["state_bytes"][T] / 2**20 for p, cost in costs.items() if T in cost["state_bytes"]}
        panels.append((f"decoding speed over the base's\nat context {int(T):,}", speeds, "higher", "{:g} x".format))
        panels.append((f"decode state\nat context {int(T):,}", state, "lower", _mebibytes))
    return panels


def _mebibytes(x: float) -> str:
    return size(x * 2**20) if x else "0"


def _differ(values: Iterable[float], by: float) -> bool:
    """Whether costs differ enough to be drawn: equal ones, as matched points have, say nothing."""
    values = list(values)
    return bool(values) and max(values) > (1 + by) * min(values)


def level(costs: Mapping[str, float], by: float) -> dict[str, float]:
    """Costs where those that differ by less than a share `by` are one: the smallest of them."""
    found: dict[str, float] = {}
    smallest = 0.0
    for point in sorted(costs, key=lambda p: costs[p]):
        if not found or costs[point] > (1 + by) * smallest:
            smallest = costs[point]
        found[point] = smallest
    return found


def pareto(
    costs: Mapping[str, float], cheap: str, scores: Mapping[str, float], better: str
) -> list[str]:
    """Points that no other one equals or beats in both cost and score, cheapest first.

    Args:
      costs: by point.
      cheap: `lower` or `higher`, the way of low cost.
      scores: by point.
      better: `lower` or `higher`, the way of good scores.
    """
    cost = {p: value if cheap == "lower" else -value for p, value in costs.items()}
    loss = {p: value if better == "lower" else -value for p, value in scores.items()}
    front = [p for p in cost if not any(
        cost[o] <= cost[p] and loss[o] <= loss[p] and (cost[o], loss[o]) != (cost[p], loss[p]) for o in cost)]
    return sorted(front, key=lambda p: (cost[p], loss[p], p))


# ----------------------------------------------------------------------------------------------------------- share


def _draw_share(results: Results, task: str, out: Path) -> Picture | None:
    scores = results.scores(task)
    shares = {p: (record["attention_layers"], record["layers"]) for p in scores
              if (record := results.points.get((task, p)))}
    if len({n / of for n, of in shares.values()}) < 2:
        return None
    figure, (axes,) = _figure(1)
    for i, (label, points) in enumerate(_lines(results, task, list(shares))):
        xs = [shares[p][0] / shares[p][1] for p in points]
        color = f"C{i % 10}"
        # Lines stand a little apart, else their bars hide each other.
        xs = [x + 0.006 * (i % 5) for x in xs]
        if len(set(xs)) == len(xs):
            axes.plot(xs, [summarize(scores[p].values()).mean for p in points], color=color, linewidth=1.2)
        for x, p in zip(xs, points, strict=True):
            _bar(axes, x, list(scores[p].values()), color=color, marker=_MARKERS[i % len(_MARKERS)])
        axes.plot([], [], color=color, marker=_MARKERS[i % len(_MARKERS)], label=label)
    if results.base in shares:
        n, of = shares[results.base]
        axes.axvline(n / of, color="0.7", linewidth=1, linestyle=":", label="share of the base", zorder=0)
    chance = results.tasks.get(task, {}).get("chance")
    if chance is not None:
        axes.axhline(chance, color="0.4", linewidth=1, linestyle="--", label="chance")
    ticks = sorted({n / of: f"{n}/{of}" for n, of in shares.values()}.items())
    axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    axes.set(xlabel="attention layers of all layers", ylabel=results.score_label(task),
             title=f"{results.title(task)}: score against attention share, mean and 95 % interval over seeds")
    axes.legend()
    return _save(figure, out, f"{slug(task)}-attention-share.png",
                 f"{results.title(task)}: score against attention share")


def _lines(results: Results, task: str, points: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(label, points by share) of each value of the other axes.

    A point that an axis says nothing about, as the operator of the other layers where there are none, is on the lines
    of all its values.
    """
    others = [axis for axis in results.axes if axis not in _SHARE_AXES]
    keys: dict[str, dict[str, Any]] = {}
    for p in points:
        record = results.points[task, p]
        n, of = record["attention_layers"], record["layers"]
        silent = {*(_OTHER_LAYERS if n == of else ()), *(_ATTENTION_LAYERS if n == 0 else ())}
        keys[p] = {axis: str(record["settings"].get(axis)) for axis in others if axis not in silent}
    full = [key for key in keys.values() if len(key) == len(others)] or list(keys.values())
    lines = []
    for values in dict.fromkeys(tuple(sorted(key.items())) for key in full):
        on = [p for p in points if keys[p].items() <= dict(values).items()]
        on.sort(key=lambda p: results.points[task, p]["attention_layers"] / results.points[task, p]["layers"])
        lines.append((", ".join(f"{axis} {value}" for axis, value in values) or "mean", on))
    return lines


# ---------------------------------------------------------------------------------------------------------- curves


def _draw_curve(results: Results, task: str, name: str, spec: Mapping[str, Any], out: Path) -> Picture | None:
    curves = {p: curve for p in results.names if (curve := _curve_of(results, task, p, name))}
    if len({x for curve in curves.values() for x in curve}) < 2:  # One place is no curve: it is in the table.
        return None
    points, note = _drawn(results, task, list(curves))
    base = curves.get(results.base) if results.base else None
    figure, all_axes = _figure(2 if base and len(points) > 1 else 1, rows_of_legend=math.ceil(len(points) / 4),
                               sharey=False)
    for p in points:
        _band(all_axes[0], curves[p], *_style(results, p))
        if base and len(all_axes) > 1:
            minus = {x: {s: y - base[x][s] for s, y in ys.items() if s in base[x]}
                     for x, ys in curves[p].items() if x in base}
            _band(all_axes[1], {x: ys for x, ys in minus.items() if ys}, *_style(results, p))
    xs = sorted({x for p in points for x in curves[p]})
    for axes in all_axes:
        axes.set_xlabel(spec["x"])
        if spec["log_x"] and xs[0] > 0:
            _log_x(axes, "{:g}".format, at=xs if len(xs) <= MOST_TICKS else None)
    all_axes[0].set_ylabel(spec["y"])
    record = results.tasks[task]
    if spec["y"] == record["score"] and record["chance"] is not None:
        all_axes[0].axhline(record["chance"], color="0.4", linewidth=1, linestyle="--", label="chance")
        all_axes[0].legend()
    if len(all_axes) > 1:
        all_axes[1].set_ylabel(f"{spec['y']},\nminus the base's, paired by seed")
    shows = f"{results.title(task)}, by {name.replace('_', ' ')}{note}"
    figure.suptitle(shows)
    _legend(figure, results, points)
    return _save(figure, out, f"{slug(task)}-{slug(name)}.png", shows)


def _curve_of(results: Results, task: str, point: str, name: str) -> dict[float, dict[int, float]]:
    """x -> seed -> y, at the places that all finished seeds have: else the seeds of a mean change along the curve."""
    runs = {seed: run["curves"][name] for (of, p, seed), run in sorted(results.runs.items())
            if (of, p) == (task, point) and name in run.get("curves", {})}
    found: dict[float, dict[int, float]] = {}
    for seed, pairs in runs.items():
        for x, y in pairs:
            if y is not None and math.isfinite(y):
                found.setdefault(x, {})[seed] = y
    return {x: found[x] for x in sorted(found) if len(found[x]) == len(runs)}


def _drawn(results: Results, task: str, points: list[str]) -> tuple[list[str], str]:
    """(points whose curves are drawn, what to say of it)."""
    if len(points) <= MOST_LINES:
        return points, ""
    scores = results.scores(task)
    ordered = sorted(points, key=lambda p: (summarize(scores[p].values()).mean, p))
    chosen = {*ordered[:EXTREMES], *ordered[-EXTREMES:], results.base}
    return [p for p in points if p in chosen], (
        f" (the base and the {EXTREMES} best and {EXTREMES} worst of {len(points)} points)")


def _band(axes: Axes, curve: Mapping[float, Mapping[int, float]], color: str, marker: str) -> None:
    xs = list(curve)
    found = [summarize(ys.values()) for ys in curve.values()]
    # Dense curves carry a few markers only, to be told apart.
    axes.plot(xs, [s.mean for s in found], color=color, marker=marker, markersize=4, linewidth=1.3,
              markevery=max(1, len(xs) // 8))
    axes.fill_between(xs, [s.mean if s.low is None else s.low for s in found],
                      [s.mean if s.high is None else s.high for s in found], color=color, alpha=0.12, linewidth=0)


# ---------------------------------------------------------------------------------------------------------- common


def _figure(panels: int, *, rows_of_legend: int = 0, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 + 0.17 * rows_of_legend), dpi=150, layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False, sharey=sharey).flat)
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def _save(figure: Figure, out: Path, name: str, shows: str) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Without matplotlib's own note, which holds its version.
    FigureCanvasAgg(figure).print_png(out / name, metadata={"Software": None})
    return shows, name


def _legend(figure: Figure, results: Results, points: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker=marker, linestyle="", label=results.labels[p])
               for p in points for color, marker in [_style(results, p)]]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False,
                  title=", ".join(results.axes) or None)


def _style(results: Results, point: str) -> tuple[str, str]:
    """(colour, marker) of a point, the same in all figures of a study."""
    if point == results.base:
        return "black", "*"
    i = results.names.index(point)
    return f"C{i % 10}", _MARKERS[i % len(_MARKERS)]


def _bar(axes: Axes, x: float, values: Sequence[float], *, color: str, marker: str, **style: Any) -> None:
    """The mean with its 95 % interval."""
    found = summarize(values)
    half = 0.0 if found.high is None else found.high - found.mean
    axes.errorbar([x], [found.mean], yerr=[half], color=color, marker=marker, markersize=9 if marker == "*" else 5,
                  capsize=2, linewidth=1, linestyle="", **style)


def _log_x(axes: Axes, form: Callable[[float], str], base: int = 10, at: Sequence[float] | None = None) -> None:
    """A logarithmic axis with ticks that people read: at given places, or at few round ones."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xscale("log", base=base)
    low, high = axes.get_xlim()
    steps = math.log(high / low, base)
    if at is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(at)))
    elif base == 2:
        axes.xaxis.set_major_locator(LogLocator(base=2 ** max(1, math.ceil(steps / 5))))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if steps < 2 else (1, 3) if steps < 3 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: form(x))
