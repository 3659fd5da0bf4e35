"""The life of a model that calls tools, in one command, every station measured:

    python experiments/tool_caller/run.py --books DIR --dialogues DIR --schemas DIR [--llama-cpp PYTHON] [--seed 0]
    python experiments/tool_caller/run.py --smoke          toy data, about a minute

Raw text -> tokenizer -> a hybrid from scratch -> long context -> chats -> preferences -> quantisation-aware -> GGUF
-> llama.cpp, transformers, our server -> a page. Every stage is a verb of `lfm`, called as a function, on a recipe of
this folder. life.yaml has the minutes of each; all keys are flags.

Ctrl-C, kill -9: the same command continues. What is finished is a file of OUT/seed-N/done/, with its seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from verified_pairs import make_pairs

from lfm_jax import compile_cache
from lfm_jax.bench.timing import conditions
from lfm_jax.cli.checkpoints import convert, export
from lfm_jax.files import say, write_whole
from lfm_jax.loading import model_config
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.run import tune
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.run import train
from lfm_jax.recipe import load_recipe, model_flags, to_plain
from lfm_jax.train.launch import FAILED, STOPPED
from lfm_jax.train.metrics import read_metrics
from tool_caller import engines, measure, prepare, size, toy
from tool_caller import page as pages
from tool_caller.config import BLOCKS, HERE, PLACES, Life
from tool_caller.speed import Case, speed

FREE = (*PLACES, "repeats", "minutes", "seed")
"""Settings that may change while a life goes on; those of one life are those of all its seeds."""
BEGAN = "0 0"
MEASURED = "measured-"
POINTS = 10
"""Of a curve."""


class Stopped(Exception):
    """A run was asked to stop, and saved where it is."""


class Step(NamedTuple):
    """A part of the life that is done once; its record is kept."""

    name: str
    do: Callable[[], Any]
    shared: bool = False
    """Of all seeds."""


def main(argv: list[str]) -> int:
    smoke = "--smoke" in argv
    recipes = [HERE / "life.yaml", *([HERE / "smoke.yaml"] if smoke else [])]
    flags = [flag for flag in argv if flag != "--smoke"]
    life = load_recipe(Life, recipes, flags, prog="run.py", description=__doc__)
    if smoke:
        raw = life.out / "raw"
        toy.write(raw)
        life = dataclasses.replace(life, books=raw / "books", dialogues=raw / "sgd", schemas=raw / "schemas")
    compile_cache.enable()
    command = "python experiments/tool_caller/run.py " + " ".join(shown(argv))
    try:
        live(life, command)
    except (Stopped, KeyboardInterrupt):
        say("stopped; the same command continues", who="tool_caller")
        return STOPPED
    except (ValueError, OSError) as error:
        say(f"error: {error}", who="tool_caller")
        return FAILED
    return 0


def shown(argv: Sequence[str]) -> list[str]:
    """Flags as a page tells them: names in the place of paths of this machine."""
    names = {f"--{name.replace('_', '-')}": name.upper() for name in PLACES}
    found: list[str] = []
    for before, flag in itertools.pairwise(["", *argv]):
        name, given, _ = flag.replace("_", "-").partition("=")
        if given and name in names:
            flag = f"{name}={names[name]}"
        found.append(names.get(before.replace("_", "-"), flag))
    return found


def live(life: Life, command: str) -> None:
    """Does what is not done yet, in order.

    Raises:
      Stopped: a run was asked to stop.
      ValueError: the directory holds another life, or a stage refuses what it is given.
    """
    _need_llama_cpp(life)
    _check(life)
    steps = Stations(life).steps()
    for number, step in enumerate(steps, 1):
        path = (life.data if step.shared else life.home) / "done" / f"{step.name}.json"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"{number} of {len(steps)}: {step.name}", who="tool_caller")
        with _Clock(path.with_suffix(".seconds")) as clock:
            found = step.do()
        write_whole(path, json.dumps({**clock.record(), "found": found}, indent=1) + "\n")
        jax.clear_caches()  # The next one has other shapes.
    where = pages.write(life, command, conditions("lfm_jax", "jax", "flax", "optax", "lm_eval", "transformers"))
    say(f"the page: {where}", who="tool_caller")


def _need_llama_cpp(life: Life) -> None:
    """Refuses a Python without llama.cpp, which would be missed hours later."""
    if life.llama_cpp and subprocess.run([life.llama_cpp, "-c", "import llama_cpp"], capture_output=True).returncode:
        raise ValueError(f"llama_cpp {life.llama_cpp} is no Python with the module llama_cpp; install llama-cpp-python "
                         "there, or leave the flag out")


def _check(life: Life) -> None:
    """Keeps the settings of a new life, and refuses others in its directory: seeds share data, and a page."""
    path = life.out / "life.json"
    plain = {key: value for key, value in to_plain(life).items() if key not in FREE}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plain, indent=1, default=str) + "\n")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in plain if there.get(key) != plain[key]]
    if changed:
        raise ValueError(f"{life.out} was begun with other settings: " + ", ".join(
            f"{key} {there.get(key)}, not {plain[key]}" for key in changed) + "; restore them, or name another --out")


class _Clock:
    """Seconds, and seconds of processors, of a step over all its attempts; a kill -9 loses those of its own."""

    def __init__(self, path: Path):
        self._path = path
        rows = path.read_text().splitlines() if path.exists() else []
        self.before = rows.count(BEGAN)
        """Earlier attempts."""
        self._spent = [sum(map(float, column)) for column in zip(*(row.split() for row in rows), strict=True)] or [0, 0]

    def __enter__(self) -> _Clock:
        self._began = _now()
        self._add(BEGAN)  # Also where it is killed.
        return self

    def record(self) -> dict[str, float]:
        seconds, processor = (spent + now - began
                              for spent, now, began in zip(self._spent, _now(), self._began, strict=True))
        return {"seconds": seconds, "processor_seconds": processor, "interrupted": self.before}

    def __exit__(self, *_: object) -> None:
        self._add(" ".join(str(now - began) for now, began in zip(_now(), self._began, strict=True)))

    def _add(self, row: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{row}\n")


def _now() -> tuple[float, float]:
    return time.monotonic(), sum(os.times()[:4])


class Stations:
    """The steps of a life, and where each leaves what the next begins with."""

    def __init__(self, life: Life):
        self.life, home = life, life.home
        self.runs = {name: home / name for name in ("pretrain", "long", "sft", "prefer", "narrow")}
        self.files = {name: home / "files" / f"{name}.gguf" for name in (
            "prefer-F32", "prefer-Q8_0", "prefer-Q4_0", "narrow-F32", "narrow-Q4_0")}
        self.hugging_face = {name: home / "files" / f"{name}-hf" for name in ("prefer", "narrow")}

    def steps(self) -> list[Step]:
        life, runs, files = self.life, self.runs, self.files
        B = max(1, life.batch_tokens // life.long_context)
        chats = ["--data.sources", str(life.data / "chats" / "chats.jsonl"), *_shape(life.long_context, B)]
        # Both answers of a pair stand in one row, each behind the prompt.
        preferences = ["--data.sources", str(life.home / "pairs" / "pairs.jsonl"),
                       *_shape(2 * life.long_context, max(1, B // 2))]
        steps = [
            Step("prepare", lambda: prepare.prepare(life), shared=True),
            Step("size", lambda: size.choose(life), shared=True),
            Step("pretrain", self.pretrain), self._measured("pretrain", tuned=False),
            Step("long", self.long), self._measured("long", ("pretrain",), tuned=False),
            Step("sft", lambda: self._tuned("sft", "long", chats)), self._measured("sft", ("long",)),
            Step("pairs", lambda: make_pairs(
                str(runs["sft"]), life.data / "asked.jsonl", life.home / "pairs", samples=life.samples,
                minutes=life.minutes.pairs, slots=life.slots, seed=life.seed, all_ways=bool(life.steps),
                most=1 if life.steps else None)),
            Step("prefer", lambda: self._tuned("prefer", "sft", preferences)), self._measured("prefer", ("sft",)),
            Step("narrow", lambda: self._tuned("narrow", "prefer", [
                *chats, "--distill.teacher", str(runs["prefer"])])),
            Step("files", self.export),
            self._measured("prefer-Q8_0", ("prefer",)), self._measured("prefer-Q4_0", ("prefer",)),
            self._measured("narrow", ("prefer", "prefer-Q4_0")),
            Step("engines", self.engines),
            Step("served", lambda: engines.served(
                life, files["narrow-Q4_0"], self._at("narrow"), life.home / "served")),
            Step("speed", self.speed),
        ]
        return [step for step in steps if step.name.removeprefix(MEASURED) == step.name
                or step.name.removeprefix(MEASURED) in life.measured]

    # ------------------------------------------------------------ training

    def pretrain(self) -> dict[str, Any]:
        life = self.life
        B = max(1, life.batch_tokens // life.context)
        chosen = json.loads((life.data / "done" / "size.json").read_text(encoding="utf-8"))["found"]["width"]
        config = self._text_run("pretrain", [*model_flags(size.model_of(life, chosen)), "--data.tokenizer",
                                             str(life.data / "tokenizer")], T=life.context, B=B)
        found = self._trained(config)
        # What chats are written with; it comes along to every later station and file.
        template = (life.data / "tokenizer" / prepare.CHAT_TEMPLATE).read_text(encoding="utf-8")
        write_whole(self.runs["pretrain"] / prepare.CHAT_TEMPLATE, template)
        return found

    def long(self) -> dict[str, Any]:
        life = self.life
        B = max(1, life.batch_tokens // life.long_context)
        flags = [*model_flags(model_config(self.runs["pretrain"])), "--init-from", str(self.runs["pretrain"])]
        return self._trained(self._text_run("long", flags, T=life.long_context, B=B))

    def _text_run(self, name: str, flags: list[str], *, T: int, B: int) -> TrainConfig:
        data = prepare.texts(self.life, T=T, B=B)
        return load_recipe(TrainConfig, HERE / f"{name}.yaml", [
            *flags, *self._common(name), "--data.sources", *data.sources, "--data.heldout", *data.heldout,
            *_shape(T, B), "--data.seed", str(self.life.seed)])

    def _tuned(self, name: str, before: str, flags: list[str]) -> dict[str, Any]:
        whole = ["--data.heldout-fraction", "0"] if self.life.steps else []  # There may be a handful only.
        config = load_recipe(TuneConfig, HERE / f"{name}.yaml", [
            "--init-from", str(self.runs[before]), *flags, *whole, *self._common(name),
            "--data.seed", str(self.life.seed)])
        return self._trained(config)

    def _common(self, name: str) -> list[str]:
        life = self.life
        minutes = getattr(life.minutes, name)
        length = ["--steps", str(life.steps)] if life.steps else ["--train-minutes", str(minutes)]
        return ["--run-dir", str(self.runs[name]), "--seed", str(life.seed), *length]

    def _trained(self, config: TrainConfig | TuneConfig) -> dict[str, Any]:
        """Runs or resumes a run; returns what it took.

        Raises:
          Stopped: it was asked to stop.
        """
        result = train(config) if isinstance(config, TrainConfig) else tune(config)
        if result.step < result.steps:
            raise Stopped
        return {"steps": result.steps, "tokens": result.steps * config.rows * config.seq_len,
                "parameters": config.model.num_params(), "curve": curve(result.run_dir)}

    # ------------------------------------------------------------ measuring

    def _at(self, name: str) -> Path:
        return self.life.home / "measured" / name

    def _measured(self, name: str, before: tuple[str, ...] = (), *, tuned: bool = True) -> Step:
        """The step that measures a station, beside earlier ones."""
        model = self.runs.get(name) or self.files[name]

        def do() -> dict[str, Any]:
            scores = measure.measure(self.life, model, self._at(name), tuned=tuned)
            # Models that have not seen chats are asked fewer turns, so that calls are not compared with theirs.
            gave = {other: measure.gave(self._at(other), self._at(name),
                                        (measure.TEXT, measure.PLAIN, measure.CONSTRAINED)
                                        if (self._at(other) / measure.CONSTRAINED).exists() else (measure.TEXT,))
                    for other in before if other in self.life.measured}
            return {"scores": scores, "gave": gave}

        return Step(f"{MEASURED}{name}", do)

    def export(self) -> dict[str, Any]:
        """`lfm export` and `lfm convert` of the two last runs; returns sizes in bytes."""
        sizes = {}
        for name, path in self.files.items():
            run, type = name.split("-")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():  # It appears whole.
                export(str(self.runs[run]), path, type=type)
            sizes[path.name] = path.stat().st_size
        for name, path in self.hugging_face.items():
            if not path.exists():
                convert(str(self.runs[name]), path)
            sizes[path.name] = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
        return sizes

    def engines(self) -> list[dict[str, Any]]:
        rows = []
        for name in self.life.equal:
            weights = engines.Weights(name, self.runs[name], self._at(name), self.hugging_face[name],
                                      self.files[f"{name}-F32"], self.files[BLOCKS[name]], exact=name == "narrow")
            rows += engines.same_calls(self.life, weights, self.life.home / "engines")
        return rows

    def speed(self) -> list[dict[str, Any]]:
        files = self.files
        cases = [Case("lfm_jax", files["prefer-Q8_0"], how) for how in self.life.forms]
        cases += [Case("llama.cpp", files[name], "mapped") for name in ("narrow-F32", "prefer-Q8_0", "narrow-Q4_0")]
        return speed(self.life, cases, self.life.home / "speed.jsonl")


def _shape(T: int, B: int) -> list[str]:
    """The shape of a batch as flags."""
    return ["--data.seq-len", str(T), "--data.batch-size", str(B)]


def curve(run_dir: Path) -> list[float]:
    """The losses of a run as means of at most POINTS equal parts; those of single steps jump, as books and dialogues
    alternate."""
    losses = [row["loss"] for row in read_metrics(run_dir) if "loss" in row]
    ends = [len(losses) * i // POINTS for i in range(POINTS + 1)]
    return [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(ends) if b > a]
