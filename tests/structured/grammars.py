"""For tests of grammars: a model that draws among the allowed tokens, a validator, a schema and tools."""

import functools

import jsonschema
import numpy as np

from lfm_jax.structured.grammar import grammar_tokenizer
from lfm_jax.structured.json_schema import Bounds
from lfm_jax.testing import tiny_tokenizer

V = 333  # More ids than the tokenizer has, and no multiple of 32.
EOS = (7, 2)
START, END = "<|tool_call_start|>", "<|tool_call_end|>"
SMALL = Bounds(string=9, items=3, digits=4, decimals=2)
FORMATS = jsonschema.FormatChecker(("ipv4", "ipv6", "uuid", "email"))

TREE = {"type": "object", "required": ["value"], "properties": {
    "value": {"type": "boolean"}, "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tree"}},
}}
WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {
    "type": "object", "required": ["city", "days"],
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F", None, True, "a<|b\"'\\", 1.5, [True, {"k": None}]]},
        "days": {"type": "integer", "exclusiveMinimum": 0, "maximum": 5},
        "flags": {"type": "array", "items": {"type": ["boolean", "null", "number", "string"]}, "minItems": 1},
        "where": {"anyOf": [{"type": "null"}, {"type": "object", "required": ["here"], "properties": {
            "here": {"type": "boolean"}, "at": {"type": "string", "pattern": "^[a-z]{2,}$"}}}]},
        "pick": {"oneOf": [{"const": False}, {"type": "string", "format": "date"}]},
    },
}}
PLANT = {"type": "function", "function": {"name": "trees.plant", "parameters": {
    "type": "object", "required": ["root", "named"],
    "properties": {
        "root": {"$ref": "#/$defs/tree"},
        "anything": {},
        "named": {"type": "object", "minProperties": 1, "additionalProperties": {"type": ["boolean", "null"]}},
        "code": {"type": "string", "minLength": 2, "maxLength": 6},
        "kind": {"allOf": [{"$ref": "#/$defs/kind"}], "default": "oak"},
    },
    "$defs": {"tree": TREE, "kind": {"type": "string", "enum": ["oak", "elm", 3]}},
}}}
PING = {"name": "ping"}
TOOLS = [WEATHER, PLANT, PING]

tokenizer = functools.cache(tiny_tokenizer)


def matcher(grammar):
    return grammar_tokenizer(tokenizer(), V, EOS).matcher(grammar)


def allowed(m):
    mask_W = np.zeros(-(-V // 32), np.uint32)
    m.mask(mask_W)
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))


def pick(ids, rng):
    return int(ids[rng.integers(len(ids))])


def written(m, rng, limit=2000):
    """What a random model writes from where a matcher stands, or None when it needs more than `limit` tokens."""
    m, ids = m.copy(), []
    while len(ids) < limit:
        token = pick(allowed(m), rng)
        m.consume(token)
        assert m.error is None
        if token in EOS:
            return tokenizer().decode(ids, skip_special_tokens=False)
        ids.append(token)
    return None


def samples(grammar, n, seed=0, limit=2000):
    start, rng = matcher(grammar), np.random.default_rng(seed)
    return [written(start, rng, limit) for _ in range(n)]


def accepts(grammar, text):
    """Whether the whole of a text fits; special tokens in it are tokens."""
    m = matcher(grammar)
    try:
        for token in tokenizer().encode(text, add_special_tokens=False).ids:
            assert (token in allowed(m)) == m.copy().handle.consume_token(token)
            m.consume(token)
    except ValueError:
        return False
    return m.accepts_eos


def faults(schema, value):
    validator = jsonschema.validators.validator_for(schema)(schema, format_checker=FORMATS)
    return [e.message for e in validator.iter_errors(value)]
