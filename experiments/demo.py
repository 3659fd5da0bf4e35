"""`make demo`: train a small hybrid on Python's own source, sample from it, extract with it, export it, load it back.

The recipe grants the steps their minutes, so that it takes about six on two cores of any speed. Interrupted and started
again, it resumes.
"""

from __future__ import annotations

import lzma
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import lfm_jax as lfm
from lfm_jax import compile_cache
from lfm_jax.data.corpora.text import heldout_documents
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.run import train
from lfm_jax.recipe import load_recipe
from lfm_jax.train.launch import STOPPED

RECIPE = Path(__file__).parent.parent / "configs" / "demo.yaml"
EXCLUDE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data")
NEW_TOKENS = 80
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["function", "arguments"],
    "properties": {
        "function": {"type": "string", "maxLength": 12},
        "arguments": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "string", "maxLength": 8}},
    },
}
PROMPTS = ("def read_file(path):\n", "class Queue:\n    def __init__(self", "import os\nimport sys\n\n")


def main() -> int:
    compile_cache.enable()
    # The caller's own flags come last and win.
    stdlib = sysconfig.get_paths()["stdlib"]
    flags = ["--data.sources", stdlib, "--data.exclude", *EXCLUDE, *sys.argv[1:]]
    config = load_recipe(TrainConfig, RECIPE, flags, prog="demo.py")
    console = Console()
    console.print(
        f"[bold]lfm_jax demo[/]: a hybrid of {config.model.num_params() / 1e6:.1f} million parameters "
        f"({config.model.layer_types.count("conv")} conv, {config.model.attention_layers} attention layers) "
        f"learns Python from {stdlib}"
    )
    result = train(config)
    if result.step < result.steps:
        return STOPPED
    report_compression(console, config, result.heldout_bits_per_byte)
    model, tokenizer = lfm.load(result.run_dir)
    assert tokenizer is not None  # A run directory always holds one.
    sample(console, model, tokenizer)
    extract(console, model, tokenizer)
    export = result.run_dir / f"hf-{result.step}"
    check_export(console, model, tokenizer, export)
    console.print(
        f"\nOpen the picture of its losses: {(result.run_dir / 'loss.png').resolve()}\n\nNext:\n"
        f"  source .venv/bin/activate\n"
        f"  lfm generate {export} 'def main():' --temperature 0.7 --top-k 50\n"
        f"  lfm train configs/{RECIPE.name} --run-dir runs/mine --data.sources YOUR_FILES\n"
        f"  lfm --help\n"
        f"  make test",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def report_compression(console: Console, config: TrainConfig, bits_per_byte: float | None) -> None:
    """Held-out bits per byte beside `xz -9` on the same files, each by itself."""
    texts = [text.encode() for text in heldout_documents(config.data)]
    packed = sum(len(lzma.compress(text, preset=9)) for text in texts)
    table = Table(title=f"{len(texts)} held-out files, {sum(map(len, texts)):,} bytes", title_justify="left")
    table.add_column("held-out bits per byte")
    table.add_column("", justify="right")
    table.add_row("this model", f"{bits_per_byte:.3f}")
    table.add_row("xz -9, file by file", f"{8 * packed / sum(map(len, texts)):.3f}")
    console.print(table)


def sample(console: Console, model: lfm.LFM, tokenizer: Tokenizer) -> None:
    """Three continuations, and how fast they come once they are compiled."""
    for _ in range(2):
        began = time.monotonic()
        texts = lfm.generate(
            model, tokenizer, list(PROMPTS), max_new_tokens=NEW_TOKENS, stop_ids=(),
            sampling=[lfm.Sampling(temperature=0.7, top_k=50, seed=i) for i in range(len(PROMPTS))],
        )
        seconds = time.monotonic() - began
    for prompt, text in zip(PROMPTS, texts, strict=True):
        console.rule("sample", align="left")
        console.print(f"[bold]{prompt}[/]", end="", highlight=False)
        console.print(text, markup=False, highlight=False)
    console.print(f"{len(PROMPTS) * NEW_TOKENS / seconds:,.0f} tokens a second, {len(PROMPTS)} texts side by side")


def extract(console: Console, model: lfm.LFM, tokenizer: Tokenizer) -> None:
    """An answer that fits a JSON schema by construction, whatever so small a model makes of the text."""
    record = lfm.extract(model, tokenizer, "def join(parts, sep): return sep.join(parts)", SCHEMA)
    console.rule("extract, valid by construction", align="left")
    console.print_json(data=record)


def check_export(console: Console, model: lfm.LFM, tokenizer: Tokenizer, export: Path) -> None:
    """Exports a Hugging Face directory, loads it back, compares logits."""
    if not export.exists():
        lfm.save_hf(model, export, tokenizer=tokenizer)
    again, _ = lfm.load(export)
    tokens_BT = jnp.asarray(np.arange(1, 257).reshape(2, 128))
    difference = jax.numpy.abs(model(tokens_BT)[0] - again(tokens_BT)[0]).max()
    console.rule("export", align="left")
    console.print(f"exported to {export} and loaded back; largest difference of logits: {float(difference)}")
    if difference != 0:
        raise SystemExit("the exported model differs from the trained one")


if __name__ == "__main__":
    sys.exit(main())
