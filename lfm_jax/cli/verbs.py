"""The table of verbs, and the text of `lfm --help`. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: its line in `lfm --help`, its function and its flags."""

    name: str
    """One word, or two (`data build`)."""
    group: str
    summary: str
    function: str
    """`module:name` in this package, imported when the verb is called; it returns the exit status. Its signature
    defines the flags, or its `config` does."""
    config: str | None = None
    """`module:class` in `lfm_jax`: the verb takes recipes (YAML files, later ones win), then every key as a flag; its
    function gets the config and the arguments that it was read from."""
    keeps: bool = True
    """Whether the programs that the verb compiles are kept on disk (`compile_cache`). Those of `plan` are for other
    machines, and this one could not load them again."""

    def resolve(self) -> tuple[Any, Any]:
        """Imports and returns (function, config class or None)."""
        config = None if self.config is None else _named(f"lfm_jax.{self.config}")
        return _named(f"lfm_jax.cli.{self.function}"), config


USE, TRAIN, CONVERT = "Use a model", "Train a model", "Convert a model"
MEASURE, MACHINE = "Measure a model", "This machine"
VERBS = (
    Verb("generate", USE, "continue prompts", "inference:generate"),
    Verb("chat", USE, "talk with a model in the terminal", "inference:chat"),
    Verb("extract", USE, "get data that fits a JSON schema out of texts", "inference:extract"),
    Verb("classify", USE, "find out which of some labels fits a text", "inference:classify"),
    Verb("embed", USE, "write the vectors of a file of texts", "inference:embed"),
    Verb("serve", USE, "serve a model over HTTP with OpenAI's API", "serving:serve"),
    Verb("batch", USE, "answer a file of requests in OpenAI's batch format", "serving:batch"),
    Verb("data build", TRAIN, "build a dataset of packed rows from text", "datasets:build", "data.build:BuildConfig",
         keeps=False),
    Verb("data show", TRAIN, "look into a built dataset, or into chats", "datasets:show", keeps=False),
    Verb("data distill", TRAIN, "store what a teacher says, for lfm tune to learn from", "training:distill",
         "post.config:TuneCommand"),
    Verb("plan", TRAIN, "report what a run needs and costs, before it runs", "training:plan", "plan:PlanConfig",
         keeps=False),
    Verb("train", TRAIN, "train a model, or resume a run", "training:train", "pretrain.config:TrainCommand"),
    Verb("tune", TRAIN, "teach a model from chats, pairs or a teacher, or resume", "training:tune",
         "post.config:TuneCommand"),
    Verb("ablate", TRAIN, "run, resume or report an ablation study", "training:ablate", "ablate.schedule:AblateConfig"),
    Verb("convert", CONVERT, "write a Hugging Face directory that transformers loads", "checkpoints:convert"),
    Verb("export", CONVERT, "write a GGUF file for llama.cpp, or programs for jax alone", "checkpoints:export",
         keeps=False),
    Verb("imatrix", CONVERT, "measure which inputs of matrices count, for `lfm export --imatrix`",
         "checkpoints:imatrix"),
    Verb("eval compare", MEASURE, "report differences of two evaluations", "evaluation:compare", keeps=False),
    Verb("eval", MEASURE, "measure a model with tasks of lm-eval", "evaluation:evaluate"),
    Verb("bench", MACHINE, "measure speed beside a peer in the same process", "machine:bench"),
    Verb("selfcheck", MACHINE, "check every kernel and collective against its reference", "machine:selfcheck"),
    Verb("cache", MACHINE, "report or clear the cache of compiled programs", "machine:cache", keeps=False),
)
EXAMPLES = """\
examples:
  lfm generate LFM2.5-350M "The capital of France is" --max-new-tokens 32
  lfm train configs/demo.yaml --run-dir runs/mine --steps 200"""


def find(args: Sequence[str]) -> Verb | None:
    """Returns the verb that a command line begins with, if any."""
    return next((verb for verb in VERBS if verb.name.split() == list(args[: len(verb.name.split())])), None)


def beginning_with(word: str) -> tuple[Verb, ...]:
    """Returns the verbs of two words whose first word is this one."""
    return tuple(verb for verb in VERBS if verb.name.startswith(f"{word} "))


def unknown(args: Sequence[str]) -> str:
    """Returns the message for an unknown verb, with the nearest verb if one is near."""
    several = beginning_with(args[0])
    given = " ".join(args[: 2 if several else 1])
    names = [verb.name for verb in several] or [verb.name.split()[0] for verb in VERBS]
    nearest = difflib.get_close_matches(given, names, n=1)
    near = f"the nearest is {nearest[0]!r}; " if nearest else ""
    return f"there is no verb {given!r}; {near}`lfm --help` lists all"


def overview(verbs: Sequence[Verb] = VERBS) -> str:
    """Returns the text of `--help`: the verbs in their groups, a line each."""
    width = max(len(verb.name) for verb in verbs)
    lines = ["usage: lfm VERB ... [--flag value ...]"]
    for group in dict.fromkeys(verb.group for verb in verbs):
        lines += ["", f"{group}:", *(f"  {v.name:{width}}  {v.summary}" for v in verbs if v.group == group)]
    more = "`lfm VERB --help` explains a verb and its flags; `lfm --version` reports versions."
    return "\n".join([*lines, "", EXAMPLES, "", more] if verbs is VERBS else [*lines, "", more])


def _named(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
