"""The files beside the weights of a Hugging Face directory: config, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_jax.convert.safetensors_io import file_problem, read_json
from lfm_jax.problems import raise_problems

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "tokenizer.model")
GENERATION_CONFIG = "generation_config.json"
SENTENCES, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
DENSE = "1_Dense/model.safetensors"
"""The projection of a model with a vector for each token."""
ENCODER_FILES = (SENTENCES, POOLING, DENSE, "1_Dense/config.json", "modules.json", "sentence_bert_config.json")
"""Of an encoder, in the form of sentence-transformers."""
OTHER_FILES = (GENERATION_CONFIG, CHAT_TEMPLATE, "LICENSE", *ENCODER_FILES)
"""Carried along with any tokenizer."""


def read_tokenizer(directory: Path) -> tuple[Tokenizer | None, list[str]]:
    """Loads tokenizer.json for inference; returns the tokenizer, None if there is no such file, and problems."""
    if not os.path.lexists(directory / TOKENIZER):
        return None, []
    problem = file_problem(directory, TOKENIZER)
    if problem is not None:
        return None, [problem]
    from lfm_jax.text.tokenizer import inference_tokenizer

    try:
        return inference_tokenizer(directory), []
    except ValueError as e:
        return None, [str(e)]


def generation_eos_ids(directory: Path) -> list[int]:
    """Returns the ids of `eos_token_id` in generation_config.json; empty if there are none."""
    if not os.path.lexists(directory / GENERATION_CONFIG):
        return []
    values, problems = read_json(directory, GENERATION_CONFIG)
    raise_problems(f"cannot load {directory}", problems)
    eos = values.get("eos_token_id")
    return [i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int and i >= 0]


def chat_template(path: str | os.PathLike) -> str | None:
    """Returns the Jinja chat template of an HF directory, None if it has none.

    It is chat_template.jinja, else `chat_template` in tokenizer_config.json: a string, or a list of named templates, of
    which `default` is taken.

    Raises:
      ValueError: a file cannot be read, or there are several templates and none is the default.
    """
    directory = Path(path)
    if os.path.lexists(directory / CHAT_TEMPLATE):
        problem = file_problem(directory, CHAT_TEMPLATE)
        raise_problems(f"no chat template from {path}", [] if problem is None else [problem])
        try:
            return (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{directory / CHAT_TEMPLATE} is no UTF-8 text: {e}") from e
    if not os.path.lexists(directory / TOKENIZER_CONFIG):
        return None
    values, problems = read_json(directory, TOKENIZER_CONFIG)
    raise_problems(f"no chat template from {path}", problems)
    template = values.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
        return next(iter(named.values())) if len(named) == 1 else named["default"]
    except (TypeError, KeyError) as e:
        raise ValueError(f"chat_template in {directory / TOKENIZER_CONFIG} is neither a string nor a list of "
                         "{name, template} with one named 'default'") from e


def carried(source: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns the files of an HF directory to copy along with its weights, by relative name, and problems."""
    if not source.is_dir():
        return {}, [f"source {source} is not a directory"]
    names = [name for name in TOKENIZER_FILES + OTHER_FILES if os.path.lexists(source / name)]
    names += [f"{MORE_TEMPLATES}/{file.name}" for file in sorted((source / MORE_TEMPLATES).glob("*.jinja"))]
    problems = [problem for name in names if (problem := file_problem(source, name)) is not None]
    return {name: source / name for name in names}, problems


def write(directory: Path, hf: Mapping[str, Any], tokenizer: Tokenizer | None, source: Path | None) -> None:
    """Writes config.json and all other files beside the weights.

    Args:
      directory: an existing directory.
      hf: the config.json.
      tokenizer: the tokenizer; None for that of the source, if it has one.
      source: an HF directory to copy files from, in which `carried` found no problems.
    """
    _write_json(directory / "config.json", hf)
    copies = {} if source is None else carried(source)[0]
    template = None
    if tokenizer is not None:
        if source is None or not _is_that_of(tokenizer, source):
            template = None if source is None or CHAT_TEMPLATE in copies else chat_template(source)
            copies = {name: path for name, path in copies.items() if name not in TOKENIZER_FILES}
            tokenizer.save(str(directory / TOKENIZER))
        if TOKENIZER_CONFIG not in copies:  # It was replaced, or the source is a run directory without one.
            _write_json(directory / TOKENIZER_CONFIG, _tokenizer_config(hf, tokenizer))
    for name, path in copies.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    if template is not None:
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    if GENERATION_CONFIG not in copies:
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(directory / GENERATION_CONFIG, {"_from_model_config": True} | ids)


def _is_that_of(tokenizer: Tokenizer, directory: Path) -> bool:
    """Returns whether a tokenizer is that of a directory, as stored or as loaded for inference."""
    from lfm_jax.text.tokenizer import load_tokenizer

    loaded = read_tokenizer(directory)[0]
    return loaded is not None and tokenizer.to_str() in (loaded.to_str(), load_tokenizer(directory).to_str())


def _tokenizer_config(hf: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    eos = hf["eos_token_id"]
    ids = {"bos_token": hf["bos_token_id"], "eos_token": eos[0] if isinstance(eos, list) else eos,
           "pad_token": hf["pad_token_id"]}
    names = {key: None if id_ is None else tokenizer.id_to_token(id_) for key, id_ in ids.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": hf["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    } | {key: name for key, name in names.items() if name is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
