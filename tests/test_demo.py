"""`experiments/demo.py` from its first line to its last, on a corpus and a model too small to learn much."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_demo_reports_samples_exports_and_finishes_again_at_once(tmp_path):
    for i in range(12):
        (tmp_path / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 30)
    run_dir = tmp_path.parent / f"{tmp_path.name}-run"
    command = [
        sys.executable, str(ROOT / "experiments" / "demo.py"), "--run-dir", str(run_dir), "--steps", "4",
        "--optimizer.warmup-steps", "0", "--data.sources", str(tmp_path),
        "--data.heldout-fraction", "0.2", "--data.seq-len", "64", "--model.vocab-size", "400",
        "--model.layer-types", "conv", "full_attention",
    ]
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    for result in (first, again):
        assert result.returncode == 0, result.stderr
        for part in ("this model", "xz -9, file by file", "tokens a second", "\"arguments\": [", "loss.png",
                     "largest difference of logits: 0.0", "lfm generate"):
            assert part in result.stdout
        assert result.stdout.count("─ sample") + result.stdout.count("sample ─") == 3
    assert "step 4/4" in first.stderr
    assert "step 4/4" not in again.stderr
    assert (run_dir / "loss.png").exists()
    assert (run_dir / "hf-4" / "model.safetensors").exists()
