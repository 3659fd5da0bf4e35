"""Client libraries as their users install them, against a real server: `clients/` has one script for each.

OpenAI's own is what test_server.py and test_fields_served.py ask with; here it has a row of the table only.
"""

import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lfm_jax as lfm
from lfm_jax.testing import tiny_model, tiny_tokenizer

HERE = Path(__file__).parent / "clients"
TABLE = Path(__file__).parents[2] / "build" / "clients.md"
"""What came of the last run; PAGE shows one."""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "clients.md"
OPENAI = "chat, stream, completion, tools, tools streamed, structured, tools and structured, responses"
"""What the ordinary suite shows with the `openai` that is installed."""
SAYS = ("the", "Ġquick", "Ġbrown", "Ġfox", "Ġjumps", "Ġover", "<|im_end|>")
LIKES = {"the": 25, '"': 18, "{": 17, "}": 16, "]": 16, ")": 16, ",": 15, "f": 14, "<|tool_call_start|>": -30}
"""What it says where nothing else is said, by logit: text begins, strings and objects end, nothing is called."""
WAYS = ("chat", "stream", "tools", "structured", "tools and structured")


@dataclasses.dataclass(frozen=True)
class Client:
    """A client: its packages, the first gives the version; what it must have shown."""

    packages: tuple[str, ...]
    script: str
    ways: tuple[str, ...] = WAYS


CLIENTS = [
    Client(("litellm",), "with_litellm.py"),
    Client(("langchain-openai", "langchain"), "with_langchain.py"),
    Client(("llama-index-llms-openai-like",), "with_llama_index.py"),
    Client(("instructor",), "with_instructor.py", WAYS[:4]),
    Client(("pydantic-ai-slim", "pydantic-ai-slim[openai]"), "with_pydantic_ai.py"),
    Client(("openai-agents",), "with_agents.py"),
    Client(("llm",), "with_llm.py"),
    Client(("lm_eval", "lm_eval[api]", "transformers"), "with_lm_eval.py",
           ("loglikelihood", "loglikelihood rolling", "generate until", "chat generate until")),
    Client(("@ai-sdk/openai-compatible", "ai", "zod"), "with_ai.mjs"),
]


def parrot(path):
    """Saves a model whose every token follows from the one before: it says SAYS, or as much of it as a grammar leaves.

    So answers end, which some clients insist on, and what frameworks ask for in turns comes in turns.
    """
    tokenizer = tiny_tokenizer()
    token = tokenizer.token_to_id
    model = tiny_model(vocab_size=tokenizer.get_vocab_size() + 5, tie_embedding=False, init_std=1e-3)
    V, D = model.embed[...].shape
    follow = [*pairwise(SAYS), ("<|tool_call_end|>", "<|im_end|>")]
    told = 1 + len(follow)  # The first number is of all tokens, the next are each of one that has a follower.
    embed = np.random.default_rng(0).normal(size=(V, D))
    embed[:, 0], embed[:, 1:told] = 1, 0
    head = np.random.default_rng(1).normal(size=(V, D)) / 100
    for i, (before, after) in enumerate(follow, 1):
        embed[token(before), 1:] = np.eye(D - 1)[i - 1] * 5
        head[token(after), i] = 12
    head[token('"'), len(SAYS) - 1] = 4  # Ends the sentence inside a string.
    for text, logit in LIKES.items():
        head[token(text), 0] = logit
    model.embed[...], model.head[...] = jnp.asarray(embed, jnp.float32), jnp.asarray(head, jnp.float32)
    lfm.save_hf(model, path, tokenizer=tokenizer)
    return token("<|tool_call_start|>")


@pytest.fixture(scope="module")
def served(tmp_path_factory, start_server, key):
    """The environment of the scripts."""
    path = tmp_path_factory.mktemp("parrot") / "tiny"
    call = parrot(path)
    process, base = start_server("--engine.slots", "6", "4096", path=path)
    yield {"LFM_BASE_URL": f"{base}/v1", "LFM_API_KEY": key, "LFM_MODEL": "tiny", "LFM_CALL_TOKEN": str(call),
           "LFM_TOKENIZER": str(path)}
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def rows():
    """Rows of the table of results."""
    rows = [("`openai`", metadata.version("openai"), OPENAI, "-")]
    yield rows
    lines = [f"{datetime.date.today()}, Python {sys.version.split()[0]}:", "", "| Client | Version | Shown | Failed |",
             "| --- | --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    print("", *lines, sep="\n")


def install_with_pip(packages, home):
    """(how to run a script, version)."""
    python = home / "env" / "bin" / "python"
    checked(sys.executable, "-m", "venv", home / "env")
    checked(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    version = checked(python, "-c", f"from importlib.metadata import version; print(version('{packages[0]}'))")
    return python, version.strip()


def install_with_npm(packages, home):
    """(how to run a script, version). The newest packages want a newer Node than a system may have: npm has one."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node and npm on this machine")
    checked("npm", "init", "--yes", cwd=home)
    checked("npm", "install", "node", cwd=home)
    node = home / "node_modules" / ".bin"
    checked("npm", "install", *packages, cwd=home, env=os.environ | {"PATH": f"{node}:{os.environ['PATH']}"})
    versions = [json.loads((home / "node_modules" / name / "package.json").read_text())["version"]
                for name in packages[:2]]
    return node / "node", f"{versions[0]} (ai {versions[1]})"


def checked(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=3600, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


def by_model(ways):
    """Ways of the same model beside each other."""
    found = {}
    for way in ways:
        model, colon, name = way.rpartition(": ")
        found.setdefault(model + colon, []).append(name)
    return [model + ", ".join(names) for model, names in found.items()]


@pytest.fixture
def home(tmp_path):
    """Where a client is installed, for as long as it runs: some are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_the_page_has_a_row_for_each_client():
    shown = re.findall(r"^\| `(.+)` \| (\S+).* \| (.+) \| - \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, *_ in shown] == ["openai", *(client.packages[0] for client in CLIENTS)]
    assert shown[0][2] == OPENAI


@pytest.mark.long
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.packages[0])
def test_a_client_works(client, served, rows, home):
    install = install_with_npm if client.script.endswith(".mjs") else install_with_pip
    runner, version = install(client.packages, home)
    script = home / client.script  # Node looks for packages beside the script.
    for name in ("ways.py", client.script):
        shutil.copy(HERE / name, home)
    env = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run([str(runner), str(script)], env=env | served | {"HOME": str(home)}, cwd=home,
                          capture_output=True, text=True, timeout=3600)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [f"{way['way']}: {way['error']}" for way in told if not way["ok"]]
    shown = [way["way"] for way in told if way["ok"]]
    rows.append((f"`{client.packages[0]}`", version, "; ".join(by_model(shown)),
                 "; ".join(" ".join(text.split())[:200].replace("|", "\\|") for text in failed) or "-"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not failed, f"{failed}\n{done.stderr[-3000:]}"
    assert set(client.ways) <= {way.rpartition(": ")[2] for way in shown}
