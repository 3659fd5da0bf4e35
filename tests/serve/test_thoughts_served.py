"""Thoughts in requests and answers: their own field or item, apart from the text, whole and in a stream."""

import asyncio
import json
import re
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseReasoningItem
from tokenizers import AddedToken

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.request import TokenLogprob
from lfm_jax.engine.service import Piece, Service
from lfm_jax.serve.app import make_app
from lfm_jax.serve.batch import call
from lfm_jax.serve.formats import ChatForm, streamed_answer, whole_answer
from lfm_jax.serve.messages import plain_messages
from lfm_jax.serve.protocol import ChatBody
from lfm_jax.serve.responses import ResponsesBody, ResponsesForm
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.codec import ReplyText
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
        reply = ReplyText(service.tokenizer, (), [7], skip_special_tokens=not form().keeps_markers, shown=form().shown)
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
    body = ResponsesBody.model_validate({"model": "tiny", "max_thinking_tokens": 4, "input": [
        *HELLO, {"type": "reasoning", "id": "rs_1", "summary": summary}, {"role": "assistant", "content": "x"}, call,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "c"}]}, call,
        {"type": "reasoning", "summary": [], "encrypted_content": "?"}, call,
        {"type": "reasoning", "summary": summary}, {"role": "user", "content": "z"},
    ]})
    assert body.as_chat().max_thinking_tokens == 4
    messages = plain_messages(body.as_chat().messages)
    assert [(m["role"], m["content"], m.get("reasoning_content"), len(m.get("tool_calls", ()))) for m in messages] == [
        ("user", "hello", None, 0), ("assistant", "x", "ab", 1), ("assistant", "", "c", 2), ("user", "z", None, 0)]


def test_reasoning_items_of_other_servers():
    def thought_of(*items):
        body = ResponsesBody.model_validate({"model": "tiny", "input": [
            *HELLO, *({"type": "reasoning"} | item for item in items), {"role": "assistant", "content": "x"}]})
        return plain_messages(body.as_chat().messages)[-1].get("reasoning_content")

    a, b = ({"summary": [{"type": "summary_text", "text": text}]} for text in "ab")
    assert thought_of(a, {"summary": [], "encrypted_content": "?"}, b) == "a\nb"
    for strange in ("a thought", [{"type": "text", "text": "?"}], ["?"], [{"type": ["?"]}], {"text": "?"}, 1, None):
        for field in ("summary", "content"):
            assert thought_of({field: strange}) is None
        assert thought_of(a | {"content": strange}) == "a"
    with pytest.raises(ValueError, match="text"):
        thought_of({"summary": [{"type": "summary_text"}]})


# -------------------------------------------------------------------- from the engine

TEMPLATE = """\
{%- for message in messages -%}
    {%- set content = message["content"] if loop.last else message["content"].split("</think>")[-1] -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" + ("<think>\\n" if opens else "") + ("<think></think>" if closes else "") -}}
{%- endif -%}
{%- if tools -%}{%- endif -%}
"""


@pytest.fixture(scope="module", params=["text", "special"])
def ask(request):
    """Asks an engine for chats, all from one event loop."""
    tokenizer = service_with(request.param).tokenizer
    model = tiny_model(vocab_size=tokenizer.get_vocab_size() + 5)
    config = EngineConfig(slots=((2, 512),), chunk=64, prefix_cache_bytes=0)
    service = Service(model, tokenizer, TEMPLATE, config)
    app = make_app(service, "tiny")
    service.engine.serve()

    def asked(**fields):
        body = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 200, "seed": 5} | fields
        status, answer = asyncio.run(call(app, "/v1/chat/completions", body))
        assert status == 200, answer
        [choice] = answer["choices"]
        return choice["message"], choice["finish_reason"], answer["usage"], tokenizer

    yield asked
    service.engine.close(drain=False)


def used(usage):
    return usage["completion_tokens_details"]["reasoning_tokens"]


def test_a_constrained_answer_follows_the_thought(ask):
    for opens in (True, False):
        message, finish, usage, tokenizer = ask(
            guided_regex="[ab]{3}", max_thinking_tokens=5, chat_template_kwargs={"opens": opens})
        assert re.fullmatch("[ab]{3}", message["content"])
        assert finish == "stop"
        close = len(tokenizer.encode(CLOSE, add_special_tokens=False).ids)
        assert (5 < used(usage) <= 5 + close + 6) if opens else used(usage) <= 5 + 2 * close + 12
    for none in (dict(chat_template_kwargs={"closes": True}), dict(max_thinking_tokens=0)):
        message, _, usage, _ = ask(guided_regex="[ab]{3}", **none)
        assert re.fullmatch("[ab]{3}", message["content"])
        assert used(usage) == 0


