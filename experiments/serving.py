"""Measures a server's life: its start, a second request with many tools, and the memory of a long mixed load.

    python experiments/serving.py start           from `lfm serve` to the first answer, cold and warm
    python experiments/serving.py soak [MINUTES]  mixed requests of 8 clients (default 30 minutes)

Both serve a random model of 16 layers and 3.8 million parameters with the defaults of `lfm serve`. `soak` appends a
line a minute to runs/soak.jsonl and ends with status 1 where the server gave a 500, or its resident memory in the last
minute was more than 3 % over that in the fifth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx

CLIENTS, SETTLED_MINUTES, GROWTH = 8, 5, 1.03
RECORDS = Path("runs/soak.jsonl")
WORDS = ["river", "stone", "paper", "green", "seven", "under", "light", "house", "morning", "quiet", "engine", "window"]


def main(argv: list[str]) -> int:
    if argv[:1] == ["start"]:
        return start()
    if argv[:1] == ["soak"]:
        return asyncio.run(soak(float(argv[1]) if argv[1:] else 30))
    print(__doc__, file=sys.stderr)
    return 2


def start() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model")
        for name in ("cold", "warm"):
            began = time.monotonic()
            with serving(model, Path(scratch)) as server:
                server.post("/v1/chat/completions", chat("hello", max_tokens=8))
                print(f"{name}, first answer: {server.spent(began)}", flush=True)
                server.wait_for("every program", 600)
                print(f"{name}, every program: {server.spent(began)}", flush=True)
                tools = [tool(f"t{i}", 16) for i in range(58)]
                for what, body in (("58 tools of 16 arguments", chat("hello", tools=tools, tool_choice="required")),
                                   ("their text without a grammar", chat(f"hello {json.dumps(tools)}"))):
                    times = []
                    for _ in range(21):
                        began = time.monotonic()
                        server.post("/v1/chat/completions", body | {"max_tokens": 1})
                        times.append(1e3 * (time.monotonic() - began))
                    print(f"{name}, {what}: first {times[0]:.0f} ms, of 20 more median "
                          f"{statistics.median(times[1:]):.0f}, longest {max(times[1:]):.0f}", flush=True)
    return 0


async def soak(minutes: float) -> int:
    RECORDS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, serving(make_model(Path(name) / "model"), Path(name)) as server:
        server.wait_for("every program", 900)
        counts: Counter[str] = Counter()
        began = time.monotonic()
        until = began + 60 * minutes
        clients = [asyncio.create_task(client(server.base, number, until, counts)) for number in range(CLIENTS)]
        settled = last = math.nan
        minute, readings = 1, []
        while not all(task.done() for task in clients):
            await asyncio.sleep(1)
            readings.append(server.resident_mib())
            if time.monotonic() >= began + 60 * minute:
                last = statistics.mean(readings)
                row = {"minute": minute, "resident_mib": round(last, 1), "highest": round(max(readings), 1),
                       "requests": counts.total(), "cpu_seconds": round(server.cpu_seconds())}
                with RECORDS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
                settled = last if minute == SETTLED_MINUTES else settled
                minute, readings = minute + 1, []
        await asyncio.gather(*clients)
    print(dict(sorted(counts.items())))
    print(f"resident, mean of a minute: {settled:.1f} MiB in minute {SETTLED_MINUTES}, {last:.1f} in the last")
    return int(any(name.startswith("5") for name in counts) or last > GROWTH * settled)


async def client(base: str, seed: int, until: float, counts: Counter[str]) -> None:
    """Sends one request after the other; leaves some before their answer is done."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=base, timeout=300) as http:
        while time.monotonic() < until:
            kind = rng.choice(sorted(REQUESTS))
            path, body = REQUESTS[kind](rng)
            if kind == "stream" and rng.random() < 0.5:
                async with http.stream("POST", path, json=body) as answer:
                    left_after = rng.randint(1, 20)
                    async for _ in answer.aiter_lines():
                        left_after -= 1
                        if left_after == 0:
                            break
                counts["left"] += 1
                continue
            answer = await http.post(path, json=body)
            counts[f"{answer.status_code} {kind}"] += 1


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "model", "messages": [{"role": "user", "content": content}], **fields}


