"""The report of a study: one Markdown page and its figures, made from results.jsonl alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_jax.ablate import scaling
from lfm_jax.ablate.points import TOLERANCE
from lfm_jax.ablate.results import Record, Results, is_finished, read_results
from lfm_jax.ablate.stats import ALPHA, CLAIM_SEEDS, Comparison, Difference, Summary, compare, summarize
from lfm_jax.units import si, size

PAGE = "README.md"
READING = "reading.md"
"""What people write about a study; put at the head of its page as it is."""
LOGGED_ERROR = 400
"""Most characters of an error on the page."""

HOW_TO_READ = f"""\
- Runs of one seed share the order of the data and the seed of their first weights, at every point. A difference to the
  base is therefore taken seed by seed (paired), and only over seeds that both have.
- An interval in brackets says where the mean over all possible seeds lies, by Student's t at 95 %: of 100 studies with
  other seeds, 95 would have it inside theirs. It says nothing about other data, sizes or schedules. Where the interval
  of a difference holds 0, no difference was shown, which is not that there is none: read how wide it is.
- *p* is that of a two-sided paired t test, corrected by Holm's method for all points of the task, those that are
  missing included: at {ALPHA}, 19 of 20 tables without any true difference claim none. The intervals are not corrected,
  and neither are tasks for one another.
- A verdict needs {CLAIM_SEEDS} paired seeds. With fewer the study only explores, and whatever it suggests is a question
  for another study.
- The t tests take differences to be spread about evenly. Accuracies near 0 or 1, or high with some seeds and low with
  others, are not: look at the intervals' ends, and take a *p* near the limit for less than it says.
- Where learning rates were tuned, they were chosen on the same held-out rows, with a seed of their own.
- A point whose runs failed is compared on the seeds that are left, which flatters it: look at its failures first.
- Speeds are of one machine. All of this is at small scale, and an order of small models trained briefly may not be that
  of large ones trained long.
