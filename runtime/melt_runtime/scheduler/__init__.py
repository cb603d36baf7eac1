"""Many requests over a fixed number of slots."""
