import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.ablate.pattern import attention_at, letters, parse_pattern, to_letters
from lfm_jax.config import ModelConfig


@given(st.text(alphabet="".join(letters()), min_size=1, max_size=40))
def test_letters_survive(text):
    assert to_letters(parse_pattern(text)) == text


def test_the_published_patterns_by_both_notations():
    assert parse_pattern("ccaccaccacacacac") == ModelConfig.preset("lfm2.5-350m").layer_types
    assert parse_pattern("conv:10,attention:6,place:lfm2") == ModelConfig.preset("lfm2.5-350m").layer_types
    assert parse_pattern("conv:8,attention:6,place:lfm2") == ModelConfig.preset("lfm2.5-230m").layer_types
    assert parse_pattern("conv:22, attention:8, place:lfm2") == ModelConfig.preset("lfm2-2.6b").layer_types


@pytest.mark.parametrize(("text", "letters"), [
    ("conv:10,attention:6,place:even", "caccacaccaccacac"),
    ("conv:2,attention:2", "caca"),
    ("conv:3,attention:3,place:front", "aaaccc"),
    ("conv:3,attention:3,place:back", "cccaaa"),
    ("conv:3,attention:3,place:sandwich", "aaccca"),
    ("attention:2", "aa"),
    ("conv:4,recurrence:2,attention:2,place:back", "crccrcaa"),
    ("sliding_attention:1,attention:1,place:front", "as"),
])
def test_counts(text, letters):
    assert to_letters(parse_pattern(text)) == letters


@given(st.integers(1, 40), st.data(), st.sampled_from(["even", "front", "back", "sandwich"]))
def test_every_place_has_as_many_layers_as_asked_for(layers, data, place):
    attention = data.draw(st.integers(0, layers))
    at = attention_at(layers, attention, place)
    assert len(set(at)) == attention
    assert list(at) == sorted(at)
    assert all(0 <= i < layers for i in at)
    if place == "even" and attention > 1:
        gaps = [b - a for a, b in itertools.pairwise(at)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("text", "says"), [
    ("", "is empty"), ("ccx", "'x'"), ("conv:3,attention:two", "attention:two"), ("conv:3,conv:4", "conv:4"),
    ("conv:3,mamba:2", "mamba:2"), ("conv:0", "no layer"), ("conv:3,attention:2,place:top", "place is 'top'"),
    ("conv:3,attention:2,place:lfm2", "only 6 of 14, 6 of 16, 6 of 24, 8 of 30, 10 of 40 are published"),
])
def test_what_is_no_pattern_says_how_to_write_one(text, says):
    with pytest.raises(ValueError, match=says):
        parse_pattern(text)
