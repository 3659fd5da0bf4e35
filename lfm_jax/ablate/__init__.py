"""Ablation studies: one YAML file says what varies; runs, costs and a report follow (`lfm ablate`)."""
