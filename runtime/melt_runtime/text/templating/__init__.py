"""Chat templates: Jinja from a package, rendered as transformers renders it, within bounds of time and memory."""
