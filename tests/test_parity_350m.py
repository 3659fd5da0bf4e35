"""The full LFM2.5-350M shape against `transformers`, with random weights: the sizes that tiny models do not reach."""

import functools
import gc

import jax
import oracle
import pytest
import torch
from helpers import tokens_like
from transformers import Lfm2Config

import lfm_jax as lfm
from lfm_jax.convert.families import config_to_hf


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_350m_shape_at_256_tokens():
    """Against `transformers` in float64: at these widths its own float32 is up to half the tolerance off.

    Both weight sets in one model, one after the other, to hold no more copies of 1.4 GB than it takes.
    """
    preset = lfm.ModelConfig.preset("lfm2.5-350m")
    model = oracle.hf_model(Lfm2Config.from_dict(config_to_hf(preset)), "init")
    assert sum(p.numel() for p in model.parameters()) == preset.num_params() == 354_483_968
    tokens, run = tokens_like((1, 256), 0, 1, preset.vocab_size), None
    for weights in oracle.WEIGHTS:
        if weights == "loud":
            oracle.make_loud(model)
        graphdef, params = oracle.ours(model)
        expected = oracle.forward(model.double(), tokens)
        model.float()  # What it was, to the bit.
        run = run or jax.jit(functools.partial(oracle.layers_and_logits, graphdef))
        oracle.assert_parity(run(params, tokens), expected)
        del params
        gc.collect()
