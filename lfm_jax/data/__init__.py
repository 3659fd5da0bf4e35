"""Text files to packed training batches: sources, documents, rows, built datasets, corpora."""
