"""An evaluation over a mesh gives the scores and texts of one device."""

import numpy as np
import pytest
from helpers import long
from lm_eval.api.instance import Instance
from meshes import mesh_of

from lfm_jax.eval import EvalModel
from lfm_jax.testing import tiny_model, tiny_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def pairs():
    """(context, continuation): shared contexts with answers of one and of several tokens, and pairs alone."""
    draw = np.random.default_rng(0)
    found = []
    for i in range(16):
        context = " ".join(draw.choice(WORDS, 4 + 3 * i))
        found += [(context, " " + " ".join(draw.choice(WORDS, 1 + i % 3))) for _ in range(4 if i % 2 else 1)]
    return found


def instances(kind, args):
    return [Instance(kind, {}, arg, i) for i, arg in enumerate(args)]


def answers(mesh):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=-(-tokenizer.get_vocab_size() // 8) * 8,
                       layer_types=("conv", "full_attention", "sliding_attention"), sliding_window=8)
    evaluated = EvalModel(model, tokenizer, max_length=128, batch_tokens=64, slots=2, mesh=mesh)
    used = set()
    real = evaluated._scorer._on_copy

    def watched(*args):
        for dispatched in real(*args):
            used.update(device for x in dispatched[1] for device in x.devices())
            yield dispatched

    evaluated._scorer._on_copy = watched
    scores = evaluated.loglikelihood(instances("loglikelihood", pairs()))
    texts = evaluated.generate_until(instances("generate_until", [
        (context, {"until": [], "max_gen_toks": 6}) for context, _ in pairs()[::4]]))
    return scores, texts, used


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), long(dict(data=4)), long(dict(tensor=2))], ids=str)
def test_as_on_one_device(sizes):
    """In `make test-long` each of the two axes alone."""
    (scores, texts, used), (expected, wanted, _) = answers(mesh_of(**sizes)), answers(None)
    assert len(used) == np.prod(list(sizes.values()))
    np.testing.assert_allclose([x for x, _ in scores], [x for x, _ in expected], rtol=1e-5, atol=1e-5)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert texts == wanted
