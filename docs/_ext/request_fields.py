"""The directive `request-fields`: a table of the fields of a request's model and of what the server does with each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from tables import TableDirective

from lfm_jax.serve.fields import described


class RequestFields(TableDirective):
    """`request-fields` with the dotted path of a model."""

    required_arguments = 1
    head = ("field", "what happens")
    widths = (25, 75)

    def rows(self) -> Iterator[tuple[str, ...]]:
        module, _, name = self.arguments[0].rpartition(".")
        for field, what in described(getattr(importlib.import_module(module), name)):
            yield f"`{field}`", what


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("request-fields", RequestFields)
    return {"parallel_read_safe": True}
