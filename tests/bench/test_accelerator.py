"""The command for an accelerator: what it makes of stages that end well, badly or not at all, and all at toy size."""

import json
import subprocess
import sys
import time

import pytest

from lfm_jax.bench import accelerator, accelerator_stages
from lfm_jax.bench.accelerator_stages import FULL, STAGES, Stage

STAND_IN = """
import json, pathlib, sys, time
here, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with (here / "begun").open("a") as file:
    file.write(name + "\\n")
print("a library greets")
tell = lambda **record: print(json.dumps(record), flush=True)
tell(kind="row", what="speed", value=1234.5, unit="tokens/s", note=sys.argv[4])
if name == "slow" and not (here / "mended").exists():
    time.sleep(60)
if name == "dead":
    sys.exit(3)
if name == "short":
    tell(kind="row", what="MFU", value=0.25, unit="share", note="")
if name == "peer":
    tell(kind="end", status="skipped", error="No module named 'transformers'")
elif name == "broken":
    tell(kind="end", status="failed", error="RuntimeError: a | b")
else:
    tell(kind="end", status="done")
"""
STAGES_OF_TEST = tuple(
    Stage(name, lambda size: iter(()), seconds, {"MFU": (0.5, "share")} if name in ("short", "dead") else {}, "peer")
    for name, seconds in (("short", 30), ("broken", 30), ("dead", 30), ("slow", 1.5), ("peer", 30))
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The directory of processes that stand in for stages."""
    (tmp_path / "stage.py").write_text(STAND_IN)
    monkeypatch.setattr(accelerator, "STAGES", STAGES_OF_TEST)
    monkeypatch.setattr(accelerator, "COMMAND", [sys.executable, str(tmp_path / "stage.py"), str(tmp_path)])
    monkeypatch.setattr(accelerator, "DEVICE", "print('gpu|1 x Fast')")
    return tmp_path


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines]


def test_a_stage_that_fails_loses_its_own_figures_and_one_that_is_finished_is_not_run_again(stand_in):
    out = stand_in / "out"
    began = time.monotonic()
    table = accelerator.bench_accelerator(out, minutes=5)
    assert time.monotonic() - began < 30  # The slow one is not waited for.
    assert table.startswith("1 x Fast; ")
    assert rows_of(table) == [
        ("short", "speed", "1,234 tokens/s", "", "1.00x", "full"),
        ("short", "MFU", "25.0 %", ">= 50.0 %, missed", "", ""),
        ("broken", "speed", "1,234 tokens/s", "", "1.00x", "full"),
        ("broken", "", "failed", "", "", "RuntimeError: a / b"),
        ("dead", "speed", "1,234 tokens/s", "", "1.00x", "full"),
        ("dead", "MFU", "not measured", ">= 50.0 %", "", ""),
        ("dead", "", "failed", "", "", "ended with status 3"),
        ("slow", "speed", "1,234 tokens/s", "", "1.00x", "full"),
        ("slow", "", "out of time", "", "", "stopped after 2 s"),
        ("peer", "speed", "1,234 tokens/s", "", "1.00x", "full"),
        ("peer", "", "skipped", "", "", "No module named 'transformers'"),
    ]
    assert (out / accelerator.TABLE).read_text() == table + "\n"

    with (out / accelerator.RESULTS).open("a") as file:
        file.write('{"kind": "begin", "st')  # A kill.
    (stand_in / "mended").touch()
    (stand_in / "begun").unlink()
    table = accelerator.bench_accelerator(out, minutes=5)
    assert (stand_in / "begun").read_text().split() == ["broken", "dead", "slow", "peer"]
    assert [row[2] for row in rows_of(table) if row[0] == "slow"] == ["1,234 tokens/s"]
    records = [json.loads(line) for line in (out / accelerator.RESULTS).read_text().splitlines()]
    assert [record["status"] for record in records if record.get("stage") == "slow" and record["kind"] == "end"] == [
        "out of time", "done"]


def test_a_table_of_two_calls_names_the_versions_of_both(stand_in, monkeypatch):
    for versions in ("jax 1", "jax 2", "jax 2"):
        monkeypatch.setattr(accelerator, "conditions", lambda *_, versions=versions: versions)
        table = accelerator.bench_accelerator(stand_in / "out", minutes=0)
    head = table.splitlines()[0]
    assert (head.count("jax 1; "), head.count("jax 2; ")) == (1, 1)


def test_no_stage_is_begun_when_the_time_is_over(stand_in):
    table = accelerator.bench_accelerator(stand_in / "out", minutes=accelerator.LEAST / 60)
    assert not (stand_in / "begun").exists()
    assert {row[2] for row in rows_of(table)} == {"not measured"}
    assert ("short", "MFU", "not measured", ">= 50.0 %", "", "") in rows_of(table)


def test_a_machine_without_a_device_is_told_why(stand_in, monkeypatch):
    monkeypatch.setattr(accelerator, "DEVICE", "raise RuntimeError('no driver')")
    with pytest.raises(ValueError, match="JAX finds no device: RuntimeError: no driver"):
        accelerator.bench_accelerator(stand_in / "out")
    monkeypatch.setattr(accelerator, "DEVICE", "import time; time.sleep(60)")
    monkeypatch.setattr(accelerator, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="has not found a device within 0 s"):
        accelerator.bench_accelerator(stand_in / "out")


def test_results_of_another_size_and_unknown_stages_are_refused(stand_in):
    out = stand_in / "out"
    accelerator.bench_accelerator(out, minutes=0)
    with pytest.raises(ValueError, match="holds results of size full, and this is toy; name another directory"):
        accelerator.bench_accelerator(out, size="toy")
    with pytest.raises(ValueError, match="stages names none; choose from short, broken"):
        accelerator.bench_accelerator(out, stages=["none"])


def test_every_stage_at_toy_size_needs_jax_flax_optax_and_numpy_only():
    absent = ("array_record", "chex", "grain", "jinja2", "llguidance", "matplotlib", "orbax", "safetensors",
              "tokenizers", "torch", "transformers", "tyro", "fastapi", "huggingface_hub")
    code = f"""
import json, sys
sys.modules.update(dict.fromkeys({absent}))
from lfm_jax.bench import accelerator_stages
for stage in accelerator_stages.STAGES:
    accelerator_stages.main(stage.name, "toy", lambda content: print(json.dumps([stage.name, content])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    ends = {stage: (record["status"], record.get("error")) for stage, record in found if record["kind"] == "end"}
    peers = {name for name in ends if name.startswith("transformers")}
    assert list(ends) == [stage.name for stage in STAGES]
    assert {ends[name][0] for name in peers} == {"skipped"}
    assert all("torch" in ends[name][1] for name in peers)
    assert {end for name, end in ends.items() if name not in peers} == {("done", None)}
    figures = {(stage, record["what"]): record["value"] for stage, record in found if record["kind"] == "row"}
    assert figures["selfcheck", "kernels within their bound"] == 1
    assert all(figures[stage.name, what] is not None for stage in STAGES for what in stage.aims
               if what not in ("MFU", "bandwidth", "bandwidth, joined weights"))  # No peak is known of a CPU.
    assert figures["batch 1", "kernels of a step, joined weights"] < figures["batch 1", "kernels of a step"]
    assert 0 <= figures["GRPO step", "|log(trainer / engine)|, mean"] < 0.01


def test_the_command_at_toy_size(tmp_path):
    command = [sys.executable, "-m", "lfm_jax.bench.accelerator", "--minutes", "20", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--stages", "selfcheck"], capture_output=True, text=True, check=True)
    assert "Toy size: no figure here means anything." in done.stdout
    assert ("selfcheck", "kernels within their bound", "100.0 %", ">= 100.0 %", "", "2 of 2") in rows_of(done.stdout)
    assert {row[2] for row in rows_of(done.stdout) if row[0] == "speed run"} == {"not measured"}
    wrong = subprocess.run([*command, "--stages", "none"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("lfm_jax.bench.accelerator: stages names none; choose from selfcheck, ")


def test_the_shapes_of_the_full_size_are_those_that_the_aims_are_for():
    sizes = {name: accelerator_stages._config(fields, "float32").num_params() for name, fields in (
        ("model", FULL.model), ("moe", FULL.moe), ("speed_run", FULL.speed_run))}
    assert sizes["model"] == 354_483_968
    assert round(sizes["speed_run"] / 1e6) == 122
    assert round(sizes["moe"] / 1e8) == 83
    rows, T = FULL.speed_run_rows
    assert rows * T * 8 == 2**19  # Tokens of a step of all eight GPUs.
    assert rows % FULL.speed_run_parts == FULL.prompts * FULL.generations % FULL.grpo_parts == 0
