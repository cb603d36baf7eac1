"""``melt-run serve``: serve a package over HTTP to OpenAI clients."""
