"""Measures packages on this machine."""
