"""Post-training: what a model that can talk already is taught, through the runner of `train/`."""
