"""The page of the study and its figures, made from results.jsonl alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from lfm_jax.ablate.hybrid.study import ORIGINAL, Place
from lfm_jax.ablate.report import PAGE, READING
from lfm_jax.ablate.stats import wilson
from lfm_jax.units import si, size

DRAWS = 2000
"""Of a bootstrap."""
HOW_TO_READ = """\
- The unit is the document: a passage of a held-out book, an article, a question. Intervals in brackets are 95 %
  percentile intervals over documents drawn again with replacement (2,000 draws, the same documents for every arm), and
  of shares of right answers Wilson's. They say what other documents of that kind would give, and nothing of other
  seeds, books or models.
- Held-out divergence: the loss of stage 2 at its end, in nats a token, the mean of eight rows of held-out books,
  without an interval.
- A difference to the original is taken document by document, of the same draws. Where its interval holds 0, none was
  shown, which is not that there is none.
- Stage 1 and the importance are one run for all arms.
- Nothing is corrected for the number of arms.
- needle: one number told in a text and asked for at its end; recall: one of eight. Right is an answer that greedy
  decoding would write, to the last digit. Nats are minus the log-probability of the right number, the mean over
  documents; a model that knows only that it has seven digits needs 16.
- Speeds and bytes depend on k alone, not on which layers those are. Weights were random while speeds were measured,
  beside the original in one process.
"""
OF_SEEDS = """\
- Rows with a seed are the same arm with another order of the rows of stage 2. How far they lie apart is what this
  order alone does.
"""


class Value(NamedTuple):
    """A number with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.form(".3g")

    def form(self, form: str) -> str:
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], documents: int, seed: int = 0) -> Value:
    """A statistic of documents with its percentile interval.

    Args:
      statistic: of indices of documents, [draws, documents], one number a draw.
    """
    everything = np.arange(documents)[None]
    drawn = np.random.default_rng(seed).integers(0, documents, (DRAWS, documents))
    low, high = np.quantile(statistic(drawn), (0.025, 0.975))
    return Value(float(statistic(everything)[0]), float(low), float(high))


def share(right: Sequence[float]) -> Value:
    """The share of documents that are right, with Wilson's interval: drawing them again would give none a width."""
    mean = sum(map(float, right)) / len(right)
    return Value(mean, *wilson(mean, len(right)))


class Found:
    """The records of results.jsonl."""

    def __init__(self, path: Path):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        of: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            of.setdefault(record["kind"], []).append(record)
        self.study, self.arms = of["study"][0], of["arm"]
        self.layers, self.importance = of["layers"][0], of["importance"][0]["kl"]
        self.costs = {record["k"]: record for record in sorted(of.get("cost", []), key=lambda record: -record["k"])}

    @cached_property
    def original(self) -> dict[str, Any]:
        return next(arm for arm in self.arms if arm["arm"] == ORIGINAL)

    @property
    def repeated(self) -> bool:
        """Is an arm trained with more than one seed?"""
        return len({arm["seed"] for arm in self.arms}) > 1

    @property
    def corpora(self) -> list[str]:
        return list(self.original["text"])

    @property
    def asked(self) -> list[tuple[str, str]]:
        """(kind, length)."""
        return [(kind, length) for kind, of in self.original["recall"].items() for length in of]

    def perplexity(self, arm: dict[str, Any], corpus: str) -> Value:
        nats, tokens = (np.array(arm["text"][corpus][key]) for key in ("nats", "tokens"))
        return bootstrap(lambda i: np.exp(nats[i].sum(1) / tokens[i].sum(1)), len(nats))

    def worse(self, arm: dict[str, Any], corpus: str, other: dict[str, Any] | None = None) -> Value:
        """Perplexity over that of another arm, which is the original without one."""
        nats, tokens = (np.array(arm["text"][corpus][key]) for key in ("nats", "tokens"))
        more = nats - np.array((other or self.original)["text"][corpus]["nats"])
        return bootstrap(lambda i: np.exp(more[i].sum(1) / tokens[i].sum(1)), len(nats))

    def right(self, arm: dict[str, Any], kind: str, length: str) -> Value:
        return share(arm["recall"][kind][length]["right"])

    def nats(self, arm: dict[str, Any], kind: str, length: str) -> Value:
        return _mean(arm["recall"][kind][length]["nats"])

    def more_nats(self, arm: dict[str, Any], kind: str, other: dict[str, Any]) -> Value:
        """Nats of the right number minus those of another arm, over documents of all lengths."""
        nats, others = (np.concatenate([of["nats"] for of in each["recall"][kind].values()]) for each in (arm, other))
        return _mean(nats - others)

    def task(self, arm: dict[str, Any], task: str) -> Value:
        return share(arm["tasks"][task])

    def task_difference(self, arm: dict[str, Any], task: str) -> Value:
        return _mean(np.array(arm["tasks"][task]) - np.array(self.original["tasks"][task]))


