"""`lfm generate`, `lfm chat`, `lfm extract`, `lfm classify`, `lfm embed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lfm_jax.cli.arguments import ModelName
from lfm_jax.config import DType, Quantize
from lfm_jax.sampling import GREEDY, PUBLISHED, Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm_jax.model import LFM

Flat = Annotated[Sampling, tyro.conf.arg(name="")]
"""The fields are flags without a prefix."""


def generate(
    path: ModelName,
    prompt: tyro.conf.Positional[tuple[str, ...]],
    /,
    sampling: Flat = GREEDY,
    max_new_tokens: int = 128,
    stop: tuple[str, ...] = (),
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    adapter: Path | None = None,
) -> int:
    """Continue one or more prompts and print the texts.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      prompt: one or more texts.
      sampling: sampling parameters.
      max_new_tokens: the most tokens to add to a prompt.
      stop: texts that end a continuation.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.infer.generate import generate as run
    from lfm_jax.infer.generate import stream
    from lfm_jax.loading import local

    if not prompt:
        raise ValueError("generate needs at least one prompt: lfm generate PATH 'some text'")
    model, tokenizer = load_with_tokenizer(local(path), dtype, quantize, adapter)
    if len(prompt) == 1:
        pieces = stream(model, tokenizer, prompt[0], sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)
        print(prompt[0], end="", flush=True)  # Nothing is printed of what is refused.
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:  # What ends it early is said on a line of its own.
            print()
        return 0
    texts = run(model, tokenizer, list(prompt), sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)
    for start, text in zip(prompt, texts, strict=True):
        print(f"{start}{text}\n")
    return 0


def chat(
    path: ModelName,
    /,
    sampling: Flat = PUBLISHED,
    system: str | None = None,
    max_new_tokens: int = 512,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    adapter: Path | None = None,
) -> int:
    """Talk with a model in the terminal, with its own chat template.

    Enter sends, Alt-Enter makes a new line, Ctrl-C stops a reply, Ctrl-D leaves; /help lists the commands. What you
    type is kept for the next session in `chat_history`, beside the compiled programs (`lfm cache`).

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      sampling: sampling parameters; those published for LFM2.5-350M if left out.
      system: system message.
      max_new_tokens: longest reply; one also ends where the model's context is full.
      dtype: of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.cli.line_editor import reader
    from lfm_jax.infer.chat_loop import chat_loop

    model, tokenizer, template = load_chat(path, dtype, quantize, adapter)
    chat_loop(model, tokenizer, template, sampling, max_new_tokens, system=system, read=reader())
    return 0


def extract(
    path: ModelName,
    text: tyro.conf.Positional[tuple[str, ...]],
    /,
    schema: Path,
    sampling: Flat = GREEDY,
    instruction: str | None = None,
    max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    adapter: Path | None = None,
) -> int:
    """Find data that fits a JSON schema in one or more texts and print it, a line of JSON each.

    Every token is chosen among those that the schema allows, so that the data is always valid. Needs
    `lfm_jax[grammar]`. Example: `lfm extract LFM2.5-350M "Ada was born in 1815" --schema person.json`.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      text: one or more texts.
      schema: file with the JSON schema.
      sampling: sampling parameters.
      instruction: the system message, in which the schema replaces {schema}; a general one if left out.
      max_new_tokens: the most tokens of an answer.
      max_thinking_tokens: after so many tokens a thought before the answer is closed; 0 for none.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.infer.extract import EXTRACTION
    from lfm_jax.infer.extract import extract as run

    if not text:
        raise ValueError("extract needs at least one text: lfm extract PATH 'some text' --schema schema.json")
    wanted = _read_schema(schema)
    model, tokenizer, template = load_chat(path, dtype, quantize, adapter)
    try:
        found = run(model, tokenizer, text, wanted, template=template, instruction=instruction or EXTRACTION,
                    sampling=sampling, max_new_tokens=max_new_tokens, max_thinking_tokens=max_thinking_tokens)
    except ImportError as error:  # llguidance is an extra.
        raise ValueError(str(error)) from None
    for data in found:
        print(json.dumps(data, ensure_ascii=False))
    return 0


def classify(
    path: ModelName,
    text: tyro.conf.Positional[tuple[str, ...]],
    /,
    labels: tuple[str, ...],
    instruction: str | None = None,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    adapter: Path | None = None,
) -> int:
    """Print how likely each label is for one or more texts: a line of JSON each, the likeliest label first.

    Example: `lfm classify LFM2.5-350M "What a day!" --labels good bad`.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      text: one or more texts.
      labels: at least two different labels.
      instruction: the system message, in which the labels replace {labels}; a general one if left out.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.infer.extract import CLASSIFICATION
    from lfm_jax.infer.extract import classify as run

    if not text:
        raise ValueError("classify needs at least one text: lfm classify PATH 'some text' --labels good bad")
    model, tokenizer, template = load_chat(path, dtype, quantize, adapter)
    found = run(model, tokenizer, text, labels, template=template, instruction=instruction or CLASSIFICATION)
    for chances in found:
        best_first = sorted(chances.items(), key=lambda item: -item[1])
        print(json.dumps({label: round(chance, 6) for label, chance in best_first}, ensure_ascii=False))
    return 0


def embed(
    path: ModelName,
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    /,
    kind: Literal["query", "document"] = "document",
    max_tokens: int = 512,
    dimensions: int | None = None,
    dtype: DType | None = None,
) -> int:
    """Write the vectors of a file of texts, with an encoder such as LFM2.5-Embedding-350M.

    Example: `lfm embed LFM2.5-Embedding-350M texts.txt vectors.npy`.

    Args:
      path: Hugging Face directory or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      source: a text for each line; in a .jsonl file a JSON string, or an object with a "text".
      target: a new file, .npy with float32 [texts, numbers of a vector], or .jsonl with a line for each text.
      kind: query for what is searched for, document for what is searched.
      max_tokens: a text is cut after so many tokens, its prefix included.
      dimensions: how many numbers of a vector are kept, the first ones; all if left out.
      dtype: dtype of parameters and computation; the stored one if left out.
    """
    from lfm_jax.infer.embed import load_encoder
    from lfm_jax.infer.embed_file import embed_file

    count = embed_file(lambda: load_encoder(path, dtype), source, target, kind=kind, max_tokens=max_tokens,
                       dimensions=dimensions)
    print(f"{target}: vectors of {count} texts")
    return 0


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"schema {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"schema {path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"schema {path} is nested too deeply") from None
    if not isinstance(schema, dict):
        raise ValueError(f"schema {path} holds a {type(schema).__name__}; expected a JSON object")
    return schema


def load_with_tokenizer(
    path: Path, dtype: str | None, quantize: str | None = None, adapter: Path | None = None
) -> tuple[LFM, Tokenizer]:
    """Loads a model that must have a tokenizer."""
    from lfm_jax.loading import load_local

    model, tokenizer = load_local(path, dtype, quantize, adapter=adapter)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; put the tokenizer.json of the checkpoint beside its weights")
    return model, tokenizer


def load_chat(
    name: str, dtype: str | None, quantize: str | None = None, adapter: Path | None = None
) -> tuple[LFM, Tokenizer, str]:
    """Loads a model with its tokenizer and chat template."""
    from lfm_jax.loading import chat_template, local
    from lfm_jax.text.chat import DEFAULT_TEMPLATE

    path = local(name)
    template = chat_template(path) or DEFAULT_TEMPLATE  # First: a file that cannot be read is found at once.
    return *load_with_tokenizer(path, dtype, quantize, adapter), template
