"""Vectors of texts, and documents ranked by them, from the encoders of the LFM2 family.

LFM2.5-Embedding gives a text one vector, that of its first token; LFM2.5-ColBERT gives it one for each token (late
interaction; Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832), as its library PyLate prepares and scores
them. Files beside the weights say which, in the form of sentence-transformers.

Dimensions: B texts of a batch, T time, D model width, O width of a vector, Q vectors of a query, S of a document,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class Row(NamedTuple):
    """A text as a model takes it in (`Encoder.prepare`)."""

    ids: np.ndarray
    """int32 [T]: its tokens."""
    read: int
    """How many of them attention reads, from the first one on: all but what fills a query up."""
    kind: Kind

    @property
    def padded(self) -> int:
        """The length of the row in a batch: its own alone, so that its neighbours change nothing."""
        return max(SHORTEST, _power_of_two(len(self.ids)))


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
        self, texts: str | Sequence[str], kind: Kind = "document", max_tokens: int = MAX_TOKENS,
        dimensions: int | None = None,
    ) -> np.ndarray:
        """Does as `lfm_jax.embed`."""
        self.check_dimensions(dimensions)
        rows = self.prepare(texts, kind, max_tokens)
        vectors_BD = np.zeros((len(rows), dimensions or self.model.config.hidden_size), np.float32)
        for i, x_SO in self._each(rows):
            vectors_BD[i] = shortened(x_SO[0], dimensions)
        return vectors_BD

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
        found = dict(self._each(self.prepare(texts, kind, max_tokens)))
        return [found[i] for i in range(len(found))]

    def rerank(self, query: str, documents: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[Ranked]:
        """Does as `lfm_jax.rerank`."""
        if not isinstance(query, str):
            raise ValueError(f"query is {query!r:.60}; expected one text")
        asked, rows = self.prepare(query, "query", max_tokens), self.prepare(documents, "document", max_tokens)
        [(_, query_QO)] = self._each(asked)
        scores = np.zeros(len(rows))
        for i, x_SO in self._each(rows):  # Scores are kept, vectors are not: those of tokens would take much room.
            scores[i] = max_sim(query_QO, x_SO)
        return ranking(scores)

    @property
    def max_tokens(self) -> int:
        """The length at which texts are cut, unless a call says another one."""
        return min(MAX_TOKENS, self.model.config.max_position)

    def check_dimensions(self, dimensions: int | None = None) -> None:
        """Checks that a text has one vector, and that it can be shortened to so many numbers.

        Raises:
          ValueError: it has not, or it cannot.
        """
        D = self.model.config.hidden_size
        if self.late is not None:
            raise ValueError("the model has a vector for each token and none for a text; use rerank or token_vectors")
        if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= D):
            raise ValueError(f"dimensions is {dimensions!r}; it must be from 1 to the width of a vector, {D}")

    def prepare(
        self, texts: str | Sequence[str], kind: Kind, max_tokens: int = MAX_TOKENS, *, cuts: bool = True,
        name: str = "texts",
    ) -> list[Row]:
        """Turns texts into tokens.

        Args:
          texts, kind, max_tokens: as in `lfm_jax.embed`.
          cuts: cut what is longer than max_tokens, rather than refuse it.
          name: of the texts, in errors.

        Raises:
          ValueError: as in `lfm_jax.embed`.
        """
        single, late = isinstance(texts, str), self.late
        if not isinstance(texts, Iterable):
            raise ValueError(f"{name} is {texts!r:.60}; expected a text or several")
        texts = [texts] if isinstance(texts, str) else list(texts)
        places = [name if single else f"{name}[{i}]" for i in range(len(texts))]
        problems = [f"{place} is {text!r:.60}; expected a text"
                    for place, text in zip(places, texts, strict=True) if not isinstance(text, str)]
        if kind not in PREFIXES:
            problems.append(f"kind is {kind!r}; choose one of {', '.join(PREFIXES)}")
        raise_problems("cannot embed", [*problems, *self._wrong_length(max_tokens)])
        query_length = late.query_length if late is not None and kind == "query" else None
        rows = []
        for place, text in zip(places, texts, strict=True):
            try:
                ids = encode(self.tokenizer, text if late else self.prefixes[kind] + text, self.model.config.bos_id)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if not ids:
                raise ValueError(f"{place} has no tokens, and the tokenizer adds none; give it a text")
            if late is not None:
                ids = [ids[0], late.prefix_ids[kind], *ids[1:]]
            ids = _cut(np.asarray(ids, np.int32), min(max_tokens, query_length or max_tokens), cuts, place)
            read = len(ids)
            if late is not None and query_length is not None:
                ids = np.pad(ids, (0, min(query_length, max_tokens) - read), constant_values=late.expansion_id)
            rows.append(Row(ids, read, kind))
        return rows

    def prepare_ids(
        self, rows: Sequence[Sequence[int]], max_tokens: int = MAX_TOKENS, *, cuts: bool = True, name: str = "ids"
    ) -> list[Row]:
        """Takes the tokens of texts as they are: no prefix and no special token is added.

        So a model reads what was sent and nothing else. `tokenizer.encode(prefix + text).ids` gives the vector that the
        text has; its first token is bos, whose vector it is.

        Args:
          rows: token ids of each text.
          max_tokens, cuts, name: as in `prepare`.

        Raises:
          ValueError: a text without tokens, an id that the model does not have, or as `prepare`.
        """
        V, problems, found = self.model.config.vocab_size, self._wrong_length(max_tokens), []
        for i, ids in enumerate(rows):
            ids = np.asarray(ids)
            if ids.shape == (0,):
                problems.append(f"{name}[{i}] has no tokens")
            elif ids.ndim != 1 or ids.dtype.kind not in "iu":
                problems.append(f"{name}[{i}] is {rows[i]!r:.60}; expected token ids")
            elif len(wrong := np.flatnonzero((ids < 0) | (ids >= V))):
                problems.append(f"{name}[{i}][{wrong[0]}] is {ids[wrong[0]]}; token ids lie in 0..{V - 1}")
            found.append(ids)
        raise_problems("cannot embed", problems)
        cut = [_cut(ids, max_tokens, cuts, f"{name}[{i}]") for i, ids in enumerate(found)]
        return [Row(ids.astype(np.int32), len(ids), "document") for ids in cut]

    def _wrong_length(self, max_tokens: int) -> list[str]:
        most = self.model.config.max_position
        if type(max_tokens) is int and 2 <= max_tokens <= most:
            return []
        return [f"max_tokens is {max_tokens!r}; it must be a whole number from 2 to config.max_position {most}"]

    def _each(self, rows: Sequence[Row]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number and the vectors of each row, [1, D] or [S, O] with late interaction, the shortest first."""
        compute, by_length = self.program(), defaultdict(list)
        for i, row in enumerate(rows):
            by_length[row.padded].append(i)
        for T, numbers in sorted(by_length.items()):
            for batch in itertools.batched(numbers, rows_of_batch(T)):
                yield from zip(batch, map(checked, compute([rows[i] for i in batch])), strict=True)

    def program(self) -> Callable[[Sequence[Row]], list[np.ndarray]]:
        """Returns a function that computes the vectors of each row of a batch, float32 [1, D], or [S, O] with late
        interaction; with the weights that the model has now.

        Its rows have one padded length T, and are at most `rows_of_batch(T)`. Whether vectors are finite is for
        `checked`.
        """
        graphdef, params = nnx.split(self.model, nnx.Param)
        params, run, late = nnx.to_pure_dict(params), _program(graphdef), self.late
        projection_OD = None if late is None else late.projection_OD
        skipped = np.asarray([] if late is None else sorted(late.skipped_ids), np.int32)

        def vectors_of(row: Row, x_TO: np.ndarray) -> np.ndarray:
            if late is None or row.kind == "query":
                return x_TO[: len(row.ids)]
            return x_TO[: len(row.ids)][~np.isin(row.ids, skipped)]

        def compute(rows: Sequence[Row]) -> list[np.ndarray]:
            tokens_BT = np.zeros(shape_of_batch(rows), np.int32)
            segment_ids_BT = np.zeros_like(tokens_BT)
            for i, row in enumerate(rows):
                tokens_BT[i, : len(row.ids)] = row.ids
                segment_ids_BT[i, : len(row.ids)] = -1
                segment_ids_BT[i, : row.read] = 1
            x_BTO = np.asarray(run(params, tokens_BT, segment_ids_BT, projection_OD))
            return [vectors_of(row, x_BTO[i]) for i, row in enumerate(rows)]

        return compute


