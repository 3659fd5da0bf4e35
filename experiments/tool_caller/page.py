"""The page: what each station gave and cost, from raw results alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_jax.ablate.stats import Z, summarize, wilson
from lfm_jax.files import write_whole
from lfm_jax.recipe import to_plain
from tool_caller.config import PLACES, Life

PAGE, RESULTS, READING = "README.md", "results.json", "reading.md"
STATIONS = {
    "pretrain": "pre-trained on books and dialogues as plain text",
    "long": "the same in rows of the long context",
    "sft": "fine-tuned on chats with calls",
    "prefer": "preferences among its own answers, by the verifier (DPO)",
    "prefer-Q8_0": "`prefer` as a GGUF file in Q8_0",
    "prefer-Q4_0": "`prefer` as a GGUF file in Q4_0, rounded after training",
    "narrow": "trained through Q4_0; its file holds the same numbers",
}
"""Those that are measured, in order."""
WORK = {"pretrain": ("size", "pretrain"), "long": ("long",), "sft": ("sft",), "prefer": ("pairs", "prefer"),
        "narrow": ("narrow",)}
"""The steps that made a station."""
SHOWN = {
    "bits per byte": ("text", "bits_per_byte"),
    "exact, seen": ("plain", "seen.exact"), "exact, unseen": ("plain", "unseen.exact"),
    "values, seen": ("plain", "seen.argument_values"), "values, unseen": ("plain", "unseen.argument_values"),
    "valid, seen": ("plain", "seen.valid"), "valid, unseen": ("plain", "unseen.valid"),
    "refrained, seen": ("plain", "seen.refrained"), "refrained, unseen": ("plain", "unseen.refrained"),
    "JSON": ("plain", "json.schema_compliance"),
}
HELD = {name: ("constrained", key) for name, (form, key) in SHOWN.items() if form == "plain"}
"""The same with answers that follow a grammar."""
Steps = Mapping[str, Any]


def write(life: Life, command: str, conditions: str) -> Path:
    """Gathers the records of all finished seeds into `results.json`, and writes the page and its figures beside it."""
    seeds = {}
    for home in sorted(life.out.glob("seed-*")):
        done = {path.stem: json.loads(path.read_text(encoding="utf-8"))
                for folder in (life.data, home) for path in sorted((folder / "done").glob("*.json"))}
        if "speed" in done:  # The last step.
            seeds[home.name.removeprefix("seed-")] = done
    life.page.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in to_plain(life).items() if name not in PLACES}
    results = {"command": command, "conditions": conditions, "life": settings, "seeds": seeds}
    write_whole(life.page / RESULTS, json.dumps(results, indent=1, default=str) + "\n")
    return write_page(life.page)


def write_page(folder: Path) -> Path:
    """Writes the page of the results in a folder, and of its `reading.md`, which goes onto it as it is."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    seeds: list[Steps] = [*results["seeds"].values()]
    reading = folder / READING
    sections = [
        "# The life of a model that calls tools",
        reading.read_text(encoding="utf-8").strip() if reading.exists() else "",
        _how(results, seeds), _size(seeds), _scores(seeds), _gave(seeds), _cost(seeds), _files(seeds),
        _equal(results["seeds"]),
        _figures(seeds, folder), READ.strip(),
    ]
    write_whole(folder / PAGE, "\n\n".join(section for section in sections if section) + "\n")
    return folder / PAGE


READ = """
## How to read this

- Of one seed, an interval in brackets is over held-out passages or chats (turns of a chat belong together): of bits per
  byte 1.96 standard errors to either side, of a share Wilson's for as many independent turns as its standard error
  amounts to. Of several seeds it is Student's t interval of their mean. Where none or all are right no interval is
  told: of 40 chats that agree, others may still differ in 7 %.
- Of what a station gave, it is the percentile interval of a bootstrap that draws chats, or passages, for both models
  together.
- `exact` and `valid` are shares of the turns in which the dialogue calls; `refrained` is a share of the others.
  `values` is a share of the dialogue's arguments to tools that the model calls too: those with an equal value.
- A service is seen if a training dialogue has each of its tools, by name and parameters; most tools of unseen services
  have the name of a tool that was seen, with other parameters.
- Models before `sft` have not seen a chat. They are asked fewer turns, and what they score there is no difference.
"""


