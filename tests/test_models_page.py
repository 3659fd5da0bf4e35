"""docs/reference/models.md says what works for which family: every cell is tried with a tiny model."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import KINDS, optimizer_for, tokens_like

import lfm_jax as lfm
from lfm_jax import LFM
from lfm_jax.config import PRESETS
from lfm_jax.convert.families import FAMILIES, family_of
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.model import abstract_model, param_axes
from lfm_jax.plan.topology import Topology
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.sharding import MeshConfig, shardings
from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.train.optimizer import OptimizerConfig

TEXT = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
SIZES = dict(vocab_size=512, num_heads=4, num_kv_heads=2)
MODELS = {
    "LFM2, LFM2.5": SIZES, "LFM2 MoE": SIZES | KINDS["moe"], "LFM3": SIZES | KINDS["lfm3"],
    "LFM2 encoder": SIZES | dict(causal=False),
}


def table(head):
    """A table of the page: the first cell of each row -> its other cells by the name of their column."""
    lines = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()
    names, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows}


WORKS = table("| family | load and export |")


@functools.cache
def model(family):
    return LFM(tiny_config(**MODELS[family]), rngs=nnx.Rngs(0))


def loads_and_exports(model, path):
    lfm.save_hf(model, path / "model")
    loaded, _ = lfm.load(path / "model")
    assert loaded.config == model.config
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (loaded, model)), strict=True):
        np.testing.assert_array_equal(a, b)


def loads_and_exports_gguf(model, path):
    lfm.save_gguf(model, path / "model.gguf", type="F32")
    loaded, _ = lfm.load(path / "model.gguf")
    assert loaded.config.replace(init_std=model.config.init_std) == model.config


def trains(model, path):
    training = next_token_training(model.config, optimizer_for(model.config, OptimizerConfig(warmup_steps=0)))
    state = training.new_state(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    tokens = tokens_like((2, 9), 0)
    _, metrics = training.compiled_step()(
        state, dict(tokens=tokens, targets=tokens, segment_ids=None, positions=None))
    assert np.isfinite(metrics["loss"])


def splits_over_a_mesh(model, path):
    mesh = Topology.parse("cpu:4").mesh(MeshConfig(fsdp=2, tensor=2), for_compiling=False)
    with jax.set_mesh(mesh):
        placed = shardings(abstract_model(model.config)[1], param_axes(model.config))
    assert {"fsdp", "tensor"} <= {name for x in jax.tree.leaves(placed) for name in x.spec if name}


def decodes(model, path):
    assert len(generate_tokens(model, [[3, 4, 5]], max_new_tokens=3, stop_ids=())[0].tokens) == 3


PAIRS = [token for first in range(8) for second in range(8) for token in (first, second)]
"""Every pair of eight tokens, so that whatever two of them a model says have been said before."""


def in_an_engine(model, **config):
    """The counts of an engine after the same request twice."""
    made = Engine(model, EngineConfig(slots=((2, 160),), chunk=16, prefix_cache_bytes=1 << 20, **config))
    for _ in range(2):
        made.submit(Request(prompt=PAIRS, max_new_tokens=8), lambda event: None)
        while made.step():
            pass
    return made.counts


def serves_with_a_prefix_cache(model, path):
    assert in_an_engine(model)["cached_tokens"] == len(PAIRS) - 16


def drafts(model, path):
    eight = LFM(model.config.replace(vocab_size=8), rngs=nnx.Rngs(0))
    assert in_an_engine(eight, draft=2)["drafted_tokens"] > 0


def embeds_and_ranks(model, path):
    tokenizer = tiny_tokenizer()
    assert lfm.embed(model, tokenizer, ["a", "b c"], kind="document").shape == (2, model.config.hidden_size)
    assert len(lfm.rerank(model, tokenizer, "a", ["a", "b"])) == 2


TRIED = {
    "load and export": loads_and_exports, "GGUF": loads_and_exports_gguf, "train": trains,
    "split over a mesh": splits_over_a_mesh, "decode": decodes,
    "engine, prefix cache": serves_with_a_prefix_cache, "drafts": drafts, "embed, rank": embeds_and_ranks,
}


@pytest.mark.parametrize("what", TRIED)
@pytest.mark.parametrize("family", MODELS)
def test_a_cell_is_what_happens(family, what, tmp_path):
    if WORKS[family][what] == "yes":
        TRIED[what](model(family), tmp_path)
    else:
        with pytest.raises(ValueError, match=r"causal|lfm2 in llama\.cpp has no sliding_attention layers"):
            TRIED[what](model(family), tmp_path)


def test_every_family_and_preset_has_its_row():
    rows = table("| family | `architectures` |")
    assert rows.keys() == WORKS.keys() == MODELS.keys()
    assert {name for row in WORKS.values() for name in row} == TRIED.keys()
    shown = {row["`architectures`"].strip("`") for row in rows.values()}
    assert shown == {family.architectures[0] for family in FAMILIES}
    listed = {name: family for family, row in rows.items() for name in re.findall(r"`([^`]+)`", row["presets"])}
    assert listed.keys() == PRESETS.keys()
    for name, family in listed.items():
        assert family.startswith(family_of(lfm.ModelConfig.preset(name)).name), name
    for family, changes in MODELS.items():
        architecture = family_of(tiny_config(**changes)).architectures[0]
        assert f"`{architecture}`" == rows[family]["`architectures`"]
