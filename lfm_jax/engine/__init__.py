"""The batched engine, which runs many requests at once."""
