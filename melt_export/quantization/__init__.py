"""Quantization of weights and caches."""
