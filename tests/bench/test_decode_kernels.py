"""How many kernels a step of decoding is: a count that no change may raise unnoticed."""

import pytest

from lfm_jax.bench.decode_kernels import decode_kernels, kernels_of_loop
from lfm_jax.testing import tiny_model

MOST = {1: 110, 2: 100}
"""By rows; a step of the tiny hybrid of three layers on a CPU has 104 and 93 with jax 0.12."""


@pytest.mark.parametrize("rows", MOST)
def test_a_step_has_no_more_kernels_than_it_had_and_fewer_of_joined_weights(rows):
    """Joined, three products of attention are one, and two of each feed-forward."""
    model = tiny_model()
    apart, joined = (decode_kernels(model, rows=rows, length=64, joined=joined) for joined in (False, True))
    assert apart <= MOST[rows]
    assert joined <= apart - 5


def test_what_runs_in_the_largest_loop_counts():
    text = """HloModule toy

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%p, %p)
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4]{0} get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %called = f32[4]{0} call(%x), to_apply=%inner
  %fused = f32[4]{0} fusion(%called), kind=kLoop, calls=%inner
  %view = f32[4]{0} bitcast(%fused)
  ROOT %out = (s32[], f32[4]{0}) tuple(%next, %view)
}

%small (arg.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %arg.1 = (s32[], f32[4]{0}) parameter(0)
}

%condition (arg.2: (s32[], f32[4])) -> pred[] {
  %arg.2 = (s32[], f32[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = (s32[], f32[4]{0}) parameter(0)
  %first = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%small
  ROOT %loop = (s32[], f32[4]{0}) while(%first), condition=%condition, body=%body
}
"""
    assert kernels_of_loop(text) == 3  # An addition, what is called, and a fusion.