def _mean(values: Any) -> Value:
    values = np.asarray(values, float)
    return bootstrap(lambda i: values[i].mean(1), len(values))


def write_page(results: Path, out: Path) -> Path:
    """Writes the page and its figures beside it; `out/reading.md` is put at its head as it is.

    Returns:
      The page's path.
    """
    found = Found(results)
    out.mkdir(parents=True, exist_ok=True)
    pictures = _figures(found, out)
    reading = out / READING
    sections = [
        f"# {found.study['name']}\n\n{found.study['question']}",
        reading.read_text().strip() if reading.exists() else "",
        _how_it_was_run(found),
        "## Text\n\n" + _text(found),
        _places(found),
        "## Needle and recall\n\n" + _recall(found),
        "## Tasks\n\n" + _tasks(found) if found.original["tasks"] else "",
        "## Cost\n\n" + _costs(found) if found.costs else "",
        "## Layers\n\n" + _layers(found),
        "## Figures\n\n" + "\n\n".join(f"![{shows}]({name})" for shows, name in pictures),
        "## How to read this\n\n" + (HOW_TO_READ + (OF_SEEDS if found.repeated else "")).strip(),
    ]
    page = out / PAGE
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    return page


# ---------------------------------------------------------------------------------------------------------- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _label(arm: dict[str, Any]) -> str:
    return arm["arm"] + (f" (seed {arm['seed']})" if arm["seed"] else "")


def _how_it_was_run(found: Found) -> str:
    study, T = found.study, found.study["seq_len"]
    flops = ", ".join(f"{name} {si(n, 'FLOP')}" for name, n in study["counted"].items())
    return (
        "## How it was run\n\n"
        f"{study['model']} ({si(study['params'])} parameters, {study['layers_of_model']} attention layers) with k of "
        f"them kept and convolutions of {study['taps']} taps in place of the others. Stage 1: "
        f"{study['layers']['rows'] * T:,} tokens, each convolution learns its layer's output from the original's "
        f"input, once for all arms. Stage 2: {study['tokens']['rows'] * T:,} tokens for each arm, the original's "
        f"{study['top_k']} likeliest tokens at each place. Rows of {T} tokens of books, in one order for all arms of a "
        f"seed. The original is not trained. By count: {flops}."
    )


def _text(found: Found) -> str:
    head = ["arm", "layers with attention", "held-out divergence"]
    head += [name for corpus in found.corpora for name in (f"{corpus}: perplexity", "over the original's")]
    rows = []
    for arm in found.arms:
        layers = " ".join(map(str, arm["attention_at"])) if arm["arm"] != ORIGINAL else "all"
        cells = [_label(arm), layers or "none", f"{arm['heldout_loss']:.3f}" if "heldout_loss" in arm else "-"]
        for corpus in found.corpora:
            same = arm is found.original
            cells += [str(found.perplexity(arm, corpus)), "-" if same else str(found.worse(arm, corpus))]
        rows.append(cells)
    return _table(head, rows)