"""


def write_report(results: Path, out: Path) -> Path:
    """Writes the report of a study: `out/README.md` and figures beside it.

    The page and the figures depend on the records alone, not on their order, and on `out/reading.md`, which goes onto
    the page as it is. Any record may be missing; the page says what is.

    Args:
      results: results.jsonl.
      out: directory; made where it does not exist.

    Returns:
      The page's path.

    Raises:
      ValueError: see `read_results`.
    """
    from lfm_jax.ablate import figures

    found = read_results(Path(results))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    arms = arms_of(found)
    law = scaling.fit(arms, scaling.RESAMPLES) if found.study.get("fit") and scaling.refusal(arms) is None else None
    groups = scaling.budgets(arms) if found.study.get("fit") else []
    reading = out / READING
    sections = [
        _head(found),
        reading.read_text().strip() if reading.exists() else "",
        _how_it_was_run(found),
        *(_task_section(found, task, figures.draw_task(found, task, out)) for task in found.task_names),
        _cost_section(found),
        _scaling_section(arms, groups, law, figures.draw_scaling(found, groups, law, out))
        if found.study.get("fit") else "",
        _curve_section(found, {task: figures.draw_curves(found, task, out) for task in found.task_names}),
        _failure_section(found),
        _tuning_section(found),
        "## How to read this\n\n" + HOW_TO_READ.strip(),
    ]
    page = out / PAGE
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    return page


# ---------------------------------------------------------------------------------------------------------- records


def arms_of(results: Results) -> list[scaling.Arm]:
    """Sizes and tokens on task text, for the law."""
    scores = results.scores("text")
    return [
        scaling.Arm(point, record["params"], record["tokens"], record["train_flops"], scores[point])
        for point in results.names if point in scores and (record := results.points.get(("text", point)))
    ]


# ------------------------------------------------------------------------------------------------------- Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text and the others numbers, at the right."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _with_interval(found: Summary | Difference, form: str) -> str:
    mean = format(found.mean, form)
    return mean if found.low is None else f"{mean} [{found.low:{form}}, {found.high:{form}}]"


def _difference(found: Difference) -> str:
    if found.p is not None and found.low is None:
        return f"{found.mean:+.4f} (the same in every seed)"
    return _with_interval(found, "+.4f")


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _who(results: Results, point: str) -> list[str]:
    """The first cells of a point's row: its values of the axes, the base's marked."""
    values = results.values(point) or [point, *[""] * (len(results.axes) - 1)]
    if point == results.base:
        values = [f"**{value}**" if value else "" for value in values]
        values[0] += " (base)"
    return values


def _axes(results: Results) -> list[str]:
    return list(results.axes) or ["point"]


def _head(results: Results) -> str:
    study = results.study
    lines = [f"# Ablation: {study.get('name', 'a study without a record')}", _status(results)]
    if study.get("smoke"):
        lines.insert(1, "**A smoke run: everything is cut down to try the harness. Nothing here is a result.**")
    if not study:
        lines.append("The study's own record is missing: base and plan are not known, so nothing is compared.")
    if "question" in study:
        lines.append(f"**Question.** {study['question'].strip()}")
    return "\n\n".join(lines)


def _status(results: Results) -> str:
    finished, planned = len(results.runs), results.study.get("runs")
    failed = {key for record in results.failures if record["kind"] == "run"
              if (key := (record["task"], record["point"], record["seed"])) not in results.runs}
    if planned is None:
        return f"{_count(finished, 'run')} finished, {len(failed)} failed; how many are planned is not recorded."
    if finished == planned:
        return f"All {_count(planned, 'planned run')} are finished."
    text = f"{finished} of {_count(planned, 'planned run')} are finished, {len(failed)} failed"
    if finished + len(failed) >= planned:
        return f"**{text}** (see [Failed runs](#failed-runs))."
    return (f"**Partial: {text}, {planned - finished - len(failed)} are still to come. Every number below may change, "
            "and points are missing.**")


def _how_it_was_run(results: Results) -> str:
    study = results.study
    lines = []
    if "command" in study:
        lines.append(f"- Command: `{study['command']}`")
    if "conditions" in study:
        lines.append(f"- Machine and versions: {study['conditions']}")
    if "seeds" in study:
        lines.append(f"- Seeds: {', '.join(map(str, study['seeds']))}" + (
            "" if len(study["seeds"]) >= CLAIM_SEEDS
            else f". Fewer than {CLAIM_SEEDS}: this study only explores, and claims nothing"))
    for task, record in sorted(results.tasks.items()):
        vary = len({point["tokens"] for (of, _), point in results.points.items() if of == task}) > 1
        lines.append(f"- {record['title']} (`{task}`): {record['steps']:,} steps, {record['tokens']:,} tokens a run"
                     + (" of the base; other points differ" if vary else "")
                     + (f". {record['note']}" if record.get("note") else ""))
    lines.append(_matching(results))
    taken = [run for run in results.runs.values() if "taken_from" in run]
    if taken:
        names = ", ".join(f"`{name}`" for name in sorted({run["taken_from"] for run in taken}))
        lines.append(f"- {_count(len(taken), 'run')} of the same model, task and seed were made by {names}, on the "
                     "machine that stands there, and are no second measurement")
    own = [run["seconds"] for run in results.runs.values() if "taken_from" not in run]
    if own:
        lines.append(f"- The finished runs took {math.fsum(own) / 3600:.2g} hours together, compilation left out")
    return "## How it was run\n\n" + "\n".join(line for line in lines if line)


def _matching(results: Results) -> str:
    by = {"params": "parameters", "flops": "training FLOPs a token", "none": None}.get(results.study.get("match", ""))
    if results.study.get("match") == "none":
        return "- Points are not matched in size; compare them with their costs in mind"
    if by is None or not results.points:
        return ""
    worst = max(results.points.values(), key=lambda r: (abs(r["match_off"]), r["point"], r["task"]))
    off = abs(worst["match_off"])
    if not off:
        return f"- Matched by {by}: all points are equal"
    text = (f"- Matched by {by}: the largest mismatch is {worst['match_off']:+.2%}, of `{worst['point']}` on "
            f"{worst['task']}")
    return text if off <= TOLERANCE else f"{text}. **That is more than the {TOLERANCE:.0%} a study allows**"


def _task_section(results: Results, task: str, pictures: Sequence[tuple[str, str]]) -> str:
    record = results.tasks.get(task)
    scores = results.scores(task)
    planned = len(set(results.study.get("points", scores)) - {results.base})
    # Points with other budgets than the base's are better or worse by having more or less.
    comparable = "train_flops" not in results.axes
    compared: Mapping[str, Comparison] | None = None
    if comparable:
        compared = compare(scores, results.base, record["better"], planned) if record and results.base else {}
    changed = any(results.points[key]["changed"] for key in results.points if key[0] == task)
    matched = results.study.get("match", "none") != "none"
    head = [*_axes(results), "pattern", "attention layers", "parameters", "training FLOPs",
            *(["mismatch"] if matched else []), *(["widths changed"] if changed else []), "seeds",
            "score" if record is None else record["score"],
            *(["difference to the base", "adjusted p", "verdict"] if comparable else [])]
    rows = []
    for point in results.names:
        rows.append([
            *_who(results, point), *_model_cells(results.points.get((task, point)), matched, changed),
            _seeds(results, task, point, (compared or {}).get(point)),
            *_score_cells(results, task, point, scores, compared),
        ])
    lines = [f"## {results.title(task)}", _task_note(results, task, scores),
             _table(head, rows, len(_axes(results)) + 1)]
    return "\n\n".join([*lines, *(f"![{alt}]({name})" for alt, name in pictures)])


def _task_note(results: Results, task: str, scores: Mapping[str, Mapping[int, float]]) -> str:
    record = results.tasks.get(task)
    if record is None:
        return "The task's record is missing: which scores are good is not known, so nothing is compared."
    text = f"{record['score'][:1].upper()}{record['score'][1:]}, {record['better']} is better; mean and 95 % interval."
    text += " No chance level is given." if record["chance"] is None else f" Chance is {record['chance']:.4g}."
    base = results.base
    if "train_flops" in results.axes:
        text += " Points have budgets of their own, so they are not compared with the base here."
    elif base is not None and base not in scores:
        return f"{text} **The base has no finished run, so nothing is compared.**"
    if scores and max(map(len, scores.values())) < CLAIM_SEEDS:
        text += f" Fewer than {CLAIM_SEEDS} seeds: this table only explores, no claim is made."
    return text


def _model_cells(record: Record | None, matched: bool, changed: bool) -> list[str]:
    if record is None:
        return ["-"] * (4 + matched + changed)
    off, widths = [f"{record['match_off']:+.2%}"], [
        ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(record["changed"].items())) or "-"]
    return [f"`{record['pattern']}`", f"{record['attention_layers']}/{record['layers']}", f"{record['params']:,}",
            si(record["train_flops"]), *(off if matched else []), *(widths if changed else [])]


def _seeds(results: Results, task: str, point: str, compared: Comparison | None) -> str:
    """Finished seeds, and what keeps them from being all of a comparison."""
    finished = {seed for of, name, seed in results.runs if (of, name) == (task, point)}
    failed = {record["seed"] for record in results.failures
              if (record["kind"], record["task"], record["point"]) == ("run", task, point)} - finished
    notes = [f"{len(failed)} failed"] if failed else []
    if compared is not None and compared.difference.n < len(finished):
        notes.append(f"{compared.difference.n} paired")
    return f"{len(finished)}" + (f" ({', '.join(notes)})" if notes else "")


def _score_cells(
    results: Results, task: str, point: str, scores: Mapping[str, Mapping[int, float]],
    compared: Mapping[str, Comparison] | None,
) -> list[str]:
    """Mean, difference, adjusted p and verdict; the mean alone where nothing is to be compared."""
    mean = _with_interval(summarize(scores[point].values()), ".4f") if point in scores else "-"
    if compared is None:
        return [mean]
    if point not in scores:
        return [mean, "-", "-", "no finished run"]
    if point not in compared:
        return [mean, "-", "-", "base" if point == results.base else "not compared"]
    found = compared[point]
    said = found.verdict or f"explores only ({_count(found.difference.n, 'pair')})"
    said = f"**{said}**" if said in ("better", "worse") else said
    return [mean, _difference(found.difference), _p(found.adjusted_p), said]


def _cost_section(results: Results) -> str:
    costs = [(point, results.costs[point]) for point in results.names if point in results.costs]
    if not costs:
        return ""
    decode, state = ({int(T) for _, cost in costs for T in cost[key]}
                     for key in ("decode_tokens_per_second", "state_bytes"))
    relative = [
        [*_who(results, point), _times(cost["relative"].get("train")), _times(cost["relative"].get("prefill")),
         *(_times(cost["relative"].get("decode", {}).get(str(T))) for T in sorted(decode))]
        for point, cost in costs
    ]
    absolute = [
        [*_who(results, point), f"{cost['params']:,}", si(cost["train_flops_per_token"]),
         f"{cost['train_tokens_per_second']:,.0f}", f"{cost['prefill_tokens_per_second']:,.0f}",
         *(_or(cost["decode_tokens_per_second"].get(str(T)), "{:,.0f}".format) for T in sorted(decode)),
         *(_or(cost["state_bytes"].get(str(T)), size) for T in sorted(state))]
        for point, cost in costs
    ]
    wide = len(_axes(results))
    missing = [point for point in results.names if point not in results.costs]
    lines = [
        "## What it costs", _cost_note(costs, missing),
        "Speed over the base's, each pair measured in turn in one process:",
        _table([*_axes(results), "training", "prefill", *(f"decode at {T:,}" for T in sorted(decode))], relative, wide),
        "As measured, tokens a second:",
        _table([*_axes(results), "parameters", "training FLOPs a token", "training", "prefill",
                *(f"decode at {T:,}" for T in sorted(decode)), *(f"state at {T:,}" for T in sorted(state))],
               absolute, wide),
    ]
    return "\n\n".join(lines)


def _cost_note(costs: Sequence[tuple[str, Record]], missing: Sequence[str]) -> str:
    lines = [f"Measured as {shape}." for shape in sorted({cost["shape"] for _, cost in costs})]
    lines += [f"Conditions: {text}." for text in sorted({cost["conditions"] for _, cost in costs})]
    if missing:
        lines.append(f"Not measured: {', '.join(f'`{point}`' for point in missing)}.")
    return " ".join(lines)


def _or(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


def _curve_section(results: Results, drawn: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    pictures = [f"![{alt}]({name})" for task in results.task_names for alt, name in drawn[task]]
    if not pictures:
        return ""
    note = ("Means over finished seeds with their 95 % intervals, not corrected for the number of points or of "
            "places on the curve.")
    return "\n\n".join(["## Curves", note, *pictures])


def _failure_section(results: Results) -> str:
    if not results.failures:
        return "## Failed runs\n\nNone."
    rows = []
    for record in sorted(results.failures, key=lambda r: (r["task"], results.names.index(r["point"]), r["kind"],
                                                          r["seed"], r["peak_lr"], json.dumps(r, sort_keys=True))):
        text = " ".join((record.get("error") or "no error is recorded, but there is no finite score").split())
        text = text if len(text) <= LOGGED_ERROR else text[:LOGGED_ERROR] + " ..."
        again = record["kind"] == "run" and (record["task"], record["point"], record["seed"]) in results.runs
        what = "tuning" if record["kind"] == "tuning" else "run, finished when repeated" if again else "run"
        rows.append([record["point"], record["task"], str(record["seed"]), f"{record['peak_lr']:g}", what, text])
    return "## Failed runs\n\n" + _table(["point", "task", "seed", "learning rate", "what", "error"], rows, 6)


def _tuning_section(results: Results) -> str:
    if not results.tuning:
        return ""
    parts = ["## Learning rates tuned", _tuning_note(results)]
    for task in results.task_names:
        records = [record for record in results.tuning if record["task"] == task]
        if records:
            rates = sorted({record["peak_lr"] for record in records})
            rows = [row for point in results.names if (row := _tuning_row(results, records, point, rates))]
            parts += [f"{results.title(task)}: {results.score_label(task)}",
                      _table([*_axes(results), *(f"{rate:g}" for rate in rates), "used"], rows, len(_axes(results)))]
    return "\n\n".join(parts)


def _tuning_note(results: Results) -> str:
    seeds = sorted({record["seed"] for record in results.tuning})
    shared = sorted(set(seeds) & {seed for _, _, seed in results.runs})
    text = f"Scores at each peak learning rate, seed {', '.join(map(str, seeds))}"
    if shared:
        return (f"{text}. **Seed {', '.join(map(str, shared))} is among the runs too, so that rates are chosen on what "
                "they are measured with.**")
    return f"{text}, which no run above has; in bold the rate used. One at the edge of its grid may not be the best."


def _tuning_row(
    results: Results, records: Sequence[Record], point: str, rates: Sequence[float]
) -> list[str] | None:
    own = [record for record in records if record["point"] == point]
    if not own:
        return None
    task = own[0]["task"]
    used = sorted({run["peak_lr"] for (of, name, _), run in results.runs.items() if (of, name) == (task, point)})
    cells = []
    for rate in rates:
        scores = [f"{record['score']:.4f}" if is_finished(record) else "failed" for record in own
                  if record["peak_lr"] == rate]
        cell = ", ".join(scores) or "-"
        cells.append(f"**{cell}**" if rate in used else cell)
    tried = {record["peak_lr"] for record in own}
    edge = len(tried) > 1 and any(rate in (min(tried), max(tried)) for rate in used)
    said = ", ".join(f"{rate:g}" for rate in used) or "-"
    return [*_who(results, point), *cells, said + (" (edge)" if edge else "")]


# ------------------------------------------------------------------------------------------------------------ law


def _scaling_section(
    arms: Sequence[scaling.Arm], groups: Sequence[Sequence[scaling.Arm]], law: scaling.Fit | None,
    pictures: Sequence[tuple[str, str]],
) -> str:
    parts = ["## Loss against size and tokens", _law_text(arms, law)]
    if law is not None:
        parts.append(_law_table(law))
    if groups:
        parts += ["### At equal training FLOPs", *_budget_tables(groups, law)]
    else:
        parts.append("No two sizes have finished runs at equal training FLOPs (within "
                     f"{scaling.EQUAL:.0%}), so small and large are not compared.")
    return "\n\n".join([*parts, *(f"![{alt}]({name})" for alt, name in pictures)])


def _law_text(arms: Sequence[scaling.Arm], law: scaling.Fit | None) -> str:
    if law is None:
        return f"No law is fitted: {scaling.refusal(arms)}."
    text = (
        "L(N, D) = E + A / N^alpha + B / D^beta for N parameters (embeddings included) and D training tokens, fitted "
        f"to the {_count(sum(len(arm.scores) for arm in arms), 'run')} of {_count(len(arms), 'point')} as approach 3 "
        "of Hoffmann et al. 2022 ([arXiv 2203.15556](https://arxiv.org/abs/2203.15556)): Huber loss on log L. "
        f"L is the score of task text. The residual standard deviation is {law.residual_sd:.2%}."
    )
    if not law.resampled:
        return f"{text} Every point has one seed: how far the seeds leave the fit open is not known."
    return (f"{text} Intervals are 95 % bootstrap intervals over seeds ({len(law.resampled)} resamples): what seeds "
            "leave open, not whether the law has the right form or goes on beyond these runs.")


def _law_table(law: scaling.Fit) -> str:
    rows = []
    for name in ("E", "A", "alpha", "B", "beta"):
        interval = law.interval(lambda one, name=name: getattr(one, name))
        value = getattr(law.law, name)
        rows.append([name, f"{value:.4g}" + (" (at its bound: not determined)" if name in law.at_bounds else ""),
                     "-" if interval is None else f"[{interval[0]:.4g}, {interval[1]:.4g}]"])
    return _table(["", "fitted", "95 % interval"], rows)


def _budget_tables(groups: Sequence[Sequence[scaling.Arm]], law: scaling.Fit | None) -> list[str]:
    sizes, pairs = [], []
    compared = scaling.compare_sizes(groups)
    for group in groups:
        best = scaling.best_of(group)
        for arm in group:
            fitted = "-" if law is None else f"{law.law(float(arm.N), float(arm.D)):.4f}"
            cells = [si(arm.C), f"{arm.N:,}", f"{arm.D:,}", f"{arm.D / arm.N:.3g}",
                     _with_interval(summarize(arm.scores.values()), ".4f"), fitted]
            sizes.append([f"**{cell}**" for cell in cells] if arm is best else cells)
    for pair in compared:
        said = {"better": "**the smaller is better**", "worse": "**the larger is better**",
                None: f"explores only ({_count(pair.difference.n, 'pair')})"}.get(pair.verdict, str(pair.verdict))
        pairs.append([si(pair.small.C), f"{pair.small.N:,}", f"{pair.large.N:,}", _difference(pair.difference),
                      _p(pair.adjusted_p), said])
    return [
        _table(["training FLOPs", "parameters", "tokens", "tokens a parameter", "score", "fitted"], sizes, 0),
        "\n".join(f"- {_best_text(group, compared, law)}" for group in groups),
        "Every smaller model against every larger one of its budget, paired by seed, with Holm's correction over all "
        "these pairs:",
        _table(["training FLOPs", "smaller", "larger", "smaller minus larger", "adjusted p", "verdict"], pairs, 0),
    ]


def _best_text(
    group: Sequence[scaling.Arm], compared: Sequence[scaling.Pair], law: scaling.Fit | None
) -> str:
    best = scaling.best_of(group)
    shown = sum((pair.small is best and pair.verdict == "better") or (pair.large is best and pair.verdict == "worse")
                for pair in compared)
    text = (f"At {si(group[0].C)} FLOPs the lowest mean is that of {best.N:,} parameters ({best.D / best.N:.3g} tokens "
            f"a parameter), shown to be lower than {shown} of {_count(len(group) - 1, 'other')}.")
    if law is None:
        return text
    low, high = scaling.ratios_of(group)
    ratio = scaling.best_ratio(law.law, group)
    interval = law.interval(lambda one: scaling.best_ratio(one, group))
    text += f" The law's lowest loss lies at {ratio:.3g} tokens a parameter"
    text += "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    if min(ratio / low, high / ratio) < 1.02:
        text += f", an end of what was run ({low:.3g} to {high:.3g}): the best lies there or beyond"
    return text + "."
