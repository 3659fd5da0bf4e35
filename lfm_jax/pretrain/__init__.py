"""Pre-training: next-token prediction on text, through the driver of `train/`."""
