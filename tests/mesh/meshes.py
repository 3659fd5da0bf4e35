"""What the checks over several devices share."""

import math
import re

import jax

from lfm_jax.sharding import make_mesh


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


COLLECTIVE = re.compile(
    r"= (?P<results>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
RESULT = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(compiled):
    """(kind, dtype, shape on one device) of everything that a collective of the compiled program brings."""
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            found += [(match["kind"], dtype, tuple(int(n) for n in shape.split(",") if n))
                      for dtype, shape in RESULT.findall(match["results"])]
    return found
