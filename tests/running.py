"""`lfm` in this process."""

import pytest

from lfm_jax.cli import main


def run(*args):
    """The exit status of `lfm ARGS`."""
    with pytest.raises(SystemExit) as status:
        main([str(a) for a in args])
    return status.value.code
