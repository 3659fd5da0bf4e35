"""Raw data of a life of seconds: books, dialogues and schemas that are made here."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path
from typing import Any

CITIES, THINGS = ("Oslo", "Rome", "Bonn", "Lima"), ("a table", "a room", "a bus")
BOOKS = 12


def write(folder: Path) -> None:
    """Writes books, sgd and schemas below a folder, in the forms of the real ones."""
    for name in ("books", "sgd", "schemas"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(BOOKS):
        lines = [f"In the year {1800 + 7 * i + j} someone of {city} looked for {thing}, and found none by noon."
                 for j, (city, thing) in enumerate(itertools.product(CITIES, THINGS))]
        (folder / "books" / f"book-{i}.txt").write_text("\n".join(lines * 3), encoding="utf-8")
    for split, services in (("train", ("FindTable", "FindRoom")), ("test", ("FindTable", "FindBus"))):
        with lzma.open(folder / "sgd" / f"sgd_{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            for i, (city, service) in enumerate(itertools.product(CITIES * 2, services)):
                file.write(json.dumps(_dialogue(f"{split}-{i}", service, city)) + "\n")
    for i, kind in enumerate(("integer", "boolean", "string")):
        schema = {"type": "object", "properties": {"a": {"type": kind, **({"maxLength": 5} if i == 2 else {})}},
                  "required": ["a"], "additionalProperties": False}
        (folder / "schemas" / f"{i}.json").write_text(json.dumps(schema), encoding="utf-8")


def _dialogue(name: str, service: str, city: str) -> dict[str, Any]:
    thing = service.removeprefix("Find").lower()
    tool = {"name": service, "description": f"Finds a {thing}", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": list(CITIES)}}, "required": ["city"]}}
    return {"id": name, "tools": [tool], "messages": [
        {"role": "user", "content": f"I look for a {thing}."},
        {"role": "assistant", "content": "In which city?"},
        {"role": "user", "content": f"In {city}."},
        {"role": "assistant", "tool_call": {"name": service, "arguments": {"city": city}}},
        {"role": "tool", "content": [{"city": city, "number": "7"}]},
        {"role": "assistant", "content": f"There is number 7 in {city}."},
    ]}
