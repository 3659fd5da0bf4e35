"""`lfm serve`: opens a service from a path and serves it at an address."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.placement import TRAINED
from lfm_jax.engine.service import Service
from lfm_jax.files import say
from lfm_jax.sampling import Sampling
from lfm_jax.serve.adapters import read_adapters
from lfm_jax.serve.app import make_app
from lfm_jax.serve.limits import Limits
from lfm_jax.text.templates import check_template

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lfm_jax.infer.embed import Encoder

KEY_VARIABLE, ADMIN_VARIABLE = "LFM_API_KEY", "LFM_ADMIN_KEY"
TELL_SECONDS = 5
"""Time for the final errors of answers that are ended at the shutdown."""


def open_service(
    path: Path, dtype: str | None, engine: EngineConfig, mesh: tuple[int, int], *, quantize: str | None = None,
    adapter: Path | None = None, adapters: Mapping[str, Path] = MappingProxyType({}), everything: bool = False,
    plain_contents: bool = False,
) -> Service:
    """A service of the model at `path`, ready for a first request; says what it does on stderr.

    Args:
      mesh: replicas, and devices of each one.
      quantize, adapter: as for `lfm.load`; the adapter is merged.
      adapters: directories of those that requests may name. Places for them are made where the engine has none.
      everything: compile all programs, and not only those that a first request needs.
      plain_contents: as for `chat.encode_chat`.

    Raises:
      ValueError: the path has no model or no tokenizer, or a chat template that is not valid; or see `Engine`.
    """
    from lfm_jax.loading import chat_template, load_local, model_config
    from lfm_jax.sharding import make_mesh

    if template := chat_template(path):
        check_template(template)
    read = {}
    if adapters:  # Before the weights, which take long.
        config = model_config(path)
        engine, read = read_adapters(adapters, config.replace(dtype=dtype) if dtype else config, engine)
    model, tokenizer = load_local(path, dtype, quantize, adapter=adapter)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; put the tokenizer.json of the checkpoint beside its weights")
    data, tensor = mesh
    over = None if data * tensor == 1 else make_mesh(data=data, tensor=tensor)
    service = Service(model, tokenizer, template, engine, over, plain_contents=plain_contents)
    for name, one in read.items():
        service.engine.load_adapter(name, one, str(adapters[name]))
    _say_memory(service, model.config)
    began = time.monotonic()
    count = service.engine.warm_up(everything=everything, tell=say)
    say(f"{count} programs ready after {time.monotonic() - began:.0f} s{_resident()}")
    return service


def _say_memory(service: Service, config: ModelConfig) -> None:
    """A table of what the engine takes on a device, and what it has room for."""
    memory, longest, trained = service.engine.memory, service.engine.longest, min(TRAINED, config.max_position)
    for name, size in {**memory, "in all, on each device": sum(memory.values())}.items():
        say(f"{size / 2**20:10,.1f} MiB  {name}")
    say("not counted: the process itself, its libraries, compiled programs, and what compiling them takes")
    if longest < trained:
        say(f"the longest request has {longest:,} tokens, of {trained:,} that the model was trained for: name longer "
            "slots in --engine.slots where there is memory for them")


def _resident() -> str:
    """What the process takes now, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return ""
    return f", {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:,.1f} MiB resident in this process"


def api_key(variable: str = KEY_VARIABLE) -> str | None:
    """The key of KEY_VARIABLE that clients must send, or of ADMIN_VARIABLE, or None.

    Raises:
      ValueError: one that no header can carry.
    """
    key = os.environ.get(variable) or None
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(f"the key in {variable} cannot be sent in a header: use printable ASCII characters, with "
                         "no blank at either end")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket of an address, taken before a model is loaded; clients that come before `serve` wait for it.

    Raises:
      ValueError: an address that others reach, without a key; no such address; a port that is taken.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port is {port}; it must be from 0 to 65535 (0: any free one)")
    try:
        private = ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = host == "localhost"
    api_key(ADMIN_VARIABLE)
    if api_key() is None and not private:
        raise ValueError(f"host {host} can be reached from elsewhere: set a key in {KEY_VARIABLE}, or keep 127.0.0.1")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                       flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen()  # One that is only bound could be bound by a second server too.
    except OSError as error:
        why = {errno.EADDRINUSE: "another program has it; choose another with --port",
               errno.EACCES: "this user may not; choose one above 1023 with --port"}
        reason = why.get(error.errno or 0, error.strerror)
        raise ValueError(f"cannot listen on port {port} of {host}: {reason}") from None
    return taken


def is_encoder(path: Path) -> bool:
    """Returns whether a directory is that of an encoder (`config.causal` is False), as far as its config.json says."""
    from lfm_jax.convert.families import config_from_hf
    from lfm_jax.convert.safetensors_io import read_json

    try:
        return not config_from_hf(read_json(path, "config.json")[0]).causal
    except (ValueError, TypeError, ArithmeticError, AttributeError):
        return False  # Whoever loads it says what is wrong.


def serve_encoder(
    encoder: Encoder, name: str, address: socket.socket, limits: Limits, drain_seconds: int,
    cors_origins: Sequence[str] = (),
) -> None:
    """Serves an encoder as `serve` does a service."""
    from lfm_jax.serve.encoders import make_encoder_app

    key = api_key()
    app = make_encoder_app(encoder, name, api_key=key, limits=limits, cors_origins=cors_origins)
    _run(app, name, address, limits, limits.prepared, drain_seconds, key, app.state.queue.close)


def serve(
    service: Service, name: str, address: socket.socket, sampling: Sampling, limits: Limits, drain_seconds: int,
    cors_origins: Sequence[str] = (),
) -> None:
    """Serves on an address of `listen` until SIGINT or SIGTERM.

    Then it takes no more requests, lets what runs end within `drain_seconds`, and ends the rest with an error that says
    so.
    """
    key = api_key()
    app = make_app(service, name, api_key=key, admin_key=api_key(ADMIN_VARIABLE), sampling=sampling, limits=limits,
                   cors_origins=cors_origins)
    most = service.engine.slots + service.engine.config.max_queue + limits.prepared
    _run(app, name, address, limits, most, drain_seconds, key, lambda: service.engine.close(drain=False))


def _run(
    app: FastAPI, name: str, address: socket.socket, limits: Limits, most: int, drain_seconds: int, key: str | None,
    cut_short: Callable[[], None],
) -> None:
    """Serves an application until a signal.

    Args:
      most: requests that can run or wait.
      cut_short: ends those that still run `drain_seconds` after the signal.
    """
    import uvicorn

    from lfm_jax.serve.connections import room_for, with_head_timer

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Does as uvicorn, but does not raise a signal again after the shutdown that it caused."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # The errors are sent while connections are open; uvicorn itself only closes them.
            late = asyncio.create_task(self._cut_short())
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

        async def _cut_short(self) -> None:
            await asyncio.sleep(drain_seconds)
            await asyncio.to_thread(cut_short)

    host, port = address.getsockname()[:2]
    say(f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}{'' if key else ', no key asked for'}")
    Server(uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=drain_seconds + TELL_SECONDS,
        server_header=False, http=with_head_timer(limits.body_seconds), h11_max_incomplete_event_size=2**16,
        # For each request that can run or wait two connections: its own, and one for a quick question such as /health.
        limit_concurrency=room_for(2 * most),
    )).run(sockets=[address])
