"""The directive `verbs`: what `lfm --help` prints, and `lfm VERB --help` for each verb that takes no recipe."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH = "84"
"""Columns of the text."""


def printed(*args: str) -> str:
    """What `lfm ARGS` prints."""
    from lfm_jax.cli import main

    out = io.StringIO()
    os.environ |= {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(args)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


class Verbs(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        from lfm_jax.cli.verbs import VERBS

        text = f"## All verbs\n\n```text\n{printed('--help')}\n```\n\n"
        for verb in VERBS:
            if verb.config is None:
                text += f"## lfm {verb.name}\n\n```text\n{printed(*verb.name.split(), '--help')}\n```\n\n"
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("verbs", Verbs)
    return {"parallel_read_safe": True}
