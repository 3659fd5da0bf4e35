"""Writes SNIPS as chats in which slots are extracted, for `lfm tune`, and measures `extract` on its test requests.

    python experiments/snips_slots.py SNIPS.tar.xz OUT
    python experiments/snips_slots.py SNIPS.tar.xz OUT --measure MODEL [--adapter DIR] [--limit 140] [--dtype float32]

The archive has a folder for each intent with train_INTENT_full.json and validate_INTENT.json, 100 requests for testing.
An intent is a JSON schema with a text for each of its slots, none of them required; a chat is what `extract` asks, the
schema in the system message, and the slots of the request as JSON. OUT gets train.jsonl. Requests that have a slot
twice, or a value of more than 64 characters, are left out of it.

With `--measure`, exact is the share of requests whose slots all are right and no more, and F1 is of (slot, value) pairs
of all requests, values compared as texts; behind each is its standard error. `--limit` measures on so many requests,
equally many of each intent, drawn. What is measured of an intent is a line of OUT/measured.jsonl; started again with
the same settings and files it repeats none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from records import Records, stamp

LONGEST = 64
"""Characters of a value, so that even a bad model ends its answer; those of the test have 55 at most."""
MAX_NEW_TOKENS = 1280
"""14 slots, the most of an intent, as long as they can be."""

Slots = dict[str, str]
Counts = tuple[int, int, int]
"""Pairs of slot and value that are right, that are too many, and that are missing."""


class Intent(NamedTuple):
    """The requests of an intent, each with its slots."""

    name: str
    schema: dict[str, Any]
    train: list[tuple[str, Slots]]
    test: list[tuple[str, Slots]]


def main(argv: list[str]) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("snips", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("--measure", metavar="MODEL")
    flags.add_argument("--adapter", type=Path)
    flags.add_argument("--limit", type=int)
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = flags.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    intents = read(args.snips)
    if args.measure is None:
        write(args.out / "train.jsonl", intents)
    else:
        measure(args, intents)
    return 0


# -------------------------------------------------------------------- the data


def read(path: Path) -> list[Intent]:
    """All intents, in the order of their names."""
    found: dict[str, dict[str, list[tuple[str, Slots]]]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            part, _, name = Path(member.name).stem.removesuffix("_full").partition("_")
            file = archive.extractfile(member)
            if part in ("train", "validate") and file is not None:
                # One file has pairs of surrogates in it, each in three bytes.
                text = file.read().decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass").decode("utf-16")
                rows = [parsed(row["data"]) for row in json.loads(text)[name]]
                found.setdefault(name, {})[part] = [row for row in rows if row is not None]
                print(f"{name}, {part}: {len(rows):,} requests, {rows.count(None)} left out", file=sys.stderr)
    intents = []
    for name, parts in sorted(found.items()):
        slots = sorted({slot for rows in parts.values() for _, of in rows for slot in of})
        schema = {"type": "object", "additionalProperties": False,
                  "properties": {slot: {"type": "string", "maxLength": LONGEST} for slot in slots}}
        intents.append(Intent(name, schema, parts["train"], parts["validate"]))
    return intents


def parsed(pieces: Sequence[Mapping[str, str]]) -> tuple[str, Slots] | None:
    """The request in pieces of text, with its slots in the order of their names; None where a slot is there twice or
    too long."""
    pairs = [(piece["entity"], piece["text"].strip()) for piece in pieces if "entity" in piece]
    slots = dict(sorted(pairs))
    if len(slots) < len(pairs) or any(len(value) > LONGEST for value in slots.values()):
        return None
    return "".join(piece["text"] for piece in pieces).strip(), slots


def chat(schema: Mapping[str, Any], request: str, slots: Slots) -> dict[str, Any]:
    """What `extract` asks, and the answer in the form of its grammar."""
    from lfm_jax.infer.extract import EXTRACTION

    system = EXTRACTION.replace("{schema}", json.dumps(schema, ensure_ascii=False))
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": request},
                         {"role": "assistant", "content": json.dumps(slots, ensure_ascii=False)}]}


def write(path: Path, intents: Sequence[Intent]) -> None:
    chats = [chat(intent.schema, *row) for intent in intents for row in intent.train]
    random.Random(0).shuffle(chats)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in chats), encoding="utf-8")
    print(f"{path}: {len(chats):,} chats")


# -------------------------------------------------------------------- measuring


def measure(args: argparse.Namespace, intents: Sequence[Intent]) -> None:
    """Extracts from the test requests of each intent that is not on record, and prints the table."""
    of = {"model": [args.measure, stamp(args.measure)], "adapter": args.adapter and stamp(args.adapter),
          "snips": stamp(args.snips), "limit": args.limit, "dtype": args.dtype,
          "versions": {name: version(name) for name in ("jax", "llguidance")}}
    records = Records(args.out / "measured.jsonl", lambda row: row["of"] == of)
    done = {row["intent"]: row for row in records.rows}
    loaded = None
    for intent in intents:
        if intent.name in done:
            continue
        if loaded is None:
            loaded = load(args)
        some = intent.test
        if args.limit is not None:
            some = random.Random(0).sample(some, min(len(some), -(-args.limit // len(intents))))
        began = time.monotonic()
        answers = extracted(loaded, intent.schema, [request for request, _ in some])
        row = {"of": of, "intent": intent.name, "seconds": time.monotonic() - began, "answers": answers,
               "slots": [slots for _, slots in some]}
        done[intent.name] = row
        records.add(row)
        print(f"{intent.name}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table([done[intent.name] for intent in intents]))
    print(f"\n{json.dumps({key: x for key, x in of.items() if key in ('limit', 'dtype', 'versions')})}")


def load(args: argparse.Namespace) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and chat template."""
    import lfm_jax as lfm
    from lfm_jax.loading import chat_template, local

    path = local(args.measure)
    model, tokenizer = lfm.load(path, dtype=args.dtype, adapter=args.adapter)
    return model, tokenizer, chat_template(path)


