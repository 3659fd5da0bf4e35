"""Pure functions: a reference and fast paths each. `sharded` has them over a mesh too; operators call those."""
