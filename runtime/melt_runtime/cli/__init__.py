"""The melt-run command."""
