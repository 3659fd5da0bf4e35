"""The process of `validation.is_valid`: reads lines [value, schema] and says of each whether the value is valid.

    python validator_process.py SECONDS   ends where a line takes more: whoever asks has killed it before, or is dead

It imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry


def verdict(line: bytes) -> dict[str, Any]:
    try:
        value, schema = json.loads(line)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        # A registry of its own fetches nothing.
        validator = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)
        return {"valid": validator.is_valid(value)}
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)[:400]}


def main() -> None:
    most = int(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What libraries print is no verdict.
    print("{}", file=out, flush=True)
    for line in sys.stdin.buffer:
        signal.alarm(most)  # Of the system: a pattern that is at work lets Python do nothing.
        print(json.dumps(verdict(line)), file=out, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
