"""A model of lm-eval on the batched engine.

It answers what lm-eval's own `hf` backend answers (`lm_eval/models/huggingface.py`): how texts are encoded and cut,
what is summed, where a generated text ends. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from lfm_jax.eval.answers import Answers
from lfm_jax.eval.generating import Wanted, run, wanted
from lfm_jax.eval.kept import EncodedLM, Tokens
from lfm_jax.eval.scoring import Scorer
from lfm_jax.model import LFM
from lfm_jax.text.chat import DEFAULT_TEMPLATE, special_tokens
from lfm_jax.text.codec import check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class EvalModel(EncodedLM):
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Texts that a chat template has written begin with bos, and get no second one. Replies end at eos and at the end of a
    turn; where the model thinks, stop strings and answers are looked for after the thought, and a thought that does not
    end leaves no answer.

    Args:
      model, tokenizer: as `lfm.load` gives them.
      template: chat template (`lfm.convert.hf.chat_template`); None means DEFAULT_TEMPLATE.
      max_length: the most tokens of context and continuation; more are cut off at the left. None: the model's
        max_position.
      batch_tokens: tokens of one dispatch of scores; see `Scorer`.
      slots: texts that are generated at a time.
      seed: of sampled texts; a request that comes again has the next one.
      answers: those of earlier calls with this model and these settings, and the place for new ones.
      mesh: the model's copies along `data`, each split over `tensor`; None: one device.

    Raises:
      ValueError: the tokenizer has more ids than the model, the model has neither bos nor eos, or see `Scorer`.
    """

    def __init__(
        self, model: LFM, tokenizer: Tokenizer, template: str | None = None, *, max_length: int | None = None,
        batch_tokens: int | None = None, slots: int = 16, seed: int = 0, answers: Answers | None = None,
        mesh: Mesh | None = None,
    ):
        config = model.config
        check_tokenizer(tokenizer, config)
        if not config.eos_ids:
            raise ValueError("the model has no eos_ids; lm-eval needs the token that ends a text")
        super().__init__(
            tokenizer, template or DEFAULT_TEMPLATE, special_tokens(tokenizer, config),
            eos_id=config.eos_ids[0], bos_id=config.bos_id,
            max_length=config.max_position if max_length is None else max_length, seed=seed, answers=answers,
        )
        self._model, self._slots, self._mesh = model, slots, mesh
        self._scorer = Scorer(model, self.max_length, batch_tokens, mesh)

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        return self._scorer.score(pairs)

    def _wanted(self, context: str, options: Mapping[str, Any], seed: int) -> Wanted:
        return wanted(self, self._codec, self._template, context, options, seed)

    def _generate(self, tasks: Sequence[Wanted]) -> Iterator[tuple[int, str]]:
        return run(self._model, self._codec, tasks, self._slots, self._mesh)