def _recall(found: Found) -> str:
    head = ["arm", *(f"{kind} {length}" for kind, length in found.asked)]
    shares, nats = (
        _table(head, [[_label(arm), *(value(arm, *asked).form(form) for asked in found.asked)] for arm in found.arms])
        for value, form in ((found.right, ".2f"), (found.nats, ".1f")))
    return f"Share of right answers by length in tokens.\n\n{shares}\n\nNats of the right answer.\n\n{nats}"


def _places(found: Found) -> str:
    """Selections of as many layers side by side."""
    kinds = list(found.original["recall"])
    head = ["arms", *(f"{corpus}: perplexity over" for corpus in found.corpora),
            *(f"{kind}: nats minus" for kind in kinds)]
    rows = [
        [f"{_label(arm)} and {_label(other)}", *(str(found.worse(arm, corpus, other)) for corpus in found.corpora),
         *(found.more_nats(arm, kind, other).form("+.1f") for kind in kinds)]
        for other, arm in itertools.combinations(found.arms, 2)
        if (arm["k"], arm["seed"]) == (other["k"], other["seed"]) and arm["place"] != other["place"]]
    if not rows:
        return ""
    return ("## Which layers\n\nThe first arm beside the second, document by document; of needle and recall over all "
            f"lengths.\n\n{_table(head, rows)}")


def _tasks(found: Found) -> str:
    tasks = list(found.original["tasks"])
    head = ["arm", *(name for task in tasks for name in (task, "minus the original's"))]
    return _table(head, [
        [_label(arm), *(cell for task in tasks for cell in (
            found.task(arm, task).form(".3f"),
            "-" if arm is found.original else found.task_difference(arm, task).form("+.3f")))]
        for arm in found.arms])


def _costs(found: Found) -> str:
    contexts = list(next(iter(found.costs.values()))["state_bytes"])
    head = ["k", "parameters", *(f"state at {context}" for context in contexts),
            *(f"decoding at {context}, tokens/s (over the original)" for context in contexts),
            "prefill over the original"]
    rows = [
        [str(k), si(cost["params"]), *(size(cost["state_bytes"][context]) for context in contexts),
         *(f"{cost['decode_tokens_per_second'][context]:.1f} ({cost['relative']['decode'][context]:.2f})"
           for context in contexts), f"{cost['relative']['prefill']:.2f}"]
        for k, cost in found.costs.items()]
    conditions = next(iter(found.costs.values()))["conditions"]
    return f"{_table(head, rows)}\n\nOne sequence, greedy. {conditions}"


def _layers(found: Found) -> str:
    rows = [[layer, f"{kl:.4f}", f"{found.layers[f'heldout_layer_{layer}']:.3f}"]
            for layer, kl in found.importance.items()]
    return ("Importance: the divergence from the original with this layer's attention alone made into a convolution, "
            "after stage 1, in nats a token. Undone: the squared error of the whole block's output (operator and "
            "feed-forward) over the square of what the block adds, on held-out rows.\n\n"
            + _table(["layer", "importance", "undone"], rows))


# --------------------------------------------------------------------------------------------------------- figures


def _figures(found: Found, out: Path) -> list[tuple[str, str]]:
    from matplotlib import rc_context

    with rc_context({"font.size": 8, "axes.titlesize": 9, "figure.titlesize": 9}):
        pictures = [_text_figure(found, out), _recall_figure(found, out), _layers_figure(found, out)]
        if found.costs:
            pictures.append(_cost_figure(found, out))
    return pictures


