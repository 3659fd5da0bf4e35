"""How many attention layers does a trained model need? `experiments/hybridise.py` runs the study."""
