"""Comparison of a package with its checkpoint: how far they are apart, and how far they may be."""
