"""The life of a model, from raw text to a file for a phone: `python experiments/tool_caller/run.py --help`."""