def _how(results: Mapping[str, Any], seeds: Sequence[Steps]) -> str:
    life, data = results["life"], seeds[0]["prepare"]["found"]
    minutes, work = (sum(record[key] for record in seeds[0].values()) / 60 for key in ("seconds", "processor_seconds"))
    interrupted = [step for step, record in seeds[0].items() if record["interrupted"]]
    several = len(seeds) > 1
    return "\n".join([
        "## How it was run", "", "<!-- not run: hours -->", "```console", f"$ {results['command']}", "```", "",
        f"- Machine and versions: {results['conditions']}",
        f"- Seeds: {', '.join(results['seeds'])}; the first took {minutes:.1f} minutes in all, and {work:.1f} of "
        "processors",
        *(["- Scores, differences and minutes are those of all seeds; the width, steps, tokens, losses, pairs, files, "
           "speeds and the server are of the first."] if several else []),
        *([f"- Interrupted and continued: {', '.join(interrupted)}. The minutes have earlier attempts in them, but for "
           "those that ended by `kill -9`."] if interrupted else []),
        f"- Text: {data['train_bytes'] / 1e6:.1f} MB to train on, of it {data['training_dialogues']:,} dialogues; held "
        f"out: {', '.join(data['heldout_books'])}, of which {data['passages']} passages are measured",
        f"- Tokenizer: {life['vocab_size']:,} ids, {data['bytes_per_token']:.2f} bytes of held-out text a token",
        f"- Calls: the first {life['documents']} turns of dialogues with seen services, and of others with unseen "
        f"ones; {data['schemas']} JSON schemas, drawn among {data['short_schemas']:,} short ones",
    ])


def _size(seeds: Sequence[Steps]) -> str:
    found = seeds[0]["size"]["found"]
    rows = [[f"**{row['width']}**" if row["width"] == found["width"] else str(row["width"]), f"{row['parameters']:,}",
             f"{row['gflops']:.0f}", f"{row['tokens']:,}", f"{row['tokens'] / row['parameters']:.2f}",
             f"{row['expected_loss']:.3f}"] for row in found["widths"]]
    law = found["law"]
    return "\n\n".join([
        "## How large",
        f"The law of [intelligence_density](../ablations/intelligence_density/report/README.md), L = {law['E']:.2f} + "
        f"{law['A']:.0f} / N^{law['alpha']:.2f} + {law['B']:.0f} / D^{law['beta']:.2f}, chooses the width whose loss "
        f"is lowest after {found['minutes']:g} minutes of pre-training at the rate at which this machine trains it. "
        "Rates are those of steps timed beforehand; a width that was not timed has that of one beside it that was. The "
        f"chosen one has {found['flops']:.2e} FLOPs. The layers are `{found['pattern']}`. The law was fitted to runs "
        "of 4e11 to 3.2e12 FLOPs and a vocabulary of 512, so that this is far outside; its losses are no forecast of "
        "the bits per byte below.",
        _table(["width", "parameters", "GFLOP/s", "tokens", "tokens a parameter", "loss by the law"], rows),
    ])


def _scores(seeds: Sequence[Steps]) -> str:
    def table(shown: Mapping[str, tuple[str, str]]) -> str:
        rows = [[f"`{name}`", *(_cell([_score(steps, name, *where) for steps in seeds], where[0])
                                for where in shown.values())]
                for name in STATIONS]
        return _table(["station", *shown], [row for row in rows if any(row[1:])])

    what = "\n".join(f"- `{name}`: {text}" for name, text in STATIONS.items())
    return "\n\n".join(["## What each station is worth", what, table(SHOWN),
                        "With answers that follow a grammar of the chat's tools, or the schema:", table(HELD)])


