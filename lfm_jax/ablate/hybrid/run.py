"""Running the study: stages, each of which leaves what it made in a file, so that any call goes on where one ended.

    study.yaml             the study as it was begun
    data/                  passages, as `lfm tune` reads them; what all arms are measured on
    original/, start/      the original, and all of its attention made into convolutions, as runs that made no step
    layers/                stage 1: the run of `lfm tune` that teaches them the layers' outputs
    importance.json
    teacher-SEED/          what the original says of each row of stage 2
    arms/ARM/              begin/, run/ (stage 2), text.json, recall.json, tasks/, record.json
    costs/K.json
    results.jsonl, report/ what the page is made of, and the page
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import yaml
from flax import nnx

from lfm_jax import recipe
from lfm_jax.ablate.hybrid import measure, passages
from lfm_jax.ablate.hybrid.page import write_page
from lfm_jax.ablate.hybrid.study import ORIGINAL, Arm, HybridStudy, arms, counted, describe
from lfm_jax.ablate.results import RESULTS, read_record, write_record
from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.data.config import ChatData
from lfm_jax.files import locked, say, write_whole
from lfm_jax.init_from import write_model
from lfm_jax.loading import load, model_config
from lfm_jax.model import LFM, abstract_model
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.distill import DistillConfig
from lfm_jax.post.hybridise import convolutions, hybrid_config, hybridised, importance, started
from lfm_jax.post.run import tune
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import inference_tokenizer
from lfm_jax.train.checkpoint import has_checkpoint
from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.run_dir import differences
from lfm_jax.units import si

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm_jax.eval.long_context import Text

HELDOUT_ROWS = 8
"""Rows of held-out books on which runs measure themselves at their end."""
MEASURED, HAYSTACK = "measured.json", "haystack.txt"
"""Ids of the documents whose perplexity is measured, by kind, and the text that needles are hidden in."""
OF_LAYERS = ("embed", "norm.*", "blocks.*_norm.*", "blocks.*.feed_forward.*")
"""What stage 1 does not train: all but the operators."""


class StoppedError(Exception):
    """The study was asked to stop."""


def run_study(study: HybridStudy) -> Path:
    """Runs what is left of a study, and writes its page.

    Returns:
      The page.

    Raises:
      StoppedError: SIGTERM or SIGINT, or the end of `study.minutes`; all that is done is kept.
      ValueError: the directory holds another study, or something of it cannot be read.
    """
    out = study.directory
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"another process runs the study in {out}; wait for it"), _stopping(study.minutes) as over:
        return _Stages(study, over).run()


@contextmanager
def _stopping(minutes: float | None) -> Iterator[threading.Event]:
    """Turns SIGTERM into `StoppedError` where no run of training is there to save itself, and sends it in time.

    Yields what tells that the time is over: a run that is at its end hears the signal, and ends as if there were none.
    """
    over = threading.Event()

    def stop(number: int, frame: Any) -> None:
        raise StoppedError

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    timer = None if minutes is None else threading.Timer(60 * minutes, end)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield over
    finally:
        if timer is not None:
            timer.cancel()
        if main:
            signal.signal(signal.SIGTERM, before)


class _Stages:
    def __init__(self, study: HybridStudy, over: threading.Event):
        self.study, self.out, self._over = study, study.directory, over

    def run(self) -> Path:
        self.begin()
        for what in (self.original, self.data, self.start, self.layers, self.weigh):
            what()
        say(f"arms: {describe(self.arms)}; " + ", ".join(
            f"{name} {si(flops, 'FLOP')}" for name, flops in counted(self.study, self.config).items()))
        for i, arm in enumerate(self.arms, 1):
            if not (self.directory(arm) / "record.json").exists():
                say(f"arm {i} of {len(self.arms)}: {arm.directory} keeps layers {list(arm.attention_at)}")
                self.arm(arm)
        self.costs()
        write_whole(self.out / RESULTS, "".join(json.dumps(record) + "\n" for record in self.records()))
        return write_page(self.out / RESULTS, self.out / "report")

    def begin(self) -> None:
        """Keeps the study, or refuses another one."""
        path, plain = self.out / "study.yaml", recipe.to_plain(self.study)
        if path.exists():
            raise_problems(f"{self.out} holds another study; restore it, or name another one",
                           differences(yaml.safe_load(path.read_text()), plain, HybridStudy.movable))
        else:
            write_whole(path, yaml.safe_dump(plain, sort_keys=False))

    # ------------------------------------------------------------------------------------------------- once for all

    def original(self) -> None:
        """The original in our form."""
        if has_checkpoint(self.out / ORIGINAL):
            return
        model, tokenizer = load(self.study.model)
        if tokenizer is None:
            raise ValueError(f"model {self.study.model} has no tokenizer; give one that has")
        self.write(_as(model, model.config.replace(dtype=self.study.dtype)), self.out / ORIGINAL, self.study.model)

    def data(self) -> None:
        """Passages to learn from, those that runs measure themselves on, and what all arms are measured on.

        Written once: arms of a later call have the same, whatever has become of the books and texts.
        """
        study, data = self.study, self.out / "data"
        data.mkdir(exist_ok=True)
        if not (data / MEASURED).exists():
            write_whole(data / HAYSTACK, measure.haystack(Path(study.texts[0])))
            write_whole(data / MEASURED, json.dumps(measure.text_documents(study, self.tokenizer)))
        sizes = {"layers": study.layers.rows, "tokens": study.tokens.rows, "heldout": HELDOUT_ROWS}
        for name, number in sizes.items():
            if (data / f"{name}.jsonl").exists():
                continue
            texts = self.books.heldout if name == "heldout" else self.books.train
            found = passages.drawn(texts, self.tokenizer, study.seq_len, f"{study.seed} {name}")
            passages.write_passages(data / f"{name}.jsonl", found, number)

    def start(self) -> None:
        """What stage 1 begins with."""
        if has_checkpoint(self.out / "start"):
            return
        found = passages.drawn(self.books.train, self.tokenizer, self.study.seq_len, f"{self.study.seed} start")
        original = self.model(ORIGINAL)
        operators = started(original, passages.rows(found, self.study.start_rows), self.study.taps)
        self.write(hybridised(original, operators, self.study.taps), self.out / "start", str(self.out / ORIGINAL))

    def layers(self) -> None:
        """Stage 1, of all attention layers at once."""
        study = self.study
        if (self.out / "layers.json").exists():
            return
        distill = DistillConfig(teacher=str(self.out / ORIGINAL), match="layers", learn="all")
        measured = self.tune(self.out / "start", self.out / "layers", "layers", study.layers.rows, study.layers.peak_lr,
                             distill, OF_LAYERS, study.seed)
        write_record(self.out / "layers.json", {"kind": "layers", "curve": _curve(self.out / "layers"), **measured})

    def weigh(self) -> None:
        """How important the attention of each layer is."""
        if (self.out / "importance.json").exists():
            return
        say(f"weighing {self.config.num_layers} layers on {self.study.importance_rows} rows")
        found = passages.drawn(self.books.train, self.tokenizer, self.study.seq_len, f"{self.study.seed} importance")
        scores = importance(self.model(ORIGINAL), self.operators, passages.rows(found, self.study.importance_rows),
                            self.study.taps)
        write_record(self.out / "importance.json", {"kind": "importance",
                                                    "kl": {str(i): score for i, score in scores.items()}})

    # ----------------------------------------------------------------------------------------------------- each arm

    def arm(self, arm: Arm) -> None:
        """Trains and measures one arm."""
        place = self.directory(arm)
        place.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"kind": "arm", "arm": arm.name, "k": arm.k, "place": arm.place, "seed": arm.seed,
                                  "attention_at": list(arm.attention_at)}
        if arm.name == ORIGINAL:
            where = self.out / ORIGINAL
        else:
            where = place / "run"
            record |= self.distil(arm, place) | {"curve": _curve(where)}
        model, _ = load(where)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "text": lambda: measure.measure_text(self.study, model, self.documents),
            "recall": lambda: measure.measure_recall(self.study, model, self.tokenizer, self.haystack),
            "tasks": lambda: measure.measure_tasks(self.study, model, self.tokenizer, place / "tasks"),
        }
        for name, measured in parts.items():
            path = place / f"{name}.json"
            if not path.exists():
                say(f"{arm.directory}: measuring {name}")
                write_record(path, measured())
            record[name] = read_record(path)
        record["params"] = model.config.num_params()
        write_record(place / "record.json", record)
        if not self.study.keep_models:
            for name in ("begin", "run"):
                shutil.rmtree(place / name, ignore_errors=True)
        jax.clear_caches()

    def distil(self, arm: Arm, place: Path) -> dict[str, Any]:
        """Stage 2, on what stage 1 made of the layers that lose their attention."""
        study, begin = self.study, place / "begin"
        if not has_checkpoint(begin):
            operators = {i: w for i, w in self.operators.items() if i not in arm.attention_at}
            self.write(hybridised(self.model(ORIGINAL), operators, study.taps), begin, str(self.out / ORIGINAL))
        stored = self.out / f"teacher-{arm.seed}"
        distill = DistillConfig(teacher=str(self.out / ORIGINAL), learn="all", top_k=study.top_k, stored=str(stored))
        return self.tune(begin, place / "run", "tokens", study.tokens.rows, study.tokens.peak_lr, distill, study.freeze,
                         arm.seed)

    def tune(self, begin: Path, run: Path, data: str, rows: int, peak_lr: float, distill: DistillConfig,
             freeze: tuple[str, ...], seed: int) -> dict[str, Any]:
        """`lfm tune`; returns what was measured at its end."""
        study, folder = self.study, self.out / "data"
        config = TuneConfig.of(
            str(begin), run_dir=str(run), method="distill", steps=rows // study.batch_size, distill=distill,
            freeze=freeze, seed=seed, eval_every=0, checkpoint_every=study.checkpoint_every, keep_checkpoints=1,
            optimizer=OptimizerConfig(peak_lr=peak_lr, schedule="cosine", warmup_steps=0, warmup_fraction=0.1,
                                      weight_decay=0.0),
            data=ChatData(sources=(str(folder / f"{data}.jsonl"),), heldout=(str(folder / "heldout.jsonl"),),
                          seq_len=study.seq_len, batch_size=study.batch_size, too_long="cut", seed=seed),
        )
        ended = tune(config)
        if ended.step < ended.steps or self._over.is_set():
            raise StoppedError
        return dict(ended.measured)

    def costs(self) -> None:
        """Speed and state of each number of attention layers, wherever they stand."""
        if not self.study.cost_contexts:
            return
        for arm in {arm.k: arm for arm in self.arms}.values():
            path = self.out / "costs" / f"{arm.k}.json"
            if not path.exists():
                say(f"costs of {arm.k} attention layers")
                config = hybrid_config(self.config, arm.attention_at, self.study.taps)
                found = measure.measured_cost(self.study, config, self.config)
                write_record(path, {"kind": "cost", "k": arm.k, **found})
                jax.clear_caches()

    def records(self) -> Iterator[dict[str, Any]]:
        """What results.jsonl holds. No path of this machine is in it."""
        study = recipe.to_plain(self.study)
        places = ("out", "model", "books", "texts", "tasks_data", "minutes")
        yield {"kind": "study", **{key: x for key, x in study.items() if key not in places},
               "model": Path(self.study.model).name, "layers_of_model": self.config.num_layers,
               "counted": counted(self.study, self.config), "params": self.config.num_params()}
        files = [self.out / "layers.json", self.out / "importance.json",
                 *(self.directory(arm) / "record.json" for arm in self.arms), *sorted(self.out.glob("costs/*.json"))]
        for file in files:
            record = read_record(file)
            assert record is not None  # Its stage is over.
            yield record

    # ------------------------------------------------------------------------------------------------------ helpers

    def directory(self, arm: Arm) -> Path:
        return self.out / "arms" / arm.directory

    def model(self, name: str) -> LFM:
        return load(self.out / name)[0]

    def write(self, model: LFM, run_dir: Path, origin: str) -> None:
        """`write_model`, with a chat template that leaves text as it is; what a kill left of it goes first."""
        shutil.rmtree(run_dir, ignore_errors=True)
        write_model(model, run_dir, origin)
        write_whole(run_dir / sidecars.CHAT_TEMPLATE, passages.TEMPLATE)

    @cached_property
    def config(self) -> ModelConfig:
        return model_config(self.out / ORIGINAL)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return inference_tokenizer(self.out / ORIGINAL)

    @cached_property
    def books(self) -> passages.Books:
        return passages.Books(Path(self.study.books), self.study.heldout_books)

    @cached_property
    def documents(self) -> dict[str, list[list[int]]]:
        return json.loads((self.out / "data" / MEASURED).read_text())

    @cached_property
    def haystack(self) -> Text:
        from lfm_jax.eval.long_context import Text

        path = self.out / "data" / HAYSTACK
        return Text(path.read_text(encoding="utf-8"), str(path))

    @cached_property
    def operators(self) -> dict[int, Any]:
        """The convolutions that stage 1 has taught."""
        return convolutions(self.model("layers"))

    @cached_property
    def arms(self) -> list[Arm]:
        found = read_record(self.out / "importance.json")
        assert found is not None  # Its stage is over.
        return arms(self.study, self.config.num_layers, {int(i): x for i, x in found["kl"].items()})


def _as(model: LFM, config: ModelConfig) -> LFM:
    """The same weights in a model of another dtype of products."""
    return nnx.merge(abstract_model(config)[0], nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))


def _curve(run_dir: Path) -> list[list[float]]:
    """(step, loss) of a run, at most a hundred of them."""
    found = [[record["step"], record["loss"]] for record in read_metrics(run_dir) if "loss" in record]
    return found[:: max(1, math.ceil(len(found) / 100))]
