"""Generation: tokens against `transformers`, rows against themselves alone, streams against whole texts."""

import functools
import re

import jax
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.engine.request import LOGITS_NOT_FINITE
from lfm_jax.infer import decoding
from lfm_jax.infer.decoding import Decoding, bucket
from lfm_jax.infer.generate import generate, generate_tokens, stream, stream_pieces
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.testing import tiny_model, tiny_tokenizer

PROMPTS = ([1, 5, 9], [1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [1, *range(60, 79)])
NEW = 44
"""With the longest prompt 64 tokens: most tests share the compiled functions of three rows with 64 slots."""
VOCAB = 320
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.95, min_p=0.001, seed=3)


@functools.cache
def oracle_model():
    return oracle.hf_model(oracle.hf_config(vocab_size=VOCAB, layer_types=("conv", "full_attention"), eos_token_id=7))


@functools.cache
def model():
    return nnx.merge(*oracle.ours(oracle_model()))


@functools.cache
def tokenizer():
    return tiny_tokenizer("naïve 東京 🦊🦊 the quick brown fox " * 4, vocab_size=VOCAB)


def hf_tokens(prompt, **options):
    """Greedy continuation of one prompt by `transformers`; `options` as there."""
    options = dict(pad_token_id=0, eos_token_id=None, do_sample=False, max_new_tokens=NEW) | options
    with torch.no_grad():
        out = oracle_model().generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    return out[0, len(prompt) :].tolist()


@functools.cache
def greedy():
    """Greedy tokens of PROMPTS that nothing ends early."""
    return tuple(tuple(c.tokens) for c in generate_tokens(model(), PROMPTS, GREEDY, NEW, stop_ids=()))


# -------------------------------------------------------------------- tokens


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_for_prompts_of_several_lengths(penalty):
    out = generate_tokens(model(), PROMPTS, Sampling(repetition_penalty=penalty), NEW, stop_ids=())
    for prompt, completion in zip(PROMPTS, out, strict=True):
        assert completion == (hf_tokens(prompt, repetition_penalty=penalty), "length")


def test_256_greedy_tokens_equal_transformers_across_many_dispatches():
    out = generate_tokens(model(), PROMPTS, GREEDY, 256, stop_ids=())
    for prompt, completion in zip(PROMPTS, out, strict=True):
        assert completion.tokens == hf_tokens(prompt, max_new_tokens=256)


def test_stop_ids_end_one_row_and_not_the_others():
    first, second, third = greedy()
    end = next(i for i in first[3:] if i not in {*first[:3], *second, *third})
    out = generate_tokens(model(), PROMPTS, GREEDY, NEW, stop_ids=(end, VOCAB - 1))
    assert out[0] == (list(first[: first.index(end) + 1]), "stop")
    for prompt, completion in zip(PROMPTS, out, strict=True):
        assert completion.tokens == hf_tokens(prompt, eos_token_id=[end, VOCAB - 1])
    assert out[2] == (list(third), "length")


@pytest.mark.parametrize("n", [1, 33, 34])
def test_max_new_tokens_is_exact(n):
    out = generate_tokens(model(), PROMPTS, GREEDY, n, stop_ids=())
    assert [c.tokens for c in out] == [list(row[:n]) for row in greedy()]


def test_prefill_in_chunks_is_prefill_at_once(monkeypatch):
    """Rows end in the first, a middle and the last chunk; one at the end of its chunk."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (5, 40, 32)]
    whole = generate_tokens(model(), prompts, GREEDY, 20, stop_ids=())
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 16)
    assert generate_tokens(model(), prompts, GREEDY, 20, stop_ids=()) == whole


def test_a_context_may_be_filled_to_its_last_position():
    config = model().config
    decoding.check([[1] * (config.max_position - 5)], GREEDY, 5, config)
    with pytest.raises(ValueError, match="shorten one of them"):
        decoding.check([[1] * (config.max_position - 4)], GREEDY, 5, config)


# -------------------------------------------------------------------- independence


def test_a_row_depends_on_its_seed_and_nothing_else():
    """Three rows, again, in another order, and two of them without the neighbour that wants other filters."""
    samplings = [DRAWN, Sampling(temperature=0.9, seed=1), Sampling(temperature=0.9, seed=2)]
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    rows = generate_tokens(model(), prompts, samplings, NEW, stop_ids=())
    assert rows[1] != rows[2]
    assert generate_tokens(model(), prompts, samplings, NEW, stop_ids=()) == rows
    assert generate_tokens(model(), prompts[::-1], samplings[::-1], NEW, stop_ids=())[::-1] == rows
    assert generate_tokens(model(), prompts[1:], samplings[1:], NEW, stop_ids=()) == rows[1:]


@pytest.mark.parametrize("steps", [1, 7])
def test_the_number_of_tokens_a_dispatch_changes_nothing(steps):
    out = [completion.tokens for completion in generate_tokens(model(), PROMPTS, DRAWN, NEW)]
    rows = Decoding(model(), PROMPTS, DRAWN, NEW, (7,))
    pieces = [[], [], []]
    while not rows.done:
        for piece, new in zip(pieces, rows.advance(steps), strict=True):
            assert len(new) <= steps
            piece += new
    assert pieces == out


# -------------------------------------------------------------------- text


def reference_text(text, stop):
    """The text before the stop string that is complete first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


