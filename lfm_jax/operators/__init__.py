"""The LIV operators, one file each, one interface; `kinds.OPERATORS` is their table."""

from typing import Any, Protocol

import jax


class Operator(Protocol):
    """What every operator is: one call for full pass, chunk and single token, on aligned rows (`state.align`)."""

    def __call__(
        self, x_BTD: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, state: Any
    ) -> tuple[jax.Array, Any]: ...
