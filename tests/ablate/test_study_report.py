"""The page and its figures follow from results.jsonl alone, say what is missing, and claim nothing on few seeds."""

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lfm_jax.ablate import figures, scaling
from lfm_jax.ablate.figures import level, pareto
from lfm_jax.ablate.report import write_report
from lfm_jax.ablate.results import read_results

SHARES = (0, 1, 2, 4, 6, 8)
CONTEXTS = (1024, 8192, 32768)
CURVES = {
    "text": {"position": {"x": "tokens of context, up to", "y": "loss (nats per token)", "log_x": True}},
    "mqar": {"pairs": {"x": "key-value pairs", "y": "accuracy", "log_x": True}},
}


def block_ratio(seeds=5, planted=True):
    """Records of a study of 13 points on two tasks; attention helps on both."""
    points = [("base", 6, "conv")]
    points += [(f"attention={n} operator={op}", n, op) for op in ("conv", "rglru") for n in SHARES
               if (n, op) != (6, "conv")]
    points += [("attention=16 operator=conv", 16, "conv")]
    records = [
        {"kind": "study", "name": "block_ratio", "question": "How many attention layers are enough?", "base": "base",
         "points": [name for name, _, _ in points], "axes": ["attention", "operator"], "seeds": list(range(seeds)),
         "match": "params", "smoke": False, "runs": len(points) * seeds * 2, "fit": False,
         "conditions": "2 cores of an Intel Xeon; jax 0.12.0", "command": "lfm ablate block_ratio.yaml"},
        {"kind": "task", "task": "text", "title": "Language modelling", "score": "held-out bits per byte",
         "better": "lower", "chance": None, "steps": 400, "tokens": 819200, "curves": CURVES["text"]},
        {"kind": "task", "task": "mqar", "title": "Associative recall (MQAR)", "score": "accuracy",
         "better": "higher", "chance": 1 / 64, "steps": 600, "tokens": 1228800, "curves": CURVES["mqar"]},
    ]
    rng = np.random.default_rng(0)
    of_seed = rng.normal(0, 0.01, seeds)
    for i, (name, n, op) in enumerate(points):
        pattern = "".join("a" if j < n else "cr"[op == "rglru"] for j in range(16))
        for task in ("text", "mqar"):
            flops = 2.4e12 * (1 + 0.004 * n)
            records.append(
                {"kind": "point", "point": name, "task": task, "settings": {"attention": n, "operator": op},
                 "pattern": pattern, "attention_layers": n, "layers": 16, "params": 1_234_560 + 16 * i,
                 "train_flops": flops, "tokens": 819200, "match_off": 0.0 if i == 0 else 0.0004 * (i - 6),
                 "changed": {} if i == 0 else {"ffn_size": [160, 160 + 8 * (6 - n) // 2]}})
            for seed in range(seeds):
                effect = planted * (0.12 * math.exp(-n / 1.5) + 0.01 * (op == "rglru"))
                noise = of_seed[seed] + rng.normal(0, 0.006)
                if task == "text":
                    score = 2.3 + effect + noise
                    curve = {"position": [[2**k, 1.6 + effect * k / 8 + 1.5 * 0.7**k + noise + rng.normal(0, 0.004)]
                                          for k in range(2, 9)]}
                else:
                    score = min(1.0, 0.02 + 0.95 * (1 - math.exp(-n / 1.2)) + abs(noise))
                    curve = {"pairs": [[p, score ** (p / 16)] for p in (4, 8, 16, 32, 64)]}
                records.append(
                    {"kind": "run", "point": name, "task": task, "seed": seed, "status": "ok", "error": None,
                     "peak_lr": 0.003, "score": score, "metrics": {}, "curves": curve, "seconds": 31.5})
        speed = 1 / (0.4 + 0.1 * n) + 0.1 * (op == "rglru")
        decode = {str(T): 900 * speed / (1 + n * T / 1e5) for T in CONTEXTS}
        records.append(
            {"kind": "cost", "point": name, "params": 1_234_560 + 16 * i, "train_flops_per_token": 3e6 + 1e4 * n,
             "train_tokens_per_second": 26000 * speed, "prefill_tokens_per_second": 90000 * speed,
             "decode_tokens_per_second": decode,
             "relative": {"train": speed, "prefill": speed,
                          "decode": {T: value / 500 * (1 + 6 * int(T) / 1e5) for T, value in decode.items()}},
             "state_bytes": {str(T): 12288 + n * T * 512 for T in CONTEXTS},
             "conditions": "2 cores of an Intel Xeon; jax 0.12.0", "shape": "1 row, float32"})
    return records


def density(seeds=5, sizes=(1e5, 2e5, 4e5, 8e5), flops=(2e12, 8e12, 3.2e13), noise=0.004):
    """Records of a study of sizes at equal FLOPs, of a known law."""
    rng = np.random.default_rng(0)
    names = [f"hidden_size={int(N / 1e4)} train_flops={C:g}" for C in flops for N in sizes]
    records = [
        {"kind": "study", "name": "intelligence_density", "question": "Small and long, or large and short?",
         "base": names[0], "points": names, "axes": ["hidden_size", "train_flops"], "seeds": list(range(seeds)),
         "match": "none", "smoke": False, "runs": len(names) * seeds, "fit": True, "conditions": "2 cores",
         "command": "lfm ablate intelligence_density.yaml"},
        {"kind": "task", "task": "text", "title": "Language modelling", "score": "held-out bits per byte",
         "better": "lower", "chance": None, "steps": 400, "tokens": 819200, "curves": {}},
    ]
    pairs = [(N, C) for C in flops for N in sizes]
    for name, (N, C) in zip(names, pairs, strict=True):
        D = C / (6 * N)
        records.append(
            {"kind": "point", "point": name, "task": "text",
             "settings": {"hidden_size": int(N / 1e4), "train_flops": C}, "pattern": "ccaccacc",
             "attention_layers": 2, "layers": 8, "params": int(N), "train_flops": C, "tokens": int(D),
             "match_off": 0.0, "changed": {}})
        loss = 0.9 + 90 * N**-0.4 + 400 * D**-0.4
        records += [
            {"kind": "run", "point": name, "task": "text", "seed": seed, "status": "ok", "error": None,
             "peak_lr": 0.003, "score": loss * math.exp(rng.normal(0, noise)), "metrics": {}, "curves": {},
             "seconds": 60.0}
            for seed in range(seeds)
        ]
    return records


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """The page of some records; figures are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(figures, "_save", lambda figure, out, name, shows: (shows, name))

    def make(records, where="."):
        out = tmp_path / where
        return write_report(write(out / "results.jsonl", records), out / "report").read_text()

    return make


def row(page, *starts):
    """The cells of the first table row that begins with these."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(starts)] == list(starts):
            return cells
    raise AssertionError(f"no row {starts}")


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def runs_of(records, **want):
    return [r for r in records if r["kind"] == "run" and all(r[key] == value for key, value in want.items())]


def test_the_page_has_the_statistics_of_each_point(page_of):
    records = block_ratio()
    page = page_of(records)
    assert "All 130 planned runs are finished." in page
    scores = {name: [r["score"] for r in runs_of(records, task="text", point=name)]
              for name in ("base", "attention=0 operator=conv")}
    text = section(page, "Language modelling")
    cells = row(text, "0", "conv")
    assert cells[2:4] == ["`" + "c" * 16 + "`", "0/16"]
    assert cells[-4].startswith(f"{np.mean(scores['attention=0 operator=conv']):.4f} [")
    mean = np.mean(np.subtract(scores["attention=0 operator=conv"], scores["base"]))
    assert cells[-3].startswith(f"{mean:+.4f} [")
    assert cells[-1] == "**worse**"
    assert row(text, "8", "conv")[-1] == "no difference shown"
    assert row(text, "**6** (base)", "**conv**")[-3:] == ["-", "-", "base"]
    assert "the largest mismatch is -0.20%" not in page
    assert "the largest mismatch is +0.24%, of `attention=16 operator=conv` on text" in page
    assert "Chance is 0.01562" in section(page, "Associative recall (MQAR)")
    assert row(section(page, "Associative recall (MQAR)"), "0", "conv")[-1] == "**worse**"
    assert section(page, "Failed runs").strip() == "None."


def test_costs_stand_beside_the_base(page_of):
    costs = section(page_of(block_ratio()), "What it costs")
    assert row(costs, "0", "conv")[2:4] == ["2.50 x", "2.50 x"]
    assert "Conditions: 2 cores of an Intel Xeon; jax 0.12.0." in costs
    assert "96 MiB" in row(costs.split("As measured")[1], "**6** (base)", "**conv**")[-1]


def test_any_order_of_the_records_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 3)
    for name, records in (("ratio", block_ratio(seeds=3)), ("density", density(seeds=2))):
        shuffled = records + records[5:9]  # a line twice is one
        random.Random(1).shuffle(shuffled)
        found = []
        for way, some in (("a", records), ("b", [dict(reversed(r.items())) for r in shuffled])):
            out = tmp_path / name / way
            page = write_report(write(out / "results.jsonl", some), out / "report").read_text()
            found.append({path.name: path.read_bytes() for path in sorted((out / "report").iterdir())})
            drawn = set(found[-1]) - {"README.md"}
            assert {line.split("(")[-1].rstrip(")") for line in page.splitlines() if line.startswith("![")} == drawn
        assert found[0].keys() == found[1].keys()
        assert sum(file.endswith(".png") for file in found[0]) == (6 if name == "ratio" else 2)
        assert [file for file in found[0] if found[0][file] != found[1][file]] == []


def test_a_reading_is_put_near_the_top_as_it_is(page_of, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "reading.md").write_text("## What it says\n\n*One* attention layer | is much.\n")
    page = page_of(block_ratio(seeds=2))
    assert "## What it says\n\n*One* attention layer | is much.\n" in page
    assert page.index("What it says") < page.index("How it was run")


def test_below_five_seeds_nothing_is_claimed(page_of):
    page = page_of(block_ratio(seeds=4))
    for word in ("**better**", "**worse**", "no difference shown |"):
        assert word not in page
    assert row(section(page, "Language modelling"), "0", "conv")[-1] == "explores only (4 pairs)"
    assert page.count("this table only explores, no claim is made") == 2


def test_where_nothing_differs_nothing_is_claimed(page_of):
    text = section(page_of(block_ratio(planted=False)), "Language modelling")
    assert "**better**" not in text
    assert "**worse**" not in text
    assert text.count("no difference shown") == 12


def test_a_partial_study_says_so_and_corrects_for_what_is_to_come(page_of, tmp_path):
    def is_to_come(record):
        return record["kind"] == "run" and (record["task"] == "mqar" or record["point"] not in (
            "base", "attention=2 operator=conv"))

    page = page_of([record for record in block_ratio() if not is_to_come(record)])
    assert "**Partial: 10 of 130 planned runs are finished, 0 failed, 120 are still to come." in page
    text = section(page, "Language modelling")
    assert row(text, "8", "rglru")[-1] == "no finished run"
    assert "The base has no finished run" in section(page, "Associative recall (MQAR)")
    # The only point that has a p pays for all twelve.
    pair = read_results(tmp_path / "results.jsonl").scores("text").values()
    p = ttest_rel(*([scores[seed] for seed in range(5)] for scores in pair)).pvalue
    assert row(text, "2", "conv")[-2] == f"{12 * p:.3f}"


def test_failed_runs_are_listed_and_compared_on_the_seeds_that_both_have(page_of):
    records = block_ratio(seeds=6)
    (failed,) = runs_of(records, task="text", point="attention=2 operator=conv", seed=3)
    failed |= {"status": "failed", "error": "DivergedError: 5 updates\nin a row | skipped", "score": None, "curves": {}}
    (empty,) = runs_of(records, task="text", point="base", seed=0)
    empty["score"] = None
    page = page_of(records)
    assert "**154 of 156 planned runs are finished, 2 failed**" in page
    cells = row(section(page, "Language modelling"), "2", "conv")
    assert cells[-5] == "5 (1 failed, 4 paired)"
    assert cells[-1] == "explores only (4 pairs)"
    failures = section(page, "Failed runs")
    assert "| attention=2 operator=conv | text | 3 | 0.003 | run | DivergedError: 5 updates in a row \\| skipped |" in (
        failures)
    assert "| base | text | 0 | 0.003 | run | no error is recorded, but there is no finite score |" in failures


def test_a_run_that_finished_when_repeated_counts_and_its_failure_stays(page_of):
    records = block_ratio()
    (again,) = runs_of(records, task="text", point="base", seed=0)
    records.append(again | {"status": "failed", "error": "OSError: no space", "score": None})
    page = page_of(records)
    assert "All 130 planned runs are finished." in page
    assert "run, finished when repeated | OSError: no space" in section(page, "Failed runs")


def test_tuned_rates_are_shown_with_the_one_used(page_of):
    records = block_ratio(seeds=2)
    records += [
        {"kind": "tuning", "point": "base", "task": "text", "peak_lr": rate, "seed": 1_000_000, "status": status,
         "score": score, "error": error}
        for rate, status, score, error in ((0.001, "ok", 2.4, None), (0.003, "ok", 2.3, None),
                                           (0.01, "failed", None, "DivergedError: spikes"))
    ]
    page = page_of(records)
    tuned = section(page, "Learning rates tuned")
    assert row(tuned, "**6** (base)", "**conv**")[2:] == ["2.4000", "**2.3000**", "failed", "0.003"]
    assert "| base | text | 1000000 | 0.01 | tuning | DivergedError: spikes |" in section(page, "Failed runs")
    del records[-1]
    assert row(page_of(records).split("## Learning rates")[1], "**6** (base)")[-1] == "0.003 (edge)"


@pytest.mark.parametrize("missing", [
    ("study",), ("task",), ("point",), ("run",), ("cost",), ("study", "task", "point", "cost"), ("task", "run"),
    ("study", "task", "point", "run", "cost"),
])
def test_any_kind_of_record_may_be_missing(page_of, missing):
    page = page_of([record for record in block_ratio(seeds=2) if record["kind"] not in missing])
    assert "How to read this" in page
    assert ("What it costs" in page) == ("cost" not in missing)
    if "study" in missing:
        assert "The study's own record is missing" in page


def test_a_line_that_a_kill_cut_short_is_left_out_and_others_are_named(tmp_path):
    path = write(tmp_path / "results.jsonl", block_ratio(seeds=2))
    with path.open("a") as file:
        file.write('{"kind": "ru')
    assert len(read_results(path).runs) == 52
    write(path, [{"kind": "rum"}])
    with pytest.raises(ValueError, match="line 1 is no record"):
        read_results(path)


def test_records_that_contradict_each_other_are_refused(tmp_path):
    records = block_ratio(seeds=2)
    (run,) = runs_of(records, task="text", point="base", seed=0)
    with pytest.raises(ValueError, match="two scores of run"):
        read_results(write(tmp_path / "results.jsonl", [*records, run | {"score": 1.0}]))
    with pytest.raises(ValueError, match="two study records of block_ratio that differ in match"):
        read_results(write(tmp_path / "results.jsonl", [*records, records[0] | {"match": "none"}]))


def test_a_mismatch_over_one_per_cent_stands_out(page_of):
    records = block_ratio(seeds=2)
    next(record for record in records if record["kind"] == "point")["match_off"] = -0.02
    assert "That is more than the 1% a study allows" in page_of(records)


def test_full_attention_ends_the_line_of_every_operator(tmp_path):
    found = read_results(write(tmp_path / "results.jsonl", block_ratio(seeds=2)))
    lines = dict(figures._lines(found, "text", list(found.names)))
    shares = {label: [found.points["text", p]["attention_layers"] for p in points] for label, points in lines.items()}
    assert shares == {"operator conv": [0, 1, 2, 4, 6, 8, 16], "operator rglru": [0, 1, 2, 4, 6, 8, 16]}


def test_of_many_curves_the_base_and_the_extremes_are_drawn(tmp_path):
    found = read_results(write(tmp_path / "results.jsonl", block_ratio(seeds=2)))
    points, note = figures._drawn(found, "text", list(found.names))
    assert {"base", "attention=0 operator=conv", "attention=0 operator=rglru"} <= set(points)
    assert (len(points), "3 best and 3 worst of 13" in note) in ((6, True), (7, True))
    assert figures._drawn(found, "text", points) == (points, "")


def test_a_curve_has_the_places_that_all_its_seeds_have(tmp_path):
    records = block_ratio(seeds=2)
    (run,) = runs_of(records, task="mqar", point="base", seed=1)
    run["curves"]["pairs"][1][1] = None
    curve = figures._curve_of(read_results(write(tmp_path / "results.jsonl", records)), "mqar", "base", "pairs")
    assert list(curve) == [4, 16, 32, 64]


def test_one_place_is_no_curve(tmp_path):
    records = block_ratio(seeds=2)
    for run in runs_of(records, task="mqar"):
        run["curves"]["pairs"] = run["curves"]["pairs"][:1]
    found = read_results(write(tmp_path / "results.jsonl", records))
    assert figures.draw_curves(found, "mqar", tmp_path) == []
    assert len(figures.draw_curves(found, "text", tmp_path)) == 1


def test_costs_that_hardly_differ_are_one():
    assert level({"a": 1.02, "b": 1.0, "c": 1.08, "d": 5.0, "e": 1.05}, 0.05) == {
        "b": 1.0, "a": 1.0, "e": 1.0, "c": 1.08, "d": 5.0}


def test_the_pareto_front_by_hand():
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 2.0, "e": 4.0}
    scores = {"a": 0.5, "b": 0.7, "c": 0.6, "d": 0.6, "e": 0.9}
    assert pareto(costs, "lower", scores, "higher") == ["a", "b", "e"]
    assert pareto(costs, "higher", scores, "higher") == ["e"]
    assert pareto(costs, "lower", scores, "lower") == ["a"]
    assert pareto({"x": 1.0, "y": 1.0}, "lower", {"x": 2.0, "y": 2.0}, "lower") == ["x", "y"]


def test_a_study_of_sizes_gets_its_law_and_its_budgets(page_of, monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 10)
    page = page_of(density())
    table = section(page, "Language modelling")
    assert "verdict" not in table  # With other FLOPs than the base, it would say who had more.
    assert row(table, "80", "3.2e+13")[-1] == "2.0368 [2.0286, 2.0450]"
    law = section(page, "Loss against size and tokens")
    assert 0.2 < float(row(law, "alpha")[1]) < 0.6
    assert "10 resamples" in law
    # The smallest is best on the least FLOPs, and a larger one on the most: the truth of this law.
    assert row(law, "**2 T**")[1] == "**100,000**"
    assert row(law, "**32 T**")[1] == "**400,000**"
    assert row(law, "2 T", "100,000", "800,000")[-1] == "**the smaller is better**"
    assert row(law, "32 T", "100,000", "400,000")[-1] == "**the larger is better**"


def test_a_study_of_too_few_sizes_says_why_there_is_no_law(page_of):
    law = section(page_of(density(sizes=(1e5, 2e5), flops=(2e12, 8e12))), "Loss against size and tokens")
    assert "No law is fitted: it needs at least 6 different pairs of parameters and tokens, and 4 have" in law
    assert row(law, "2 T", "100,000", "200,000")[-1] == "**the smaller is better**"
