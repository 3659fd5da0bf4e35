"""`lfm batch`: answers a file of requests offline, with the application of the server but without a network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from lfm_jax.engine.service import Service
from lfm_jax.files import locked, say, write_whole
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.serve.app import make_app
from lfm_jax.serve.errors import RefusalError
from lfm_jax.serve.limits import OFFLINE, Limits

ANSWER = b'{"id": "line-'
"""The beginning of every line of a target."""
URLS = ("/v1/chat/completions", "/v1/completions")
"""The endpoints that a line may name."""
EXAMPLE = '{"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}'
"""A line, for those who wrote something else."""


def batch(
    open_service: Callable[[], Service], name: str, source: Path, target: Path, *, shard: str = "0/1",
    sampling: Sampling = GREEDY, limits: Limits = OFFLINE,
) -> int:
    """Answers every line of a file in OpenAI's batch format; continues where an earlier call stopped.

    A line is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`; the model need not
    be named, or is one of the engine's adapters; a name that is not ours is reported once. Each gives one line of the
    target: `{"id": "line-N", "custom_id": ..., "response": {"status_code": ..., "body": ...}, "error": null}`. A line
    that cannot be read has an `error`. At the end they stand in order.

    Args:
      open_service: called once the files are read, if a line is left to answer.
      name: of the model.
      shard: I/N: only every N-th line from number I (from 0) on, for a file spread over machines, each with a target of
        its own.
      limits: limits of one line.

    Returns:
      The number of lines with an error.

    Raises:
      ValueError: a file cannot be read, the shard is not valid, the target is locked by another call or is not a file
        of batch answers, or the engine has failed; answers so far are kept.
    """
    i, n = _numbers(shard)
    lines = {number: line for number, line in enumerate(_lines(source)) if number % n == i and line.strip()}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    with locked(target, f"another call is at work on {target}; name another target, or wait for it"):
        done = _kept(target, lines)
        left = {number: line for number, line in lines.items() if number not in done}
        say(f"{len(done)} of {len(lines)} lines are done")
        if left:
            service = open_service()
            app = make_app(service, name, sampling=sampling, limits=limits)
            service.engine.serve()
            try:
                asyncio.run(_run(app, service, name, left, target, len(lines)))
            finally:
                service.engine.close(drain=False)
            if service.engine.failure is not None:
                raise ValueError(f"the engine has failed: {service.engine.failure}; answers so far are kept in "
                                 f"{target}")
        results = sorted((json.loads(line) for line in _lines(target)), key=lambda r: int(r["id"].split("-")[1]))
        write_whole(target, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))
    return sum(r["error"] is not None or r["response"]["status_code"] != 200 for r in results)


def _numbers(shard: str) -> tuple[int, int]:
    """(I, N) of a shard; ValueError for what is none."""
    i, _, n = shard.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError(f"shard is {shard!r}; write I/N with I from 0 to N - 1")
    return int(i), int(n)


def _lines(path: Path) -> Iterator[bytes]:
    """Yields lines, which end at b"\\n" and nowhere else, as in JSON Lines."""
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _kept(target: Path, lines: dict[int, bytes]) -> set[int]:
    """Returns the numbers of the answered lines; cuts off a last line that a killed process wrote in part."""
    if not target.exists():
        return set()
    text = target.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    foreign = f"{target} exists and is not a file of batch answers; name another file"
    if not ANSWER.startswith(text[len(whole) :][: len(ANSWER)]):
        raise ValueError(foreign)
    done = set()
    for row in whole.splitlines():
        try:
            number = int(json.loads(row)["id"].removeprefix("line-"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(foreign) from None
        if number not in lines:
            raise ValueError(f"{target} answers line {number}, which is not to be answered here; name another file")
        done.add(number)
    if len(whole) < len(text):
        os.truncate(target, len(whole))
    return done


async def _run(
    app: FastAPI, service: Service, name: str, left: dict[int, bytes], target: Path, total: int
) -> None:
    todo = iter(left.items())
    said = time.monotonic()
    answered = total - len(left)
    strangers: set[str] = set()
    with target.open("a", encoding="utf-8") as file:

        async def work() -> None:
            nonlocal said, answered
            for number, line in todo:
                result = await _one(app, service, name, number, line, strangers)
                if service.engine.failure is not None:
                    return  # This line and those after it are left to the next call.
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
                answered += 1
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"{answered} of {total} lines; {service.engine.counts['tokens']} tokens")

        # Enough to fill all slots, and as many that are ready when a slot is free.
        workers = 2 * service.engine.slots
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(left))):
                group.create_task(work())


async def _one(
    app: FastAPI, service: Service, name: str, number: int, line: bytes, strangers: set[str]
) -> dict[str, Any]:
    """The answer to a line.

    Args:
      strangers: names of other models that lines have asked for so far; the first one is reported.
    """
    result: dict[str, Any] = {"id": f"line-{number}", "custom_id": None, "response": None, "error": None}
    try:
        task = _task(line)
        result["custom_id"] = _custom_id(task)
        url, body = task.get("url", URLS[0]), task.get("body")
        if url not in URLS:
            raise ValueError(f"url is {url!r:.100}; choose one of {', '.join(URLS)}")
        if not isinstance(body, dict):
            wrong = "the line has no body" if body is None else "body is not an object"
            raise ValueError(f"{wrong}; write an object with the fields of the request, as in {EXAMPLE}")
        if body.get("stream"):
            raise ValueError("a batch does not stream; leave out stream")
    except (ValueError, RecursionError) as error:
        reason = "the line is nested too deeply" if isinstance(error, RecursionError) else str(error)
        result["error"] = {"code": "bad_line", "message": reason[:500]}
        return result
    wanted = body.get("model") or name
    # Files written for one server are answered by another.
    if isinstance(wanted, str) and wanted not in service.engine.adapters.sources():
        if wanted != name and not strangers:
            say(f"line-{number} asks for the model {wanted!r:.100}; {name!r} answers every line, whatever it asks for")
        strangers.update({wanted} - {name})
        body = body | {"model": name}
    status, answer = await call(app, url, body)
    while status == 429:  # Others of this file wait: so can this one. Each try makes its prompts ready again.
        await asyncio.sleep(0.05)
        if service.engine.waiting() > service.engine.config.max_queue // 2:
            continue
        status, answer = await call(app, url, body)
    result["response"] = {"status_code": status, "body": answer}
    return result


def _task(line: bytes) -> dict[str, Any]:
    """The object in a line; ValueError for what is none."""
    try:
        task = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"the line is not valid JSON: {error}; write one object in each line, as {EXAMPLE}") from None
    if not isinstance(task, dict):
        raise ValueError(f"the line is not an object; write one, as {EXAMPLE}")
    return task


def _custom_id(task: dict[str, Any]) -> str | int | None:
    """The client's own id of a line; ValueError for one that could not be given back."""
    custom_id = task.get("custom_id")
    if custom_id is not None and type(custom_id) not in (str, int):
        raise ValueError(f"custom_id is {custom_id!r:.40}; it must be a text or a whole number")
    try:
        str(custom_id).encode()
    except UnicodeEncodeError:
        raise ValueError(f"custom_id is {custom_id!a:.60}, which holds half of a surrogate pair; write a text that "
                         "UTF-8 can hold") from None
    return custom_id


async def call(app: FastAPI, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POSTs a body to the application without a network: (status, answer)."""
    sent = json.dumps(body).encode()
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": url,
             "raw_path": url.encode(), "query_string": b"", "root_path": "", "scheme": "http", "client": None,
             "server": ("batch", 80),
             "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(sent)).encode())]}
    parts: list[bytes] = []
    status = 500
    messages = iter([{"type": "http.request", "body": sent, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        return await asyncio.Future()  # This client never disconnects.

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception as error:  # An error in one line must not stop the others.
        return 500, RefusalError(500, f"{type(error).__name__}: {error}").body()
    with contextlib.suppress(ValueError):
        return status, json.loads(b"".join(parts))
    return status, None
