"""A trained model scores and writes as with lm-eval's own `hf` backend: SmolLM2-135M, float32."""

import jax.numpy as jnp
import numpy as np
import pytest
from hf_backend import HFLM, instances, scored_pairs
from smollm2 import fetched, in_transformers
from transformers import PreTrainedTokenizerFast

import lfm_jax as lfm
from lfm_jax.eval import EvalModel

pytestmark = pytest.mark.long
MAX_LENGTH = 128


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    path = fetched(tmp_path_factory.mktemp("smollm2"))
    model, tokenizer = lfm.load(path, dtype=jnp.float32)
    config = model.config
    names = {name: tokenizer.id_to_token(id) for name, id in (
        ("bos_token", config.bos_id), ("eos_token", config.eos_ids[0]), ("pad_token", config.pad_id)) if id is not None}
    codec = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    theirs = HFLM(in_transformers(path), tokenizer=codec, batch_size=1, max_length=MAX_LENGTH)
    return EvalModel(model, tokenizer, max_length=MAX_LENGTH), theirs


def test_log_probabilities_and_greedy_flags(backends):
    ours, theirs = backends
    requests = instances("loglikelihood", scored_pairs(500))
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    # Sums of up to hundreds of nats: float32 has seven digits.
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-4, rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_whole_texts_and_what_is_written(backends):
    ours, theirs = backends
    texts = [context for context, _ in scored_pairs(40, seed=1) if context][:12]
    rolling = instances("loglikelihood_rolling", [(text,) for text in texts])
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling),
                               theirs.loglikelihood_rolling(rolling, disable_tqdm=True), atol=1e-4, rtol=1e-5)
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(text, options) for text in texts])
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
