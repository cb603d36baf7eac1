"""Rivals that take turns in a benchmark: how each is made and run, one file per rival."""
