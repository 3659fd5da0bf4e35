"""The fields of a config dataclass, with the docstrings that follow them in its source."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
import typing
from types import ModuleType
from typing import Any, NamedTuple

LONG = 40
"""Characters beyond which a default is told by its length or its source."""


class Field(NamedTuple):
    """One field."""

    name: str
    type: str
    """As the source has it, a `Literal` as its choices."""
    default: str
    """Empty where the field has none and must be given."""
    doc: str
    """Empty where no docstring follows the field."""


def config_fields(path: str) -> list[Field]:
    """The fields of the dataclass at a dotted path that it defines itself, in their order."""
    where, _, name = path.rpartition(".")
    module = importlib.import_module(where)
    cls = getattr(module, name)
    values = {field.name: field for field in dataclasses.fields(cls)}
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return [
        Field(node.target.id, _type(node.annotation, module), _default(values[node.target.id], node.value), _doc(after))
        for node, after in zip(definition.body, [*definition.body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in values
    ]


def _type(node: ast.expr, module: ModuleType) -> str:
    class Plain(ast.NodeTransformer):
        """Drops what `Annotated` adds for the parser of flags, and spells out choices."""

        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
                return self.visit(node.slice.elts[0])
            return self.generic_visit(node)

        def visit_Name(self, node: ast.Name) -> ast.AST:
            value = getattr(module, node.id, None)
            if typing.get_origin(value) is not typing.Literal:
                return node
            return ast.Name(" or ".join(map(str, typing.get_args(value))))

    return ast.unparse(Plain().visit(node))


def _default(field: dataclasses.Field[Any], node: ast.expr | None) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        text = value if isinstance(value, str) else repr(value)
        if len(text) <= LONG:
            return text or "''"
        return f"{len(value)} values" if isinstance(value, tuple) else ast.unparse(node) if node else text
    if field.default_factory is dataclasses.MISSING:
        return ""
    [factory] = [keyword.value for keyword in node.keywords if keyword.arg == "default_factory"]
    return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"


def _doc(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""