def _gave(seeds: Sequence[Steps]) -> str:
    rows, shown = [], [*SHOWN.items(), *((f"{label}, by grammar", where) for label, where in HELD.items())]
    for name in STATIONS:
        for before in seeds[0].get(f"measured-{name}", {"found": {"gave": {}}})["found"]["gave"]:
            for label, (form, key) in shown:
                metric = key if form == "text" else f"{form}.{key}"
                cells = [_difference(steps[f"measured-{name}"]["found"]["gave"][before].get(metric)) for steps in seeds]
                if any(cells):
                    rows.append([f"`{before}` to `{name}`", label, *cells])
    head = ["", "score", *(f"seed {i}" if len(seeds) > 1 else "difference" for i in range(len(seeds)))]
    return "\n\n".join(["## What each station gave", "An interval that holds 0 shows no difference.",
                        _table(head, rows, text_columns=2)])


def _cost(seeds: Sequence[Steps]) -> str:
    rows = []
    for name, steps in WORK.items():
        minutes = [sum(seed[step]["seconds"] for step in steps) / 60 for seed in seeds]
        found = seeds[0][name]["found"]
        work = [sum(seed[step]["processor_seconds"] for step in steps) / 60 for seed in seeds]
        rows.append([f"`{name}`", f"{found['steps']:,}", f"{found['tokens']:,}", f"{_mean(minutes):.1f}",
                     f"{_mean(work):.1f}", f"{found['curve'][0]:.3f} to {found['curve'][-1]:.3f}"])
    pairs = seeds[0]["pairs"]["found"]
    measured = [sum(record["seconds"] for step, record in seed.items() if step.startswith("measured")) / 60
                for seed in seeds]
    return "\n\n".join([
        "## What each station cost",
        "`pretrain` has the choice of the width in it, `prefer` the sampling of its pairs. Losses are means of the "
        "first and of the last tenth of the steps. They jump in short runs, as books and dialogues alternate; that of "
        "`prefer` is DPO's and that of `narrow` a divergence from the teacher: stations are not compared by them.",
        _table(["station", "steps", "tokens", "minutes", "of processors", "loss"], rows),
        f"Preferences: {pairs['answers']:,} answers to {pairs['turns']:,} turns were sampled, of which "
        f"{pairs['right'] / pairs['answers']:.1%} were right; {pairs['pairs']:,} pairs, in "
        f"{pairs['chosen is sampled']:,} of which the chosen answer is the model's own. Measuring took "
        f"{_mean(measured):.1f} minutes.",
    ])


def _files(seeds: Sequence[Steps]) -> str:
    sizes, rows = seeds[0]["files"]["found"], []
    for row in seeds[0]["speed"]["found"]:
        rows.append([row["engine"], f"`{row['file']}`", row["how"], f"{sizes[row['file']] / 1e6:.2f}",
                     *(f"{row[name][0]:,.0f} [{row[name][1]:,.0f}, {row[name][2]:,.0f}]"
                       for name in ("peak", "own", "prefill", "decode"))])
    return "\n\n".join([
        "## Size, memory, speed",
        "All stations have one shape, so that these depend on the form of the weights alone. A prompt of 1,024 tokens "
        "and 100 new ones, each measurement in a process of its own; medians, with the smallest and largest. `peak` is "
        "the largest resident set and `own` what belongs to the process alone, in MB.",
        _table(["engine", "file", "weights", "MB", "peak", "own", "prefill, tokens/s", "decode, tokens/s"], rows,
               text_columns=3),
    ])


def _equal(seeds: Mapping[str, Steps]) -> str:
    rows = []
    several = len(seeds) > 1
    for seed, steps in seeds.items():
        for row in steps["engines"]["found"]:
            named = "; ".join(f"{count} {name}" for name, count in row["exceptions"].items()) or "none"
            rows.append([*([seed] if several else []), f"`{row['weights']}`", row["engine"], f"`{row['file']}`",
                         str(row["turns"]), str(row["equal"]), str(row["equal_texts"]), named])
    found = next(iter(seeds.values()))["served"]["found"]
    return "\n\n".join([
        "## The same dialogues through every engine",
        "Beside our engine on the run, greedy: turns, those with equal calls, those with equal answers to the letter, "
        "and why calls differ.",
        _table([*(["seed"] if several else []), "weights of", "engine", "file", "turns", "equal calls", "equal answers",
                "exceptions"], rows, text_columns=3 + several),
        "`lfm serve` on the file of `narrow` in Q4_0, over HTTP and with the grammar of tools that it has: "
        f"{found['equal']} of {found['turns']} turns with the calls of `lfm eval --constrained`.",
    ])


