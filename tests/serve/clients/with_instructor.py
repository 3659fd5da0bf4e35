"""Instructor: tools mode, JSON schema mode, Responses mode, partial objects from a stream."""

from collections.abc import Iterable
from typing import Literal

import instructor
from pydantic import BaseModel
from ways import ASKED, BASE, CALLS, KEY, MODEL, run

HELLO = [{"role": "user", "content": ASKED}]


class Report(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]
    warm: bool


class Loose(BaseModel):
    """What a model that follows no prompt fits too."""

    city: str = ""


class Ask(BaseModel):
    """Ask for the weather of a city."""

    city: Literal["Paris", "Oslo"]


def client(mode):
    return instructor.from_provider(f"openai/{MODEL}", base_url=BASE, api_key=KEY, mode=mode)


def check(mode, **fields):
    report = client(mode).create(response_model=Report, messages=HELLO, max_retries=0, **fields)
    assert isinstance(report, Report)


def chat():
    answer = client(instructor.Mode.TOOLS).create(response_model=None, messages=HELLO, max_tokens=16)
    assert answer.choices[0].message.content


def tools():
    check(instructor.Mode.TOOLS, max_tokens=200)


def tools_strict():
    check(instructor.Mode.TOOLS_STRICT, max_tokens=200)


def several():
    asked = client(instructor.Mode.PARALLEL_TOOLS).create(
        response_model=Iterable[Report | Ask], messages=HELLO, max_tokens=400, logit_bias=CALLS)
    assert list(asked)


def structured():
    check(instructor.Mode.JSON_SCHEMA, max_tokens=200)


def json_object():
    answer = client(instructor.Mode.JSON).create(response_model=Loose, messages=HELLO, max_retries=0, max_tokens=200)
    assert isinstance(answer, Loose)


def responses():
    check(instructor.Mode.RESPONSES_TOOLS, max_output_tokens=200)


def stream():
    last = None
    for part in client(instructor.Mode.TOOLS).create_partial(response_model=Report, messages=HELLO, max_tokens=200):
        last = part
    Report.model_validate(last.model_dump())


run(chat, stream, tools, tools_strict, several, structured, json_object, responses)
