"""metrics.jsonl survives kills and resumes; the curves; MFU."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest

from lfm_jax.testing import tiny_config
from lfm_jax.train import metrics


def test_a_resume_drops_later_records_and_a_line_cut_short(tmp_path):
    log = metrics.MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3, 4):
        log.log(step, {"loss": 1.0 / step})
    log.log(2 + 2, {"heldout_loss": 9.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4, 4]

    log = metrics.MetricsLog(tmp_path, resume_step=3)
    log.log(4, {"loss": 0.5})
    log.close()
    records = metrics.read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1] == {"step": 4, "loss": 0.5}


def test_a_resume_behind_the_last_record_drops_only_the_line_cut_short(tmp_path):
    whole = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2')
    metrics.MetricsLog(tmp_path, resume_step=7).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_each_record_is_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path):
    log = metrics.MetricsLog(tmp_path, resume_step=0)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1, "mfu": None})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.1, "mfu": None}
    log.close()


def test_mfu_is_three_forwards_over_the_peak_of_all_devices(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Chip:
        peak_bf16_flops: float

    table = {"big": Chip(1e9), "odd": None}
    monkeypatch.setitem(sys.modules, "lfm_jax.chips", types.SimpleNamespace(chip_of=table.get))
    config = tiny_config()
    expected = 3 * config.flops_per_token(64) * 1000 / 2e9
    assert metrics.mfu(3 * config.flops_per_token(64), 1000, ["big", "big"]) == pytest.approx(expected, rel=1e-12)
    assert metrics.mfu(3 * config.flops_per_token(64), 1000, ["big", "odd"]) is None
    assert metrics.mfu(3 * config.flops_per_token(64), None, ["big"]) is None


def test_the_running_mean_is_that_of_the_values_so_far():
    values = np.asarray([4.0, 2.0, 0.0, 6.0])
    np.testing.assert_allclose(metrics._running_mean(values, 2), [4, 3, 1, 3])


def test_curves_have_a_panel_for_each_quantity(tmp_path):
    from matplotlib import image

    assert metrics.plot_loss(tmp_path) is None
    log = metrics.MetricsLog(tmp_path, resume_step=0)
    for step in range(1, 40):
        speed = None if step == 1 else 1000.0 + step
        loss = math.nan if step == 7 else 5 / step
        log.log(step, {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3 * step, "tokens_per_second": speed})
    log.log(39, {"heldout_loss": 0.5})
    log.close()
    single, panels = metrics.plot_loss(tmp_path), metrics.plot_curves(tmp_path)
    assert (single.name, panels.name) == ("loss.png", "curves.png")
    pixels = image.imread(panels)[:, :, :3]
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    for row in (0, 1):  # Each quarter of the picture has some blue of a curve.
        for column in (0, 1):
            part = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert np.any(part[:, :, 2] - part[:, :, 0] > 0.4)
    # One loss.png has the held-out loss in red.
    assert np.any(image.imread(single)[:, :, 0] - image.imread(single)[:, :, 2] > 0.4)
