"""Measure packages on this machine."""
