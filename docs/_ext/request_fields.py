"""The directive `request-fields`: a table of the fields of a request's model and of what the server does with each."""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lfm_jax.serve.fields import described


class RequestFields(SphinxDirective):
    """`request-fields` with the dotted path of a model."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        model = getattr(importlib.import_module(module), name)
        group = nodes.tgroup(cols=2)
        group += [nodes.colspec(colwidth=width) for width in (25, 75)]
        body = nodes.tbody()
        group += [nodes.thead("", self._row(("field", "what happens"))), body]
        for field, what in described(model):
            body += self._row((f"`{field}`", what))
        table = nodes.table(classes=["config"])
        table += group
        return [table]

    def _row(self, cells: tuple[str, ...]) -> nodes.row:
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            entry += self.parse_text_to_nodes(cell)
            row += entry
        return row


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("request-fields", RequestFields)
    return {"parallel_read_safe": True}
