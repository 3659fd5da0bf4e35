"""Between text and tokens: tokenizers, chat templates, tool calls."""
