"""`lfm chat` as a person uses it: keys in a pseudo-terminal, a history that lasts; and as a program does: a pipe."""

import contextlib
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import lfm_jax as lfm
from lfm_jax.cli import line_editor
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import turn_stop_ids

PROMPT = ">"  # The space after it is a move of the cursor.
SPEED = r"\[\d+ tokens?, .*the first after [\d.]+ s"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that talks until it is stopped, and for long enough to be."""
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), max_position=2**15)
    # The logit of what ends a turn is 0, and some other one is above that.
    model.embed[...] = model.embed[...].at[np.array(turn_stop_ids(tokenizer, model.config))].set(0)
    lfm.save_hf(model, path, tokenizer=tokenizer)
    return path


class Person:
    """At a terminal with `lfm chat`."""

    def __init__(self, checkpoint, cache, *flags):
        self._master, slave = pty.openpty()
        env = os.environ | {"LFM_CACHE_DIR": str(cache), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        # The terminal is that of the process, so that Ctrl-C reaches it.
        command = [sys.executable, "-c", "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])",
                   sys.executable, "-m", "lfm_jax.cli", "chat", str(checkpoint), *flags]
        self._process = subprocess.Popen(command, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self._seen = ""

    def type(self, keys):
        os.write(self._master, keys.encode())

    def hear_out(self):
        """Waits for the end of a reply and the next prompt: what is typed before that is no key to anyone."""
        self.see(SPEED)
        self.see(PROMPT)

    def see(self, pattern, seconds=60):
        """What the screen has shown since the last call, up to a pattern."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self._seen)):
            assert time.monotonic() < until, f"no {pattern!r} in {self._seen!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    more = os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # Linux says so at the end.
                    more = ""
                assert more, f"it ended without {pattern!r}: {self._seen!r}"
                self._seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", more)
        shown, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return shown

    def ended(self):
        """The exit status."""
        with contextlib.suppress(OSError):
            while select.select([self._master], [], [], 30)[0] and os.read(self._master, 65536):
                pass
        return self._process.wait(30)

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def sit_down(checkpoint, tmp_path):
    people = []

    def sit(*flags):
        people.append(Person(checkpoint, tmp_path / "cache", *flags))
        people[-1].see("/help lists")
        people[-1].see(PROMPT)
        return people[-1]

    yield sit
    for person in people:
        person.close()


def saved(person, path):
    person.type(f"/save {path}\r")
    person.see("messages are in")
    person.see(PROMPT)
    return [m["content"] for m in json.loads(path.read_text()) if m["role"] == "user"]


def test_typing_pasting_and_a_history_that_lasts(sit_down, tmp_path):
    person = sit_down("--max-new-tokens", "3")
    person.type("helo\x1b[Dl\r")  # Left, and the letter that was missing.
    person.hear_out()
    person.type("two\x1b\rlines\r")  # Alt-Enter.
    person.hear_out()
    person.type("\x1b[200~def f():\n    return 1\n\x1b[201~")  # As a terminal hands on what is pasted.
    person.type(" and more\r")
    person.hear_out()
    person.type("dropped\x03/reset x\x03\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\r")  # Ctrl-C drops a line; Up goes back.
    person.hear_out()
    said = saved(person, tmp_path / "talk.json")
    assert said[:3] == ["hello", "two\nlines", "def f():\n    return 1\n and more"]
    assert said[3] in said[:3]
    person.type("\x03")
    person.see("Ctrl-D or /exit leaves")
    person.see(PROMPT)
    person.type("\x04")
    assert person.ended() == 0

    history = tmp_path / "cache" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = sit_down("--max-new-tokens", "3")
    again.type("\x1b[A\x1b[A\r")  # The last one was /save.
    again.hear_out()
    assert saved(again, tmp_path / "again.json") == said[3:]
    again.type("/exit\r")
    assert again.ended() == 0


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """What a person at a terminal sends with some keys, in a session of its own with the history of those before."""
    monkeypatch.setenv("LFM_CACHE_DIR", str(tmp_path))
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)

    def send(text):
        with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
            keys.send_text(text)
            keys.close()  # Keys that send nothing are the end of the input.
            return line_editor.reader()("> ")

    return send


def test_the_history_is_searched(typed):
    for message in ("hello there", "two\x1b\rlines", "last"):
        typed(f"{message}\r")
    assert typed("\x12hello\r\r") == "hello there"  # Enter ends the search, the next one sends what was found.
    assert typed("\x12two\rmore \r") == "more two\nlines"
    assert typed("mine\x12hello\x03\r") == "mine"  # Ctrl-C leaves the search and not what was typed before it.
    assert typed("\x12hello\x03mine\x03yours\r") == "yours"
    with pytest.raises(KeyboardInterrupt):
        typed("\x12hello\x03\x03")


def test_ctrl_c_stops_a_reply_and_the_talk_goes_on(sit_down, tmp_path):
    person = sit_down("--max-new-tokens", "20000", "--temperature", "0")
    person.type("hello\r")
    person.see(r"hello\s+\S[\s\S]{80}")
    person.type("\x03")
    person.see(r"\[stopped; \d+ tokens, ")
    person.see(PROMPT)
    person.type("more\r")
    person.see(r"more\s+\S[\s\S]{80}")
    person.type("\x03")
    person.see(r"\[stopped; \d+ tokens, ")
    person.see(PROMPT)
    talk = tmp_path / "talk.json"
    assert saved(person, talk) == ["hello", "more"]
    assert len(json.loads(talk.read_text())[1]["content"]) >= 40
    person.type("\x03")
    person.see("Ctrl-D or /exit leaves")
    person.see(PROMPT)
    person.type("\x03")
    assert person.ended() == 0


def test_a_pipe_is_read_line_by_line(checkpoint, tmp_path):
    env = os.environ | {"LFM_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-m", "lfm_jax.cli", "chat", str(checkpoint), "--max-new-tokens", "3"],
                          env=env, input=f"hello\n/save {tmp_path / 'talk.json'}\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(SPEED, done.stdout)
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "hello"
    assert not (tmp_path / "cache" / "chat_history").exists()
    assert "\x1b" not in done.stdout


def test_a_history_that_cannot_be_kept_is_one_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LFM_CACHE_DIR", str(tmp_path / "file"))
    assert type(line_editor._history()).__name__ == "InMemoryHistory"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lfm: what you type is not kept for the next session")
    monkeypatch.setenv("LFM_CACHE_DIR", "")
    assert type(line_editor._history()).__name__ == "InMemoryHistory"
    assert capsys.readouterr().err == ""
