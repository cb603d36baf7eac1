"""``melt-run serve``: a package behind an HTTP interface that clients of OpenAI's understand."""
