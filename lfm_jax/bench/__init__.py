"""`lfm bench`: timings as medians beside a peer in the same process. Needs jax, flax and optax only for our side."""
