"""`python -m lfm_jax.cli` is `lfm`."""

from lfm_jax.cli import main

main()
