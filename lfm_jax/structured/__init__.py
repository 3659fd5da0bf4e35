"""Text that follows a grammar: JSON schemas, tool calls, and masks of the tokens they allow."""