def extracted(loaded: tuple[Any, Any, str | None], schema: Mapping[str, Any], requests: Sequence[str]) -> list[Slots]:
    from lfm_jax.infer.extract import extract

    model, tokenizer, template = loaded
    return extract(model, tokenizer, requests, schema, template=template, max_new_tokens=MAX_NEW_TOKENS)


def counts(answer: Slots, slots: Slots) -> Counts:
    given, wanted = ({(slot, value.strip()) for slot, value in each.items()} for each in (answer, slots))
    return len(given & wanted), len(given - wanted), len(wanted - given)


def table(rows: Sequence[dict[str, Any]]) -> str:
    from lfm_jax.eval.shares import share, share_error

    lines = ["| intent | requests | exact | slot F1 | precision | recall | s |", "|---" * 7 + "|"]
    names = [*(row["intent"] for row in rows), "all"]
    for name in names:
        some = [row for row in rows if name in (row["intent"], "all")]
        found = [counts(*pair) for row in some for pair in zip(row["answers"], row["slots"], strict=True)]
        scores = {"exact": [(float(not wrong and not missing), 1) for _, wrong, missing in found],
                  "f1": [(2 * right, 2 * right + wrong + missing) for right, wrong, missing in found],
                  "precision": [(right, right + wrong) for right, wrong, _ in found],
                  "recall": [(right, right + missing) for right, _, missing in found]}
        lines.append(" | ".join([f"| {name}", str(len(found)), *(
            f"{_percent(share(parts))} ({_percent(share_error(parts))})" for parts in scores.values()),
            f"{sum(row['seconds'] for row in some):.0f} |"]))
    return "\n".join(lines)


def _percent(x: float | str) -> str:
    return x if isinstance(x, str) else f"{100 * x:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
