"""The directive `config`: a table of the fields of a config dataclass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from config_fields import config_fields
from sphinx.application import Sphinx
from tables import TableDirective


class ConfigTable(TableDirective):
    """`config` with the dotted paths of one or more dataclasses: a table of the fields that they define themselves."""

    required_arguments = 1
    final_argument_whitespace = True
    head = ("field", "what it means", "type", "default")
    widths = (20, 60, 25, 15)

    def rows(self) -> Iterator[tuple[str, ...]]:
        for field in (field for path in self.arguments[0].split() for field in config_fields(path)):
            default = f"`{field.default}`" if field.default else "required"
            yield f"`{field.name}`", field.doc, f"`{field.type}`", default


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("config", ConfigTable)
    return {"parallel_read_safe": True}