def drawn(seed):
    return Sampling(temperature=2.0, top_p=0.999, seed=seed)


@functools.cache
def drawn_tokens(seed):
    return generate_tokens(model(), [tokenizer().encode("the fox").ids], drawn(seed), NEW, stop_ids=())[0].tokens


@given(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), max_size=2), st.booleans())
def test_stream_and_generate_agree_and_stop_where_they_should(seed, cuts, foreign):
    text = tokenizer().decode(drawn_tokens(seed))
    stop = [s for at, n in cuts if (s := text[at : at + n])] + ["東京東"] * foreign
    options = dict(sampling=drawn(seed), max_new_tokens=NEW, stop=stop, stop_ids=())
    expected = reference_text(text, stop)
    assert generate(model(), tokenizer(), "the fox", **options) == [expected]
    pieces = list(stream(model(), tokenizer(), "the fox", **options))
    assert "".join(pieces) == expected
    assert all(pieces)


def test_the_texts_above_hold_broken_and_whole_characters():
    text = "".join(tokenizer().decode(drawn_tokens(seed)) for seed in range(6))
    assert "\ufffd" in text
    assert any("\x80" <= c != "\ufffd" for c in text)


def test_a_stream_comes_in_pieces():
    assert len(list(stream(model(), tokenizer(), "the fox", drawn(1), NEW, stop_ids=()))) > 5


def test_a_stop_string_ends_its_own_row_only():
    prompts = ["the fox", list(PROMPTS[2]), "🦊"]
    texts = generate(model(), tokenizer(), prompts, DRAWN, NEW, stop_ids=())
    stop = next(c for c in texts[1][5:] if c not in texts[0] + texts[2])
    cut = generate(model(), tokenizer(), prompts, DRAWN, NEW, stop=stop, stop_ids=())
    assert cut == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]


def test_eos_of_the_config_is_the_default_stop():
    seed = next(s for s in range(200) if 7 in drawn_tokens(s)[1:])
    tokens = drawn_tokens(seed)[: drawn_tokens(seed).index(7) + 1]
    prompt = tokenizer().encode("the fox").ids
    assert generate_tokens(model(), [prompt], drawn(seed), NEW) == [(tokens, "stop")]
    assert generate(model(), tokenizer(), [prompt], drawn(seed), NEW, skip_special_tokens=False) == [
        tokenizer().decode(tokens[:-1], skip_special_tokens=False)
    ]


def test_special_tokens_are_left_out_unless_wanted():
    seed = next(s for s in range(50) if min(drawn_tokens(s)) < 14)
    for skip in (True, False):
        out = generate(model(), tokenizer(), "the fox", drawn(seed), NEW, stop_ids=(), skip_special_tokens=skip)
        assert out == [tokenizer().decode(drawn_tokens(seed), skip_special_tokens=skip)]


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_may_be_the_stop_string_or_part_of_it(skip):
    seeds = [s for s in range(50) if min(drawn_tokens(s)[:2]) >= 14 > min(drawn_tokens(s)[2:])]
    for seed in seeds[:3]:
        at, special = next((n, i) for n, i in enumerate(drawn_tokens(seed)) if i < 14)
        name, before = tokenizer().id_to_token(special), tokenizer().decode(drawn_tokens(seed)[:at])
        options = dict(sampling=drawn(seed), max_new_tokens=NEW, stop_ids=(), skip_special_tokens=skip)
        for stop, expected in ((name, before), (["never", before[-1] + name], before[:-1])):
            assert generate(model(), tokenizer(), "the fox", stop=stop, **options) == [expected]
            assert "".join(stream(model(), tokenizer(), "the fox", stop=stop, **options)) == expected
    assert len(seeds) > 3


# -------------------------------------------------------------------- the machine


