"""Continuous batching of requests over a fixed number of slots."""
