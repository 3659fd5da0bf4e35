"""The queue of an encoder: what waits is computed together, each request gets its own, and none holds up the others."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_jax.infer import embed
from lfm_jax.infer.embed import NotFiniteError, Row
from lfm_jax.serve.encoder_queue import EncoderQueue
from lfm_jax.serve.errors import RefusalError

BAD = 9
"""A token whose vector is not finite."""


def row(value, length=4):
    return Row(np.full(length, value, np.int32), length, "document")


def queue_of(batches, before=lambda: None):
    """A queue whose vector of a row is its first token; `batches` takes the rows of each batch."""

    def compute(rows):
        before()
        batches.append(rows)
        return [np.full((1, 1), math.nan if one.ids[0] == BAD else one.ids[0], np.float32) for one in rows]

    return EncoderQueue(SimpleNamespace(program=lambda: compute))


def value(x_SO):
    return int(x_SO[0, 0])


lengths = st.sampled_from([3, 16, 17, 40, 500])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(lengths, min_size=1, max_size=12), min_size=1, max_size=6))
def test_requests_share_batches_of_one_length_and_get_their_own_in_order(requests):
    batches, ends = [], {}

    async def ask(queue, number, request):
        rows = [row(100 * number + i + 10, length) for i, length in enumerate(request)]
        assert await queue.compute(rows, value) == [100 * number + i + 10 for i in range(len(rows))]
        ends[number] = len(batches)

    async def run():
        queue = queue_of(batches)
        await asyncio.gather(*[ask(queue, i, request) for i, request in enumerate(requests)])
        return queue

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "BATCH_TOKENS", 64)
        queue = asyncio.run(run())
        assert all(len({one.padded for one in batch}) == 1 for batch in batches)
        assert all(len(batch) <= embed.rows_of_batch(batch[0].padded) for batch in batches)
    texts = [length for request in requests for length in request]
    assert sum(map(len, batches)) == len(texts)
    assert queue.counts == {
        "texts": len(texts), "batches": len(batches), "prompt_tokens": sum(texts),
        "padded_tokens": sum(max(2, 1 << (len(b) - 1).bit_length()) * b[0].padded for b in batches)}
    assert queue.waiting() == 0
    for number, request in enumerate(requests):
        if len(request) == 1:  # Its turn comes once in a round; it may end while the next batch has begun.
            assert ends[number] <= len(requests) + 1


def test_many_texts_do_not_hold_up_a_few():
    batches, ends = [], {}

    async def run():
        many, few = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        queue = queue_of(batches, lambda: loop.call_soon_threadsafe(many.set))

        async def ask(name, rows):
            await queue.compute(rows, value)
            ends[name] = len(batches)
            few.set()

        long = asyncio.create_task(ask("many", [row(1, 512)] * 2048))
        await many.wait()  # Its first batch is being computed.
        began = len(batches)
        await asyncio.gather(*[ask(f"few {i}", [row(2, length)]) for i, length in enumerate([5, 512, 60])])
        assert not long.done()
        await long
        return began

    began = asyncio.run(run())
    room = embed.rows_of_batch(512)
    assert ends["many"] == len(batches) <= 2048 // room + 4
    assert max(end for name, end in ends.items() if name != "many") <= began + 6


def test_what_fails_is_of_one_request_alone():
    batches, fails = [], []

    def before():
        if fails:
            raise RuntimeError(fails.pop())

    async def run():
        queue = queue_of(batches, before)

        async def ask(*values, reduce=value):
            return await queue.compute([row(one) for one in values], reduce)

        bad, good, strange = await asyncio.gather(
            ask(1, BAD, 2), ask(3, 4), ask(5, reduce=lambda x_SO: x_SO[7]), return_exceptions=True)
        assert isinstance(bad, NotFiniteError)
        assert good == [3, 4]
        assert isinstance(strange, IndexError)
        assert len(batches) == 1
        fails.append("the device")
        with pytest.raises(RuntimeError, match="the device"):
            await ask(1)
        assert await ask(1) == [1]

    asyncio.run(run())


def test_who_leaves_is_computed_no_more():
    batches = []

    async def run():
        begun, loop = asyncio.Event(), asyncio.get_running_loop()
        queue = queue_of(batches, lambda: loop.call_soon_threadsafe(begun.set))
        leaver = asyncio.create_task(queue.compute([row(1, 512)] * 100, value))
        await begun.wait()
        stayer = asyncio.create_task(queue.compute([row(2, 512)] * 20, value))
        await asyncio.sleep(0)
        leaver.cancel()
        assert await stayer == [2] * 20
        assert leaver.cancelled()
        assert queue.waiting() == 0

    asyncio.run(run())
    assert sum(one.ids[0] == 2 for batch in batches for one in batch) == 20
    assert sum(one.ids[0] == 1 for batch in batches for one in batch) < 100


def test_a_queue_that_closes_says_so():
    batches = []

    async def run():
        begun, loop = asyncio.Event(), asyncio.get_running_loop()
        queue = queue_of(batches, lambda: loop.call_soon_threadsafe(begun.set))
        waiting = asyncio.create_task(queue.compute([row(1, 512)] * 1000, value))
        await begun.wait()
        await asyncio.to_thread(queue.close)
        for late in (waiting, queue.compute([row(1)], value)):
            with pytest.raises(RefusalError, match="the server is closing"):
                await late

    asyncio.run(run())
    assert sum(map(len, batches)) < 1000
