"""Filters against the logits processors of `transformers`; draws against their distribution."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from lfm_jax.sampling import ANYTHING, GREEDY, Sampling, filter_logits, penalise_logits, sample, to_arrays

V = 211
sampled = jax.jit(sample, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def filtered(logits_BV, params, features, seen_BV=None, count_BV=0):
    def count():
        return jax.numpy.broadcast_to(count_BV, logits_BV.shape)

    return filter_logits(penalise_logits(logits_BV, params, features, seen_BV, count), params, features)


@functools.cache
def problem(rows, scale=3.0):
    """Logits, and tokens seen so far as ids and as a mask."""
    rng = np.random.default_rng(rows)
    logits_BV = (scale * rng.standard_normal((rows, V))).astype(np.float32)
    seen_BT = rng.integers(0, V, (rows, 30))
    seen_BV = np.zeros((rows, V), bool)
    seen_BV[np.arange(rows)[:, None], seen_BT] = True
    return logits_BV, seen_BT, seen_BV


def hf_filtered(s, logits_V, seen_T):
    """What `generate` of transformers does to the logits of one row, in its order."""
    chain = []
    if s.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)))
    if s.temperature > 0:
        chain.append(hf.TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k:
        chain.append(hf.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(hf.TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(hf.MinPLogitsWarper(s.min_p))
    scores = torch.tensor(logits_V)[None]
    for processor in chain:
        scores = processor(torch.tensor(seen_T)[None], scores)
    return scores[0].numpy()


def assert_filtered_as_hf(samplings, logits_BV, seen_BT, seen_BV):
    params, features = to_arrays(samplings, V)
    ours_BV = np.asarray(filtered(logits_BV, params, features, seen_BV))
    for s, ours_V, logits_V, seen_T in zip(samplings, ours_BV, logits_BV, seen_BT, strict=True):
        theirs_V = hf_filtered(s, logits_V, seen_T)
        np.testing.assert_array_equal(np.isfinite(ours_V), np.isfinite(theirs_V), err_msg=str(s))
        np.testing.assert_allclose(ours_V, theirs_V, rtol=1e-6, err_msg=str(s))


EACH = {
    "temperature": [1e-6, 0.1, 0.7, 1.0, 3.0],
    "top_k": [1, 7, 50, 70, V, 9999],
    "top_p": [1e-6, 0.1, 0.5, 0.9, 0.999],
    "min_p": [1e-4, 0.05, 0.3, 1.0],
    "repetition_penalty": [0.5, 1.05, 2.0],
}


@pytest.mark.parametrize("name", EACH)
def test_each_filter_is_that_of_transformers(name):
    samplings = [Sampling(**{"temperature": 1.0, name: value}) for value in EACH[name]]
    assert_filtered_as_hf(samplings, *problem(len(samplings)))


def test_filters_together_row_by_row():
    rng = np.random.default_rng(5)
    samplings = [
        Sampling(**{name: values[rng.integers(len(values))] for name, values in EACH.items() if rng.random() < 0.6})
        for _ in range(24)
    ]
    samplings = [s if s.temperature else Sampling(temperature=0.5, top_k=s.top_k, min_p=s.min_p) for s in samplings]
    assert_filtered_as_hf(samplings, *problem(24))


def test_equal_logits_at_the_border_stay_together():
    logits_BV = np.array([[3, 2, 2, 2, 1, 0, -1]], np.float32)
    params, features = to_arrays([Sampling(temperature=1.0, top_k=2)], 7)
    assert np.isfinite(filter_logits(logits_BV, params, features)).sum() == 4


def test_a_filter_that_is_off_changes_no_bit():
    logits_BV, _, seen_BV = problem(2)
    busy = Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5, frequency_penalty=1.0)
    params, features = to_arrays([Sampling(temperature=1.0), busy], V)
    logits_BV = np.where(logits_BV < -3, np.float32(-0.0), logits_BV)
    ours_BV = np.asarray(filtered(logits_BV, params, features, seen_BV, 3))
    np.testing.assert_array_equal(ours_BV[0].view(np.int32), logits_BV[0].view(np.int32))


@pytest.mark.parametrize("features", [None, ANYTHING])
def test_penalties_of_what_was_generated(features):
    """OpenAI's formula, after the repetition penalty and before the temperature, greedy rows included."""
    rng = np.random.default_rng(11)
    samplings = [Sampling(), Sampling(frequency_penalty=2.0), Sampling(presence_penalty=-2.0, temperature=0.5),
                 Sampling(frequency_penalty=-0.3, presence_penalty=1.5, repetition_penalty=1.3, temperature=2.0)]
    logits_BV, _, seen_BV = problem(4)
    count_BV = rng.integers(0, 4, (4, V)) * rng.integers(0, 2, (4, V))
    expected_BV = logits_BV.copy()
    for row_V, s, seen_V, count_V in zip(expected_BV, samplings, seen_BV, count_BV, strict=True):
        row_V[seen_V] = np.where(row_V < 0, row_V * s.repetition_penalty, row_V / s.repetition_penalty)[seen_V]
        row_V -= s.presence_penalty * (count_V > 0) + s.frequency_penalty * count_V
        row_V /= s.temperature or 1
    params, found = to_arrays(samplings, V)
    ours_BV = filtered(logits_BV, params, features or found, seen_BV, count_BV)
    np.testing.assert_allclose(ours_BV, expected_BV, rtol=1e-5, atol=1e-5)
    greedy, _ = to_arrays([dataclasses.replace(s, temperature=0.0) for s in samplings], V)
    tokens_B = sample(logits_BV, greedy, features or found, np.arange(4), seen_BV, lambda: count_BV)
    np.testing.assert_array_equal(tokens_B, expected_BV.argmax(axis=1))
    assert (tokens_B != logits_BV.argmax(axis=1)).any()


