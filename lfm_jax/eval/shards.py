"""Parts of an evaluation that processes answer side by side, on any machines.

A process builds all requests, as a whole evaluation does, and answers those of its part; the scores are computed
afterwards, by a whole evaluation in the same directory, which finds all answers there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lfm_jax.eval.kept import KeptLM


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` of `count`."""

    number: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """Reads I/N, with I from 0 on.

        Raises:
          ValueError: it is something else.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"shard is {text!r}; it must be I/N with I from 0 to N - 1, as 0/4")
        return cls(int(number), int(count))

    def holds(self, request: Instance) -> bool:
        """Whether a request belongs to this part, as all do that begin with the same context."""
        digest = hashlib.sha256(str(request.args[0]).encode()).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number


class PartDone(Exception):
    """All requests of a part are answered."""


class PartLM(LM):
    """Has a model answer the requests of a part; raises PartDone after the last, so that nothing is scored.

    Args:
      lm: the model, with a place for its answers.
      shard: the part.
      tasks: the tasks and groups that are evaluated.
    """

    def __init__(self, lm: KeptLM, shard: Shard, tasks: Iterable[Any]):
        super().__init__()
        self._lm, self._shard, self._tasks = lm, shard, [
            task for each in tasks for task in (each.get_all_tasks() if isinstance(each, Group) else [each])]
        self._answered: set[str] = set()

    def loglikelihood(self, requests: list[Instance], **kwargs: Any) -> list[Any]:
        return self._answer("loglikelihood", self._lm.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[Any]:
        return self._answer("loglikelihood_rolling", self._lm.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[Any]:
        return self._answer("generate_until", self._lm.generate_until, requests)

    def _answer(self, kind: str, answer: Callable[[list[Instance]], Any], requests: list[Instance]) -> list[Any]:
        if mine := [request for request in requests if self._shard.holds(request)]:
            answer(mine)
        self._answered.add(kind)
        if self._answered >= {request.request_type for task in self._tasks for request in task.instances}:
            raise PartDone
        return [None] * len(requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], *args: Any, **options: Any) -> str:
        return self._lm.apply_chat_template(chat_history, *args, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._lm.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self._lm.tokenizer_name
