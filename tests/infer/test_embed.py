"""Vectors of texts depend on nothing but the text; documents are ranked as numpy ranks them."""

import functools
import json
import string
import weakref

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import AddedToken

import lfm_jax as lfm
from lfm_jax.infer import embed as module
from lfm_jax.infer.embed import Encoder, LateInteraction, load_encoder, max_sim
from lfm_jax.testing import tiny_model, tiny_tokenizer

TEXTS = ["fox", "the quick brown fox, and the dog. " * 3, "", "lazy dogs!", "over " * 40, "jumps"]
O = 5  # noqa: E741 (the width of projected vectors)


@functools.cache
def tokenizer():
    made = tiny_tokenizer()
    made.add_tokens([AddedToken(name, normalized=False) for name in ("[Q] ", "[D] ")])
    return made


@functools.cache
def model(**changes):
    return tiny_model(vocab_size=tokenizer().get_vocab_size(), max_position=1024, causal=False, **changes)


def ids_of(text):
    return tokenizer().encode(text).ids


@functools.cache
def params64():
    params = nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def hidden(ids):
    """Normed hidden states of one text in float64 numpy."""
    return reference.hidden(model().config, params64(), np.asarray(ids))


@jax.jit
def hidden_of_query(ids_T, segment_ids_T):
    """The same, of tokens that attention does not read too."""
    return model()(ids_T[None], segment_ids_BT=segment_ids_T[None], logits=None)[0][0]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------ one vector for a text


def test_a_vector_is_that_of_the_first_token_behind_the_prefix():
    for kind, prefix in (("query", "query: "), ("document", "document: ")):
        vectors = lfm.embed(model(), tokenizer(), TEXTS, kind)
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(TEXTS), 32))
        for text, vector in zip(TEXTS, vectors, strict=True):
            np.testing.assert_allclose(vector, unit(hidden(ids_of(prefix + text))[0]), atol=1e-6)
    np.testing.assert_array_equal(lfm.embed(model(), tokenizer(), TEXTS), vectors)


def test_neighbours_and_their_lengths_change_nothing():
    together = lfm.embed(model(), tokenizer(), TEXTS * 5)
    for i, text in enumerate(TEXTS):
        [alone] = lfm.embed(model(), tokenizer(), text)
        for again in together[i :: len(TEXTS)]:
            np.testing.assert_allclose(again, alone, atol=1e-6)
    assert lfm.embed(model(), tokenizer(), []).shape == (0, 32)


def test_few_shapes_are_compiled(monkeypatch):
    shapes = set()
    program = module._program

    def watched(graphdef):
        def run(params, tokens_BT, *rest):
            shapes.add(tokens_BT.shape)
            return program(graphdef)(params, tokens_BT, *rest)

        return run

    monkeypatch.setattr(module, "_program", watched)
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)
    texts = ["fox"] * 7 + ["the quick brown fox jumps over the lazy dog " * 2] * 5
    vectors = lfm.embed(model(), tokenizer(), texts)
    assert shapes == {(4, 16), (2, 32)}
    np.testing.assert_allclose(vectors[:7], np.stack([vectors[0]] * 7), atol=1e-6)


def test_long_texts_are_cut():
    long = "the quick brown fox jumps over the lazy dog " * 300
    ids = ids_of("document: " + long)
    assert len(ids) > 512
    [vector] = lfm.embed(model(), tokenizer(), long)
    np.testing.assert_allclose(vector, unit(hidden(ids[:512])[0]), atol=2e-6)
    [vector] = lfm.embed(model(), tokenizer(), long, max_tokens=20)
    np.testing.assert_allclose(vector, unit(hidden(ids[:20])[0]), atol=1e-6)


def test_documents_are_ranked_by_their_cosine_and_equal_ones_keep_their_order():
    documents = ["over the lazy dog", "fox", "over the lazy dog", "quick"]
    ranked = lfm.rerank(model(), tokenizer(), "the dog", documents)
    [query] = lfm.embed(model(), tokenizer(), "the dog", "query")
    scores = lfm.embed(model(), tokenizer(), documents) @ query
    assert [scores[i] for i, _ in ranked] == sorted(scores, reverse=True)
    assert [score for _, score in ranked] == pytest.approx([scores[i] for i, _ in ranked])
    order = [i for i, _ in ranked]
    assert order.index(0) + 1 == order.index(2)
    assert sorted(order) == [0, 1, 2, 3]
    assert lfm.rerank(model(), tokenizer(), "the dog", []) == []


def test_vectors_are_shortened_to_their_first_numbers():
    whole = lfm.embed(model(), tokenizer(), TEXTS, "query")
    for d in (1, 7, 32):
        found = lfm.embed(model(), tokenizer(), TEXTS, "query", dimensions=d)
        np.testing.assert_allclose(found, unit(whole[:, :d]), atol=1e-6)
    assert lfm.embed(model(), tokenizer(), [], dimensions=7).shape == (0, 7)
    assert (module.shortened(np.float32([0, 0, 1]), 2) == 0).all()


