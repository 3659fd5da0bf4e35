"""LlamaIndex: OpenAILike, and a FunctionAgent around it."""

from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from ways import ASKED, BASE, KEY, MODEL, run, weather


class Report(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]
    warm: bool


def weather_of(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return weather(city)


TOOL = FunctionTool.from_defaults(weather_of, name="weather")


def model(**fields):
    return OpenAILike(model=MODEL, api_base=BASE, api_key=KEY, max_tokens=200, context_window=4096, max_retries=0,
                      **({"is_chat_model": True, "is_function_calling_model": True} | fields))


def chat():
    assert model().chat([ChatMessage(role="user", content="hello")]).message.content
    assert model().complete("hello").text


def stream():
    parts = list(model().stream_chat([ChatMessage(role="user", content="hello")]))
    assert len(parts) > 1
    assert parts[-1].message.content


def completion():
    assert model(is_chat_model=False).complete("hello").text
    assert list(model(is_chat_model=False).stream_complete("hello"))[-1].text


def tools():
    asked = [ChatMessage(role="user", content=ASKED)]
    answer = model().chat_with_tools([TOOL], chat_history=asked, tool_required=True)
    calls = model().get_tool_calls_from_response(answer)
    assert calls
    asked.append(answer.message)
    asked += [ChatMessage(role="tool", content=str(TOOL(**call.tool_kwargs)),
                          additional_kwargs={"tool_call_id": call.tool_id}) for call in calls]
    assert model().chat_with_tools([TOOL], chat_history=asked).message.content


def predict_and_call():
    assert "rains" in str(model().predict_and_call([TOOL], user_msg=ASKED, tool_required=True))


async def agent():
    agent = FunctionAgent(tools=[TOOL], llm=model(), initial_tool_choice="weather")
    answer = await agent.run(ASKED)
    assert answer.tool_calls
    assert answer.response.content


def structured():
    for form in ({}, {"should_use_structured_outputs": True}):
        answer = model(**form).as_structured_llm(Report).chat([ChatMessage(role="user", content=ASKED)])
        assert isinstance(answer.raw, Report)


async def tools_and_structured():
    agent = FunctionAgent(tools=[TOOL], llm=model(), initial_tool_choice="weather", output_cls=Report)
    answer = await agent.run(ASKED)
    assert answer.tool_calls
    assert answer.get_pydantic_model(Report)


run(chat, stream, completion, tools, predict_and_call, agent, structured, tools_and_structured)
