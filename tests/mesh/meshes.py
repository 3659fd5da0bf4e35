"""What the checks over several devices share."""

import math
import re

import jax

from lfm_jax.sharding import make_mesh


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


COLLECTIVE = re.compile(
    r"= \(?(?P<dtype>[a-z]+\d+)\[(?P<shape>[\d,]*)\].*? (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)


def collectives(compiled):
    """(kind, dtype, shape of the result on one device) of every collective in the compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            found.append((match["kind"], match["dtype"], tuple(int(n) for n in match["shape"].split(",") if n)))
    return found
