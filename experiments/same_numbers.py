"""Shows that a redesign changes no number: runs two commits side by side on this machine and compares, to the bit.

    python experiments/same_numbers.py OLD [NEW]

NEW is the working tree if left out. Compared are the public names, logits and decode states of models of every kind of
layer, the losses and norms of training runs (AdamW, Muon over scanned layers, a built dataset), what a run that OLD
began and NEW resumes comes to, the weights that NEW loads from a run of OLD, sampled text, and the bytes of exports.
Stored hashes would not do: other processors round otherwise. Takes a few minutes; ends with status 1 on a difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
VERBS = ("train", "plan", "data", "generate", "chat", "convert", "bench", "selfcheck", "ablate", "serve", "batch")
PATTERNS: dict[str, dict[str, Any]] = {
    "hybrid": dict(layer_types=("conv", "full_attention", "conv")),
    "every": dict(layer_types=("recurrence", "conv", "sliding_attention", "full_attention"), sliding_window=5),
    "bias": dict(layer_types=("conv", "conv"), conv_taps=4, conv_bias=True, tie_embedding=False, post_norm=True),
}
TINY: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, ffn_size=64, num_heads=4, num_kv_heads=2, head_dim=8, max_position=128,
    dtype="float32",
)
STEPS, HALF = 8, 4
SMALL = [
    "--model.vocab-size", "400", "--model.layer-types", "conv", "conv", "full_attention", "conv", "conv",
    "full_attention", "--model.hidden-size", "32", "--model.ffn-size", "64", "--model.num-heads", "4",
    "--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.max-position", "256", "--model.dtype", "float32",
    "--optimizer.schedule", "constant", "--optimizer.warmup-steps", "2", "--optimizer.peak-lr", "3e-3",
    "--data.seq-len", "64", "--data.batch-size", "4", "--eval-every", "0", "--checkpoint-every", str(HALF),
]
RUNS: dict[str, list[str]] = {
    "adamw": [],
    "muon": ["--optimizer.algorithm", "muon", "--model.scan-layers", "True", "--micro-batches", "2"],
}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--probe"]:
        return probe(Path(argv[1]), argv[2:])
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        old, new = checkout(argv[0], work / "old"), checkout(argv[1], work / "new") if argv[1:] else ROOT
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / "json", work / "text")
        for i in range(8):  # Enough files for some to be held out.
            shutil.copytree(work / "text", work / "text" / f"again{i}", ignore=shutil.ignore_patterns("again*"))
        for name, tree in (("a", old), ("b", new)):
            train_all(tree, work / name, work / "text")
            python(tree, __file__, "--probe", work / f"{name}.npz", *[work / name / run for run in RUNS])
        for run, flags in RUNS.items():  # OLD stops in the middle, NEW goes on.
            begun = work / "b" / f"{run}-begun-before"
            lfm(old, "train", "--run-dir", begun, "--steps", HALF, *SMALL, *flags, "--data.sources", work / "text")
            lfm(new, "train", "--run-dir", begun, "--steps", STEPS, *SMALL, *flags, "--data.sources", work / "text")
        lfm(new, "train", "--run-dir", work / "b" / "old-data", "--steps", STEPS, *without_text(), "--data.mixture",
            work / "a" / "set")
        python(new, __file__, "--probe", work / "crossed.npz", *[work / "a" / run for run in RUNS])
        problems = [*differing_names(old, new), *differing_runs(work), *differing_arrays(work), *differing_files(work)]
    for problem in problems:
        print(f"DIFFERS: {problem}")
    print(f"{len(problems)} differences" if problems else "no differences")
    return 1 if problems else 0


def checkout(commit: str, path: Path) -> Path:
    """The files of a commit."""
    path.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(path)], input=archive, check=True)
    return path


def python(tree: Path, *args: Any) -> str:
    env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree.name}: {' '.join(map(str, args))[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def lfm(tree: Path, *args: Any) -> str:
    print(f"{tree.name}: lfm {' '.join(map(str, args))[:100]}", file=sys.stderr, flush=True)
    return python(tree, "-m", "lfm_jax.cli", *args)


def without_text() -> list[str]:
    """Flags of a run on a built dataset."""
    return [*SMALL, "--eval-batches", "2"]


def train_all(tree: Path, out: Path, text: Path) -> None:
    """Runs, a dataset with a run on it, exports and a sample of one tree."""
    for name, flags in RUNS.items():
        lfm(tree, "train", "--run-dir", out / name, "--steps", STEPS, *SMALL, *flags, "--data.sources", text)
        lfm(tree, "convert", out / name, out / f"{name}-hf")
    lfm(tree, "data", "build", "--sources", text, "--tokenizer", out / "adamw", "--seq-len", 64, "--out", out / "set",
        "--heldout-fraction", "0.2")
    lfm(tree, "train", "--run-dir", out / "built", "--steps", STEPS, *without_text(), "--data.mixture", out / "set")
    text_file = out / "sample.txt"
    text_file.write_text(lfm(tree, "generate", out / "adamw", "def f", "--max-new-tokens", 12, "--temperature", 1.0))


def probe(out: Path, run_dirs: list[str]) -> int:
    """Runs in one tree: logits and states of models, and the weights of runs, into an .npz file."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import lfm_jax

    found: dict[str, Any] = {}
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 97, (2, 24)))
    ids = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4, [0] * 3 + [5] * 21])
    for name, changes in PATTERNS.items():
        model = lfm_jax.LFM(lfm_jax.ModelConfig(**(TINY | changes)), rngs=nnx.Rngs(0))
        found[f"{name}/packed"] = model(tokens, segment_ids_BT=ids)[0][np.asarray(ids) != 0]
        state = model.init_state(2, 32)
        for cut, stop in ((0, 11), (11, 12), (12, 24)):
            logits, state = model(tokens[:, cut:stop], state=state)
            found[f"{name}/{cut}"] = logits
        for i, leaf in enumerate(jax.tree.leaves(state)):
            found[f"{name}/state{i}"] = leaf
    for run_dir in run_dirs:
        model, tokenizer = lfm_jax.load(run_dir)
        assert tokenizer is not None
        for name, x in lfm_jax.to_state_dict(model).items():
            found[f"{Path(run_dir).name}/{name}"] = x
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in found.items()}
    np.savez(out, **arrays)
    out.with_suffix(".json").write_text(json.dumps(sorted(lfm_jax.__all__)))
    return 0


