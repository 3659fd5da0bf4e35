"""What the benchmarks of this package have in common: tasks of lm-eval that ask a model in a chat."""

from __future__ import annotations

import abc
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from lfm_jax.eval.shares import share, share_error

Document = dict[str, Any]
Metrics = Mapping[str, tuple[Callable[..., Any], bool | None]]
"""By name: what is made of the values of all documents, and whether a higher value is better."""


def counted(values: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many documents each of some texts was said of, the most frequent first."""
    return dict(collections.Counter(text for texts in values for text in dict.fromkeys(texts)).most_common())


_Task: Any = Task
"""Its abstract methods are annotated as if they returned nothing."""


class ChatTask(_Task):
    """A benchmark whose documents are conversations that the model answers.

    Args:
      name: of the task.
      documents: plain data.
      version: of documents and checkers.
      metrics: those that `process_results` gives values of.
      max_gen_toks: the most tokens of an answer.
    """

    OUTPUT_TYPE = "generate_until"

    def __init__(
        self, name: str, documents: Sequence[Document], version: str, metrics: Metrics, max_gen_toks: int
    ):
        # Without `super().__init__`, which warns of the config that it makes.
        self.VERSION, self._documents, self._metrics = version, list(documents), metrics
        self._instances, self.fewshot_rnd = None, None
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        options = {"until": [], "do_sample": False, "max_gen_toks": max_gen_toks}
        self._config = TaskConfig(task=name, num_fewshot=0, generation_kwargs=options, metadata={"version": version})

    @abc.abstractmethod
    def messages(self, doc: Document) -> list[dict[str, str]]:
        """The conversation that is to be answered."""

    @abc.abstractmethod
    def process_results(self, doc: Document, results: list[str]) -> dict[str, Any]:
        """The values of the metrics for the only answer to a document."""

    def tools(self, doc: Document) -> list[dict[str, Any]] | None:
        """The functions that the model may call."""
        return None

    def options(self, doc: Document) -> dict[str, Any]:
        """Generation kwargs of a document, beside those of all."""
        return {}

    # ---------------------------------------------------------------- what lm-eval asks for

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Document]:
        return self._documents

    def doc_to_text(self, doc: Document) -> str:
        return self.messages(doc)[-1]["content"]

    def doc_to_target(self, doc: Document) -> str:
        return ""

    def fewshot_context(
        self, doc: Document, num_fewshot: int, system_instruction: str | None = None, chat_template: Any = None,
        **kwargs: Any,
    ) -> str:
        """The prompt.

        Raises:
          ValueError: no chat template is applied, or it has no place for the tools.
        """
        if chat_template is None:
            raise ValueError(f"{self.task_name} is asked in a chat: add --apply-chat-template")
        system = [{"role": "system", "content": system_instruction}] if system_instruction else []
        tools = self.tools(doc)
        messages = [*system, *self.messages(doc)]
        return chat_template(messages) if tools is None else chat_template(messages, tools=tools)

    def construct_requests(self, doc: Document, ctx: str, **kwargs: Any) -> Instance:
        """The request that a document becomes."""
        arguments = (ctx, {**(self.config.generation_kwargs or {}), **self.options(doc)})
        return Instance("generate_until", doc, arguments, 0, metadata=kwargs["metadata"])

    def aggregation(self) -> dict[str, Callable[..., Any]]:
        return {name: how for name, (how, _) in self._metrics.items()}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: better for name, (_, better) in self._metrics.items() if better is not None}

    # ---------------------------------------------------------------- what lm-eval does not know

    def share_errors(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
        """Standard errors of the metrics that are shares, by the keys that lm-eval has for them: it knows none."""
        return {f"{name}_stderr,none": share_error([sample[name] for sample in samples])
                for name, (how, _) in self._metrics.items() if how is share}
