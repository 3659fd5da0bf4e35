"""Lines typed in a terminal: editing, a history that lasts, messages of several lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_jax import compile_cache
from lfm_jax.files import say

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


def reader() -> Callable[[str], str]:
    """What asks for a message, given the prompt to show: `input`, unless a person is at a terminal.

    There Enter ends a message, Alt-Enter begins a line in it, lines that are pasted together stay one message, and
    Ctrl-R searches the history. As `input` it raises EOFError at Ctrl-D, and KeyboardInterrupt at Ctrl-C where nothing
    is typed; where something is, Ctrl-C drops it.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        history=_history(), key_bindings=_keys(), multiline=True, prompt_continuation="  ",
        enable_open_in_editor=False,
    )
    return session.prompt


def _keys() -> KeyBindings:
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # In a search of the history these keys have meanings of their own.

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=typing)
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.text = ""
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _history() -> History:
    """That of earlier sessions, or one of this session only where no file can be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # A full disk must not end the talk.
                super().store_string(string)

    if (root := compile_cache.root()) is None:
        return InMemoryHistory()
    path = Path(root / "chat_history")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("ab").close()
    except OSError as error:
        say(f"what you type is not kept for the next session: {error}")
        return InMemoryHistory()
    return Kept(str(path))
