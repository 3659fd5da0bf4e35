"""Arguments that several verbs have."""

from __future__ import annotations

from typing import Annotated

import tyro

ModelName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
"""A model, as `loading.local` takes it. It stays a text until then: a Path would lose the `./` by which `./OWNER/NAME`
is a path, and no Hub id."""
