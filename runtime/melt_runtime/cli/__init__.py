"""The ``melt-run`` command."""
