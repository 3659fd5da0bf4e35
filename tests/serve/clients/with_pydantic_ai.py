"""Pydantic AI: outputs by tools, by the format and by prompt, beside tools; chat completions and Responses."""

from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, Tool, ToolOutput
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from ways import ASKED, BASE, KEY, MODEL, run, weather

PROVIDER = OpenAIProvider(base_url=BASE, api_key=KEY)
MODELS = {"chat completions": OpenAIChatModel(MODEL, provider=PROVIDER),
          "responses": OpenAIResponsesModel(MODEL, provider=PROVIDER)}


class Report(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]
    warm: bool


class Loose(BaseModel):
    """What a model that follows no prompt fits too."""

    city: str = ""


def weather_of(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return weather(city)


TOOL = Tool(weather_of, name="weather")


def calls_first(context):
    """The first step must call a tool."""
    return {"max_tokens": 200} | ({"tool_choice": ["weather"]} if context.run_step == 1 else {})


def returned(messages):
    return [part for message in messages for part in message.parts
            if isinstance(part, ToolReturnPart) and part.tool_name == "weather"]


def agent(model, output=str, tool=None):
    return Agent(model, instructions="Be short.", output_type=output, tools=[tool] if tool else [], retries=1,
                 model_settings=calls_first if tool else {"max_tokens": 200})


async def chat(model):
    result = await agent(model).run("hello")
    assert result.output
    assert (await agent(model).run("again", message_history=result.all_messages())).output


async def stream(model):
    async with agent(model).run_stream("hello") as result:
        assert len([text async for text in result.stream_text(debounce_by=None)]) > 1


async def tools(model):
    result = await agent(model, tool=TOOL).run(ASKED)
    assert returned(result.all_messages())
    assert result.output


async def structured(model):
    for output in (ToolOutput(Report), NativeOutput(Report), NativeOutput(Report, strict=True), PromptedOutput(Loose)):
        assert isinstance((await agent(model, output).run(ASKED)).output, Report | Loose)


async def structured_streamed(model):
    async with agent(model, NativeOutput(Report)).run_stream(ASKED) as result:
        assert isinstance(await result.get_output(), Report)


async def tools_and_structured(model):
    for output in (ToolOutput(Report), NativeOutput(Report), PromptedOutput(Loose)):
        result = await agent(model, output, TOOL).run(ASKED)
        assert returned(result.all_messages())
        assert isinstance(result.output, Report | Loose)


run(chat, stream, tools, structured, structured_streamed, tools_and_structured, models=MODELS)