# ---------------------------------------------------------------------------------------------------------- figures


def _figures(seeds: Sequence[Steps], folder: Path) -> str:
    from matplotlib import rc_context

    with rc_context({"font.size": 8, "axes.titlesize": 9}):
        drawn = [("Calls by station", _draw_calls(seeds, folder)),
                 ("Bits per byte by station", _draw_bits(seeds, folder)),
                 ("Loss by step of each run", _draw_losses(seeds, folder))]
    return "\n\n".join(["## Figures", *(f"![{text}]({name})" for text, name in drawn)])


def _draw_calls(seeds: Sequence[Steps], folder: Path) -> str:
    def draw(axes: Any) -> None:
        for form, marker in (("plain", "o"), ("constrained", "s")):
            for kind, color in (("seen", "C0"), ("unseen", "C1")):
                _points(axes, seeds, form, f"{kind}.exact", f"{kind}, {form}", color=color, marker=marker,
                        linestyle="-" if form == "plain" else ":")
        axes.set_ylabel("share of turns with exact calls")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _save(folder, "calls.png", draw)


def _draw_bits(seeds: Sequence[Steps], folder: Path) -> str:
    def draw(axes: Any) -> None:
        _points(axes, seeds, "text", "bits_per_byte", "held-out books", color="C2", marker="o", linestyle="-")
        axes.set_ylabel("bits per byte")

    return _save(folder, "bits.png", draw)


def _draw_losses(seeds: Sequence[Steps], folder: Path) -> str:
    def draw(axes: Any) -> None:
        for name in WORK:
            curve = seeds[0][name]["found"]["curve"]
            share = [i / max(1, len(curve) - 1) for i in range(len(curve))]
            axes.plot(share, curve, label=name)
        axes.set_xlabel("share of the run")
        axes.set_ylabel("loss")
        axes.legend()

    return _save(folder, "losses.png", draw)


def _points(axes: Any, seeds: Sequence[Steps], form: str, key: str, label: str, **style: Any) -> None:
    at, means, errors = [], [], []
    for i, name in enumerate(STATIONS):
        found = _summary([_score(steps, name, form, key) for steps in seeds], form)
        if found is not None:
            mean, low, high = found
            at.append(i)
            means.append(mean)
            errors.append([mean - low, high - mean] if low is not None and high is not None else [0, 0])
    if at:
        axes.errorbar(at, means, list(zip(*errors, strict=True)), label=label, capsize=2, markersize=4, **style)
        axes.set_xticks(range(len(STATIONS)), STATIONS, rotation=20)


def _save(folder: Path, name: str, draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure((6.4, 3.4), layout="constrained")
    draw(figure.subplots())
    figure.savefig(folder / name, dpi=130, metadata={"Software": None})
    return name


# ------------------------------------------------------------------------------------------------------------- cells


def _score(steps: Steps, station: str, form: str, key: str) -> list[Any] | None:
    record = steps.get(f"measured-{station}")
    return None if record is None else record["found"]["scores"].get(form, {}).get(key)


def _summary(scores: Iterable[list[Any] | None], form: str) -> tuple[float, float | None, float | None] | None:
    """Mean and interval: over seeds where there are several, else over documents. All but those of text are shares."""
    there = [score for score in scores if score is not None]
    if not there:
        return None
    if len(there) > 1:
        found = summarize([value for value, _, _ in there])
        return found.mean, found.low, found.high
    value, error, _ = there[0]
    # Of none and of all the error is 0, which no number of documents tells.
    if not error or math.isnan(error):
        return value, None, None
    if form == "text":
        return value, value - Z * error, value + Z * error
    return value, *wilson(value, value * (1 - value) / error**2)


def _cell(scores: Iterable[list[Any] | None], form: str) -> str:
    found = _summary(scores, form)
    if found is None:
        return ""
    mean, low, high = found
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _difference(found: list[Any] | None) -> str:
    if found is None:
        return ""
    difference, low, high = found
    return f"{difference:+.3f}" if low is None or high is None else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text and the others numbers, at the right."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
