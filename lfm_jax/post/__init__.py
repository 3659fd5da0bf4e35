"""Post-training: what is done to a model that is trained already."""
