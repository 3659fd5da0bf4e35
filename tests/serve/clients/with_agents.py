"""OpenAI's Agents SDK: the Responses API, which is its default, and chat completions."""

from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from ways import ASKED, BASE, KEY, MODEL, run, weather

CLIENT = AsyncOpenAI(base_url=BASE, api_key=KEY)
set_default_openai_client(CLIENT, use_for_tracing=False)
set_tracing_disabled(True)  # Traces go to OpenAI.


class Report(BaseModel):
    city: Literal["Paris", "Oslo"]
    warm: bool


@function_tool(name_override="weather")
def weather_of(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return weather(city)


def agent(model, choice=None, **fields):
    settings = ModelSettings(max_tokens=200, tool_choice=choice)
    return Agent(name="a", instructions="Be short.", model=model, model_settings=settings, **fields)


def kinds(result):
    return [item.type for item in result.new_items]


async def streamed(agent, asked):
    result = Runner.run_streamed(agent, asked)
    return result, [event.type async for event in result.stream_events()]


async def chat(model):
    assert (await Runner.run(agent(model), "hello")).final_output


async def stream(model):
    result, events = await streamed(agent(model), "hello")
    assert events.count("raw_response_event") > 5
    assert result.final_output


async def tools(model):
    result = await Runner.run(agent(model, "required", tools=[weather_of]), ASKED)
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def tools_streamed(model):
    result, _ = await streamed(agent(model, "required", tools=[weather_of]), ASKED)
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def structured(model):
    assert isinstance((await Runner.run(agent(model, output_type=Report), ASKED)).final_output, Report)


async def tools_and_structured(model):
    result = await Runner.run(agent(model, "required", tools=[weather_of], output_type=Report), ASKED)
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert isinstance(result.final_output, Report)


async def handoff(model):
    result = await Runner.run(agent(model, "required", handoffs=[agent(model)]), ASKED)
    assert "handoff_output_item" in kinds(result)


run(chat, stream, tools, tools_streamed, structured, tools_and_structured, handoff,
    models={"responses": MODEL, "chat completions": OpenAIChatCompletionsModel(MODEL, CLIENT)})
