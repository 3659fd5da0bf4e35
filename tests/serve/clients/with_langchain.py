"""LangChain: ChatOpenAI by itself, and `create_agent` around it."""

from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from ways import ASKED, BASE, CALLS, KEY, MODEL, run, weather


class Report(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]
    warm: bool


@tool("weather")
def weather_of(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return weather(city)


@wrap_model_call
def calls_first(request, handler):
    """The first step calls a tool; beside a provider's format an agent leaves `tool_choice` out."""
    if not any(isinstance(message, ToolMessage) for message in request.messages):
        request = request.override(tool_choice="required", model=model(logit_bias=CALLS))
    return handler(request)


def model(most=200, **fields):
    return ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_tokens=most, max_retries=0, **fields)


def chat():
    answer = model(16).invoke("hello")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0


def stream():
    chunks = list(model(16, stream_usage=True).stream("hello"))
    assert len(chunks) > 1
    whole = sum(chunks[1:], chunks[0])
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0


def completion():
    assert OpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_tokens=8).invoke("hello")


def tools():
    bound = model().bind_tools([weather_of], tool_choice="required")
    messages = [HumanMessage(ASKED)]
    messages.append(bound.invoke(messages))
    assert messages[-1].tool_calls
    assert not messages[-1].invalid_tool_calls
    messages += [weather_of.invoke(call) for call in messages[-1].tool_calls]
    assert model(16).bind_tools([weather_of]).invoke(messages).content


def tools_streamed():
    chunks = list(model().bind_tools([weather_of], tool_choice="weather").stream("The weather?"))
    for call in sum(chunks[1:], chunks[0]).tool_calls:
        weather_of.invoke(call)


def structured():
    for method in ("json_schema", "function_calling"):
        assert isinstance(model().with_structured_output(Report, method=method).invoke("The weather?"), Report)
    assert isinstance(model().with_structured_output(Report, method="json_schema", strict=True).invoke("?"), Report)


def tools_and_structured():
    bound = model().bind_tools([weather_of], response_format=Report, strict=True)
    assert isinstance(bound.invoke("The weather?").additional_kwargs["parsed"], Report)


def agent():
    agent = create_agent(model(), [weather_of], middleware=[calls_first])
    messages = agent.invoke({"messages": "The weather in Paris?"})["messages"]
    assert any(isinstance(message, ToolMessage) for message in messages)
    assert messages[-1].content


def agent_structured():
    asked = {"messages": "The weather in Paris?"}
    agent = create_agent(model(), [weather_of], middleware=[calls_first],
                         response_format=ProviderStrategy(Report))
    answer = agent.invoke(asked)
    assert any(isinstance(message, ToolMessage) for message in answer["messages"])
    assert isinstance(answer["structured_response"], Report)
    agent = create_agent(model(), [], response_format=ToolStrategy(Report))
    assert isinstance(agent.invoke(asked)["structured_response"], Report)


def responses():
    model_ = model(use_responses_api=True)
    assert model_.invoke("hello").text
    assert sum(bool(chunk.text) for chunk in model_.stream("hello")) > 1
    bound = model_.bind_tools([weather_of], tool_choice="required")
    messages = [HumanMessage(ASKED)]
    messages.append(bound.invoke(messages))
    messages += [weather_of.invoke(call) for call in messages[-1].tool_calls]
    assert model_.bind_tools([weather_of]).invoke(messages)
    assert isinstance(model_.with_structured_output(Report).invoke("The weather?"), Report)


run(chat, stream, completion, tools, tools_streamed, structured, tools_and_structured, agent, agent_structured,
    responses)
