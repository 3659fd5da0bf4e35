"""`import lfm_jax` is quick and its public names are there when asked for."""

import subprocess
import sys

import pytest

import lfm_jax as lfm


def test_every_public_name_is_there_and_no_other():
    assert all(callable(getattr(lfm, name)) for name in lfm.__all__)
    assert set(lfm.__all__) <= set(dir(lfm))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lfm.lode


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, lfm_jax; assert not {'jax', 'flax', 'orbax', 'grain', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
