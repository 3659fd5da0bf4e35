"""`Scorer`: shared contexts, shapes and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.eval.scoring import Scorer, _groups
from lfm_jax.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def plainly(model, given):
    """Log-probabilities by one pass over whole rows."""
    rows = [[*context, *continuation] for context, continuation in given]
    tokens_BT = np.array([row + [0] * (640 - len(row)) for row in rows])
    graphdef, params = nnx.split(model, nnx.Param)
    logits_BTV, _ = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(params, tokens_BT)
    logprobs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    return [sum(logprobs_BTV[i, t - 1, row[t]] for t in range(len(context), len(row)))
            for i, (row, (context, _)) in enumerate(zip(rows, given, strict=True))]


def pairs(model, seed=0):
    """A long context with one-token answers, one with answers of several lengths, and pairs alone."""
    ids = np.random.default_rng(seed).integers(1, model.config.vocab_size, 2000).tolist()
    found = [(ids[:40], [i]) for i in range(1, 6)] + [(ids[40:90], ids[100 : 101 + n]) for n in range(4)]
    return [*found, (ids[200:203], ids[203:230]), (ids[300:301], ids[301:302]), (ids[400:600], ids[600:620])]


def test_a_context_is_read_once_and_its_continuations_go_on(model):
    """Chunks of contexts, lanes that take one continuation after the other, and long ones in several steps."""
    given = pairs(model)
    scorer, read = Scorer(model, 4096, 64), []
    begin = scorer._programs.begin
    scorer._programs = scorer._programs._replace(
        begin=lambda *args: read.append(np.clip(args[4], 0, args[3].shape[1]).sum()) or begin(*args))
    scores = dict(scorer.score(given))
    assert list(scores) != sorted(scores)  # The longest come first.
    np.testing.assert_allclose([scores[i].logprob for i in range(len(given))], plainly(model, given), atol=1e-4)
    assert sum(read) == sum(len(context) for context in {tuple(context) for context, _ in given})


def test_a_state_has_no_more_slots_than_the_model_has_positions():
    model = tiny_model(max_position=100)
    ids = np.random.default_rng(1).integers(1, model.config.vocab_size, 101).tolist()
    given = [(ids[:n], ids[n:]) for n in (1, 50, 99, 100)]
    scores = dict(Scorer(model, 100, 64).score(given))
    wider = tiny_model()  # The same weights.
    np.testing.assert_allclose([scores[i].logprob for i in range(4)], plainly(wider, given), atol=1e-4)


def test_a_score_does_not_depend_on_its_company(model):
    given = pairs(model)
    scorer = Scorer(model, 64, 64)
    together = dict(scorer.score(given))
    for i in (0, 5, 9, 11):
        group = [j for j, pair in enumerate(given) if pair[0] == given[i][0]]
        assert dict(scorer.score([given[j] for j in group])) == {k: together[j] for k, j in enumerate(group)}


def test_equal_pairs_are_scored_once(model):
    given = pairs(model)
    assert sum(len(group.lines) for group in _groups(given * 3, 64)) == len(given)
    scores = dict(Scorer(model, 64, 256).score(given * 3))
    assert all(scores[i] == scores[i + len(given)] == scores[i + 2 * len(given)] for i in range(len(given)))


def test_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="max_length is 5000; the model reads 1 to 4096 tokens"):
        Scorer(model, 5000)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        Scorer(model, 64, 0)
    with pytest.raises(ValueError, match=r"pair 0 has no context\n.*pair 1 has no continuation\n.*pair 2 has a "
                                         "continuation of 65 tokens; the model reads 64"):
        list(Scorer(model, 64, 256).score([([], [1]), ([1], []), ([1], [2] * 65)]))
    assert list(Scorer(model, 64, 256).score([])) == []
    broken = tiny_model()
    broken.embed[...] = jnp.full(broken.embed.shape, jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        list(Scorer(broken, 64, 256).score([([1], [2])]))
