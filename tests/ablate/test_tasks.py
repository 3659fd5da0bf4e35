"""Synthetic tasks: rows exactly seeded, answers that the row holds, what chance is, held-out rows nobody trains on."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.ablate.tasks.copying import SelectiveCopying
from lfm_jax.ablate.tasks.induction import InductionHeads
from lfm_jax.ablate.tasks.needle import Needle
from lfm_jax.ablate.tasks.recall import Mqar
from lfm_jax.ablate.tasks.synthetic import heldout_batches, train_batches
from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.recipe import dump_recipe, load_recipe

COMMON = dict(batch_size=6, heldout_rows=16)
TASKS = {
    "mqar": Mqar(pairs=(2, 5), length=32, test_lengths=(48,), gap=6, num_keys=32, num_values=32, **COMMON),
    "copying": SelectiveCopying(symbols=4, alphabet=6, length=24, test_lengths=(40,), **COMMON),
    "induction": InductionHeads(min_period=3, max_period=9, alphabet=12, length=24, test_lengths=(40, 60), **COMMON),
    "needle": Needle(
        needles=3, length=33, test_lengths=(50,), num_keys=32, num_values=32, fillers=32, **COMMON
    ),
}
every_task = pytest.mark.parametrize("name", TASKS)


def training_rows(task, count, seed=0):
    rng = np.random.default_rng(seed)
    return [task.row(rng, None) for _ in range(count)]


# ---------------------------------------------------------------- oracles: what a reader of the row alone can answer


def answer_recall(tokens, t):
    """The token after the first time that tokens[t] came."""
    first = tokens.index(tokens[t])
    assert first < t
    return tokens[first + 1]


def answer_copying(tokens, t):
    """As many symbols into the row as markers were met; the marker is the last token."""
    marker = tokens[-1]
    symbols = [token for token in tokens if token not in (0, marker)]
    return symbols[tokens[: t + 1].count(marker) - 1]


ORACLES = {"mqar": answer_recall, "copying": answer_copying, "induction": answer_recall, "needle": answer_recall}


@every_task
@given(seed=st.integers(0, 2**32), which=st.integers(-1, 100))
def test_every_answer_can_be_read_off_the_row(name, seed, which):
    task = TASKS[name]
    variants = (None, *task.variants())
    variant = variants[which % len(variants)]
    tokens, targets = task.row(np.random.default_rng(seed), variant)
    assert tokens.shape == targets.shape == (variant.length if variant else task.seq_len,)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.min() >= 0
    assert max(tokens.max(), targets.max()) < task.vocab_size
    (asked,) = np.nonzero(targets != LOSS_IGNORE)
    assert len(asked)
    assert [ORACLES[name](tokens.tolist(), t) for t in asked] == targets[asked].tolist()


@every_task
def test_chance_is_what_a_uniform_guess_comes_to(name):
    task = TASKS[name]
    answers = np.concatenate([targets[targets != LOSS_IGNORE] for _, targets in training_rows(task, 1500)])
    possible = np.unique(answers)
    assert len(possible) == round(1 / task.chance)
    # Two passes of guesses: answers are uniform too, so that no fixed guess does better.
    for guesses in (np.random.default_rng(1).choice(possible, len(answers)), np.full(len(answers), possible[0])):
        # Answers of one row hang together (a symbol comes up each round), so that the error is taken wide.
        error = np.sqrt(task.chance / len(answers))
        assert np.mean(guesses == answers) == pytest.approx(task.chance, abs=6 * error)


# ---------------------------------------------------------------- rows of each task


@given(seed=st.integers(0, 2**32), gap=st.integers(0, 20), pairs=st.integers(1, 6), spare=st.integers(0, 30))
def test_mqar_keeps_its_gap_and_asks_each_key_once(seed, gap, pairs, spare):
    T = 3 * pairs + gap + spare
    task = Mqar(pairs=(pairs,), length=T, gap=gap)
    tokens, targets = task.row(np.random.default_rng(seed), None)
    asked = np.flatnonzero(targets != LOSS_IGNORE)
    assert sorted(tokens[asked]) == sorted(tokens[0 : 2 * pairs : 2])
    assert len(set(tokens[asked])) == pairs
    for t in asked:
        value = int(np.flatnonzero(tokens[: 2 * pairs] == tokens[t])[0]) + 1
        assert t - value > gap
    rest = np.delete(tokens, np.concatenate([np.arange(2 * pairs), asked]))
    assert not rest.any()


def test_mqar_draws_near_places_by_the_power_law():
    def first_place(power):
        task = Mqar(pairs=(1,), length=12, gap=0, power=power)
        asked = [int(np.flatnonzero(targets >= 0)[0]) for _, targets in training_rows(task, 4000)]
        return np.bincount(asked, minlength=12)[2:] / 4000

    for power in (0.01, 0.5, 1.0):
        expected = np.arange(1, 11) ** (power - 1.0)
        np.testing.assert_allclose(first_place(power), expected / expected.sum(), atol=0.03)


def test_mqar_trains_on_each_number_of_pairs():
    asked = [int(np.sum(targets >= 0)) for _, targets in training_rows(TASKS["mqar"], 200)]
    assert set(asked) == {2, 5}
    by_variant = {(v.curve, v.x): int(np.sum(b["targets"][0] >= 0)) for v, b in heldout_batches(TASKS["mqar"])}
    assert by_variant == {("pairs", 2): 2, ("pairs", 5): 5, ("length", 32): 5, ("length", 48): 5}


def test_induction_periods_are_drawn_and_scaled_but_never_beyond_the_alphabet():
    task = TASKS["induction"]

    def periods(variant):
        rng = np.random.default_rng(0)
        rows = [task.row(rng, variant) for _ in range(300)]
        for tokens, targets in rows:
            period = int(np.flatnonzero(targets != LOSS_IGNORE)[0])
            assert len(set(tokens[:period].tolist())) == period
            np.testing.assert_array_equal(tokens[period:], tokens[: len(tokens) - period])
            assert (targets[period:] != LOSS_IGNORE).all()
        found = [int(np.flatnonzero(targets != LOSS_IGNORE)[0]) for _, targets in rows]
        return min(found), max(found)

    assert periods(None) == (3, 9)
    assert [periods(variant) for variant in task.variants()] == [(3, 9), (5, 12), (7, 12)]


def test_copying_scatters_its_symbols():
    places = np.concatenate([np.flatnonzero(tokens[:20]) for tokens, _ in training_rows(TASKS["copying"], 500)])
    np.testing.assert_allclose(np.bincount(places, minlength=20) / 500, 4 / 20, atol=0.07)


def test_needles_stand_at_the_depth_that_is_measured():
    task = TASKS["needle"]
    depths = [variant for variant in task.variants() if variant.curve == "depth"]
    assert [variant.x for variant in depths] == list(range(1, 11))
    assert {variant.length for variant in depths} == {50}
    for variant in depths:
        rng = np.random.default_rng(variant.x)
        for _ in range(20):
            tokens, targets = task.row(rng, variant)
            (asked,) = np.flatnonzero(targets != LOSS_IGNORE)
            place = tokens.tolist().index(tokens[asked])
            # Needles stand in cells of two tokens, which tenths of the 47 tokens do not cut evenly.
            assert (variant.x - 1) / 10 * 47 - 3 <= place <= variant.x / 10 * 47
    assert not [v for v in dataclasses.replace(task, depth=False).variants() if v.curve == "depth"]


def test_needles_stand_everywhere_and_never_overlap():
    task = TASKS["needle"]
    found = []
    for tokens, targets in training_rows(task, 1000):
        keys = tokens[targets != LOSS_IGNORE]
        places = np.array([tokens.tolist().index(key) for key in keys])
        assert np.diff(np.sort(places)).min() >= 2
        assert len(places) == 3
        found.append(places)
    # 30 tokens of haystack: 15 cells of two.
    np.testing.assert_allclose(np.bincount(np.concatenate(found) // 2, minlength=15) / 1000, 3 / 15, atol=0.06)


# ---------------------------------------------------------------- seeds and batches


@every_task
def test_batches_are_whole_documents_with_their_keys(name):
    task = TASKS[name]
    batch = next(train_batches(task, 3))
    assert list(batch) == ["tokens", "targets", "segment_ids", "positions"]
    assert {(x.shape, x.dtype.name) for x in batch.values()} == {((6, task.seq_len), "int32")}
    assert (batch["segment_ids"] == 1).all()
    assert (batch["positions"] == np.arange(task.seq_len)).all()


@every_task
def test_rows_belong_to_seed_and_number(name):
    task = TASKS[name]
    batches = [next(iterator) for iterator in (train_batches(task, 0),) for _ in range(3)]
    again = train_batches(task, 0)
    for batch in batches:
        np.testing.assert_array_equal(batch["tokens"], next(again)["tokens"])
    other = next(train_batches(task, 1))
    assert not np.array_equal(batches[0]["tokens"], other["tokens"])
    # Whatever the batch, the rows are the same.
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(tokens[:9], next(train_batches(dataclasses.replace(task, batch_size=9), 0))["tokens"])
    assert len(np.unique(tokens, axis=0)) == len(tokens)


ROWS = [[4, 13, 1, 15, 0, 1, 0, 0, 4, 0], [8, 14, 9, 15, 9, 0, 0, 8, 0, 0]]
SUMS = {"mqar": (1527, 1051), "copying": (268, 250), "induction": (992, 980), "needle": (13171, 13100)}


def test_rows_are_the_same_on_every_machine():
    """Numbers written down once: where numpy or a task draws otherwise, a study's seeds mean other rows."""
    batch = next(train_batches(Mqar(pairs=(2,), length=10, num_keys=9, num_values=9, batch_size=2), 5))
    assert batch["tokens"].tolist() == ROWS
    for name, task in TASKS.items():
        trained, held = next(train_batches(task, 0)), next(heldout_batches(task))[1]
        assert (int(trained["tokens"].sum()), int(held["tokens"].sum())) == SUMS[name]