def tool(name: str, arguments: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {f"a{i}": {"type": "string"} for i in range(arguments)}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema(rng: random.Random) -> dict[str, Any]:
    """One that was rarely there before, so that kept grammars come and go."""
    kinds = [{"type": "integer"}, {"type": "boolean"}, {"enum": WORDS[:4]}, {"type": "string", "maxLength": 12}]
    properties = {f"{rng.choice(WORDS)}_{rng.randrange(1000)}": rng.choice(kinds) for _ in range(rng.randint(1, 6))}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def sampled(rng: random.Random) -> dict[str, Any]:
    return {"temperature": rng.choice([0, 0.7, 1]), "top_p": rng.choice([0.9, 1]), "max_tokens": rng.randint(1, 60),
            "frequency_penalty": rng.choice([0, 0.5]), "seed": rng.randrange(1000)}


REQUESTS = {
    "chat": lambda rng: ("/v1/chat/completions", chat(words(rng, rng.randint(1, 60)), **sampled(rng))),
    "long": lambda rng: ("/v1/chat/completions", chat(words(rng, rng.randint(200, 500)), **sampled(rng))),
    "several": lambda rng: ("/v1/chat/completions", chat(
        words(rng, 9), n=3, logprobs=True, top_logprobs=5, **sampled(rng))),
    "stream": lambda rng: ("/v1/chat/completions", chat(words(rng, 20), stream=True, **sampled(rng))),
    "text": lambda rng: ("/v1/completions", {"model": "model", "prompt": words(rng, 20), "logprobs": 2, "echo": True,
                                             "max_tokens": rng.randint(0, 30)}),
    "format": lambda rng: ("/v1/chat/completions", chat(words(rng, 20), max_tokens=80, response_format={
        "type": "json_schema", "json_schema": {"name": "answer", "schema": schema(rng), "strict": True}})),
    "tools": lambda rng: ("/v1/chat/completions", chat(words(rng, 20), max_tokens=80, tool_choice="required", tools=[
        tool(f"{rng.choice(WORDS)}_{rng.randrange(100)}", rng.randint(1, 6))])),
    "responses": lambda rng: ("/v1/responses", {"model": "model", "input": words(rng, 20), "max_output_tokens": 40}),
    "refused": lambda rng: ("/v1/chat/completions", chat("hello", temperature=rng.choice(["hot", -1, 1e9]))),
}


def make_model(path: Path) -> Path:
    """A random model with the shape of LFM2.5-350M, narrower, in a process of its own."""
    code = f"""
import jax, lfm_jax as lfm
from flax import nnx
from lfm_jax.testing import tiny_tokenizer
sizes = dict(hidden_size=128, ffn_size=384, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=4096)
config = lfm.ModelConfig.preset("lfm2.5-350m").replace(dtype="float32", param_dtype="float32", **sizes)
with jax.default_prng_impl("rbg"):
    model = lfm.LFM(config, rngs=nnx.Rngs(0))
lfm.save_hf(model, {str(path)!r}, tokenizer=tiny_tokenizer())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    return path


class Server:
    def __init__(self, process: subprocess.Popen[bytes], base: str, log: Path):
        self.process, self.base, self.log = process, base, log

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer, as soon as the server gives one."""
        while True:
            try:
                answer = httpx.post(self.base + path, json=body, timeout=600)
            except httpx.ConnectError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server has ended: {self.log.read_text()}") from None
                time.sleep(0.05)
                continue
            if answer.is_error:
                raise RuntimeError(f"{answer.status_code}: {answer.text}")
            return answer.json()

    def wait_for(self, said: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while said not in self.log.read_text():
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(f"the server did not say {said!r}: {self.log.read_text()}")
            time.sleep(0.5)

    def spent(self, began: float) -> str:
        return (f"{time.monotonic() - began:.1f} s, {self.cpu_seconds():.1f} processor seconds, "
                f"{self.resident_mib():.0f} MiB resident")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def serving(model: Path, scratch: Path) -> Generator[Server]:
    """`lfm serve` with its defaults; its programs are kept in `scratch`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = scratch / f"{port}.txt"
    command = [sys.executable, "-m", "lfm_jax.cli", "serve", str(model), "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"LFM_CACHE_DIR": str(scratch / "cache"), "JAX_PLATFORMS": "cpu"}
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=env, stderr=said)
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
