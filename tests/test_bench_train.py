"""The training benchmark runs, on shapes too small to say anything about speed."""

import json
import subprocess
import sys
import time

import pytest

from lfm_jax.bench import train, train_side
from lfm_jax.bench.train import Failed, Process, Variant

TINY = dict(
    layer_types=("conv",), vocab_size=300, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1,
    head_dim=8, max_position=64,
)


def rows_of(report):
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_the_gpu_suite_runs_in_toy_size_and_a_variant_that_fails_loses_only_its_line():
    report = train.bench_gpu(train.toy_jobs(), measure=0.05)
    packed, cudnn, peer = rows_of(report)
    assert packed[:4] == ["32", "2", "2", "remat ffn, packed"]
    assert float(packed[4].replace(",", "")) > 0
    assert packed[5] == ""  # No peak is known of a CPU.
    assert packed[8].endswith("s")
    assert "impl='cudnn' needs an NVIDIA GPU" in cudnn[4]
    assert float(peer[4].replace(",", "")) > 0
    assert "Best at T = 32, packed: remat ffn, packed, 2 rows, " in report
    assert "x transformers." in report


def test_the_cpu_suite_has_speed_memory_and_compile_time_of_both_sides(monkeypatch):
    # The workers get the shape by name: as a preset that they know, with the fields of a tiny one.
    monkeypatch.setattr(train, "Job", lambda *, model, **job: train_side.Job(model=model | TINY, **job))
    report = train.bench_cpu("lfm2.5-350m", repeats=1, shapes=((2, 16),))
    names = ["tokens/s", "step", "processor time of a step", "peak RSS", "compile"]
    speed, _, _, rss, compiled = rows = rows_of(report)
    assert [row[0] for row in rows] == [f"2 x 16 tokens: {name}" for name in names]
    ours, peer = float(speed[1]), float(speed[2])
    assert float(speed[3].rstrip("x")) == pytest.approx(ours / peer, rel=0.02)
    assert speed[4] == ">= 1.3x"
    assert rss[1].endswith("GB")
    assert 0.05 < float(rss[2].removesuffix(" GB")) < 5
    assert float(compiled[1].removesuffix(" s")) > 0
    assert "GLIBC_TUNABLES=" in report


def test_our_side_needs_neither_orbax_nor_grain():
    """A GPU machine may have jax, flax (with what it depends on), optax and numpy only."""
    absent = ("array_record", "chex", "grain", "jinja2", "matplotlib", "orbax", "safetensors", "tokenizers", "torch",
              "transformers", "tyro")
    model = {"preset": "lfm2.5-350m"} | TINY
    jobs = [train_side.Job(side=side, model=model, rows=2, T=16) for side in ("ours", "peer")]
    code = f"""
import dataclasses, json, sys
sys.modules.update(dict.fromkeys({absent}))
from lfm_jax.bench import train, train_side
for job in sys.argv[1:]:
    train_side.main(iter([job, "2"]), lambda content: print(json.dumps(content)))
"""
    arguments = [json.dumps(job.__dict__) for job in jobs]
    lines = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    begun, steps, peer = map(json.loads, lines.splitlines())
    assert begun["compile_seconds"] > 0
    assert steps["seconds"] > 0
    assert peer["error"].startswith("ModuleNotFoundError: import of torch halted")


class FakeProcess:
    """A side of a known speed."""

    def __init__(self, job, deadline, environment):
        del environment
        if job.rows == 99:
            raise Failed("RESOURCE_EXHAUSTED: out of memory")
        self.job, self.begun = job, {"device": "NVIDIA H200", "compile_seconds": 40.0, "first_seconds": 1.0}
        if job.side == "peer":
            self.begun["compile_seconds"] = None

    def steps(self, count):
        speed = 100_000 if self.job.side == "peer" else 200_000 + self.job.rows
        return {"seconds": count * self.job.tokens / speed, "rss": 2 * 10**9, "device_bytes": 30 * 10**9}

    def close(self):
        pass


def test_the_gpu_table_has_mfu_the_best_of_each_length_and_what_was_left_out(monkeypatch):
    monkeypatch.setattr(train, "Process", FakeProcess)
    model = {"preset": "lfm2.5-350m"}

    def variant(name, side, rows, T, documents=0):
        return Variant(name, train_side.Job(side=side, model=model, rows=rows, T=T, documents=documents))

    jobs = [variant("a", "ours", 8, 4096), variant("b", "ours", 16, 4096), variant("c", "ours", 99, 4096),
            variant("d", "peer", 8, 4096), variant("e", "ours", 1, 32768), variant("f", "ours", 4, 4096, documents=8)]
    report = train.bench_gpu(jobs)
    a, b, c, d, e, f = rows_of(report)
    assert f[2] == "8"
    assert a[4:] == ["200,008", "46.0 %", "163.8 ms", "30.0 GB", "40 s"]
    assert c[4] == "RESOURCE_EXHAUSTED: out of memory"
    assert d[8] == "first step 1 s"
    assert float(e[5].split()[0]) > float(b[5].split()[0])  # Attention to a longer row is more work a token.
    assert "Best at T = 4,096, one document a row: b, 16 rows, 200,016 tokens/s; 2.00x transformers." in report
    assert "Best at T = 4,096, packed: f, 4 rows, 200,004 tokens/s; 2.00x transformers." in report
    assert "Best at T = 32,768, one document a row: e, 1 rows, 200,001 tokens/s; no figure of transformers." in report

    late = train.bench_gpu(jobs, limit=-1)
    assert rows_of(late) == []
    assert "Out of time: the last 6 variants were not run." in late


def test_a_side_that_does_not_answer_in_time_or_dies_says_so(monkeypatch):
    job = train_side.Job(side="ours", model={"preset": "lfm2.5-350m"}, rows=1, T=8)
    monkeypatch.setattr(train, "SIDE", [sys.executable, "-c", "import time; time.sleep(60)"])
    start = time.monotonic()
    with pytest.raises(Failed, match="out of time"):
        Process(job, time.monotonic() + 0.2, {})
    assert time.monotonic() - start < 10
    monkeypatch.setattr(train, "SIDE", [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(Failed, match="ended with status 3"):
        Process(job, time.monotonic() + 60, {})


def test_the_batch_has_documents_of_equal_length():
    job = train_side.Job(side="ours", model={"preset": "lfm2.5-350m"}, rows=2, T=8, documents=2)
    batch = train_side._batch(job)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]] * 2
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
    whole = train_side._batch(train_side.Job(side="ours", model={"preset": "lfm2.5-350m"}, rows=2, T=8))
    assert whole["segment_ids"] is None
    assert whole["positions"].tolist() == [list(range(8))] * 2


def test_every_gpu_variant_is_one_of_the_350m_that_can_be_built():
    jobs = [variant.job for variant in train.gpu_jobs("lfm2.5-350m")]
    assert all(job.config.num_params() == 354_483_968 for job in jobs)
    assert all(job.rows % job.micro_batches == 0 for job in jobs)
    assert {(job.side, job.T) for job in jobs} == {(s, T) for s in ("ours", "peer") for T in (4096, 32_768)}
