"""What the scripts of this folder share. Each runs one client as a user would, every way that it has, and prints a line
of JSON for each: {"way": "tools", "ok": true}, or the error.

The model (`parrot` of test_clients.py) says one sentence, or what a grammar leaves of it, and calls a tool only where
it must: the form of what it says is what is checked.
"""

import asyncio
import functools
import json
import os
import sys
import traceback

BASE, KEY, MODEL = (os.environ[name] for name in ("LFM_BASE_URL", "LFM_API_KEY", "LFM_MODEL"))
CALLS = {os.environ["LFM_CALL_TOKEN"]: 60}
"""A `logit_bias` with which the model calls a tool, for clients without `tool_choice`."""
ASKED = "What is the weather in Paris?"
CITIES = ["Paris", "Oslo"]


def weather(city: str) -> str:
    """The weather of a city."""
    assert city in CITIES, city
    return f"It rains in {city}."


def run(*ways, models=None):
    """Runs functions, plain or async, named after their ways; all of them, whatever fails.

    With `models`, by name: each function with each model.
    """
    named = [(way.__name__, way) for way in ways] if models is None else [
        (f"{kind}: {way.__name__}", functools.partial(way, model)) for kind, model in models.items() for way in ways]
    with asyncio.Runner() as loop:
        for name, way in named:
            told = {"way": name.replace("_", " "), "ok": True}
            try:
                if (doing := way()) is not None:
                    loop.run(doing)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                told |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            print(json.dumps(told), flush=True)