def test_nothing_compiles_twice():
    programs = decoding._programs(nnx.split(model(), nnx.Param)[0])
    generate_tokens(model(), PROMPTS, DRAWN, NEW)
    sizes = [program._cache_size() for program in programs]
    other = jax.tree.map(lambda x: x + 0.1, nnx.split(model(), nnx.Param))
    for m, lengths, n, stop_ids in (
        (model(), (17, 31, 2), 31, None), (model(), (18, 18, 18), 32, (3, 4)), (nnx.merge(*other), (1, 20, 2), 40, ())
    ):
        sampling = Sampling(temperature=0.3, top_k=9, top_p=0.5, min_p=0.3, seed=n)
        generate_tokens(m, [[1] * length for length in lengths], sampling, n, stop_ids=stop_ids)
    assert [program._cache_size() for program in programs] == sizes


def test_parameters_are_read_at_every_call():
    graphdef, params = nnx.split(model(), nnx.Param)
    mine = nnx.merge(graphdef, jax.tree.map(lambda x: -x, params))
    assert generate_tokens(mine, PROMPTS, GREEDY, NEW, stop_ids=())[0].tokens != list(greedy()[0])
    nnx.update(mine, params)
    assert generate_tokens(mine, PROMPTS, GREEDY, NEW, stop_ids=())[0].tokens == list(greedy()[0])


def test_the_loop_copies_no_cache():
    rows = Decoding(model(), PROMPTS, GREEDY, NEW, ())
    kv = rows._carry.state.layers[1].k_BSKH
    compiled = rows._programs.decode.lower(
        rows._model_params, rows._carry, rows._params, rows._stop_ids, 32, features=rows._features
    ).compile().as_text()
    shape = re.escape(f"f32[{','.join(map(str, kv.shape))}]")
    assert re.search(rf"= {shape}\S* \w+", compiled)
    assert not re.findall(rf"= {shape}\S* copy\(.*", compiled)
    rows.advance(1)
    assert not kv.is_deleted()
    rows.advance(1)
    assert kv.is_deleted()


def test_only_a_penalty_costs_a_mask():
    assert Decoding(model(), PROMPTS, DRAWN, NEW, ())._carry.seen_BV is None
    seen_BV = Decoding(model(), PROMPTS, Sampling(repetition_penalty=1.4), NEW, ())._carry.seen_BV
    assert seen_BV.shape == (3, VOCAB)
    assert seen_BV.dtype == jax.numpy.bool_
    assert Decoding(model(), PROMPTS, DRAWN, NEW, ())._carry.count_BV is None
    assert Decoding(model(), PROMPTS, Sampling(presence_penalty=1), NEW, ())._carry.count_BV.shape == (3, VOCAB)


@pytest.mark.parametrize("sampling", [Sampling(frequency_penalty=0.7, presence_penalty=0.4),
                                      Sampling(frequency_penalty=-2.0, repetition_penalty=1.2)])
def test_penalties_count_what_was_generated(sampling):
    """As the whole text's logits and OpenAI's formula say, step by step; beside a row without them."""
    samplings = [sampling, GREEDY, sampling]
    out = generate_tokens(model(), PROMPTS, samplings, NEW, stop_ids=())
    assert out[0].tokens != generate_tokens(model(), PROMPTS, GREEDY, NEW, stop_ids=())[0].tokens
    for prompt, s, completion in zip(PROMPTS, samplings, out, strict=True):
        whole = [*prompt, *completion.tokens]
        logits_TV = np.asarray(model()(jax.numpy.asarray([whole]))[0][0])
        for made in range(NEW):
            text = whole[: len(prompt) + made]
            logits_V = logits_TV[len(text) - 1]
            seen_V, count_V = np.isin(np.arange(VOCAB), text), np.bincount(completion.tokens[:made], minlength=VOCAB)
            penalised_V = np.where(logits_V < 0, logits_V * s.repetition_penalty, logits_V / s.repetition_penalty)
            logits_V = np.where(seen_V, penalised_V, logits_V)
            logits_V -= s.frequency_penalty * count_V + s.presence_penalty * (count_V > 0)
            assert logits_V[completion.tokens[made]] > logits_V.max() - 1e-5