def _panels(number: int, height: float = 3.2) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height * math.ceil(number / 2)), dpi=150, layout="constrained")
    panels = list(figure.subplots(math.ceil(number / 2), 2, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels[:number]


def _save(figure: Any, out: Path, name: str, shows: str) -> tuple[str, str]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(out / name, metadata={"Software": None})
    return shows, name


def _against_k(found: Found, axes: Any, value: Callable[[dict[str, Any]], Value]) -> None:
    """One line a place, through the arms that there is no choice in; other seeds as points."""
    first = [arm for arm in found.arms if arm["seed"] == found.study["seed"]]
    there = {arm["place"] for arm in first}
    for i, place in enumerate([place for place in get_args(Place) if place in there] or ["all"]):
        color = f"C{i}"
        line = sorted((arm for arm in first if arm["place"] in (place, "all")), key=lambda arm: arm["k"])
        points = [value(arm) for arm in line]
        low, high = [p.mean - p.low for p in points], [p.high - p.mean for p in points]
        axes.errorbar([arm["k"] for arm in line], [p.mean for p in points], yerr=[low, high], color=color, marker="o",
                      markersize=4, capsize=2, linewidth=1.2, label=place)
        more = [arm for arm in found.arms if arm not in first and arm["place"] == place]
        axes.plot([arm["k"] for arm in more], [value(arm).mean for arm in more], "x", color=color, markersize=5)
    axes.set_xlabel("attention layers")
    axes.set_xticks(sorted({arm["k"] for arm in found.arms}))
    axes.legend()


def _text_figure(found: Found, out: Path) -> tuple[str, str]:
    from matplotlib.ticker import LogFormatter

    figure, panels = _panels(len(found.corpora))
    for axes, corpus in zip(panels, found.corpora, strict=True):
        _against_k(found, axes, lambda arm, corpus=corpus: found.perplexity(arm, corpus))
        axes.set(title=corpus, ylabel="perplexity (lower is better)", yscale="log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 60, not 6 x 10^1.
        axes.yaxis.set_minor_formatter(LogFormatter())
    return _save(figure, out, "text.png", "Perplexity against attention layers")


def _recall_figure(found: Found, out: Path) -> tuple[str, str]:
    figure, panels = _panels(len(found.asked), 2.4)
    for axes, (kind, length) in zip(panels, found.asked, strict=True):
        _against_k(found, axes, lambda arm, asked=(kind, length): found.nats(arm, *asked))
        axes.set(title=f"{kind}, {length} tokens", ylabel="nats of the right number")
    return _save(figure, out, "recall.png", "Needle and recall against attention layers")


def _layers_figure(found: Found, out: Path) -> tuple[str, str]:
    figure, (left, right) = _panels(2)
    layers = [int(layer) for layer in found.importance]
    left.bar(layers, list(found.importance.values()))
    left.set(xlabel="layer", ylabel="divergence, nats", title="Importance: its attention alone replaced", yscale="log")
    right.bar(layers, [found.layers[f"heldout_layer_{layer}"] for layer in layers])
    right.set(xlabel="layer", ylabel="share of its work left undone", title="After stage 1")
    return _save(figure, out, "layers.png", "Layers: importance, and what convolutions leave undone")


def _cost_figure(found: Found, out: Path) -> tuple[str, str]:
    figure, (left, right) = _panels(2)
    contexts = list(next(iter(found.costs.values()))["state_bytes"])
    for i, context in enumerate(contexts):
        ks = list(found.costs)
        left.plot(ks, [cost["state_bytes"][context] / 2**20 for cost in found.costs.values()], "o-", color=f"C{i}",
                  label=f"{context} tokens")
        right.plot(ks, [cost["relative"]["decode"][context] for cost in found.costs.values()], "o-", color=f"C{i}",
                   label=f"{context} tokens")
    left.set(xlabel="attention layers", ylabel="MiB", title="State of one sequence")
    right.set(xlabel="attention layers", ylabel="over the original", title="Speed of decoding")
    for axes in (left, right):
        axes.legend()
    return _save(figure, out, "cost.png", "State and speed against attention layers")
