"""Thoughts in requests and answers: their own field or item, apart from the text, whole and in a stream."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseReasoningItem
from tokenizers import AddedToken

from lfm_jax.engine.request import TokenLogprob
from lfm_jax.engine.service import Piece
from lfm_jax.serve.formats import ChatForm, streamed_answer, whole_answer
from lfm_jax.serve.messages import plain_messages
from lfm_jax.serve.protocol import ChatBody
from lfm_jax.serve.responses import ResponsesBody, ResponsesForm
from lfm_jax.testing import tiny_tokenizer
from lfm_jax.text.codec import Reply
from lfm_jax.text.thoughts import CLOSE, OPEN, thinking

HELLO = [{"role": "user", "content": "hello"}]
CALL = "<|tool_call_start|>[f(a=1)]<|tool_call_end|>"
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def service_with(marks):
    tokenizer = tiny_tokenizer()
    if marks != "text":
        tokenizer.add_tokens([AddedToken(mark, special=marks == "special", normalized=False) for mark in (OPEN, CLOSE)])
    return SimpleNamespace(tokenizer=tokenizer, thinking=thinking(tokenizer, CLOSE))


def answers(service, form, text, size=2, finish="stop"):
    """An answer whole, and the chunks of its stream, where this text is what the model writes."""
    ids = service.tokenizer.encode(text, add_special_tokens=False).ids

    async def pieces():
        reply = Reply(service.tokenizer, (), [7], skip_special_tokens=not form().keeps_markers, shown=form().shown)
        for i in range(0, len(ids), size):
            tokens = ids[i : i + size]
            told = [TokenLogprob(token, -1.0, ()) for token in tokens]
            ended = i + size >= len(ids)
            yield Piece(0, reply.push(tokens) + (reply.finish() if ended else ""), tokens, told,
                        finish=finish if ended else None)

    asked = [SimpleNamespace(prompt=[1, 2, 3], n=1)]

    async def run():
        events = [event async for event in streamed_answer(form(), pieces(), asked)]
        return await whole_answer(form(), pieces(), asked), events

    whole, events = asyncio.run(run())
    chunks = [json.loads(event[event.index("data: ") + 6 :]) for event in events if "[DONE]" not in event]
    return whole, chunks, ids


@pytest.fixture(params=["text", "special", "plain"])
def service(request):
    return service_with(request.param)


def chat(**fields):
    return ChatBody.model_validate({"model": "tiny", "messages": HELLO, **fields})


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("begin", ["start", "thought"])
def test_chats_have_reasoning_content(service, begin, size):
    written = ("<think>" if begin == "start" else "") + "\nthe fox?\n</think>\n\nover <think>"
    whole, chunks, ids = answers(service, lambda: ChatForm(service, "tiny", chat(logprobs=True), begin), written, size)
    message = whole["choices"][0]["message"]
    # A mark in the answer is text.
    assert (message["reasoning_content"], message["content"]) == ("the fox?", "over <think>")
    assert len(whole["choices"][0]["logprobs"]["content"]) == whole["usage"]["completion_tokens"] == len(ids)
    thought = service.tokenizer.encode(written.partition("\n\n")[0], add_special_tokens=False).ids
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(thought)}
    deltas = [ChatCompletionChunk.model_validate(chunk).choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thoughts) == "the fox?"
    assert "".join(delta.content or "" for delta in deltas) == "over <think>"
    assert not any(thought and delta.content for thought, delta in zip(thoughts, deltas, strict=True))


def test_calls_come_after_the_thought_and_none_is_in_it(service):
    body = chat(tools=[{"type": "function", "function": TOOL}])
    written = f"<think>{CALL}</think>\n{CALL}"
    whole, chunks, _ = answers(service, lambda: ChatForm(service, "tiny", body, "start"), written)
    choice = whole["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (CALL, None)
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": 1}']
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_thought_that_is_cut_has_no_answer(service):
    whole, _, ids = answers(service, lambda: ChatForm(service, "tiny", chat(), "start"), "<think>the fo",
                            finish="length")
    assert whole["choices"][0]["message"] == {
        "role": "assistant", "content": "", "refusal": None, "reasoning_content": "the fo"}
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(ids)


def test_without_a_thought_there_is_no_field(service):
    whole, chunks, _ = answers(service, lambda: ChatForm(service, "tiny", chat(), "start"), "\n<the fox")
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "\n<the fox", "refusal": None}
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert "reasoning_content" not in json.dumps(chunks)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_responses_have_a_reasoning_item(service, size):
    asked = {"model": "tiny", "input": "hello", "include": ["message.output_text.logprobs"]}
    body = ResponsesBody.model_validate(asked)
    written = "<think>\nthe fox?\n</think>\n\nover"
    whole, events, ids = answers(
        service, lambda: ResponsesForm(service, "tiny", body, body.as_chat(), "start"), written, size)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    thought, message = whole["output"]
    ResponseReasoningItem.model_validate(thought)
    assert thought["summary"] == [{"type": "summary_text", "text": "the fox?"}]
    [part] = message["content"]
    assert part["text"] == "over"
    tokens = [entry["token"] for entry in part["logprobs"]]
    assert "".join(tokens).strip() == "over"
    assert len(tokens) + whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len(ids)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert "".join(e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta") == "the fox?"
    order = ["response.output_item.added", "response.reasoning_summary_part.added",
             "response.reasoning_summary_text.delta", "response.reasoning_summary_text.done",
             "response.reasoning_summary_part.done", "response.output_item.done", "response.output_text.delta"]
    assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
    assert events[-1]["response"]["output"][0]["summary"] == thought["summary"]


def test_a_response_that_is_cut_in_its_thought():
    service = service_with("special")
    body = ResponsesBody.model_validate({"model": "tiny", "input": "hello"})
    whole, _, _ = answers(service, lambda: ResponsesForm(service, "tiny", body, body.as_chat(), "start"), "<think>the",
                          finish="length")
    assert whole["status"] == "incomplete"
    assert [(item["type"], item["status"]) for item in whole["output"]] == [("reasoning", "incomplete")]


def test_thoughts_of_earlier_turns():
    body = chat(messages=[*HELLO, {"role": "assistant", "content": "x", "reasoning_content": "y"},
                          {"role": "user", "content": "z", "reasoning_content": "not the model's"}])
    assert plain_messages(body.messages)[1:] == [
        {"role": "assistant", "content": "x", "reasoning_content": "y"}, {"role": "user", "content": "z"}]
    summary = [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    body = ResponsesBody.model_validate({"model": "tiny", "input": [
        *HELLO, {"type": "reasoning", "id": "rs_1", "summary": summary}, {"role": "assistant", "content": "x"}, call,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "c"}]}, call,
        {"type": "reasoning", "summary": [], "encrypted_content": "?"}, call,
        {"type": "reasoning", "summary": summary}, {"role": "user", "content": "z"},
    ]})
    messages = plain_messages(body.as_chat().messages)
    assert [(m["role"], m["content"], m.get("reasoning_content"), len(m.get("tool_calls", ()))) for m in messages] == [
        ("user", "hello", None, 0), ("assistant", "x", "ab", 1), ("assistant", "", "c", 2), ("user", "z", None, 0)]
