"""The process of `validation`: reads lines of JSON, {"value", "schema"} or {"pattern", "text"}, and says of each
whether the value is valid, or the pattern is in the text.

    python validator_process.py SECONDS   ends where a line takes more: whoever asks has killed it before, or is dead

It imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any


def verdict(line: bytes) -> dict[str, Any]:
    try:
        question = json.loads(line)
        if "pattern" in question:
            return {"yes": re.search(question["pattern"], question["text"]) is not None}
        from jsonschema.validators import Draft202012Validator, validator_for  # Not asked of those who have none.
        from referencing import Registry

        schema = question["schema"]
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        # A registry of its own fetches nothing.
        validator = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)
        return {"yes": validator.is_valid(question["value"])}
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)[:400],
                "at_fault": not isinstance(error, (ArithmeticError, RecursionError))}


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
