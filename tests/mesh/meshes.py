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
OVER = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}")
RESULT = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(compiled):
    """(kind, dtype, shape on one device) of everything that a collective of the compiled program brings."""
    found = []
    for line in compiled.as_text().splitlines():
        match, over = COLLECTIVE.search(line), OVER.search(line)
        if over:  # What shard_map sums over axes of one device moves nothing, and is dropped on TPU and GPU.
            sizes = dict(item.split("=") for item in over["sizes"].split(","))
            over_one = all(sizes[axis] == "1" for axis in over["axes"].split(",") if axis)
        if match and not (over and over_one):
            found += [(match["kind"], dtype, tuple(int(n) for n in shape.split(",") if n))
                      for dtype, shape in RESULT.findall(match["results"])]
    return found
