"""The chip table: complete, plausible, and found by what devices call themselves."""

import pytest

from lfm_jax.chips import CHIPS, chip_of


def test_every_row_has_its_source_and_plausible_figures():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e", "tpu7x", "A100", "H100", "H200", "B200"}
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source.startswith("https://")
        # Units: a peak in FLOP/s, memory in bytes. Hundreds of products a byte is what all of them are built for.
        assert 1e14 < chip.peak_bf16_flops < 3e15
        assert 15e9 < chip.hbm_bytes < 200e9
        assert 100 < chip.peak_bf16_flops / chip.hbm_bandwidth < 700
        assert 5 < chip.hbm_bandwidth / chip.link_bandwidth < 90


def test_agrees_with_what_jax_knows_of_tpus():
    info = pytest.importorskip("jax._src.tpu_info")
    for name, version in (("v5e", "TPU_V5E"), ("v6e", "TPU_V6E"), ("tpu7x", "TPU_7X")):
        theirs = info.get_tpu_info_for_chip(getattr(info.ChipVersion, version), 1)
        assert CHIPS[name].peak_bf16_flops == pytest.approx(theirs.bf16_ops_per_second, rel=0.01)
        assert CHIPS[name].hbm_bandwidth == pytest.approx(theirs.mem_bw_bytes_per_second, rel=0.01)
        assert CHIPS[name].hbm_bytes == pytest.approx(theirs.hbm_capacity_bytes, rel=0.02)


@pytest.mark.parametrize(("kind", "name"), [
    ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"), ("TPU v4", "v4"),
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA B200", "B200"),
])
def test_chip_of_a_device(kind, name):
    class Device:
        device_kind = kind

    assert chip_of(Device()) is CHIPS[name]


def test_a_cpu_is_no_chip():
    assert chip_of("cpu") is None
    assert chip_of("TPU v5 something") is None
