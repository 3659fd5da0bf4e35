"""Replies that are read by a `ToolCallParser`, in pieces."""

import json

from hypothesis import strategies as st

from lfm_jax.text.tools import CallCut, CallPiece, CallStart, Content, ToolCall, ToolCallParser


def whole(pieces, tools=()):
    """Content and calls of a reply in pieces, and in which order they came: calls among characters."""
    parser = ToolCallParser(tools)
    order, events = [], []
    for piece in pieces:
        events += parser.push(piece)
    for event in [*events, *parser.finish()]:
        assert event != Content("")
        order += event.text if isinstance(event, Content) else [event]
    return order


def grown(pieces, tools=(), cut=False):
    """What `whole` gives, as a parser tells of it that tells of calls as they grow; and the pieces of each call.

    Everything that it promises of the order of events is checked.
    """
    parser, order, told, index, name = ToolCallParser(tools, growing=True), [], [], 0, None
    events = [event for piece in pieces for event in parser.push(piece)]
    for event in [*events, *parser.finish(cut=cut)]:
        match event:
            case CallStart(i, name):
                assert i == index == len(told)
                told.append([])
            case CallPiece(i, text):
                assert (i, len(told), bool(text)) == (index, index + 1, True)
                told[-1].append(text)
            case CallCut(i):
                assert (i, len(told)) == (index, index + 1)
                index += 1
            case ToolCall():
                assert (event.name, len(told)) == (name, index + 1)
                # Equality lets True pass for 1 and 1.0.
                assert repr(json.loads("".join(told[-1]))) == repr(event.arguments)
                index += 1
                order.append(event)
            case Content(text):
                assert len(told) == index
                order += text
    assert len(told) == index
    return order, told


def pieces_of(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