def differing_names(old: Path, new: Path) -> list[str]:
    names = "import json, lfm_jax; print(json.dumps(lfm_jax.__all__))"
    before, after = (set(json.loads(python(tree, "-c", names))) for tree in (old, new))
    gone = [f"public name {name} is gone" for name in sorted(before - after)]
    for verb in VERBS:
        try:
            lfm(new, verb, "--help")
        except SystemExit as error:
            gone.append(f"lfm {verb} --help fails: {error}")
    return gone


def differing_runs(work: Path) -> list[str]:
    """Records of the same steps must be equal but for times."""
    problems = []
    pairs = [(f"a/{run}", f"b/{run}") for run in (*RUNS, "built")]
    pairs += [(f"a/{run}", f"b/{run}-begun-before") for run in RUNS] + [("a/built", "b/old-data")]
    for a, b in pairs:
        before, after = (records(work / run) for run in (a, b))
        if len(before) < STEPS or before.keys() != after.keys():
            problems.append(f"{a} and {b} have other records, or too few")
        problems += [f"{b} step {step}: {name} is {after[step].get(name)}, was {value}"
                     for step in before.keys() & after.keys() for name, value in before[step].items()
                     if (name in ("loss", "grad_norm", "learning_rate") or "heldout" in name or "norm/" in name)
                     and after[step].get(name) != value]
    return problems


def records(run_dir: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if (record["step"] > HALF and record["step"] != STEPS) or "heldout_loss" not in record:
            found.setdefault(record["step"], {}).update(record)
        elif record["step"] == STEPS:
            found.setdefault(STEPS, {}).update(record)
    return found


def differing_arrays(work: Path) -> list[str]:
    before = np.load(work / "a.npz")
    problems = []
    for name in ("b", "crossed"):
        after = np.load(work / f"{name}.npz")
        if set(before.files) != set(after.files):
            problems.append(f"{name}: other arrays: {sorted(set(before.files) ^ set(after.files))[:5]}")
        problems += [f"{name}: {key}" for key in set(before.files) & set(after.files)
                     if before[key].dtype != after[key].dtype or before[key].tobytes() != after[key].tobytes()]
    return problems


def differing_files(work: Path) -> list[str]:
    """Exports, built datasets and a sample must have the same bytes; reports of when or where do not count."""
    problems = []
    for part in (*(f"{run}-hf" for run in RUNS), "set", "sample.txt"):
        before, after = digests(work / "a" / part), digests(work / "b" / part)
        problems += [f"{part}: {name}" for name in sorted(before.keys() | after.keys())
                     if before.get(name) != after.get(name) and name != "manifest.json"]
    return problems


def digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