def test_token_ids_are_taken_as_they_are():
    encoder = Encoder(model(), tokenizer())
    ids = [ids_of(f"document: {text}") for text in TEXTS]
    texts = encoder.prepare(TEXTS, "document")
    for given in (ids, [np.asarray(one) for one in ids]):
        for found, expected in zip(encoder.prepare_ids(given), texts, strict=True):
            np.testing.assert_array_equal(found.ids, expected.ids)
            assert found[1:] == expected[1:]
    [row] = encoder.prepare_ids([[5, 6, 7]], max_tokens=2)
    assert (row.ids.tolist(), row.read) == ([5, 6], 2)


def test_ranking_keeps_no_vectors(monkeypatch):
    encoder = Encoder(model(), tokenizer(), late=late())
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    seen, most, scored = [], 0, module.max_sim

    def watched(query_QO, x_SO):
        nonlocal most
        seen.append(weakref.ref(x_SO))
        most = max(most, sum(one() is not None for one in seen))
        return scored(query_QO, x_SO)

    monkeypatch.setattr(module, "max_sim", watched)
    assert len(encoder.rerank("the dog", ["fox"] * 40)) == 40
    assert 0 < most < 10


@pytest.mark.parametrize(("call", "match"), [
    (lambda: lfm.embed(model(), tokenizer(), 5), "texts is 5; expected a text or several"),
    (lambda: lfm.embed(model(), tokenizer(), ["x", "\ud800"]), r"texts\[1\]: the text has half of a surrogate pair"),
    (lambda: lfm.embed(model(), tokenizer(), "x", dimensions=33), "dimensions is 33; .* from 1 to the width .* 32"),
    (lambda: lfm.embed(model(), tokenizer(), "x", dimensions=True), "dimensions is True"),
    (lambda: Encoder(model(), tokenizer(), late=late()).embed("x", dimensions=4), "a vector for each token"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([[1], []]), r"ids\[1\] has no tokens"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([[1], [2, 10**6]]), r"ids\[1\]\[1\] is 1000000; token ids lie"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([[1, -1]]), r"ids\[0\]\[1\] is -1"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([[1.5]]), r"ids\[0\] is \[1.5\]; expected token ids"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([1, 2]), r"ids\[0\] is 1; expected token ids"),
    (lambda: Encoder(model(), tokenizer()).prepare_ids([[1, 2, 3]], 2, cuts=False), r"ids\[0\] has 3 tokens, and at m"),
    (lambda: lfm.embed(tiny_model(), tokenizer(), "x"), "config.causal is True: .*load an encoder, such as LFM2.5-Emb"),
    (lambda: lfm.rerank(tiny_model(), tokenizer(), "x", ["y"]), "config.causal is True"),
    (lambda: lfm.embed(tiny_model(causal=False), tokenizer(), "x"), "ids but the model's vocab_size is 97"),
    (lambda: lfm.embed(model(), tokenizer(), "x", "passage"), "kind is 'passage'; choose one of query, document"),
    (lambda: lfm.embed(model(), tokenizer(), ["x", 3]), r"texts\[1\] is 3; expected a text"),
    (lambda: lfm.embed(model(), tokenizer(), "x", max_tokens=1), "max_tokens is 1; it must be .* from 2 to .* 1024"),
    (lambda: lfm.embed(model(), tokenizer(), "x", max_tokens=1025), "max_tokens is 1025"),
    (lambda: lfm.rerank(model(), tokenizer(), ["x"], ["y"]), r"query is \['x'\]; expected one text"),
    (lambda: Encoder(model(), tokenizer()).token_vectors("x"), "one vector for a text .*; use embed"),
    (lambda: Encoder(model(), tokenizer(), late=late()).embed("x"), "a vector for each token .* use rerank or token_v"),
])
def test_what_cannot_be_embedded_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --------------------------------------------------------------------------------------------- a vector for each token


def late():
    rng = np.random.default_rng(0)
    return LateInteraction(
        projection_OD=rng.standard_normal((O, 32)).astype(np.float32), expansion_id=7, query_length=12,
        prefix_ids={"query": tokenizer().token_to_id("[Q] "), "document": tokenizer().token_to_id("[D] ")},
        skipped_ids=frozenset(tokenizer().token_to_id(c) for c in string.punctuation),
    )


def expected(text, kind):
    """Vectors of a text, step by step."""
    first, *rest = ids_of(text)
    ids = [first, late().prefix_ids[kind], *rest]
    read = len(ids)
    if kind == "query":
        ids = (ids + [7] * 12)[:12]
        x_TD = np.asarray(hidden_of_query(np.asarray(ids), np.where(np.arange(12) < read, 1, -1)))
    else:
        x_TD = hidden(ids)
    vectors = unit(x_TD @ late().projection_OD.T)
    punctuation = {tokenizer().token_to_id(c) for c in string.punctuation}
    return vectors[[kind == "query" or i not in punctuation for i in ids]]


