"""Docstrings as this project writes them (`code` in single backticks, lists with dashes) made ready for Sphinx."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
SPECIAL = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")
LIST = re.compile(r"^(?! *- )(\S.*|( *)\S.*)\n(?=\2 +- )", re.MULTILINE)
"""A line right before an indented list: reStructuredText wants a blank one between them."""


def to_rst(text: str) -> str:
    """Single backticks become literals; what reStructuredText would read as markup is escaped."""
    text, parts, at = LIST.sub(r"\1\n\n", text), [], 0
    for match in CODE.finditer(text):
        parts += [SPECIAL.sub(r"\\\g<0>", text[at : match.start()]), f"``{' '.join(match[2].split())}``"]
        # A literal must end at a space or at punctuation.
        if text[match.end() : match.end() + 1].isalnum():
            parts.append("\\ ")
        at = match.end()
    return "".join(parts) + SPECIAL.sub(r"\\\g<0>", text[at:])


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines)).split("\n")
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # A comment: napoleon takes what stands before a colon in the first line for a type.


def without_fields(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, None] | None:
    """Leaves the fields of a dataclass out of its head: they are listed below it."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(obj) else None


def unambiguous(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Node) -> nodes.Node | None:
    """A type in a signature by its bare name, where exactly one class has it; `bytes` is not some class's attribute."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    found = [name for name, entry in domain.objects.items()
             if entry.objtype == "class" and name.count(".") > 1 and name.rpartition(".")[2] == node["reftarget"]]
    if len(found) != 1:
        return None
    node["reftarget"] = found[0]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "class", found[0], node, text)


def exact(app: Sphinx, document: nodes.document) -> None:
    """Has names in signatures looked up as they stand: Sphinx would search every object that ends in them."""
    for node in document.findall(addnodes.pending_xref):
        if node.get("refdomain") == "py" and not node.get("refspecific"):
            node.attributes.pop("refspecific", None)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=100)  # Before napoleon.
    app.connect("autodoc-process-signature", without_fields)
    app.connect("doctree-read", exact)
    app.connect("missing-reference", unambiguous)
    return {"parallel_read_safe": True}
