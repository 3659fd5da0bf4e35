"""The harness finds the truth: what cannot be learned is at chance, what differs is flagged, what does not is not."""

import dataclasses

import numpy as np
import pytest
from studies import tiny_study

from lfm_jax.ablate import run as runs
from lfm_jax.ablate.results import RESULTS, read_results
from lfm_jax.ablate.schedule import AblateConfig, Work, ablate
from lfm_jax.ablate.stats import compare
from lfm_jax.ablate.study import Grid
from lfm_jax.ablate.tasks.recall import Mqar

RECALL = Mqar(pairs=(3,), length=16, gap=4, num_keys=8, num_values=8, steps=250, batch_size=32, heldout_rows=128)
"""Two convolutions of three taps see five tokens, the query's own included: no query sees its value."""


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Accuracy by point and seed; report page. Attention over one convolution is the base; without attention, and with
    a convolution broken by taking all but its last tap away, are the points."""
    study = tiny_study(
        out=str(tmp_path_factory.mktemp("sanity")), pattern="conv:1,attention:1,place:back", match="none", seeds=5,
        vary=(Grid.of({"attention": 0}), Grid.of({"taps": 1})), mqar=RECALL,
        optimizer=dataclasses.replace(tiny_study().optimizer, peak_lr=5e-3),
    )
    assert ablate(AblateConfig(study=study)) == 0
    found = {}
    for (_, point, seed), run in read_results(study.directory / RESULTS).runs.items():
        found.setdefault(point, {})[seed] = run["score"]
    return found, (study.directory / "report" / "README.md").read_text()


def test_convolutions_that_do_not_reach_are_at_chance_and_attention_lifts_them(scores):
    found, _ = scores
    assert RECALL.chance == 1 / 8
    blind = np.array(list(found["attention=0"].values()))
    answers = RECALL.heldout_rows * 3
    assert abs(blind.mean() - RECALL.chance) < 4 * np.sqrt(RECALL.chance * (1 - RECALL.chance) / answers)
    assert np.median(list(found["base"].values())) > 0.8


def test_a_planted_difference_is_flagged(scores):
    found, page = scores
    flagged = compare(found, "base", "higher")
    assert {point: one.verdict for point, one in flagged.items()} == {"attention=0": "worse", "taps=1": "worse"}
    assert page.count("**worse**") == 2


def test_of_twenty_pairs_of_identical_arms_few_are_flagged():
    """Forty arms of one model, five seeds each, none used twice."""
    study = tiny_study(
        pattern="conv:1,attention:1", vary=(Grid.of({"attention": 0}),), match="none",
        model=dataclasses.replace(tiny_study().model, hidden_size=16, ffn_size=32, num_heads=2, num_kv_heads=1),
        mqar=Mqar(pairs=(2,), length=12, num_keys=4, num_values=4, steps=30, batch_size=8, heldout_rows=64),
    )
    work = Work(study)
    trainer = runs.Trainer(study, work.trials[0], work.tasks["mqar"])
    nats = []
    for first in range(0, 200, 50):
        outcomes = trainer.run(range(first, first + 50), 1e-2, study.directory / "never", "", NeverStop())
        nats += [outcome.metrics["nats_per_answer"] for outcome in outcomes]
    arms = [dict(enumerate(nats[i : i + 5])) for i in range(0, 200, 5)]
    assert len({value for arm in arms for value in arm.values()}) == 200  # Every run is another one.
    pairs = zip(arms[::2], arms[1::2], strict=True)
    verdicts = [compare({"a": a, "b": b}, "a", "lower")["b"].verdict for a, b in pairs]
    assert len(verdicts) == 20
    assert sum(verdict != "no difference shown" for verdict in verdicts) <= 3


class NeverStop:
    def due(self):
        return False
