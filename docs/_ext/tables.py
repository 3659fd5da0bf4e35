"""What the directives of tables have in common."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class TableDirective(SphinxDirective, abc.ABC):
    """A directive that makes a table; the text of a cell is Markdown."""

    head: tuple[str, ...]
    widths: tuple[int, ...]
    """Of the columns, relative to each other."""

    @abc.abstractmethod
    def rows(self) -> Iterable[Sequence[str]]:
        """The cells of each row."""

    def run(self) -> list[nodes.Node]:
        group = nodes.tgroup(cols=len(self.head))
        group += [nodes.colspec(colwidth=width) for width in self.widths]
        body = nodes.tbody()
        body += [self._row(cells) for cells in self.rows()]
        group += [nodes.thead("", self._row(self.head)), body]
        table = nodes.table(classes=["config"])
        table += group
        return [table]

    def _row(self, cells: Sequence[str]) -> nodes.row:
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            entry += self.parse_text_to_nodes(cell)
            row += entry
        return row