@given(taken=st.integers(0, 7), name=st.sampled_from(sorted(TASKS)), seed=st.integers(0, 2**64))
def test_an_iterator_goes_on_from_its_state(taken, name, seed):
    iterator = train_batches(TASKS[name], seed)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = train_batches(TASKS[name], seed)
    next(resumed)
    resumed.set_state(state)
    for _ in range(3):
        expected, got = next(iterator), next(resumed)
        for key, x in expected.items():
            np.testing.assert_array_equal(got[key], x)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        train_batches(TASKS["mqar"], -1)


@every_task
def test_heldout_rows_come_once_each_and_are_not_trained_on(name):
    task = TASKS[name]
    held = list(heldout_batches(task))
    assert list(dict.fromkeys(variant for variant, _ in held)) == list(task.variants())
    rows = {}
    for variant, batch in held:
        assert batch["tokens"].shape == (6, variant.length)
        padding = batch["segment_ids"][:, 0] == 0
        assert (batch["targets"][padding] == LOSS_IGNORE).all()
        rows.setdefault(variant, []).extend(map(tuple, batch["tokens"][~padding].tolist()))
    assert {len(found) for found in rows.values()} == {16}
    # Variants draw apart from one another too: equal shapes do not make equal rows.
    measured = [row for found in rows.values() for row in found]
    assert len(set(measured)) == len(measured)
    for seed in (0, 1):
        iterator = train_batches(task, seed)
        trained = {tuple(row) for _ in range(40) for row in next(iterator)["tokens"].tolist()}
        assert not trained & set(measured)


