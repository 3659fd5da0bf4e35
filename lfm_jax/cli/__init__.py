"""The `lfm` command: `verbs.VERBS` names the verbs, tyro parses the flags of each."""

from __future__ import annotations

import inspect
import itertools
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from lfm_jax.cli.errors import refuse
from lfm_jax.cli.verbs import Verb, beginning_with, find, overview, unknown

HELP = ("-h", "--help")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `lfm` command; exits with the verb's status, 2 on bad input, 130 at Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(args)
    except (ValueError, OSError) as error:
        status = refuse(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _run(args: list[str]) -> int:
    if not args or args[0] in HELP:
        print(overview())
        return 0
    if args[0] == "--version":
        versions = (f"{name} {metadata.version(name)}" for name in ("lfm_jax", "jax", "jaxlib", "flax"))
        print(f"{', '.join(versions)}, Python {platform.python_version()}")
        return 0
    if (verb := find(args)) is not None:
        return _call(verb, args[len(verb.name.split()) :])
    if (several := beginning_with(args[0])) and (len(args) == 1 or args[1] in HELP):
        print(overview(several))
        return 0
    raise ValueError(unknown(args))


def _call(verb: Verb, args: list[str]) -> int:
    import tyro

    from lfm_jax import recipe

    function, config = verb.resolve()
    if config is None:
        _keep_compiled(verb, args)
        return tyro.cli(function, args=args, prog=f"lfm {verb.name}")
    files = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    prog = f"lfm {verb.name} [RECIPE.yaml ...]"
    parsed = recipe.load_recipe(config, files, args[len(files) :], prog=prog, description=inspect.getdoc(function))
    _keep_compiled(verb, args)
    return function(parsed, args)


def _keep_compiled(verb: Verb, args: Sequence[str]) -> None:
    if verb.keeps and not set(HELP) & set(args):
        from lfm_jax import compile_cache

        compile_cache.enable()
