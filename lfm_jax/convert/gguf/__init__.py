"""GGUF, the files of llama.cpp, both ways: `models.save_gguf`, `models.export`, `models.load_gguf`."""
