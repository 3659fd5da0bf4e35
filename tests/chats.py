"""What the tests of chats share: a template with `{% generation %}`, and chats drawn at random, with tools."""

import json

import numpy as np

# LFM2.5's form: all that the assistant writes is in the block, calls as LFM2 writes them.
TURNS = """\
{{- bos_token -}}
{%- if tools -%}{{- "<|im_start|>system\\nList of tools: " + tools | tojson + "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
        {%- if message["tool_calls"] -%}
            {{- "<|tool_call_start|>[" -}}
            {%- for call in message["tool_calls"] -%}
                {{- call["function"]["name"] + "(" -}}
                {%- for key, value in call["function"]["arguments"].items() -%}
                    {{- key + "=" + value | tojson + ("" if loop.last else ", ") -}}
                {%- endfor -%}
                {{- ")" + ("" if loop.last else ", ") -}}
            {%- endfor -%}
            {{- "]<|tool_call_end|>" -}}
        {%- endif -%}
        {{- (message["content"] or "") + "<|im_end|>\\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

WORDS = ["the fox", "a lazy dog", "42", "naïve", "東京", "x\ny", 'say "hi"', "  two", "😀", "end."]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turns(*contents):
    """A chat in which user and assistant take turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def drawn(count, seed=0):
    """Chats of one to four turns, with calls of tools and their answers."""
    rng = np.random.default_rng(seed)
    return [_drawn(rng) for _ in range(count)]


def _drawn(rng):
    def text():
        return " ".join(rng.choice(WORDS, size=rng.integers(1, 6)))

    def call(i):
        arguments = {f"key_{k}": [text(), int(rng.integers(-9, 99)), None, True, [text(), 1.5]][rng.integers(5)]
                     for k in range(rng.integers(3))}
        return {"id": f"call_{i}", "type": "function", "function": {"name": f"tool_{rng.integers(3)}",
                                                                    "arguments": json.dumps(arguments)}}

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    for turn in range(rng.integers(1, 5)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.5:
            calls = [call(f"{turn}_{i}") for i in range(rng.integers(1, 3))]
            messages.append({"role": "assistant", "tool_calls": calls} | [{}, {"content": text()}][rng.integers(2)])
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": text()} for call in calls]
        messages.append({"role": "assistant", "content": text()})
    tools = [{"type": "function", "function": {"name": f"tool_{i}", "description": text()}} for i in range(3)]
    return {"messages": messages} | ({"tools": tools} if rng.random() < 0.7 else {})
