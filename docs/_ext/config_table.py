"""The directive `config`: a table of the fields of a config dataclass."""

from __future__ import annotations

from typing import Any

from config_fields import config_fields
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HEAD = ("field", "what it means", "type", "default")


class ConfigTable(SphinxDirective):
    """`config` with the dotted paths of one or more dataclasses: a table of the fields that they define themselves.
    The text of a cell is Markdown."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        table = nodes.table(classes=["config"])
        group = nodes.tgroup(cols=len(HEAD))
        group += [nodes.colspec(colwidth=width) for width in (20, 60, 25, 15)]
        body = nodes.tbody()
        group += [nodes.thead("", self._row(HEAD)), body]
        for field in (field for path in self.arguments[0].split() for field in config_fields(path)):
            default = f"`{field.default}`" if field.default else "required"
            body += self._row((f"`{field.name}`", field.doc, f"`{field.type}`", default))
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
    app.add_directive("config", ConfigTable)
    return {"parallel_read_safe": True}
