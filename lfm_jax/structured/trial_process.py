"""The process of `trial.tried`: compiles the grammar on standard input and writes what llguidance has against it.

It imports nothing of this package, so that it starts in a tenth of a second. Arguments: seconds of a processor, MiB of
memory, MiB of stack.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from typing import Any

MAX_IDS = 2**20
"""Most ids of the tokenizer, where the text names tokens by number (`<[7]>`)."""


def main(text: str, seconds: int, memory: int, stack: int) -> str:
    try:
        import resource
    except ImportError:  # Not on Windows.
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (memory << 20, memory << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found: list[str] = []
    threading.stack_size(stack << 20)
    thread = threading.Thread(target=lambda: found.append(compiled(text)))
    thread.start()
    thread.join()
    return found[0]


def compiled(text: str) -> str:
    """Compiles a grammar and its first mask; an error, or nothing."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    names = sorted(set(re.findall(r"<[^<>\s]+>", text)))
    most = max([0, *(int(number) for number in re.findall(r"<\[[^]]*?(\d{1,9})\]>", text))])
    size = min(MAX_IDS, max(most, 256 + len(names)) + 1)
    tokenizer = LLTokenizer(json.dumps(a_tokenizer(names)), n_vocab=size, eos_token=[0])
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def a_tokenizer(special: list[str]) -> dict[str, Any]:
    """A tokenizer of bytes and of whatever special tokens the grammar names, in the format of Hugging Face."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    as_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": name} | as_is for i, name in enumerate(special)],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []},
    }


if __name__ == "__main__":
    sys.stdout.buffer.write(main(sys.stdin.buffer.read().decode(), *map(int, sys.argv[1:])).encode())
