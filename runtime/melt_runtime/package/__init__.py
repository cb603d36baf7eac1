"""The package format: reading and checking."""
