import pytest

from lfm_jax.train import console


def test_plain_lines_every_so_often_with_speed_and_time_left(capsys):
    view = console.Console(100, log_every=2)
    with view:
        assert view.step(1, 5.0, 1000, 0.0) is None  # Compilation is in the first step's time.
        assert view.step(2, 5.0, 1000, 2.0) == pytest.approx(500.0)
        view.restart_clock()
        assert view.step(3, 5.0, 1000, 4.0) is None
        assert view.step(4, 5.0, 1000, 6.0) == pytest.approx(500.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["2/100", "4/100"]
    assert "loss 5.0000" in lines[0]
    assert "500 tokens/s" in lines[0]
    assert "3:16 left" in lines[0]
