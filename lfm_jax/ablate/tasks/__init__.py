"""Tasks of a study: text, and synthetic ones that are made on the fly."""
