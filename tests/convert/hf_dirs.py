"""Tiny Hugging Face directories that the tests of this folder read, break and convert."""

import json

import numpy as np
import torch
from oracle import hf_config, hf_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

INDEX = "model.safetensors.index.json"


def save(path, dtype=torch.float32, shards=False, seed=0, **changes):
    """What `save_pretrained` writes for a random model."""
    model = hf_model(hf_config(**changes), seed=seed).to(dtype)
    model.save_pretrained(path, max_shard_size="20KB" if shards else "5GB")
    return path


def tensors_of(path):
    """Every tensor of a directory as (dtype tag, bits), by name."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                array = opened.get_tensor(name)
                found[name] = (opened.get_slice(name).get_dtype(), array.shape, array.tobytes())
    return found


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = np.random.default_rng(0).integers(1, 97, (2, 19))
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits  # Its cache needs an attention layer.


def edit_weights(path, change):
    """Rewrites model.safetensors with its dict of arrays changed in place."""
    weights = {name: array.copy() for name, array in load_file(path / "model.safetensors").items()}
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, name, **changes):
    values = json.loads((path / name).read_text()) | changes
    (path / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