@pytest.mark.parametrize("extreme", [
    dict(top_p=1e-45), dict(top_p=1e-46), dict(top_p=1e-300), dict(min_p=1.0), dict(top_k=1), dict(temperature=1e-300),
    dict(top_p=1e-45, top_k=1, min_p=1.0), dict(top_p=1e-45, min_p=1e-46, top_k=2**40),
])
def test_the_likeliest_token_always_stays(extreme):
    logits_BV, _, _ = problem(4)
    params, features = to_arrays([Sampling(**dict(temperature=1.0, seed=i) | extreme) for i in range(4)], V)
    for chosen in (features, ANYTHING):
        token_B = sample(logits_BV, params, chosen, np.arange(4), np.zeros((4, V), bool), lambda: np.zeros((4, V)))
        np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))


@pytest.mark.parametrize("extreme", [dict(temperature=1e300), dict(temperature=1e300, top_p=0.5, top_k=3, min_p=1e-46)])
def test_no_parameter_lets_a_token_in_that_is_ruled_out(extreme):
    logits_BV = np.where(np.arange(V) % 20 == 7, problem(4)[0], -np.inf)
    params, features = to_arrays([Sampling(seed=i, **extreme) for i in range(4)], V)
    token_B = np.asarray(sample(logits_BV, params, features, np.arange(4)))
    assert (token_B % 20 == 7).all()


def test_greedy_takes_the_first_of_the_best_and_ignores_the_rest():
    logits_BV = np.array([[0, 5, 5, 1], [-3, -2, -9, -2], [-np.inf, -np.inf, -np.inf, 0]], np.float32)
    params, features = to_arrays([GREEDY, Sampling(top_k=1, seed=4), Sampling(top_p=0.1, seed=5)], 4)
    assert not features.sampled
    np.testing.assert_array_equal(sampled(logits_BV, params, features, np.arange(3)), [1, 1, 3])


def test_draws_follow_the_filtered_distribution():
    logits_BV, _, _ = problem(1)
    count = 20_000
    s = Sampling(temperature=1.5, top_k=12, top_p=0.95)
    params, features = to_arrays([s], V)
    probability_V = np.asarray(jax.nn.softmax(filtered(logits_BV, params, features)[0]))
    rows = jax.tree.map(lambda x: np.repeat(x, count), params)
    drawn_B = np.asarray(sampled(np.repeat(logits_BV, count, axis=0), rows, features, np.arange(count)))
    frequency_V = np.bincount(drawn_B, minlength=V) / count
    assert frequency_V[probability_V == 0].sum() == 0
    # Five standard deviations of a binomial.
    assert (np.abs(frequency_V - probability_V) <= 5 * np.sqrt(probability_V / count)).all()


