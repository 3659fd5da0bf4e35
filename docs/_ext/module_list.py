"""The directive `modules`: the reference of modules, and of all that lie in packages, from their docstrings."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTION = """\
## {name}

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :ignore-module-all:
```

"""


def module_names(name: str) -> list[str]:
    """A module by name, and where it is a package all modules in it; private ones and `__main__` are left out."""
    path = getattr(importlib.import_module(name), "__path__", None)
    below = pkgutil.iter_modules(path) if path else ()
    return [name, *(found for module in below if not module.name.startswith("_")
                    for found in module_names(f"{name}.{module.name}"))]


class Modules(SphinxDirective):
    """`modules` with one or more names of modules or packages: a section for each module."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        names = [found for name in self.arguments[0].split() for found in module_names(name)]
        text = "".join(SECTION.format(name=name) for name in names)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("modules", Modules)
    return {"parallel_read_safe": True}
