"""A conversation in the terminal: `lfm chat`."""

from __future__ import annotations

import difflib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm_jax.infer.generate import Piece, stream_pieces
from lfm_jax.model import LFM
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.text.chat import DEFAULT_TEMPLATE, encode_chat, reply_stage, turn_stop_ids
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.text.thoughts import Split, ThoughtCounter, ThoughtSplitter, thinking

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WELCOME = "Type a message and press Enter. /help lists the commands and keys."
LEAVING = "Ctrl-C once more, Ctrl-D or /exit leaves."
COMMANDS = {
    "/help": "lists this",
    "/system TEXT": "sets the system message, or removes it where TEXT is -; without TEXT it shows the one that is set",
    "/save FILE": "writes the conversation to a new file, as a JSON list of messages",
    "/reset": "forgets the conversation, but not the system message",
    "/exit": "leaves, as Ctrl-D does",
}
KEYS = """\
Enter sends, Alt-Enter (or Esc, then Enter) begins a new line.
Up and Down go through what you have typed, Ctrl-R searches it.
Ctrl-C stops a reply; what is written of it stays in the conversation.
Put a space before a message that begins with /."""


def chat_loop(
    model: LFM,
    tokenizer: Tokenizer,
    template: str | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 512,
    *,
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[..., None] = print,
) -> list[dict[str, str]]:
    """Talks until /exit or the end of input; /help lists the other commands.

    Ctrl-C stops a reply and keeps what is written of it. At the prompt it says how to leave, and the second time
    leaves. A thought is shown under the line `[thinking]`, and then the answer under `[answer]`.

    Args:
      model, tokenizer, sampling: as in `generate`.
      template: chat template; None means DEFAULT_TEMPLATE.
      max_new_tokens: longest reply; one also ends where the model's context is full.
      system: text of a system message that opens the conversation.
      read: asks for a message, given the prompt to show.
      write: shows text; takes the keywords `end` and `flush` of `print`.

    Returns:
      The messages of the conversation; those that began with a thought have it as `reasoning_content`.

    Raises:
      ValueError: the model is an encoder, a tokenizer that does not fit the model, a bad option, or a template that
        fails.
    """
    model.config.need_causal("a chat")
    check_tokenizer(tokenizer, model.config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    talk = _Talk(model, tokenizer, template or DEFAULT_TEMPLATE, sampling, max_new_tokens, write)
    talk.set_system(system)
    write(WELCOME)
    interrupted = False
    while True:
        try:
            line = read("> ").rstrip()
        except EOFError:
            write("")
            break
        except KeyboardInterrupt:
            if interrupted:
                break
            interrupted = True
            write(LEAVING)
            continue
        interrupted = False
        if line == "/exit":
            break
        try:
            talk.take(line)
        except KeyboardInterrupt:  # Between two tokens it stops the reply; here there is nothing to stop.
            write("")
        except ValueError as error:
            write(str(error))
        except RuntimeError as error:  # Of the device, which often has room for a shorter conversation.
            reason = str(error).partition("\n")[0]
            write(f"The reply failed: {reason}\nYour message is not kept, but the conversation before it is: /save "
                  "FILE writes it to a file, /reset begins anew.")
    return talk.messages


class _Talk:
    """The conversation so far, and what a line does to it. A line that raises an error leaves it as it was."""

    def __init__(
        self, model: LFM, tokenizer: Tokenizer, template: str, sampling: Sampling, max_new_tokens: int,
        write: Callable[..., None],
    ):
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._most, self._write = sampling, max_new_tokens, write
        self._stop_ids = turn_stop_ids(tokenizer, model.config)
        self._thinking = thinking(tokenizer, template)
        self._system: list[dict[str, str]] = []
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*self._system, *self._turns]

    def take(self, line: str) -> None:
        """Answers a message or obeys a command."""
        if command := re.fullmatch(r"(/[^\s/]*)(?:\s+(.*))?", line, re.DOTALL):  # With a second / it is a path.
            self._obey(command[1], command[2] or "")
        elif message := line.strip():
            self._answer(message)

    def set_system(self, text: str | None) -> None:
        system = [{"role": "system", "content": text}] if text else []
        self._encode([*system, {"role": "user", "content": "?"}])  # A template may refuse it.
        self._system = system

    def _obey(self, name: str, rest: str) -> None:
        names = [usage.split()[0] for usage in COMMANDS]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"There is no command {name}{nearest}. /help lists all; put a space before a message that "
                             "begins with /.")
        if rest and name not in ("/system", "/save"):
            raise ValueError(f"{name} takes no text; put a space before a message that begins with /.")
        match name:
            case "/help":
                self._write("\n".join([*(f"{usage:14}{what}" for usage, what in COMMANDS.items()), KEYS]))
            case "/reset":
                self._turns = []
                self._write("The conversation is forgotten.")
            case "/save":
                self._save(rest)
            case "/system" if rest == "-":
                self.set_system(None)
                self._write("There is no system message any more.")
            case "/system" if rest:
                self.set_system(rest)
                self._write("The system message is set. The next replies follow it; /reset begins anew with it.")
            case "/system":
                self._write(f"The system message: {self._system[0]['content']}" if self._system
                            else "There is no system message. /system TEXT sets one.")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a new file: /save talk.json")
        if not self._turns:
            raise ValueError("There is nothing to save yet.")
        content = (json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n").encode()
        try:
            path = Path(name).expanduser()
            path.open("x").close()
            try:
                path.write_bytes(content)
            except OSError:  # Half a file would be in the way of the next try.
                path.unlink()
                raise
        except FileExistsError:
            raise ValueError(f"{name} is there already; name a new file.") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be written: {error.strerror}") from None
        except RuntimeError as error:  # ~ of nobody.
            raise ValueError(f"{name} cannot be written: {error}") from None
        self._write(f"{len(self.messages)} messages are in {path}.")

    def _answer(self, message: str) -> None:
        turns = [*self._turns, {"role": "user", "content": message}]
        ids = self._encode([*self._system, *turns])
        context = self._model.config.max_position
        if (room := context - len(ids)) < 1:
            raise ValueError(
                f"The conversation would take {len(ids)} tokens, and the model's context holds {context}: nothing is "
                "left for a reply. Send something shorter, or begin anew with /reset; /save FILE keeps what there is.")
        most = min(self._most, room)
        marks = self._thinking.token_ids if self._thinking else ()
        begin = reply_stage(self._tokenizer, self._thinking, ids)
        reply = _Shown(self._write, ThoughtSplitter(begin), ThoughtCounter(self._tokenizer, self._thinking, begin))
        tokens, first, began, stopped = [], 0.0, time.monotonic(), False
        try:
            with _interrupts() as asked:
                for piece in stream_pieces(self._model, self._tokenizer, ids, self._sampling, most,
                                           stop_ids=self._stop_ids, shown=marks):
                    if asked.is_set():
                        raise KeyboardInterrupt
                    first = first or time.monotonic() - began
                    tokens += piece.tokens
                    reply.push(piece)
            reply.finish()
        except KeyboardInterrupt:
            stopped = True
        except (ValueError, RuntimeError):
            if reply.thought or reply.answer:
                self._write("")  # What is wrong is said on a line of its own.
            raise
        seconds = time.monotonic() - began
        if stopped and not (reply.thought or reply.answer):
            self._write("[stopped before the first word; your message is not kept]")
            return
        thought = {"reasoning_content": reply.thought} if reply.thought else {}
        self._turns = [*turns, {"role": "assistant", "content": reply.answer, **thought}]
        notes = [_speed(len(tokens), first, seconds)]
        if stopped:
            notes = ["stopped", *notes]
        elif tokens[-1] not in self._stop_ids:
            notes.append(f"cut at the limit of {most} tokens (--max-new-tokens)" if most == self._most else
                         f"cut where the model's context of {context} tokens is full; /reset begins anew")
        self._write(f"\n[{'; '.join(notes)}]")

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return encode_chat(self._tokenizer, self._model.config, self._template, messages)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C sets while the block runs; a second Ctrl-C raises KeyboardInterrupt.

    Raised at once it could be lost: Python ignores what callbacks of its collector raise.
    """
    asked = threading.Event()

    def note(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # Which alone may handle signals.
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Shown:
    """Shows a reply as it comes: its thought, if it has one, and the answer, each under a line that says so."""

    def __init__(self, write: Callable[..., None], splitter: ThoughtSplitter, counter: ThoughtCounter):
        self._write, self._splitter, self._counter = write, splitter, counter
        self.thought = self.answer = ""

    def push(self, piece: Piece) -> None:
        self._counter.push(piece.tokens)
        if self._counter.none:
            self._splitter.skip()
        self._show(self._splitter.push(piece.text))

    def finish(self) -> None:
        self._show(self._splitter.finish())

    def _show(self, new: Split) -> None:
        if new.thought:
            heading = "" if self.thought else "[thinking]\n"
            self.thought += new.thought  # What is kept is never less than what is shown.
            self._write(heading + new.thought, end="", flush=True)
        if new.answer:
            heading = "\n[answer]\n" if self.thought and not self.answer else ""
            self.answer += new.answer
            self._write(heading + new.answer, end="", flush=True)


def _speed(count: int, first: float, seconds: float) -> str:
    """How many tokens there are, how fast they came after the first one, and when that one came."""
    rate = f", {(count - 1) / (seconds - first):.1f} tokens/s" if count > 1 and seconds > first else ""
    return f"{count} token{'s' * (count != 1)}{rate}, the first after {first:.2f} s"
