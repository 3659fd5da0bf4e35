"""Tokens that a frozen output matrix cannot tell apart.

A vocabulary has tokens that pretraining never met; their rows of the table are all at about one place. An adapter
leaves the table as it is: where chats use such a token as a mark, its logit is that of all the others, whatever is
learnt.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from tokenizers import Tokenizer

COSINE = 0.995
"""Rows at a smaller angle are the same. Of SmolLM2-135M in 8 bits, tokens that were never trained are at 1.0000 with
each other, and `<|im_start|>`, which was, is at 0.993 with them."""


def alike(table_VD: np.ndarray, learnt: Collection[int], tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """Added tokens that are learnt, each with the added tokens whose rows of the table are the same.

    Args:
      table_VD: the output matrix.
      learnt: ids of targets.
    """
    added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if id < len(table_VD)}
    ids = sorted(added)
    rows = table_VD[ids].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    same = rows @ rows.T >= COSINE
    return [(added[id], [added[other] for other, is_same in zip(ids, same[i], strict=True) if is_same and other != id])
            for i, id in enumerate(ids) if id in learnt and same[i].sum() > 1]