def test_a_draw_depends_on_seed_and_position_only():
    logits_BV, _, _ = problem(1)
    rows = [(3, 10), (3, 11), (4, 10), (3, 10)]
    neighbour = Sampling(temperature=2.0, top_k=5, top_p=0.5, min_p=0.1, seed=9)

    def draw(rows, others=()):
        samplings = [Sampling(temperature=5.0, seed=seed) for seed, _ in rows] + list(others)
        params, features = to_arrays(samplings, V)
        positions = np.array([position for _, position in rows] + [7] * len(others), np.int32)
        tokens = sampled(np.repeat(logits_BV, len(samplings), axis=0), params, features, positions)
        return np.asarray(tokens)[: len(rows)].tolist()

    first = draw(rows)
    assert first[0] == first[3]
    assert len(set(first)) == 3
    assert draw(rows[::-1]) == first[::-1]
    assert draw(rows, [neighbour] * 3) == first
    assert [draw([row])[0] for row in rows] == first


def test_a_greedy_row_beside_a_drawn_one():
    logits_BV, _, _ = problem(2)
    params, features = to_arrays([GREEDY, Sampling(temperature=9.0)], V)
    assert all(
        sampled(logits_BV, params, features, np.array([p, p]))[0] == logits_BV[0].argmax() for p in range(5)
    )


def test_nothing_sorts_the_vocabulary():
    logits_BV, _, seen_BV = problem(2)
    everything = Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    for samplings, top_k in (([GREEDY] * 2, False), ([everything] * 2, True)):
        params, features = to_arrays(samplings, V)
        jaxpr = str(jax.make_jaxpr(sample, static_argnums=2)(logits_BV, params, features, np.arange(2), seen_BV))
        assert "sort[" not in jaxpr
        assert ("top_k[" in jaxpr) == top_k
        assert ("random" in jaxpr) == top_k


def test_features_hold_only_what_some_row_needs():
    _, features = to_arrays([Sampling(top_k=5, top_p=0.5, min_p=0.5), Sampling(temperature=1.0, top_k=70)], 65_536)
    assert features == (True, True, False, False, False, False)
    assert to_arrays([Sampling(repetition_penalty=1.1)], V)[1] == (False, False, False, False, True, False)
    assert to_arrays([Sampling(presence_penalty=-1.0)], V)[1] == (False, False, False, False, False, True)


@pytest.mark.parametrize("name", EACH)
def test_one_set_of_features_for_any_batch_changes_no_bit(name):
    samplings = [Sampling(**{"temperature": 1.0, name: value}) for value in EACH[name]]
    logits_BV, _, seen_BV = problem(len(samplings))
    params, _ = to_arrays(samplings, V)
    together_BV = np.asarray(filtered(logits_BV, params, ANYTHING, seen_BV))
    for i, sampling in enumerate(samplings):  # Alone, so that the few and the many of top_k are both gone through.
        params, features = to_arrays([sampling], V)
        alone_BV = filtered(logits_BV[i : i + 1], params, features, seen_BV[i : i + 1])
        np.testing.assert_array_equal(together_BV[i], np.asarray(alone_BV)[0])


def test_penalty_without_seen_tokens_is_refused():
    params, features = to_arrays([Sampling(repetition_penalty=1.1)], V)
    with pytest.raises(ValueError, match="seen_BV"):
        sample(problem(1)[0], params, features, np.zeros(1, np.int32))
    params, features = to_arrays([Sampling(frequency_penalty=1.1)], V)
    with pytest.raises(ValueError, match="count"):
        sample(problem(1)[0], params, features, np.zeros(1, np.int32))


def test_bad_fields_are_listed_together():
    bad = dict(temperature=-1.0, top_k=2.5, top_p=0.0, min_p=2, repetition_penalty=float("nan"), seed=-1,
               frequency_penalty=2.1, presence_penalty=-3)
    with pytest.raises(ValueError, match="Sampling is not valid") as error:
        Sampling(**bad)
    for name, value in bad.items():
        assert f"{name} is {value!r}" in str(error.value)


def test_a_temperature_next_to_nothing_takes_the_likeliest():
    logits_BV = np.random.default_rng(8).normal(size=(3, V)).astype(np.float32) * 50
    params, features = to_arrays([Sampling(temperature=t, seed=1) for t in (2e-38, 1e-9, 1e-7)], V)
    drawn_B = sample(logits_BV, params, features, np.array([0, 1, 2], np.int32), None)
    np.testing.assert_array_equal(drawn_B, logits_BV.argmax(axis=1))
