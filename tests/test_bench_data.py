"""`lfm bench data` runs at a small size and prints its table."""

import re

from lfm_jax.bench.data import bench_data


def test_the_table_has_shards_beside_text():
    table = bench_data(T=128, repeats=1, documents=150)
    rows = re.findall(r"^\| (shards|shards, 2 batches read ahead|text, [^|]*) \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert len(rows) == 4
    assert "array_record" in table.splitlines()[-1]
