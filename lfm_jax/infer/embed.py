"""Vectors of texts, and documents ranked by them, from the encoders of the LFM2 family.

LFM2.5-Embedding gives a text one vector, that of its first token; LFM2.5-ColBERT gives it one for each token (late
interaction; Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832), as its library PyLate prepares and scores
them. Files beside the weights say which, in the form of sentence-transformers.

Dimensions: B texts of a batch, T time, D model width, O width of a vector, Q vectors of a query, S of a document.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.convert.hf import load_hf
from lfm_jax.convert.safetensors_io import read_json, read_tensors
from lfm_jax.convert.sidecars import DENSE, POOLING, SENTENCES
from lfm_jax.kernels.linear import linear
from lfm_jax.loading import local
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems
from lfm_jax.text.codec import check_tokenizer, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["query", "document"]
PREFIXES: Mapping[str, str] = {"query": "query: ", "document": "document: "}
"""What LFM2.5-Embedding wants before a text."""
MAX_TOKENS = 512
"""The length that the published encoders were trained for."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
SHORTEST = 16
"""Tokens of the shortest rows that a program is compiled for; the others are powers of two."""


class NotFiniteError(ValueError):
    """The vectors of a model are not finite."""


class Rows(NamedTuple):
    """Texts as a model takes them in (`Encoder.prepare`)."""

    rows: list[tuple[np.ndarray, np.ndarray]]
    """Token ids and segment ids of each text."""
    kind: Kind

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(len(ids) for ids, _ in self.rows)