def embed(
    model: LFM, tokenizer: Tokenizer, texts: str | Sequence[str], kind: Kind = "document",
    max_tokens: int = MAX_TOKENS, dimensions: int | None = None,
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
      dimensions: how many numbers of a vector are kept, the first ones, which are brought back to length 1; None: all.

    Returns:
      float32 [texts, D], or [texts, dimensions], vectors of length 1: the hidden state of the first token.

    Raises:
      ValueError: the model is causal (`config.causal`), the tokenizer does not fit it, an argument is not valid, or the
        vectors are not finite (`NotFiniteError`).
    """
    return Encoder(model, tokenizer).embed(texts, kind, max_tokens, dimensions)


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


def shortened(vector_D: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Returns the first numbers of a vector, brought back to length 1; the vector itself for None."""
    if dimensions is None:
        return vector_D
    first = vector_D[:dimensions]
    return first / np.maximum(np.linalg.norm(first), 1e-12)


def ranking(scores: np.ndarray) -> list[Ranked]:
    """Returns (index, score) of each document, the highest score first, of equal ones the earlier document."""
    return [Ranked(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")]


def checked(x_SO: np.ndarray) -> np.ndarray:
    """Returns the vectors of a text; raises NotFiniteError if they are not finite."""
    if not np.isfinite(x_SO).all():
        raise NotFiniteError("the vectors are not finite; the weights are damaged, or the dtype is too narrow")
    return x_SO


def rows_of_batch(T: int) -> int:
    """Returns the most rows of a padded length that a batch has."""
    return max(2, BATCH_TOKENS // T)


def shape_of_batch(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns (B, T) of a batch with these rows, which have one padded length."""
    # Two rows are the fewest, because products of one row take another path and round otherwise.
    return max(2, _power_of_two(len(rows))), rows[0].padded


def _cut(ids: np.ndarray, most: int, cuts: bool, place: str) -> np.ndarray:
    if len(ids) > most and not cuts:
        raise ValueError(f"{place} has {len(ids)} tokens, and at most {most} are read; shorten it, or let it be cut")
    return ids[:most]


def max_sim(query_QO: np.ndarray, document_SO: np.ndarray) -> float:
    """Returns the sum, over the vectors of a query, of the product with the most similar vector of a document; minus
    infinity for a document without vectors. Of one vector each it is their product."""
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
    directory = local(path)
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
