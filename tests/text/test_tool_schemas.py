"""Schemas of Python functions, and tools in every form that is taken or refused."""

import enum
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.text.tool_schemas import function_schema, tool_schemas


class Unit(enum.Enum):
    METRIC = "metric"
    IMPERIAL = "imperial"


class Level(enum.IntEnum):
    LOW = 1


class Place(TypedDict):
    city: Required[str]
    zip: "NotRequired[int]"


class Tree(TypedDict):
    children: list["Tree"]


def weather(
    place: Place, unit: Unit, level: Level, days: "int" = 1, parts: list[str] | None = None, *,
    kind: Literal["now", "later"] = "now", mixed: Literal["a", 1, None] = None, scale: float = 1.0, raw: bool = False,
    table: dict[str, list[float]] = {}, plain: dict = {},  # noqa: B006 (defaults are what is tested)
    other: Any = None, nothing: None = None, rows: Sequence = (),
    noted: Annotated[str, "from the hint"] = "",
) -> str:
    """Weather of a place,
    for some days.

    More about it.

    Args:
      place: where,
        exactly.

      unit (Unit): of what: temperature.
      level, days: two at once.
      raw:
        text below

    Returns:
      kind: not of a parameter.
    """  # fmt: skip
    return ""


def test_schema_of_a_function():
    string = {"type": "string"}
    assert function_schema(weather) == {
        "name": "weather",
        "description": "Weather of a place, for some days.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "object", "properties": {"city": string, "zip": {"type": "integer"}},
                          "required": ["city"], "description": "where, exactly."},
                "unit": {"type": "string", "enum": ["metric", "imperial"], "description": "of what: temperature."},
                "level": {"type": "integer", "enum": [1], "description": "two at once."},
                "days": {"type": "integer", "description": "two at once."},
                "parts": {"anyOf": [{"type": "array", "items": string}, {"type": "null"}]},
                "kind": {"type": "string", "enum": ["now", "later"]},
                "mixed": {"enum": ["a", 1, None]},
                "scale": {"type": "number"},
                "raw": {"type": "boolean", "description": "text below"},
                "table": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
                "other": {},
                "nothing": {"type": "null"},
                "rows": {"type": "array"},
                "plain": {"type": "object"},
                "noted": {"type": "string", "description": "from the hint"},
            },
            "required": ["place", "unit", "level"],
        },
    }  # fmt: skip


def test_schema_of_methods_and_of_functions_that_say_little():
    class Account:
        def close(self) -> None: ...

        def pay(self, amount: float) -> None:
            """Pays.
            Arguments:
                amount: how much
            """

    assert function_schema(Account().close) == {
        "name": "close", "description": "", "parameters": {"type": "object", "properties": {}}
    }
    pay = function_schema(Account().pay)
    assert pay["description"] == "Pays."
    assert pay["parameters"]["properties"] == {"amount": {"type": "number", "description": "how much"}}


def bad(
    a, b: bytes, c: dict[int, str], d: list[set], e: Literal[b"x"], f: Tree, /,
    g: [int], *args: int, h: int, **kwargs: int,
):  # fmt: skip
    """Nothing here but h is fit."""


def test_what_a_schema_cannot_express_is_named():
    with pytest.raises(ValueError, match=r"^bad cannot be a tool") as error:
        function_schema(bad)
    told = str(error.value)
    for name in ("a", "b", "c", "d", "e", "f"):
        assert f"parameter '{name}' is positional-only" in told
    assert "parameter 'args' is variadic positional" in told
    assert "parameter 'kwargs' is variadic keyword" in told
    assert "parameter 'g' has the type [<class 'int'>]" in told
    assert "'h'" not in told


@pytest.mark.parametrize(
    ("hint", "problem"),
    [
        (bytes, "no JSON schema"), (dict[int, str], "no JSON schema"), (list[set], "type <class 'set'>"),
        (Literal[b"x"], "values that are not JSON"), (Tree, "holds itself"), (tuple[int, str], "no JSON schema"),
        (enum.Enum("E", {"A": (1, 2)}), "values that are not JSON"), ("unknown_name", "cannot be read"),
        (int | bytes, "bytes"),
    ],
)  # fmt: skip
def test_hints_without_a_schema(hint, problem):
    def f(x): ...

    f.__annotations__["x"] = hint
    with pytest.raises(ValueError, match=rf"(?s)f .*{problem}") as error:
        function_schema(f)
    assert "parameter 'x'" in str(error.value) or hint == "unknown_name"


