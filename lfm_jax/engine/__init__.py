"""The batched engine: requests in, tokens out, many at a time."""
