"""Tasks of lm-eval in a training run (`RunConfig.eval`)."""

from __future__ import annotations

from pathlib import Path

from lfm_jax.eval import need_lm_eval
from lfm_jax.model import LFM
from lfm_jax.train.config import TaskConfig
from lfm_jax.train.metrics import TASKS
from lfm_jax.train.runner import Tasks

FEWSHOT_SEED = 1234
"""That of `simple_evaluate`."""


def open_tasks(config: TaskConfig) -> Tasks:
    """Loads the tasks of a run; returns what measures a model with them.

    Scores are those of `lfm eval` with the same tasks, limit and data, by `eval/TASK/METRIC`; a filter that has a name
    stands behind the metric, after a comma. Random numbers of the process are left alone.

    Raises:
      ValueError: lm-eval is not installed, tasks that are asked in a chat, or see `load_tasks`.
    """
    try:
        need_lm_eval()
    except ImportError as error:
        raise ValueError(f"eval.tasks: {error}") from None
    from lm_eval.evaluator import evaluate

    from lfm_jax.convert.sidecars import chat_template
    from lfm_jax.eval import benchmarks
    from lfm_jax.eval.lm import EvalModel
    from lfm_jax.eval.report import metrics
    from lfm_jax.eval.tasks import load_tasks
    from lfm_jax.text.tokenizer import inference_tokenizer

    if chats := [name for name in config.tasks if benchmarks.has(name)]:
        raise ValueError(f"eval.tasks: {', '.join(chats)} cannot be measured in a training run, which asks without a "
                         "chat template; measure its checkpoints with lfm eval --apply-chat-template")
    manager, named = load_tasks(config.tasks, None if config.data is None else Path(config.data))
    loaded = manager.load(named)

    def measure(model: LFM, run_dir: Path) -> dict[str, float]:
        # What `simple_evaluate` does, but for the seeds of all libraries and a list of all packages.
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        lm = EvalModel(model, inference_tokenizer(run_dir), chat_template(run_dir))
        lm.silent = True
        results = evaluate(lm, loaded, limit=config.limit, bootstrap_iters=0, log_samples=False)
        return {f"{TASKS}{found.task}/{found.name}{'' if found.filter == 'none' else f',{found.filter}'}": found.score
                for found in metrics(results)}

    return measure
