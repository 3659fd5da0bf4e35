"""Pure functions: a reference and fast paths each. `sharded` has the same functions over a mesh; operators call those."""