@pytest.mark.parametrize("kind", ["query", "document"])
def test_vectors_of_tokens(kind):
    encoder = Encoder(model(), tokenizer(), late=late())
    found = encoder.token_vectors(TEXTS, kind)
    for text, vectors in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(vectors, expected(text, kind), atol=1e-5)
    if kind == "query":
        assert {len(vectors) for vectors in found} == {12}
    else:
        assert len(found[3]) == len(ids_of(TEXTS[3]))  # One more for the prefix, one less for the punctuation.


def test_documents_are_ranked_by_the_sum_of_the_best_products():
    encoder = Encoder(model(), tokenizer(), late=late())
    ranked = encoder.rerank("the dog", [*TEXTS, TEXTS[0]])
    scores = [sum(max(q @ d for d in expected(text, "document")) for q in expected("the dog", "query"))
              for text in [*TEXTS, TEXTS[0]]]
    assert [i for i, _ in ranked] == sorted(range(len(scores)), key=lambda i: (-round(scores[i], 4), i))
    assert [score for _, score in ranked] == pytest.approx([scores[i] for i, _ in ranked], abs=1e-4)


def test_max_sim_is_that_of_numpy():
    rng = np.random.default_rng(0)
    query, document = rng.standard_normal((4, O)), rng.standard_normal((7, O))
    assert max_sim(query, document) == pytest.approx(sum(max(q @ d for d in document) for q in query))
    assert max_sim(query, document[:0]) == -np.inf


# ---------------------------------------------------------------------------------------------------------- directories


def write(path, said=None, pooling=None, dense=None):
    lfm.save_hf(model(), path, tokenizer=tokenizer())
    for name, value in (("config_sentence_transformers.json", said), ("1_Pooling/config.json", pooling)):
        if value is not None:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(json.dumps(value))
    if dense is not None:
        (path / "1_Dense").mkdir()
        save_file(dense, path / "1_Dense" / "model.safetensors")
    return path


def test_prefixes_come_from_the_directory(tmp_path):
    plain = load_encoder(write(tmp_path / "plain", pooling={"pooling_mode_cls_token": True}))
    np.testing.assert_array_equal(plain.embed(TEXTS), lfm.embed(*lfm.load(tmp_path / "plain"), TEXTS))
    own = load_encoder(write(tmp_path / "own", said={"prompts": {"query": "over ", "document": "fox "}}))
    np.testing.assert_allclose(own.embed("dog", "query")[0], unit(hidden(ids_of("over dog"))[0]), atol=1e-6)
    np.testing.assert_allclose(own.embed("dog")[0], unit(hidden(ids_of("fox dog"))[0]), atol=1e-6)


def test_a_projection_makes_it_late_interaction(tmp_path):
    said = {"query_length": 12, "prompts": {"query": "", "document": ""}}
    path = write(tmp_path / "late", said=said, dense={"linear.weight": late().projection_OD})
    encoder = load_encoder(path)
    assert dataclass_without_array(encoder.late) == dataclass_without_array(late())
    np.testing.assert_allclose(encoder.token_vectors("lazy dogs!")[0], expected("lazy dogs!", "document"), atol=1e-5)
    with pytest.raises(ValueError, match=r"1_Dense/model.safetensors, which .* lose; load it with lfm.load_encoder"):
        lfm.load(path)
    lfm.save_hf(encoder.model, tmp_path / "again", source=path)
    again = load_encoder(tmp_path / "again")
    np.testing.assert_array_equal(again.token_vectors("fox")[0], encoder.token_vectors("fox")[0])


def dataclass_without_array(late):
    return {name: value for name, value in vars(late).items() if name != "projection_OD"}


def test_a_directory_that_asks_for_more_is_refused_with_all_problems(tmp_path):
    path = write(
        tmp_path / "bad", pooling={"pooling_mode_cls_token": False},
        said={"prompts": {"query": 3}, "query_prefix": "[X] ", "query_length": 1, "attend_to_expansion_tokens": True},
        dense={"linear.weight": np.zeros((O, 31), np.float32), "linear.bias": np.zeros(O, np.float32)},
    )
    with pytest.raises(ValueError, match="cannot load") as error:
        load_encoder(path)
    for part in ("pooling_mode_cls_token false", "the prompt of query is 3", "query_prefix '[X] ' is no token",
                 "query_length is 1;", "attend_to_expansion_tokens is True; only False", "expected one linear.weight"):
        assert part in str(error.value)
    lfm.save_hf(model(), tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, and an encoder takes texts"):
        load_encoder(tmp_path / "bare")