class Ranked(NamedTuple):
    """A document in the order of a ranking."""

    index: int
    """Its place in the list that was given."""
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateInteraction:
    """What a model with a vector for each token does beside its network."""

    projection_OD: np.ndarray
    """Makes a vector of a hidden state."""
    prefix_ids: Mapping[str, int]
    """The token after the first one, by kind of text."""
    query_length: int = 32
    """Tokens of every query: longer ones are cut, shorter ones filled up with `expansion_id`. Attention does not read
    what fills them up, convolutions do, and its vectors count as the others do: the code that LFM2.5-ColBERT brings
    along (`modeling_lfm2_bidirectional.py`) leaves it unmasked there, other than that of LFM2.5-Embedding."""
    expansion_id: int
    skipped_ids: frozenset[int] = frozenset()
    """Tokens of documents that get no vector: punctuation."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with all that its directory says of texts; `load_encoder` reads one.

    Raises:
      ValueError: the model is causal, or the tokenizer does not fit it.
    """

    model: LFM
    tokenizer: Tokenizer
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=lambda: PREFIXES)
    """What comes before a text, by its kind; not used with `late`."""
    late: LateInteraction | None = None
    """None: a text has one vector, that of its first token."""

    def __post_init__(self) -> None:
        if self.model.config.causal:
            raise ValueError("config.causal is True: the model sees no later tokens, so that a token's vector is not "
                             "that of its text; load an encoder, such as LFM2.5-Embedding-350M")
        check_tokenizer(self.tokenizer, self.model.config)

    def embed(
        self, texts: str | Sequence[str], kind: Kind = "document", max_tokens: int = MAX_TOKENS
    ) -> np.ndarray:
        """Does as `lfm_jax.embed`."""
        return self.vectors(self.prepare(texts, kind, max_tokens))

    def token_vectors(
        self, texts: str | Sequence[str], kind: Kind = "document", max_tokens: int = MAX_TOKENS
    ) -> list[np.ndarray]:
        """Computes the vectors of each text of a model with late interaction, float32 [S, O] of length 1.

        Args:
          texts, kind, max_tokens: as in `lfm_jax.embed`; queries have `LateInteraction.query_length` tokens.

        Raises:
          ValueError: as there, or the model has one vector for a text.
        """
        if self.late is None:
            raise ValueError("the model has one vector for a text (no 1_Dense projection); use embed")
        return self._of_tokens(self.prepare(texts, kind, max_tokens))

    def rerank(self, query: str, documents: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[Ranked]:
        """Does as `lfm_jax.rerank`."""
        if not isinstance(query, str):
            raise ValueError(f"query is {query!r:.60}; expected one text")
        return self.rank(self.prepare(query, "query", max_tokens), self.prepare(documents, "document", max_tokens))

    def vectors(self, texts: Rows) -> np.ndarray:
        """Computes the vector of each prepared text, as `lfm_jax.embed`."""
        if self.late is not None:
            raise ValueError("the model has a vector for each token and none for a text; use rerank or token_vectors")
        vectors = self._run([(ids, np.ones_like(ids)) for ids, _ in texts.rows])
        return np.stack([x_TO[0] for x_TO in vectors]) if vectors else self._none()

    def rank(self, query: Rows, documents: Rows) -> list[Ranked]:
        """Ranks prepared documents by their similarity to one prepared query, as `lfm_jax.rerank`."""
        if self.late is None:
            [query_O] = self.vectors(query)
            scores = self.vectors(documents) @ query_O
        else:
            [query_QO] = self._of_tokens(query)
            scores = np.asarray([max_sim(query_QO, x_SO) for x_SO in self._of_tokens(documents)])
        return [Ranked(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")]

    def _of_tokens(self, texts: Rows) -> list[np.ndarray]:
        assert self.late is not None
        skipped = np.asarray(sorted(self.late.skipped_ids) if texts.kind == "document" else [], np.int32)
        vectors = zip(self._run(texts.rows), texts.rows, strict=True)
        return [x_TO[~np.isin(ids, skipped)] for x_TO, (ids, _) in vectors]

    @property
    def max_tokens(self) -> int:
        """The length at which texts are cut, unless a call says another one."""
        return min(MAX_TOKENS, self.model.config.max_position)

    def _none(self) -> np.ndarray:
        return np.zeros((0, self.model.config.hidden_size), np.float32)

    def prepare(self, texts: str | Sequence[str], kind: Kind, max_tokens: int = MAX_TOKENS) -> Rows:
        """Turns texts into tokens; raises as `lfm_jax.embed`."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        config, late = self.model.config, self.late
        problems = [f"texts[{i}] is {text!r:.60}; expected a text"
                    for i, text in enumerate(texts) if not isinstance(text, str)]
        if kind not in PREFIXES:
            problems.append(f"kind is {kind!r}; choose one of {', '.join(PREFIXES)}")
        if type(max_tokens) is not int or not 2 <= max_tokens <= config.max_position:
            problems.append(f"max_tokens is {max_tokens!r}; it must be a whole number from 2 to config.max_position "
                            f"{config.max_position}")
        raise_problems("cannot embed", problems)
        rows = []
        for i, text in enumerate(texts):
            ids = encode(self.tokenizer, text if late else self.prefixes[kind] + text, config.bos_id)
            if not ids:
                raise ValueError(f"texts[{i}] has no tokens, and the tokenizer adds none; give it a text")
            length, expansion = max_tokens, 0
            if late is not None:
                length = min(late.query_length, max_tokens) if kind == "query" else max_tokens
                ids = [ids[0], late.prefix_ids[kind], *ids[1:]]
                if kind == "query":
                    expansion = max(length - len(ids), 0)
                    ids = ids[:length] + [late.expansion_id] * expansion
            ids = np.asarray(ids[:length], np.int32)
            rows.append((ids, np.where(np.arange(len(ids)) < len(ids) - expansion, 1, -1).astype(np.int32)))
        return Rows(rows, kind)

    def _run(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Returns the vectors of each row: [1, O], or [T, O] with late interaction.

        The shape of the row in a batch is its own, so that its neighbours change nothing. Two rows are the fewest,
        because products of one row take another path and round otherwise.
        """
        graphdef, params = nnx.split(self.model, nnx.Param)
        params, run = nnx.to_pure_dict(params), _program(graphdef)
        projection_OD = None if self.late is None else self.late.projection_OD
        found: dict[int, np.ndarray] = {}
        widths = [max(SHORTEST, _power_of_two(len(ids))) for ids, _ in rows]
        for T in sorted(set(widths)):
            of_width = [i for i, width in enumerate(widths) if width == T]
            most = max(2, BATCH_TOKENS // T)
            for start in range(0, len(of_width), most):
                batch = of_width[start : start + most]
                arrays = np.zeros((2, max(2, _power_of_two(len(batch))), T), np.int32)
                for row, i in enumerate(batch):
                    arrays[:, row, : len(rows[i][0])] = rows[i]
                vectors = np.asarray(run(params, *arrays, projection_OD))
                if not np.isfinite(vectors[: len(batch)]).all():
                    raise NotFiniteError(
                        "the vectors are not finite; the weights are damaged, or the dtype is too narrow")
                found |= {i: vectors[row, : len(rows[i][0])] for row, i in enumerate(batch)}
        return [found[i] for i in range(len(rows))]


def embed(
    model: LFM, tokenizer: Tokenizer, texts: str | Sequence[str], kind: Kind = "document",
    max_tokens: int = MAX_TOKENS,
) -> np.ndarray:
    """Computes a vector of each text with LFM2.5-Embedding; the product of two vectors is their similarity (cosine).

    A vector does not depend on the other texts. The published prefixes are put before texts; `load_encoder` reads
    those of a directory.

    Args:
      model: an encoder.
      tokenizer: the tokenizer of the model.
      texts: one text or several.
      kind: `query` for what is searched for, `document` for what is searched.
      max_tokens: a text is cut after so many tokens, its prefix included.

    Returns:
      float32 [texts, D], vectors of length 1: the hidden state of the first token.

    Raises:
      ValueError: the model is causal (`config.causal`), the tokenizer does not fit it, an argument is not valid, or the
        vectors are not finite (`NotFiniteError`).
    """
    return Encoder(model, tokenizer).embed(texts, kind, max_tokens)


def rerank(
    model: LFM, tokenizer: Tokenizer, query: str, documents: Sequence[str], max_tokens: int = MAX_TOKENS
) -> list[Ranked]:
    """Ranks documents by their similarity to a query, the most similar one first.

    A score is the cosine of two vectors of LFM2.5-Embedding. With LFM2.5-ColBERT, `load_encoder(path).rerank(query,
    documents)` scores by `max_sim`.

    Args:
      model, tokenizer, max_tokens: as in `embed`.
      query: what is searched for.
      documents: what is searched.

    Returns:
      (index, score) of each document; of equal scores the earlier document comes first.

    Raises:
      ValueError: as `embed`.
    """
    return Encoder(model, tokenizer).rerank(query, documents, max_tokens)


def max_sim(query_QO: np.ndarray, document_SO: np.ndarray) -> float:
    """Returns the sum, over the vectors of a query, of the product with the most similar vector of a document; minus
    infinity for a document without vectors."""
    if not len(document_SO):
        return -np.inf
    return float((query_QO @ document_SO.T).max(axis=1).sum())


def load_encoder(path: str | os.PathLike, dtype: Any = None) -> Encoder:
    """Loads an encoder with its prefixes and, if it has one, the projection of its vectors of tokens.

    Args:
      path: a directory in Hugging Face format, or a Hub id. config_sentence_transformers.json gives the prefixes,
        those that are published if it says none; 1_Dense/model.safetensors makes it a model with late interaction.
      dtype: as in `lfm_jax.load`.

    Raises:
      ValueError: as `lfm_jax.load`; the model is causal; or files beside the weights ask for what it does not do. The
        message lists all problems with these.
    """
    directory = local(Path(path))
    model, tokenizer = load_hf(directory, dtype)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json, and an encoder takes texts; put it beside the weights")
    said, problems = _read_if_there(directory, SENTENCES)
    pooling, found = _read_if_there(directory, POOLING)
    problems += found
    if not pooling.get("pooling_mode_cls_token", True):
        problems.append(f"{POOLING} has pooling_mode_cls_token false; only the first token's vector is supported")
    prefixes = {kind: (said.get("prompts") or {}).get(kind, prefix) for kind, prefix in PREFIXES.items()}
    problems += [f"{SENTENCES}: the prompt of {kind} is {prefix!r}; expected a text"
                 for kind, prefix in prefixes.items() if not isinstance(prefix, str)]
    late = None
    if os.path.lexists(directory / DENSE):
        late, found = _read_late_interaction(directory, said, model, tokenizer)
        problems += found
    raise_problems(f"cannot load {path}", problems, most=None)
    return Encoder(model, tokenizer, prefixes, late)


def _read_if_there(directory: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    return read_json(directory, name) if os.path.lexists(directory / name) else ({}, [])


def _read_late_interaction(
    directory: Path, said: Mapping[str, Any], model: LFM, tokenizer: Tokenizer
) -> tuple[LateInteraction | None, list[str]]:
    tensors, problems = read_tensors(directory, DENSE)
    shapes = {name: list(array.shape) for name, array in tensors.items()}
    D = model.config.hidden_size
    if not problems and (shapes.keys() != {"linear.weight"} or shapes["linear.weight"][1:] != [D]):
        problems.append(f"{DENSE} has {shapes}; expected one linear.weight [width of a vector, {D}]")
    prefixes = {"query": said.get("query_prefix", "[Q] "), "document": said.get("document_prefix", "[D] ")}
    ids = {kind: tokenizer.token_to_id(prefix) for kind, prefix in prefixes.items()}
    problems += [f"{kind}_prefix {prefixes[kind]!r} is no token of the tokenizer; add it, or correct {SENTENCES}"
                 for kind, id_ in ids.items() if id_ is None]
    length = said.get("query_length", 32)
    if type(length) is not int or length < 2:
        problems.append(f"{SENTENCES}: query_length is {length!r}; it must be a whole number of at least 2")
    for name, only in (("do_query_expansion", True), ("attend_to_expansion_tokens", False)):
        if said.get(name, only) is not only:
            problems.append(f"{SENTENCES}: {name} is {said[name]!r}; only {only} is supported")
    if not model.config.eos_ids:
        problems.append("config.json has no eos_token_id, which fills queries up")
    if problems:
        return None, problems
    words = said.get("skiplist_words", list(string.punctuation))
    skipped = frozenset(id_ for word in words if (id_ := tokenizer.token_to_id(word)) is not None)
    return LateInteraction(
        projection_OD=tensors["linear.weight"].astype(np.float32), query_length=length,
        prefix_ids={kind: id_ for kind, id_ in ids.items() if id_ is not None},
        expansion_id=model.config.eos_ids[0], skipped_ids=skipped,
    ), []


@functools.lru_cache(maxsize=8)  # The oldest structure's executables go when more models than this are in use.
def _program(graphdef: nnx.GraphDef[LFM]) -> Callable[..., jax.Array]:
    @jax.jit
    def run(
        params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array, projection_OD: jax.Array | None
    ) -> jax.Array:
        """Returns vectors of length 1: of the first tokens [B, 1, D], or projected ones of all tokens [B, T, O]."""
        model = nnx.merge(graphdef, params)
        x_BTD, _ = model(tokens_BT, None, segment_ids_BT, logits=None, padding="right")
        x_BTO = x_BTD[:, :1] if projection_OD is None else linear(x_BTD, projection_OD, dtype="float32")
        x_BTO = x_BTO.astype(jnp.float32)
        return x_BTO / jnp.maximum(jnp.linalg.norm(x_BTO, axis=-1, keepdims=True), 1e-12)

    return run


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
