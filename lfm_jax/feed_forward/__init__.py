"""The feed-forwards of a block, one file each."""
