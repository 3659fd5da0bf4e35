"""One server process for all tests of a session."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

import lfm_jax as lfm
from lfm_jax.testing import tiny_model, tiny_tokenizer

KEY = "secret-key"
FLAGS = ("--engine.slots", "6", "1024", "--engine.chunk", "64", "--engine.max-queue", "6",
         "--engine.prefix-cache-bytes", "1000000", "--limits.body-bytes", "20000", "--limits.choices", "6")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model with a tokenizer."""
    path = tmp_path_factory.mktemp("serve") / "tiny"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size() + 5), path, tokenizer=tokenizer)
    return path


def start(checkpoint, *flags, key=KEY):
    port = free_port()
    env = os.environ | {"XDG_CACHE_HOME": str(checkpoint.parent), "JAX_PLATFORMS": "cpu"}
    env |= {"LFM_API_KEY": key} if key else {}
    command = [sys.executable, "-m", "lfm_jax.cli", "serve", str(checkpoint), "--port", str(port), *FLAGS, *flags]
    log = checkpoint.parent / f"{port}.txt"  # A pipe that nobody reads would hold up a server that says much.
    with log.open("w") as said:
        process = subprocess.Popen(command, env=env, stderr=said)
    process.log = log
    base, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
    while time.monotonic() < until:
        try:
            if httpx.get(f"{base}/health").status_code == 200:
                return process, base
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"not ready: {log.read_text()}")


@pytest.fixture(scope="session")
def server(checkpoint):
    process, base = start(checkpoint)
    yield base
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    said = process.log.read_text()
    assert "Traceback" not in said
    assert "has failed" not in said
    assert "hello" not in said  # Nothing of a request.


@pytest.fixture(scope="session")
def start_server(checkpoint):
    """Starts another one with more flags, perhaps of another model: (process, address)."""
    started = []

    def another(*flags, key=KEY, path=checkpoint):
        started.append(start(path, *flags, key=key))
        return started[-1]

    yield another
    for process, _ in started:
        process.kill()  # Those of tests that failed are still there.


@pytest.fixture(scope="session")
def key():
    return KEY