@every_task
def test_heldout_rows_do_not_depend_on_what_does_not_draw_them(name):
    def rows(task):
        found = {}
        for variant, batch in heldout_batches(task):
            found.setdefault(variant, []).extend(batch["tokens"][batch["segment_ids"][:, 0] == 1].tolist())
        return found

    task = TASKS[name]
    fewer = rows(dataclasses.replace(task, batch_size=5, steps=7, heldout_rows=11))
    assert {variant: found[:11] for variant, found in rows(task).items()} == fewer


@every_task
def test_curves_and_what_is_scored(name):
    task = TASKS[name]
    variants = task.variants()
    assert len(set(variants)) == len({(v.curve, v.x) for v in variants}) == len(variants)
    assert {variant.curve for variant in variants} == set(task.curve_axes)
    assert {variant.length for variant in variants if variant.scored} == {task.seq_len}
    assert {variant.length for variant in variants} == {task.length, *task.test_lengths}


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("kind", [Mqar, SelectiveCopying, InductionHeads, Needle])
def test_the_defaults_make_a_task_that_a_model_fits(kind):
    task = kind()
    assert ModelConfig(vocab_size=task.vocab_size).vocab_size == task.vocab_size
    assert task.title
    assert json.loads(json.dumps(dataclasses.asdict(task)))  # A study's digest and its records are made of this.
    assert set(dataclasses.asdict(task)) == {field.name for field in dataclasses.fields(kind)}


BAD = {
    "mqar.steps": (Mqar, dict(steps=0)),
    "mqar.pairs, mqar.gap, mqar.power, mqar.heldout_rows": (
        Mqar, dict(pairs=(4, 4), gap=-1, power=0.0, heldout_rows=1.5)
    ),
    "mqar.pairs": (Mqar, dict(pairs=())),
    "mqar.length, mqar.num_keys, mqar.test_lengths": (
        Mqar, dict(pairs=(8,), length=20, num_keys=4, test_lengths=(16, 20))
    ),
    "copying.symbols, copying.alphabet": (SelectiveCopying, dict(symbols=0, alphabet=1)),
    "copying.length, copying.test_lengths": (SelectiveCopying, dict(symbols=8, length=15, test_lengths=(10,))),
    "induction.min_period, induction.batch_size": (InductionHeads, dict(min_period=0, batch_size=True)),
    "induction.min_period, induction.max_period, induction.length": (
        InductionHeads, dict(min_period=40, max_period=32, alphabet=16, length=32)
    ),
    "needle.fillers, needle.depth, needle.num_values": (Needle, dict(fillers=0, depth=1, num_values=1)),
    "needle.length, needle.num_keys": (Needle, dict(needles=9, num_keys=8, length=40, test_lengths=())),
}


@pytest.mark.parametrize("names", BAD)
def test_bad_fields_are_all_named(names):
    kind, fields = BAD[names]
    with pytest.raises(ValueError, match=f"{kind.__name__} is not valid") as caught:
        kind(**fields)
    lines = str(caught.value).splitlines()[1:]
    assert [re.match(r"  - ([\w.]+)", line)[1] for line in sorted(lines)] == sorted(names.split(", "))


@every_task
def test_a_task_is_a_section_of_yaml(name, tmp_path):
    file = tmp_path / "task.yaml"
    task = TASKS[name]
    file.write_text(dump_recipe(task))
    assert load_recipe(type(task), file) == task
    file.write_text("{length: 60, test_lengths: [80], steps: 9}")
    assert load_recipe(type(task), file) == type(task)(length=60, test_lengths=(80,), steps=9)
