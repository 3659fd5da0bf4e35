"""Bodies of requests: what the prompt and the engine get of what a client wrote."""

import itertools
import json

from lfm_jax.serve.protocol import ChatBody
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat

HELLO = [{"role": "user", "content": "hello"}]


def test_tools_stand_in_the_prompt_as_the_client_wrote_them():
    parameters = {"required": ["b"], "properties": {"b": {"default": None, "type": ["null", "string"]}, "a": {}},
                  "type": "object"}
    written = {"parameters": parameters, "description": "Does it.", "strict": False, "name": "f"}
    for keys in itertools.permutations(written):
        function = {key: written[key] for key in keys}
        body = ChatBody.model_validate(
            {"model": "tiny", "messages": HELLO, "tools": [{"function": function, "type": "function"}]}
        )
        shown = json.dumps([{key: function[key] for key in keys if key != "strict"}])
        assert f"List of tools: {shown}<" in render_chat(DEFAULT_TEMPLATE, HELLO, tools=body.schemas, bos_token="")