def test_an_answer_that_spells_the_mark_out_is_no_thought_where_there_is_a_token_for_it(ask):
    [t] = tiny_tokenizer().encode("t", add_special_tokens=False).ids
    message, finish, usage, tokenizer = ask(guided_regex="<(think>x|-)y", max_thinking_tokens=0,
                                            logit_bias={str(t): 100})
    assert finish == "stop"
    if tokenizer.token_to_id(OPEN) is None:  # Nothing tells it from a thought.
        assert (message["content"], message["reasoning_content"]) == ("", "xy")
    else:
        assert (message["content"], used(usage)) == ("<think>xy", 0)
        assert "reasoning_content" not in message


def test_a_forced_call_follows_the_thought(ask):
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        message, finish, usage, _ = ask(tools=[{"type": "function", "function": TOOL}], tool_choice=choice,
                                        max_thinking_tokens=4, chat_template_kwargs={"opens": True})
        assert message["tool_calls"][0]["function"]["name"] == "f"
        assert (finish, message["content"]) == ("tool_calls", None)
        assert used(usage) > 4


def test_the_limit_alone(ask):
    for most in (0, 7):
        message, _, usage, tokenizer = ask(max_thinking_tokens=most, max_tokens=60,
                                           chat_template_kwargs={"opens": True})
        close = len(tokenizer.encode(CLOSE, add_special_tokens=False).ids)
        assert most + 1 <= used(usage) <= most + close + 6
        assert ("reasoning_content" in message) <= (most > 0)
    message, _, usage, _ = ask(max_tokens=30, chat_template_kwargs={"closes": True}, max_thinking_tokens=3)
    assert used(usage) == 0


def test_a_thought_that_the_client_began(ask):
    begun = {"role": "assistant", "content": "<think>\nThe fox"}
    message, finish, usage, _ = ask(messages=[*HELLO, begun], continue_final_message=True, guided_choice=["yes", "no"],
                                    max_thinking_tokens=12)
    assert message["content"] in ("yes", "no")
    assert finish == "stop"
    assert used(usage) > 0
    message, _, usage, _ = ask(messages=[*HELLO, begun | {"content": "ye"}], continue_final_message=True,
                               guided_choice=["yes", "no"])
    assert (message["content"], used(usage)) == ("s", 0)



def continued(ask, content, **fields):
    last = {"role": "assistant", "content": content, "prefix": True}
    return ask(messages=[*HELLO, last | fields.pop("last", {})], **fields)


def test_an_answer_after_a_thought_that_the_client_closed(ask):
    for blanks in ("", "\n", "\n\n\n\n\n"):
        message, _, usage, _ = continued(ask, f"\n<think>\nx\n</think>{blanks}", guided_choice=["yes", "no"])
        assert (message["content"] in ("yes", "no"), used(usage)) == (True, 0)
    message, _, _, _ = continued(ask, "<think>\nx\n</think>\n\n\n\n\n\nye", guided_choice=["yes", "no"])
    assert message["content"] == "s"
    for begun in ("", "ye"):
        message, _, usage, _ = continued(ask, begun, last={"reasoning_content": "hm"}, guided_choice=["yes", "yet"])
        assert (begun + message["content"] in ("yes", "yet"), used(usage)) == (True, 0)


def test_the_limit_of_a_thought_that_the_client_began(ask):
    # What the client wrote of the thought counts.
    for begun, most in (("<think>\nx", 0), ("\n<think>\nx", 1), ("<think>\nThe fox over the dog", 2)):
        message, _, usage, tokenizer = continued(ask, begun, guided_choice=["yes", "no"], max_thinking_tokens=most)
        assert message["content"] in ("yes", "no")
        assert "reasoning_content" not in message
        assert used(usage) == len(tokenizer.encode(CLOSE, add_special_tokens=False).ids)


def test_the_limit_alone_leaves_the_answer_free(ask):
    message, finish, usage, tokenizer = continued(ask, CALL.removesuffix("<|tool_call_end|>"), max_thinking_tokens=3,
                                                  max_tokens=4)
    assert used(usage) == 0
    bias = {str(tokenizer.token_to_id("<|tool_call_start|>")): 100}
    for fields in (dict(ignore_eos=True, skip_special_tokens=False), dict(stop_token_ids=[5], min_tokens=40)):
        message, finish, usage, _ = continued(ask, "<think>\nThe fox", max_thinking_tokens=0, logit_bias=bias,
                                              max_tokens=40, **fields)
        assert (finish, usage["completion_tokens"]) == ("length", 40)
        close = len(tokenizer.encode(CLOSE, add_special_tokens=False).ids)
        assert used(usage) == close
        if "ignore_eos" in fields:
            assert message["content"] == "<|tool_call_start|>" * (40 - close)
    # Where eos would come at once.
    eos = {str(tokenizer.token_to_id("<|im_end|>")): 100}
    for ignore_eos, finish in ((True, "length"), (False, "stop")):
        answer = continued(ask, "<think>\nThe fox", max_thinking_tokens=0, logit_bias=eos, max_tokens=20,
                           ignore_eos=ignore_eos)
        assert answer[1] == finish
