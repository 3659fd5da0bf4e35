"""Simon Willison's `llm`: the command with extra-openai-models.yaml, and its Python side for the loop of tools."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from ways import BASE, CALLS, CITIES, KEY, MODEL, run, weather

HOME = Path(os.environ.setdefault("LLM_USER_PATH", tempfile.mkdtemp()))
(HOME / "extra-openai-models.yaml").write_text("\n".join(
    f"- {{model_id: {name}, model_name: {MODEL}, api_base: '{BASE}', api_key_name: lfm, {kind}"
    " supports_schema: true, supports_tools: true}"
    for name, kind in (("chats", ""), ("answers", "responses: true,"), ("texts", "completion: true,"))))
(HOME / "keys.json").write_text(json.dumps({"lfm": KEY}))
SCHEMA = json.dumps({"type": "object", "properties": {"city": {"enum": CITIES}, "warm": {"type": "boolean"}},
                     "required": ["city", "warm"]})
FUNCTION = "def weather(city: str) -> str:\n    'The weather of a city.'\n    return 'It rains.'"


def command(*arguments, model="chats"):
    command = [str(Path(sys.executable).parent / "llm"), "-m", model, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.strip()


def chat():
    assert command("hello", "--no-stream", "-o", "max_tokens", "8")
    assert command("hello again", "-c", "--no-stream", "-o", "max_tokens", "8")


def stream():
    assert command("hello", "-s", "Be short.", "-o", "max_tokens", "8")


def completion():
    assert command("hello", "-o", "max_tokens", "8", model="texts")


def structured():
    assert json.loads(command("hello", "--schema", SCHEMA))["city"] in CITIES
    assert json.loads(command("hello", "--schema", SCHEMA, "--no-stream"))["city"] in CITIES


def tools():
    assert command("hello", "--functions", FUNCTION, "--no-stream")
    for streamed in (False, True):
        loop("chats", streamed, logit_bias=CALLS)


def tools_and_structured():
    assert json.loads(command("hello", "--functions", FUNCTION, "--schema", SCHEMA))["city"] in CITIES
    loop("chats", True, then=json.loads(SCHEMA), logit_bias=CALLS)


def loop(name, streamed, then=None, **options):
    import llm  # It reads its folder when it is imported.

    def weather_of(city: Literal["Paris", "Oslo"]) -> str:
        """The weather of a city."""
        return weather(city)

    talk = llm.get_model(name).conversation(tools=[weather_of])
    first = talk.prompt("The weather in Paris?", stream=streamed, **options)
    assert first.tool_calls()
    last = talk.prompt(tool_results=first.execute_tool_calls(), stream=streamed, schema=then)
    assert json.loads(last.text())["city"] in CITIES if then else last.text()


def responses():
    assert command("hello", model="answers")
    assert command("hello", "--no-stream", model="answers")
    assert json.loads(command("hello", "--schema", SCHEMA, model="answers"))["city"] in CITIES
    assert command("hello", "--functions", FUNCTION, model="answers")


run(chat, stream, completion, structured, tools, tools_and_structured, responses)