def test_missing_hint():
    with pytest.raises(ValueError, match=r"^<lambda> cannot be a tool: parameter 'x' has no type hint$"):
        function_schema(lambda x: x)


def test_tools_in_every_form():
    def f(a: int) -> None:
        """Does it."""

    parameters = {"type": "object", "properties": {"x": True}}
    schema = {"name": "g.h", "description": "d", "parameters": parameters, "strict": True}
    got = tool_schemas([f, schema, {"type": "function", "function": {"name": "i"}}])
    assert got == [function_schema(f), schema, {"name": "i", "parameters": {"type": "object", "properties": {}}}]
    got[1]["parameters"]["properties"]["x"] = False
    assert parameters["properties"]["x"] is True  # A copy.
    assert tool_schemas([]) == []
    nothing = {"type": "object", "properties": {}}
    for given_as in ({}, {"parameters": None}, {"parameters": {}}):
        assert tool_schemas([{"name": "f"} | given_as]) == [{"name": "f", "parameters": nothing}]


@given(st.data())
def test_tools_given_as_data_keep_the_order_of_their_keys_at_every_level(data):
    def shuffled(value):
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in data.draw(st.permutations(list(value)))}
        return value

    pick = {"type": "string", "description": "which", "enum": ["a", "b"]}
    rows = {"type": "array", "items": {"type": "object", "properties": {"u": {}, "v": True}, "required": ["v"]}}
    parameters = {"type": "object", "properties": {"pick": pick, "rows": rows}, "required": ["pick"]}
    tool = shuffled({"name": "f", "description": "d", "parameters": parameters})
    for given_as in (tool, shuffled({"type": "function", "function": tool}) | {"function": tool}):
        assert json.dumps(tool_schemas([given_as])) == json.dumps([tool])
    del tool["parameters"]
    assert list(tool_schemas([tool])[0]) == [*tool, "parameters"]


def test_names_of_tools():
    good = ["f", "get-weather", "mcp.server-1.do_it", "7zip", "_", "-", "straße-1"]
    assert [schema["name"] for schema in tool_schemas([{"name": name} for name in good])] == good
    for name in ("", "g h", "a/b", 'a"b', "f()", "f\n", "<|x|>", "²", None):
        with pytest.raises(ValueError, match="it must be made of letters, digits, _, - and dots"):
            tool_schemas([{"name": name}])


def test_every_problem_of_the_tools_is_told():
    loop: dict = {}
    loop["name"] = loop
    parameters = {"type": "object", "properties": {}}
    tools = [
        {"name": "f"}, {"name": "f"}, {"name": "g h", "parameters": {"type": "string"}}, {},
        {"name": "i", "description": 1}, {"name": "j", "parameters": parameters | {"properties": []}},
        {"name": "k", "parameters": parameters | {"required": "x"}},
        {"name": "l", "parameters": parameters | {"properties": {"x": 1}}}, "m",
        {"name": "n", "parameters": {"x": {1}}}, loop, {"type": "function", "function": 1},
        {"type": "web_search", "function": {"name": "o"}}, lambda x: x, lambda: 0, {"name": "p", "parameters": []},
        {"name": "q", "x": math.nan}, {"name": "r", "parameters": parameters}, {"name": "s", "strict": "yes"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^tools are not valid:\n") as error:
        tool_schemas(tools)
    lines = str(error.value).splitlines()[1:]
    told = [(int(line.split(":")[0].split()[-1]), line) for line in lines]
    assert [i for i, _ in told] == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18]
    for (_, line), words in zip(told, [
        "another tool has the name 'f'", "its name is 'g h'", '"type": "object"', "its name is None", "description",
        "properties", "required", "properties", "not 'm'", "plain data", "plain data", "not 1", "its name is None",
        "no type hint", "<lambda>", '"type": "object"', "plain data", "strict is 'yes'",
    ], strict=True):  # fmt: skip
        assert words in line
