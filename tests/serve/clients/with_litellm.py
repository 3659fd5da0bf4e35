"""LiteLLM: its `openai/` provider, and its Responses."""

import json
import os
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Else it asks the network for the prices of models.

import litellm
from pydantic import BaseModel
from ways import ASKED, BASE, CITIES, KEY, MODEL, run, weather

SERVER = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY}
HELLO = [{"role": "user", "content": ASKED}]
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": CITIES}}, "required": ["city"]}}}


class Report(BaseModel):
    city: Literal["Paris", "Oslo"]
    warm: bool


def chat():
    answer = litellm.completion(messages=HELLO, max_tokens=16, **SERVER)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def stream():
    chunks = list(litellm.completion(
        messages=HELLO, max_tokens=16, stream=True, stream_options={"include_usage": True}, **SERVER))
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert whole.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.usage.completion_tokens > 0


def tools():
    messages = list(HELLO)
    first = litellm.completion(messages=messages, tools=[TOOL], tool_choice="required", max_tokens=200, **SERVER)
    assert first.choices[0].finish_reason == "tool_calls"
    messages.append(first.choices[0].message)
    for call in first.choices[0].message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name,
                         "content": weather(**json.loads(call.function.arguments))})
    last = litellm.completion(messages=messages, tools=[TOOL], max_tokens=16, **SERVER)
    assert last.choices[0].message.content


def tools_streamed():
    chunks = list(litellm.completion(
        messages=HELLO, tools=[TOOL], tool_choice="required", max_tokens=200, stream=True, **SERVER))
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    for call in whole.choices[0].message.tool_calls:
        weather(**json.loads(call.function.arguments))


def structured():
    answer = litellm.completion(messages=HELLO, response_format=Report, max_tokens=200, **SERVER)
    Report.model_validate_json(answer.choices[0].message.content)


def tools_and_structured():
    both = {"tools": [TOOL], "response_format": Report, "max_tokens": 200}
    messages = list(HELLO)
    first = litellm.completion(messages=messages, tool_choice="required", **both, **SERVER)
    messages.append(first.choices[0].message)
    for call in first.choices[0].message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id,
                         "content": weather(**json.loads(call.function.arguments))})
    last = litellm.completion(messages=messages, **both, **SERVER)
    Report.model_validate_json(last.choices[0].message.content)


def responses():
    answer = litellm.responses(input="hello", instructions="Be short.", max_output_tokens=16, **SERVER)
    assert answer.output[0].content[0].text
    events = list(litellm.responses(input="hello", max_output_tokens=16, stream=True, **SERVER))
    assert events[-1].response.usage.output_tokens > 0


run(chat, stream, tools, tools_streamed, structured, tools_and_structured, responses)
