"""Tasks of lm-eval by name, also over data on disk; what would make a score meaningless in silence is refused."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lfm_jax.eval import benchmarks
from lfm_jax.problems import raise_problems

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Loaders of `datasets` by the ending of a file."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
LOOKED_AT = 100
"""Documents of a task that are checked."""


def load_tasks(
    names: Sequence[str], data: Path | None = None, *, checkers: Path | None = None, constrained: bool = False
) -> tuple[TaskManager, list[Any]]:
    """Loads tasks, groups and tags by name; returns what `simple_evaluate` takes as `task_manager` and `tasks`.

    Args:
      data: a directory with data and tasks. Files `TASK/SPLIT.jsonl` (or .json, .parquet, .csv) take the place of the
        data set of a shipped task, in groups too; splits without a file are absent. Tasks of one's own are
        `NAME.yaml`, in which a relative name in `data_files` is a file beside it; they come before shipped ones.
      checkers, constrained: of our own benchmarks, see `benchmarks.load`.

    Raises:
      ValueError: names that there are not, data that is not a directory, a split that the task does not have, a
        package that a task needs and that is not installed, `constrained` with tasks that have no such form, or see
        `benchmarks.load` and `check_tasks`.
    """
    if data is not None and not data.is_dir():
        raise ValueError(f"data {data} is not a directory")
    own = {} if data is None else {path.stem: path for path in sorted(data.glob("*.yaml"))}
    ours = [name for name in names if benchmarks.has(name) and name not in own]
    names = [name for name in names if name not in ours]
    if constrained and names:
        raise ValueError(f"{', '.join(names)} cannot be constrained; leave --constrained out, or name only tasks of "
                         f"{', '.join(sorted(benchmarks.NAMES - benchmarks.FREE))}")
    # To index the shipped tasks takes many seconds.
    shipped = not set(names) <= own.keys()
    manager = TaskManager(include_path=None if data is None else str(data), include_defaults=shipped)
    missing = [name for name in names if name not in manager.all_tasks]
    raise_problems("cannot evaluate", [f"there is no task {name!r}" for name in missing])
    loaded: list[Any] = []
    try:
        _index_data(manager, names, own, data)
        for name in dict.fromkeys(names):
            with _seeded():
                found = manager.load([name])
            for task in found["tasks"].values():
                _settle(task)
            group = found.get("groups", {}).get(name)
            loaded += [group] if group is not None else found["tasks"].values()
        leaves = manager.load(loaded)["tasks"].values()
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed, and one of the tasks needs it: install it, or an extra of "
                         "lm-eval such as 'lm-eval[ifeval]'") from None
    check_tasks(leaves)
    return manager, [*loaded, *benchmarks.load(ours, data, checkers=checkers, constrained=constrained)]


@contextmanager
def _seeded() -> Iterator[None]:
    """Draws the same random numbers in any process.

    Tasks draw where they read their documents, as gpqa does the order of choices. What `datasets` keeps on a disk may
    have been drawn with another seed.
    """
    python, numpy, cached = random.getstate(), np.random.get_state(), datasets.is_caching_enabled()
    random.seed(0)
    np.random.seed(0)
    datasets.disable_caching()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if cached:
            datasets.enable_caching()


def _settle(task: Any) -> None:
    """Has a task make its documents once, whatever else is evaluated: lm-eval makes them whenever it looks at them."""
    process: Callable[[Any], Any] | None = getattr(task.config, "process_docs", None)
    if process is None:
        return
    made: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(process)
    def once(docs: Any) -> Any:
        if id(docs) not in made:
            with _seeded():
                made[id(docs)] = docs, process(docs)
        return made[id(docs)][1]

    task.config.process_docs = once


def _index_data(manager: TaskManager, names: Sequence[str], own: dict[str, Path], data: Path | None) -> None:
    """Puts the configs of tasks whose data are on disk into the index, where groups find them too."""
    index = manager.task_index
    configs = {name: _beside(load_yaml(own[name]), own[name].parent) for name in names if name in own}
    for folder in () if data is None else sorted(data.iterdir()):
        name, files = folder.name, _files(folder)
        if files and name in index and name not in own and (path := index[name].yaml_path) is not None:
            configs[name] = _over_files(name, load_yaml(path), files)
    for name, config in configs.items():
        index[name] = dataclasses.replace(index[name], yaml_path=None, cfg=config)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by the split that they are named after."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.stem: path.absolute() for path in paths if path.suffix in FORMATS}


def _beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose data files are those beside it."""
    options = dict(config.get("dataset_kwargs") or {})
    if "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], folder)
    return config | ({"dataset_kwargs": options} if options else {})


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_absolute(each, folder) for each in files]
    return files if "://" in files else str(folder.absolute() / files)


def _over_files(name: str, config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """The config of a shipped task over files of one's own."""
    formats = {FORMATS[path.suffix] for path in files.values()}
    used = {config[split] for split in SPLITS if config.get(split)}
    problems = [] if len(formats) == 1 else [f"the files are of several formats, {', '.join(sorted(formats))}"]
    problems += [f"{path} is no split of it; it has {', '.join(sorted(used))}" for split, path in files.items()
                 if split not in used]
    tested = config.get("test_split") or config.get("validation_split")
    if tested not in files:
        problems.append(f"it is measured on {tested!r}, of which there is no file")
    raise_problems(f"task {name} cannot use its data on disk", problems)
    absent = {split: None for split in SPLITS if config.get(split) not in files and config.get(split)}
    return config | absent | {
        "dataset_path": formats.pop(), "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }


def check_tasks(tasks: Iterable[Any]) -> None:
    """Checks that the documents of tasks have what their scores are made of.

    lm-eval takes a template that names a column which is not there for plain text: a multiple choice is then never
    right, and its score is 0 without a word.

    Raises:
      ValueError: a task is a multiple choice whose right answer is none of its choices.
    """
    problems = []
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:  # There the choices are contexts.
            continue
        docs = list(task.eval_docs)
        for doc in random.Random(0).sample(docs, min(LOOKED_AT, len(docs))):
            choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
            answers = target if isinstance(target, list) else [target]
            if not all(answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
                       for answer in answers):
                problems.append(f"{task.config.task}: the right answer of a document is {target!r:.60}, and its "
                                f"choices are {choices!r:.100}; its columns are {', '.join(doc)}")
                break
    raise_problems("the data of tasks lack what is scored", problems)
