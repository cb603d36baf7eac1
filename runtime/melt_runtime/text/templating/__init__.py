"""Chat templates: Jinja from a package, rendered as transformers does, with bounded time and memory."""