def test_bucket_repeats_shapes_and_wastes_little():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(n <= size <= max(16, n + 15, 1.25 * n) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 30
    assert [bucket(n) for n in (1, 16, 17, 100, 256, 257, 320, 4096)] == [16, 16, 32, 112, 256, 320, 320, 4096]


# -------------------------------------------------------------------- damaged weights


def untied(*broken):
    """A model that cannot read some tokens: its logits are NaN once one of them is in the text."""
    made = tiny_model(vocab_size=VOCAB, tie_embedding=False, layer_types=("conv", "full_attention"))
    made.embed[...] = made.embed[...].at[np.array(broken, int)].set(np.nan)
    return made


PENALISED = Sampling(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, seed=1)


@pytest.mark.parametrize("sampling", [GREEDY, PENALISED], ids=["greedy", "penalised"])
def test_logits_that_are_not_finite_are_an_error_after_what_came_before(sampling):
    prompt = tokenizer().encode("the fox").ids
    asked = dict(sampling=sampling, max_new_tokens=30, stop_ids=())
    [(tokens, _)] = generate_tokens(untied(), [prompt], **asked)
    at = max(i for i, token in enumerate(tokens[:20]) if token not in [*prompt, *tokens[:i]])
    assert at > 2
    broken = untied(tokens[at])
    with pytest.raises(ValueError, match=LOGITS_NOT_FINITE):
        generate_tokens(broken, [prompt], **asked)
    with pytest.raises(ValueError, match=LOGITS_NOT_FINITE):
        generate(broken, tokenizer(), ["the fox", "quick"], **asked)
    text = tokenizer().decode(tokens[: at + 1])
    for stop in ((), (text + "never",)):  # What may become a stop string is held back, and cannot become one any more.
        pieces = []
        with pytest.raises(ValueError, match=LOGITS_NOT_FINITE):
            pieces.extend(stream_pieces(broken, tokenizer(), prompt, stop=stop, **asked))
        assert [token for piece in pieces for token in piece.tokens] == tokens[: at + 1]
        assert "".join(piece.text for piece in pieces) == text
    for many in (1, at + 1):  # Enough, before they are needed.
        assert generate_tokens(broken, [prompt], sampling, many, stop_ids=()) == [(tokens[:many], "length")]
    stop = tokenizer().decode(tokens[:at])[1:]  # Ends the text in the dispatch that meets the logits.
    assert generate(broken, tokenizer(), "the fox", stop=stop, **asked) == [
        "".join(stream(broken, tokenizer(), "the fox", stop=stop, **asked))] == [tokenizer().decode(tokens[:at])[:1]]


def test_rows_beside_logits_that_are_not_finite_have_their_tokens():
    alone = generate_tokens(untied(), PROMPTS[:1], GREEDY, NEW, stop_ids=())[0].tokens
    bad = next(i for i in range(14, VOCAB) if i not in [*PROMPTS[0], *alone])
    rows = Decoding(untied(bad), [PROMPTS[0], [1, bad]], GREEDY, NEW, ())
    assert rows.advance(8) == [alone[:1], []]
    assert not rows.done
    with pytest.raises(ValueError, match=LOGITS_NOT_FINITE):
        rows.advance(8)
    rows.stop(1)
    assert rows.advance(8) == [alone[1:9], []]
    with pytest.raises(ValueError, match=LOGITS_NOT_FINITE):
        list(stream(untied(bad), tokenizer(), [1, bad]))


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ("text", {}, "expected a list"),
        ([1, 2, 3], {}, r"prompts\[0\] is 1; expected a list of token ids"),
        ([[0.5]], {}, r"prompts\[0\] is \[0.5\]"),
        ([[1], []], {}, r"prompts\[1\] has no tokens"),
        ([[1], [5, VOCAB]], {}, rf"prompts\[1\] has ids 5..{VOCAB}; they lie in 0..{VOCAB - 1}"),
        ([[-1]], {}, r"prompts\[0\] has ids -1"),
        ([[1] * 4090], dict(max_new_tokens=7), "4090 tokens, with max_new_tokens 7 more than config.max_position 4096"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(sampling=[GREEDY, GREEDY]), "sampling has 2 entries for 1 prompts"),
        ([[1]], dict(stop_ids=(VOCAB,)), "stop_ids has"),
    ],
)
def test_what_cannot_run_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(model(), prompts, **options)


def test_problems_are_listed_together():
    with pytest.raises(ValueError, match=r"prompts\[0\](?s:.*)prompts\[2\](?s:.*)prompts\[3\]"):
        generate_tokens(model(), [[], [1], [999], [1] * 5000])


def test_text_problems_are_refused():
    with pytest.raises(ValueError, match="stop is"):
        generate(model(), tokenizer(), "a", stop=["x", ""])
    small = nnx.eval_shape(lambda: tiny_model(vocab_size=97))
    with pytest.raises(ValueError, match="the tokenizer has"):
        generate(small, tokenizer(), "a")
    with pytest.raises(ValueError, match="the tokenizer has"):
        stream(small, tokenizer(), "a")
    with pytest.raises(ValueError, match="stop is"):  # At the call, not at the first piece.
        stream(model(), tokenizer(), "a", stop=["x", ""])
    with pytest.raises(ValueError, match="max_new_tokens 5000 more than"):
        stream(model(), tokenizer(), "a", max_new_tokens=5000)
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(model(), tokenizer(), [])
